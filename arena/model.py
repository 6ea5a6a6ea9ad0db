"""Models: embedding, N x (norm, block, residual, [norm, MLP, residual]), norm, head.

Axes: B batch, T positions, C tokens in one position, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.blocks import Block, block_names, block_options, build_block
from arena.blocks.base import State, no_weight_decay
from arena.blocks.outer import RMSNorm
from arena.blocks.registry import name_error, near

RESULT_VERSION = 1
"""Bumped by hand when results of this part change; part of every run's id."""

_STACK = re.compile(r"xlstm\[(\d+):(\d+)\]")
_GELU_FACTOR = 1.3  # hidden width of the official sLSTM's gated MLP over d_model (2405.04517)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model.

    Raises:
        ValueError: a field is out of its range, or the architecture is unknown; the message says what.
    """

    arch: str
    """A block name, ``xlstm[a:b]`` or ``a+b``; see :func:`parse_arch`."""
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
    mlp_ratio: float = 8 / 3
    """Hidden width of the SwiGLU MLP over d_model; 8/3 gives the 8 D^2 weights of a plain MLP of factor 4."""
    mlp_hidden: int | None = None
    """Hidden width of the MLP after every block that has one, in place of a ratio."""
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
        names = parse_arch(self.arch, self.n_layers)
        for option in self.options:
            if not any(option in block_options(name) for name in names):
                known = sorted({known for name in names for known in block_options(name)})
                raise ValueError(f"{self.arch!r} has no option {option!r}{near(option, known)}")


def arch_names() -> list[str]:
    """Architectures by name: every block, and the stack ``xlstm[1:1]``; ``a+b`` combines any two blocks.

    A family of blocks is there once: ``deltaproduct[2]`` for ``deltaproduct[n]``.
    """
    return sorted([*block_names(), "xlstm[1:1]"])


def parse_arch(arch: str, n_layers: int) -> list[str]:
    """Block names of a stack, one a layer.

    - A plain name: that block in every layer.
    - ``xlstm[a:b]``: the ratio of mLSTM to sLSTM blocks. Each period of a + b layers is a mLSTM blocks, then
      b sLSTM blocks, as in the xLSTM authors' small models (their xlstm[1:1] of two blocks has its sLSTM
      second); a last period may be cut. (Their language models put a few sLSTM blocks at hand-picked layers
      instead.) ``xlstm[1:0]`` is all mLSTM, ``xlstm[0:1]`` all sLSTM.
    - ``a+b``: the blocks a and b take turns.

    Raises:
        ValueError: unknown name (the near ones are listed), or a stack shorter than one period.
    """
    stack = _STACK.fullmatch(arch)
    if stack:
        a, b = int(stack[1]), int(stack[2])
        if a + b == 0:
            raise ValueError(f"{arch!r} has no block: give a ratio such as xlstm[1:1]")
        if a == 0 or b == 0:
            a, b = min(a, 1), min(b, 1)
        if n_layers < a + b:
            raise ValueError(_too_few_layers(arch, a + b, n_layers))
        period = ["mlstm"] * a + ["slstm"] * b
    elif arch.startswith("xlstm"):
        raise ValueError(f"{arch!r}: write xlstm[a:b] for a mLSTM to b sLSTM blocks, such as xlstm[1:1]")
    else:
        period = arch.split("+")
        if len(period) > 2:
            raise ValueError(f"{arch!r}: a stack alternates two blocks (a+b), not {len(period)}")
    for name in period:
        what = f"architecture {arch!r}" if name == arch else f"block {name!r} in architecture {arch!r}"
        wrong = name_error(name, what=what, known=arch_names())
        if wrong is not None:
            raise ValueError(wrong)
    if n_layers < len(period):
        raise ValueError(_too_few_layers(arch, len(period), n_layers))
    return [period[layer % len(period)] for layer in range(n_layers)]


def _too_few_layers(arch: str, period: int, n_layers: int) -> str:
    return f"{arch!r} needs at least {period} layers (one period), not {n_layers}"


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), without biases; weights as nn.Linear draws them, U(+-1/sqrt(fan in))."""

    def __init__(self, width: int, hidden: int, *, gelu: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self._gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down((F.gelu(gate) if self._gelu else F.silu(gate)) * up)


class Layer(nn.Module):
    """One block and its MLP, each behind a norm and beside a residual."""

    def __init__(self, block: Block, mlp: GatedMLP | None) -> None:
        super().__init__()
        self.norm = RMSNorm(block.d_model)
        self.block = block
        self.mlp_norm = RMSNorm(block.d_model) if mlp is not None else None
        self.mlp = mlp

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Map x [B,T,D] and a state to the next ones."""
        y, state = self.block(self.norm(x), state)
        return self._feed(x + y), state

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Map one position x_t [B,D]."""
        y_t, state = self.block.step(self.norm(x_t), state)
        return self._feed(x_t + y_t), state

    def _feed(self, x: Tensor) -> Tensor:
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.mlp(self.mlp_norm(x))


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
        layers = []
        for index, name in enumerate(parse_arch(config.arch, config.n_layers)):
            known = block_options(name)
            block = build_block(
                name,
                d_model=width,
                n_heads=config.n_heads,
                outer=config.outer,
                conv=config.conv,
                depth=index / max(config.n_layers - 1, 1),
                **{key: value for key, value in config.options.items() if key in known},
            )
            kind = "swiglu" if config.outer == "common" else block.mlp
            mlp = None
            if kind != "none":
                ratio = _GELU_FACTOR if kind == "gelu" else config.mlp_ratio
                hidden = config.mlp_hidden or _hidden(width, ratio)
                mlp = GatedMLP(width, hidden, gelu=kind == "gelu")
            layers.append(Layer(block, mlp))
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

    def forward(self, tokens: Tensor, state: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Read tokens [B,T] (or [B,T,C]).

        Returns:
            Logits [B,T,n_classes], and the state to continue the sequence with: one of each block.
        """
        x = self._embed(tokens)
        states = []
        for index, layer in enumerate(self.layers):
            x, new = layer(x, None if state is None else state[index])
            states.append(new)
        return self.head(self.norm(x)), states

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
        return [block.initial_state(batch_size) for block in self.blocks]

    def state_bytes(self, length: int) -> int:
        """Bytes that one sequence carries after ``length`` positions, measured; the sum over the blocks."""
        return sum(block.state_bytes(length) for block in self.blocks)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return x if self.config.tokens_per_position == 1 else x.flatten(-2)


def build_model(config: ModelConfig, *, seed: int) -> Model:
    """Build a model on the CPU; its initial weights are a function of the configuration and the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would also seed the GPU, which is not forked
        return Model(config)


def model_params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _hidden(width: int, ratio: float) -> int:
    """Hidden width: ``ratio * width`` to the nearest multiple of 8, at least 8."""
    return max(8, round(ratio * width / 8) * 8)
