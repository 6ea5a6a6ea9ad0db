"""TTT-E2E: a transformer whose last MLPs keep learning while it reads (arXiv 2512.23675).

Sliding-window attention everywhere. Each of the last blocks (``updated_share`` of them, a quarter) has a
second MLP, between attention and the ordinary one. Its weights W are a sequence's own: they start from
learnt ones, W_0, and after every b tokens take a step of SGD on the model's next-token loss over those
tokens,

    h_t = norm(tail(prefix(x_1..t), W_i))  for the tokens t of mini-batch i      y_t = head(h_t)
    l_i = mean_t -ln softmax(E h_t)[x_{t+1}]
    W_{i+1} = W_i - lr g_i min(1, clip / ||g_i||)        g_i = d l_i / d W_i

The prefix is the blocks without such an MLP, the tail those with one. All else (attention, norms, embedding)
stays fixed in a sequence. Training differentiates the task's loss, each mini-batch under the weights from
before its update, through all inner steps: so W_0 and everything else is learnt. The last token of a
mini-batch has the first of the next one as its target, so the update is made when that one comes in, before
it is read: no token sees an update that was made from later ones.

As published: updated MLP with a norm before and after it and a residual of its own; MLPs narrowed so that the
model has the parameters of one without it; inner rate warmed up, gradient clipped per sequence, W in fp32 and
reset per sequence; each mini-batch rematerialised in the backward pass. Official layer: RMSNorm before and
after attention and MLPs, QK-norm, SwiGLU.

Ours, where the paper's language models have no counterpart: a task has a head of its own, so E is the
transposed embedding (theirs is tied too), learnt through the updates alone unless ``next_token_head`` or
``next_token_weight`` say otherwise; with C tokens in a position, slice c of h predicts token c of the next.
The defaults of b and window are 1/64 and 1/128 of theirs. The common layer is that of ``swa``, with its
output gate and convolution; there only the updated MLP has a norm after it.

Axes: B batch, T positions, C tokens in one position, D model width, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from arena.blocks.base import State, memory_dtype
from arena.blocks.registry import check_options
from arena.blocks.ttt_e2e import TTTOptions
from arena.inner_loop import inner_step, with_loss
from arena.layer import Layer
from arena.memory import state_bytes
from arena.model import Model, ModelConfig, hidden_width
from arena.ttt_layer import Fast, Tail, TTTLayer

_FAST = ("gate_up", "down")
UPDATE_FIELDS = ("update_token", "update_norm", "update_drift", "inner_loss_before", "inner_loss_after")
"""Fields of the trace of an updated layer."""


class _Read(NamedTuple):
    """A mini-batch that has been read, or the beginning of one."""

    h: Tensor
    """[B,c,D], c <= b."""
    states: list[State]
    """Of the tail's attention before it."""
    fast: Fast
    """Weights that it was read with."""
    losses: Tensor | None
    """Its mean next-token loss [B]; None: it is the last, and no update has followed."""


class TTTModel(Model):
    """The model of ``arch="ttt_e2e"``.

    State: that of every layer's attention, in the tail as it was before the present mini-batch, there with
    the weights ``gate_up`` and ``down``; last ``x`` [B,p,D] and ``tokens`` [B,p] or [B,p,C], what the tail
    has read of that mini-batch, p <= b. The next call reads those p positions again. Without updates: the
    attention's.
    """

    inner_scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Draw the weights from torch's global generator; see ``arena.model.build_model``.

        Raises:
            ValueError: an option is out of its range or does not fit the model.
        """
        check_options("ttt_e2e", config.options)
        options = TTTOptions(**config.options)
        if options.next_token_head == "task" and (
            config.decoder or config.n_classes != config.vocab_size or config.tokens_per_position > 1
        ):
            raise ValueError(
                "next_token_head = 'task' needs a task whose classes are its tokens, one in a position, and "
                f"no decoder: n_classes is {config.n_classes}, vocab_size {config.vocab_size}, "
                f"tokens_per_position {config.tokens_per_position}, decoder {config.decoder}"
            )
        if config.experts > 1 or config.conv_on == "all":
            raise ValueError("ttt_e2e has neither experts nor conv_on = 'all'")
        official, n_layers = config.outer == "official", config.n_layers
        n_tail = options.updated_layers(n_layers)
        theta = options.rope_theta if options.rope_theta is not None else (5e5 if official else 1e4)
        # n_layers + n_tail MLPs with as many weights as n_layers would have.
        ratio = config.mlp_ratio * n_layers / (n_layers + n_tail)
        hidden = config.mlp_hidden or hidden_width(config.d_model, ratio)
        attention = {"window": options.window, "rope_theta": theta}
        super().__init__(replace(config, arch="swa", options=attention, mlp_hidden=hidden))
        self.config, self.options, self.n_tail = config, options, n_tail
        self.layers = nn.ModuleList(
            TTTLayer(cast(Layer, layer), post=official, updated=index >= n_layers - n_tail)
            for index, layer in enumerate(self.layers)
        )
        for layer in self._stack:
            if official:
                layer.block.norm_qk()
            if layer.updated:
                layer.block.compose()
        self.register_buffer("inner_scale", torch.ones(()), persistent=False)

    @property
    def updates(self) -> bool:
        """Whether sequences update weights in the present mode, training or evaluation."""
        return self.options.mini_batch > 0 and not (self.options.naive and self.training)

    def before_step(self, step: int, steps: int) -> None:
        """Set the inner rate of a training step: linear from a tenth over the first ``inner_warmup``."""
        warm = self.options.inner_warmup * steps
        self.inner_scale.fill_(1.0 if step >= warm else 0.1 + 0.9 * step / warm)

    def forward(self, tokens: Tensor, state: list[State] | None = None, *, routing: bool = False) -> Any:
        """See :class:`~arena.model.Model`; there are no experts to tell of.

        Raises:
            ValueError: the state is that of a naive model in the other mode.
        """
        state = self._begin(tokens.shape[0]) if state is None else state
        if len(state) != len(self.layers) + self.updates:
            raise ValueError("a state from training mode can't go on in evaluation mode, nor the other way")
        x, states = self._prefix(tokens, state)
        if not self.updates:
            h, after = self._tail(x, state[len(states) :], None)
            return self._answer(h, [], h, tokens), [*states, *after]
        past, x, tokens = self._pending(x, tokens, state)
        reads = list(self._scan(x, tokens, state))
        done = self.options.mini_batch * (len(reads) - 1)
        for index, held in enumerate(reads[-1].states):
            own = dict(zip(_FAST, reads[-1].fast[2 * index : 2 * index + 2], strict=True))
            states.append({**held, **own})
        states.append({"x": x[:, done:], "tokens": tokens[:, done:]})
        h = torch.cat([read.h for read in reads], 1)[:, past:]
        losses = [read.losses for read in reads if read.losses is not None]
        return self._answer(h, losses, reads[-1].h, tokens), states

    def step(self, tokens_t: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """See :class:`~arena.model.Model`; an update is made by the step that reads the token after it.

        Raises:
            ValueError: the model has a decoder, which answers at the end of a sequence only.
        """
        if self.config.decoder:
            raise ValueError("a model with a decoder answers at the end of a sequence: it has no step form")
        logits, state = self(tokens_t[:, None], state)
        return logits[:, 0], state

    def initial_state(self, batch_size: int) -> list[State]:
        """State before the first position, on the device and of the type of the parameters."""
        return [{name: x.detach().clone() for name, x in held.items()} for held in self._begin(batch_size)]

    def state_bytes(self, length: int) -> int:
        """Bytes that one sequence carries, measured: the most at any of its last ``mini_batch`` positions.

        (What is pending of a mini-batch comes and goes; memory is needed for the most of it.) In evaluation
        mode, in which a naive model has updated weights too.
        """
        mode = self.training
        try:
            return self.eval()._carried(length)
        finally:
            self.train(mode)

    def _carried(self, length: int) -> int:
        """:meth:`state_bytes` in the present mode."""
        C = self.config.tokens_per_position
        tokens = torch.zeros((1, length) if C == 1 else (1, length, C), dtype=torch.int64)
        tokens = tokens.to(self.embedding.weight.device)
        b = self.options.mini_batch
        cuts = [length - length % b, length] if b else [length]
        sizes, start = [], 0
        with torch.no_grad():
            state = self.initial_state(1)
            for stop in cuts:
                if stop > start:
                    state = self(tokens[:, start:stop], state)[1]
                sizes.append(sum(map(state_bytes, state)))
                start = stop
        return max(sizes)

    @torch.no_grad()
    def trace(self, tokens: Tensor, state: list[State] | None = None) -> list[dict[str, Tensor]]:
        """What happened inside of every layer, under the names of ``arena.memory.TRACE_FIELDS``.

        Attention as its block traces it; of an updated layer also the updates that these tokens set off.
        """
        state = self._begin(tokens.shape[0]) if state is None else state
        first = len(self.layers) - self.n_tail
        x, traces = self._embed(tokens), []
        for layer, held in zip(self._stack[:first], state[:first], strict=True):
            traces.append(layer.block.trace(layer.norm(x), held))
            x, _ = layer(x, held)
        past, reads = 0, [_Read(x, state[first:], (), None)]
        if self.updates:
            past, x, tokens = self._pending(x, tokens, state)
            reads = list(self._scan(x, tokens, state))
        inputs: list[list[Tensor]] = [[] for _ in range(self.n_tail)]
        pieces = x.split([read.h.shape[1] for read in reads], 1)
        for read, piece in zip(reads, pieces, strict=True):
            for index, layer in enumerate(self._stack[first:]):
                inputs[index].append(layer.norm(piece))
                own = read.fast[2 * index : 2 * index + 2] or None
                piece, _ = layer(piece, read.states[index], own)
        for index, layer in enumerate(self._stack[first:]):
            whole = layer.block.trace(torch.cat(inputs[index], 1), reads[0].states[index])
            trace = {
                name: x[:, :, past:] if name == "attention" else x[:, past:] for name, x in whole.items()
            }
            if self.updates:
                trace |= self._trace_updates(index, reads, pieces, tokens, past)
            traces.append(trace)
        return traces

    def _trace_updates(
        self, index: int, reads: list[_Read], pieces: tuple[Tensor, ...], tokens: Tensor, past: int
    ) -> dict[str, Tensor]:
        """Fields of the updates of a layer of the tail, [B,U]."""
        b, layer = self.options.mini_batch, self._stack[len(self.layers) - self.n_tail + index]
        start = [getattr(layer.fast, name).weight for name in _FAST]
        found: dict[str, list[Tensor]] = {name: [] for name in UPDATE_FIELDS}
        for at, (read, after) in enumerate(pairwise(reads)):
            assert read.losses is not None
            old, new = (r.fast[2 * index : 2 * index + 2] for r in (read, after))
            h, _ = self._tail(pieces[at], read.states, after.fast)
            again = self._losses(h, tokens[:, at * b + 1 : (at + 1) * b + 1], self._vocabulary).mean(1)
            found["update_token"].append(torch.full_like(read.losses, (at + 1) * b - past))
            found["update_norm"].append(_distance(new, old))
            found["update_drift"].append(_distance(new, start))
            found["inner_loss_before"].append(read.losses)
            found["inner_loss_after"].append(again)
        empty = tokens.new_zeros(tokens.shape[0], 0, dtype=self.inner_scale.dtype)
        return {name: torch.stack(values, 1) if values else empty for name, values in found.items()}

    @property
    def _stack(self) -> list[TTTLayer]:
        return [cast(TTTLayer, layer) for layer in self.layers]

    @property
    def _vocabulary(self) -> Tensor:
        """E [V,D/C]."""
        owner = self.head if self.options.next_token_head == "task" else self.embedding
        return cast(Tensor, owner.weight)

    def _tail(self, x: Tensor, states: list[State], fast: Fast | None) -> tuple[Tensor, list[State]]:
        return self._tail_module()(x, states, fast)

    def _tail_module(self) -> Tail:
        return Tail(self._stack[-self.n_tail :], self.norm)

    def _begin(self, batch_size: int) -> list[State]:
        """As :meth:`initial_state`, the learnt weights themselves in it, so that gradients reach them."""
        states = [block.initial_state(batch_size) for block in self.blocks]
        if not self.updates:
            return states
        weight = self.embedding.weight
        for layer, state in zip(self._stack, states, strict=True):
            if layer.updated:
                for name in _FAST:
                    start = getattr(layer.fast, name).weight.to(memory_dtype(weight.dtype))
                    state[name] = start.expand(batch_size, *start.shape)
        C = self.config.tokens_per_position
        shape = (batch_size, 0) if C == 1 else (batch_size, 0, C)
        tokens = torch.zeros(shape, dtype=torch.int64, device=weight.device)
        return [*states, {"x": weight.new_zeros(batch_size, 0, self.config.d_model), "tokens": tokens}]

    def _prefix(self, tokens: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """What goes into the tail, and the new states of the layers before it."""
        x, states = self._embed(tokens), []
        for layer, held in zip(self._stack[: -self.n_tail], state, strict=False):
            x, new = layer(x, held)
            states.append(new)
        return x, states

    def _pending(self, x: Tensor, tokens: Tensor, state: list[State]) -> tuple[int, Tensor, Tensor]:
        """How many positions are read again, and the tail's inputs and tokens with them in front."""
        held = state[-1]
        return held["x"].shape[1], torch.cat([held["x"], x], 1), torch.cat([held["tokens"], tokens], 1)

    def _scan(self, x: Tensor, tokens: Tensor, state: list[State]) -> Iterator[_Read]:
        """Read x [B,P,D], which begins with a mini-batch; after each but the last comes an update."""
        held = state[-1 - self.n_tail : -1]
        fast = tuple(layer[name] for layer in held for name in _FAST)
        states = [{name: y for name, y in layer.items() if name not in _FAST} for layer in held]
        b, clip, P = self.options.mini_batch, self.options.inner_clip, x.shape[1]
        tail, vocabulary = self._tail_module(), self._vocabulary
        weights = {name: w for name, w in tail.named_parameters() if ".fast." not in name}
        lr = self.options.inner_lr * (self.inner_scale if self.training else self.inner_scale.new_ones(()))
        keys = [list(layer) for layer in states]

        def loss(fast: Fast, x: Tensor, targets: Tensor, vocabulary: Tensor, *rest: Tensor) -> Any:
            own, flat = dict(zip(weights, rest, strict=False)), iter(rest[len(weights) :])
            before = [{name: next(flat) for name in names} for names in keys]
            h, after = functional_call(tail, own, (x, before, fast))
            flat_after = [layer[name] for layer, names in zip(after, keys, strict=True) for name in names]
            return self._losses(h, targets, vocabulary).mean(1), (h, *flat_after)

        for start in range(0, P - b, b):
            piece, targets = x[:, start : start + b], tokens[:, start + 1 : start + b + 1]
            flat = [layer[name] for layer, names in zip(states, keys, strict=True) for name in names]
            losses, stepped, (h, *after) = inner_step(
                loss, fast, lr, clip, piece, targets, vocabulary, *weights.values(), *flat
            )
            yield _Read(h, states, fast, losses)
            fast, new = stepped, iter(after)
            states = [{name: next(new) for name in names} for names in keys]
        last = x[:, (P - 1) // b * b :]
        yield _Read(tail(last, states, fast)[0], states, fast, None)

    def _losses(self, h: Tensor, targets: Tensor, vocabulary: Tensor) -> Tensor:
        """-ln p of every target, [B,t] from h [B,t,D]; the mean over the tokens of a position."""
        C = self.config.tokens_per_position
        logits = h.unflatten(-1, (C, -1)) @ vocabulary.mT
        picked = logits.log_softmax(-1).gather(-1, targets.view(*logits.shape[:-1], 1))
        return -picked[..., 0].mean(-1)

    def _answer(self, h: Tensor, losses: list[Tensor], last: Tensor, tokens: Tensor) -> Tensor:
        """The task's logits from h, with the next-token loss in their gradient where it is asked for.

        Args:
            h: [B,T,D].
            losses: Mean loss [B] of each complete mini-batch.
            last: [B,c,D], what is behind them.
            tokens: [B,P], those of the mini-batches and of what is behind.
        """
        logits = self.head(h)
        P = tokens.shape[1]
        if self.training and self.options.next_token_weight > 0.0 and P > 1:
            nll = self._losses(last[:, :-1], tokens[:, P - last.shape[1] + 1 :], self._vocabulary)
            total = torch.stack([nll.sum(1), *(x * self.options.mini_batch for x in losses)]).sum(0)
            logits = with_loss(logits, self.options.next_token_weight * total.mean() / (P - 1))
        return logits


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Frobenius norm over several weights of a difference, [B]."""
    squares = [(a - b).flatten(1).square().sum(1) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(squares).sum(0).sqrt()
