"""Models: embedding, N x (norm, block, residual, [norm, MLP, residual]), norm, head.

Axes: B batch, T positions, C tokens in one position, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks import Block, block_options, build_block
from arena.blocks.base import State, no_weight_decay
from arena.blocks.outer import RMSNorm
from arena.blocks.registry import model_names, near
from arena.layer import ConvolvedLayer, Layer
from arena.mlp import GatedMLP, MixtureMLP, Routing
from arena.stack import arch_names as arch_names
from arena.stack import parse_arch

RESULT_VERSION = 1
"""Bumped by hand when results of this part change; part of every run's id."""

CONV_ON = ("qkv", "all")
_GELU_FACTOR = 1.3  # hidden width of the official sLSTM's gated MLP over d_model (2405.04517)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model.

    Raises:
        ValueError: a field is out of its range, or the architecture is unknown; the message says what.
    """

    arch: str
    """A block name, ``xlstm[m:n]``, ``a+b``, ``a+b[m:n]``, ``a+b[first]`` or ``a+b[last]``; see
    :func:`arena.stack.parse_arch`."""
    vocab_size: int
    """Input tokens are below this."""
    n_classes: int
    """Width of the head."""
    d_model: int = 64
    """D."""
    n_layers: int = 2
    """Blocks in the stack."""
    n_heads: int = 2
    """Heads of each block."""
    outer: str = "common"
    """``common``: every block gets the same layer and SwiGLU MLP; ``official``: the layer of its paper."""
    conv: str | None = None
    """Short convolution of the blocks; None: what ``outer`` implies."""
    conv_on: str = "qkv"
    """``all``: the convolution named by ``conv`` is also after the block's map out and after gate, up and
    down of its MLP (:class:`arena.layer.ConvolvedLayer`)."""
    mlp_ratio: float = 8 / 3
    """Hidden width of the SwiGLU MLP over d_model; 8/3 gives the 8 D^2 weights of a plain MLP of factor 4."""
    mlp_hidden: int | None = None
    """Hidden width of the MLP after every block that has one, in place of a ratio; of one expert, where
    there are several."""
    experts: int = 1
    """E: above 1, every MLP is a mixture of so many (:class:`arena.mlp.MixtureMLP`)."""
    experts_per_token: int = 1
    """k: the experts that a token goes through."""
    load_balance: float = 0.01
    """Coefficient of the load-balance loss of each mixture, E sum_e f_e P_e (:class:`arena.mlp.Routing`), in
    the training loss; 0.01 as in Switch Transformer and ST-MoE."""
    tokens_per_position: int = 1
    """C: the embeddings, of width D/C, of the C tokens of one position are concatenated."""
    decoder: bool = False
    """Read every answer out of the last position (:class:`PositionDecoder`); for tasks that need it only."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the blocks; in a stack of two blocks each gets those that it knows."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_classes", "d_model", "n_layers", "n_heads", "tokens_per_position"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.d_model % self.tokens_per_position:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of tokens_per_position {self.tokens_per_position}"
            )
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, not {self.mlp_ratio}")
        if self.mlp_hidden is not None and self.mlp_hidden < 1:
            raise ValueError(f"mlp_hidden must be at least 1, not {self.mlp_hidden}")
        if self.conv_on not in CONV_ON:
            raise ValueError(f"unknown conv_on {self.conv_on!r}{near(self.conv_on, CONV_ON)}")
        if self.conv_on == "all" and self.conv in (None, "none"):
            raise ValueError("conv_on = 'all' needs a convolution: name it by conv")
        if self.experts < 1:
            raise ValueError(f"experts must be at least 1, not {self.experts}")
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token must be within 1..experts ({self.experts}), not {self.experts_per_token}"
            )
        if not (self.load_balance >= 0 and math.isfinite(self.load_balance)):
            raise ValueError(f"load_balance must be finite and 0 or more, not {self.load_balance}")
        if self.experts == 1 and self.load_balance != 0.01:
            raise ValueError("load_balance is about a mixture of experts: give experts")
        if self.experts > 1 and self.conv_on == "all":
            raise ValueError(
                "conv_on = 'all' does not go with experts: neighbouring tokens go through different ones"
            )
        names = parse_arch(self.arch, self.n_layers)
        for option in self.options:
            if not any(option in block_options(name) for name in names):
                known = sorted({known for name in names for known in block_options(name)})
                raise ValueError(f"{self.arch!r} has no option {option!r}{near(option, known)}")


class PositionDecoder(nn.Module):
    """logits_t = W2 gelu(W1 (x_T + position_t) + b1) + b2: what the state at the last position T has kept.

    MAD's decoder for compression (arXiv 2403.17844): two layers that do not expand, sinusoidal positions as
    of Vaswani et al. (1706.03762). Not causal: it sees the whole sequence through x_T alone.
    """

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B,T,D], of which the last position counts, to logits [B,T,n_classes]."""
        T, D = x.shape[-2:]
        pairs = torch.arange((D + 1) // 2, device=x.device, dtype=x.dtype)
        angles = torch.arange(T, device=x.device, dtype=x.dtype)[:, None] * 10000.0 ** (-2 * pairs / D)
        positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[:, :D]
        return self.out(F.gelu(self.hidden(x[..., -1:, :] + positions)))


class Model(nn.Module):
    """A stack of layers between an embedding and a head.

    Initial weights: embedding and head N(0, 0.02) (so the first loss is that of a uniform guess), norms 1,
    MLPs as nn.Linear draws them, blocks as each documents. Not decayed (``no_weight_decay``): embedding,
    norms, every bias, and what a block marks.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Draw the weights from torch's global generator; see :func:`build_model`."""
        super().__init__()
        self.config = config
        width = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, width // config.tokens_per_position)
        layers: list[Layer] = []
        options = {**stack_options(config), **config.options}
        for index, name in enumerate(parse_arch(config.arch, config.n_layers)):
            known = block_options(name)
            block = build_block(
                name,
                d_model=width,
                n_heads=config.n_heads,
                outer=config.outer,
                conv=config.conv,
                depth=index / max(config.n_layers - 1, 1),
                **{key: value for key, value in options.items() if key in known},
            )
            kind = "swiglu" if config.outer == "common" else block.mlp
            mlp = None
            if kind != "none":
                ratio = _GELU_FACTOR if kind == "gelu" else config.mlp_ratio
                hidden = config.mlp_hidden or hidden_width(width, ratio)
                mlp = _mlp(config, hidden, gelu=kind == "gelu")
            if config.conv_on == "all":
                layers.append(ConvolvedLayer(block, cast(GatedMLP | None, mlp), cast(str, config.conv)))
            else:
                layers.append(Layer(block, mlp))
        if config.experts > 1 and not any(isinstance(layer.mlp, MixtureMLP) for layer in layers):
            raise ValueError(
                f"{config.arch!r} has no MLP with outer={config.outer!r}: experts are several MLPs"
            )
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if config.decoder:
            self.head: nn.Module = PositionDecoder(width, config.n_classes)
        else:
            self.head = nn.Linear(width, config.n_classes, bias=False)
            nn.init.normal_(cast(Tensor, self.head.weight), std=0.02)
        no_weight_decay(cast(nn.Parameter, self.embedding.weight))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                no_weight_decay(parameter)

    @overload
    def forward(
        self, tokens: Tensor, state: list[State] | None = ..., *, routing: Literal[False] = ...
    ) -> tuple[Tensor, list[State]]: ...

    @overload
    def forward(
        self, tokens: Tensor, state: list[State] | None = ..., *, routing: Literal[True]
    ) -> tuple[Tensor, list[State], Routing]: ...

    def forward(
        self, tokens: Tensor, state: list[State] | None = None, *, routing: bool = False
    ) -> tuple[Tensor, list[State]] | tuple[Tensor, list[State], Routing]:
        """Read tokens [B,T] (or [B,T,C]).

        Args:
            tokens: Below ``vocab_size``.
            state: To continue from, or None.
            routing: Also tell where the tokens went, in a model with experts.

        Returns:
            Logits [B,T,n_classes], and the state to continue the sequence with: one of each layer. With
            ``routing`` also the load and the importance of the experts of each layer that has some, [L,E].
        """
        x = self._embed(tokens)
        states = []
        routes: list[Routing] = []
        for index, layer in enumerate(self.layers):
            x, new, route = layer(x, None if state is None else state[index])
            states.append(new)
            if route is not None:
                routes.append(route)
        logits = self.head(self.norm(x))
        if routing:
            return logits, states, Routing(*(torch.stack(y) for y in zip(*routes, strict=True)))
        return logits, states

    @property
    def mixtures(self) -> list[int]:
        """The layers that have experts, by index."""
        return [
            index for index, layer in enumerate(self.layers) if isinstance(cast(Layer, layer).mlp, MixtureMLP)
        ]

    @property
    def blocks(self) -> list[Block]:
        """The blocks, first layer first."""
        return [cast(Layer, layer).block for layer in self.layers]

    def step(self, tokens_t: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """Read one position, tokens_t [B] (or [B,C]): logits [B,n_classes] and the next state.

        Raises:
            ValueError: the model has a decoder, which answers at the end of a sequence only.
        """
        if self.config.decoder:
            raise ValueError("a model with a decoder answers at the end of a sequence: it has no step form")
        x_t = self._embed(tokens_t)
        states = []
        for layer, old in zip(self.layers, state, strict=True):
            x_t, new = cast(Layer, layer).step(x_t, old)
            states.append(new)
        return self.head(self.norm(x_t)), states

    def initial_state(self, batch_size: int) -> list[State]:
        """State before the first position, on the device and of the type of the parameters."""
        return [cast(Layer, layer).initial_state(batch_size) for layer in self.layers]

    def state_bytes(self, length: int) -> int:
        """Bytes that one sequence carries after ``length`` positions, measured; the sum over the layers."""
        return sum(cast(Layer, layer).state_bytes(length) for layer in self.layers)

    def before_step(self, step: int, steps: int) -> None:
        """Called before training step ``step`` of ``steps``, for models that keep a schedule of their own."""

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return x if self.config.tokens_per_position == 1 else x.flatten(-2)


def stack_options(config: ModelConfig) -> dict[str, int]:
    """``n_blocks`` = ``n_layers``, for official layers whose initial values depend on the depth of the stack.

    These have an option of that name and of default None. One in ``config.options`` goes before this.
    """
    names = parse_arch(config.arch, config.n_layers)
    wanted = any(block_options(name).get("n_blocks", 0) is None for name in names)
    return {"n_blocks": config.n_layers} if wanted and config.outer == "official" else {}


def build_model(config: ModelConfig, *, seed: int) -> Model:
    """Build a model on the CPU; its initial weights are a function of the configuration and the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would also seed the GPU, which is not forked
        if config.arch in model_names():
            from arena.ttt import TTTModel

            return TTTModel(config)
        return Model(config)


def model_params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def active_params(model: nn.Module) -> int:
    """Number of parameters without those of the experts that a token does not go through."""
    idle = (module.idle_params for module in model.modules() if isinstance(module, MixtureMLP))
    return model_params(model) - sum(idle)


def _mlp(config: ModelConfig, hidden: int, *, gelu: bool) -> GatedMLP | MixtureMLP:
    if config.experts == 1:
        return GatedMLP(config.d_model, hidden, gelu=gelu)
    return MixtureMLP(
        config.d_model, hidden, gelu=gelu, n_experts=config.experts, per_token=config.experts_per_token
    )


def hidden_width(width: int, ratio: float) -> int:
    """Hidden width: ``ratio * width`` to the nearest multiple of 8, at least 8."""
    return max(8, round(ratio * width / 8) * 8)
