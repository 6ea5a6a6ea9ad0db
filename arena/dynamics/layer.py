"""The measurements of one block, carried from chunk to chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import synthetic_tasks
from arena.dynamics import transition as tr
from arena.dynamics.edit import Edits, Event, previous_write_share
from arena.dynamics.gates import Correlation, Distribution
from arena.dynamics.quantities import QUANTITIES
from arena.dynamics.retention import (
    Past,
    by_source,
    contribution_age,
    contributions,
    half_life,
    log_decay,
    memory_length,
    remembered,
)
from arena.dynamics.state import (
    advance,
    by_token,
    effective_rank,
    growth_exponent,
    is_matrix_memory,
    micro_steps,
    transition_fields,
    value_lags,
    write_gate,
    writing_step,
)
from arena.dynamics.table import Rows
from synthetic_tasks import ROLES

GATES = ("decay", "erase", "write", "angle", "step", "input_gate", "forget_gate")
_OF_READS = {"contribution", "memory_length", "contribution_age", "gain_beyond", "previous_write_share"}
_OF_EIGENVALUES = {
    *("eigenvalue_min", "eigenvalue_max_imaginary", "spectral_radius"),
    *("eigenvalue_real", "eigenvalue_imaginary", "permutation_distance"),
}
_OF_WINDOWS = {"window_norm", "window_radius", "window_eigenvalue_min", "window_permutation_distance"}
_PAIRS = {"corr_erase_write": ("erase", "write"), "corr_decay_write": ("decay", "write")}


_Of = tuple[str, int, str, int | None]
"""Quantity, head, role, micro-step."""


class LayerMeasurement:
    """What is carried for one block from chunk to chunk."""

    def __init__(
        self,
        index: int,
        rows: Rows,
        wanted: set[str],
        grid: Tensor,
        read_at: Tensor,
        writes: synthetic_tasks.Writes | None,
        pairs: dict[tuple[int, int], tuple[range, range]] | None,
        roles: Tensor | None,
        horizon: int,
        window: int,
        maps: int,
    ) -> None:
        self.index, self.rows, self.wanted, self.grid = index, rows, wanted, grid
        self.read_at, self.roles, self.pairs = read_at, roles, pairs or {}
        self.horizon, self.window, self.maps = horizon, window, maps
        self.families = {QUANTITIES[name].family for name in wanted}
        self.distributions: dict[_Of, Distribution] = {}
        self.correlations: dict[_Of, Correlation] = {}
        self.log_decay: Tensor | None = None
        self.decays = 0
        self.state: Tensor | None = None
        self.norms: list[tuple[int, Tensor]] = []
        self.edits = Edits(*writes) if writes is not None and "edit" in self.families else None
        self.step = 0  # the micro-step that writes
        self.edited: dict[str, list[tuple[Event, Tensor, int]]] = {}
        self.tail: dict[str, Tensor] = {}
        self.gram: Tensor | float = 0.0
        self.keys = 0
        self.past: list[Past] = []
        self.log_norm: Tensor | None = None

    def take(self, trace: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Take in the trace of tokens start .. stop-1."""
        trace = {name: x.detach().cpu() for name, x in trace.items()}
        here = self.grid[(self.grid >= start) & (self.grid < stop)]
        if "gates" in self.families:
            self._gates(trace, start, stop, here)
        for name in ("normaliser", "cell"):
            if name in trace and len(here):
                value = trace[name][:, here - start].double()
                value = value.norm(dim=-1) if name == "cell" else value.mean(-1)
                self._add("cell_norm" if name == "cell" else name, value, here)
        if "update_token" in trace and "update" in self.families:
            self._updates(trace, start)
        if is_matrix_memory(trace):
            if self.families & {"state", "edit"}:
                self._states(trace, start, stop)
            if "transition" in self.families:
                self._transitions(trace, start, here)
        if "retention" in self.families or "previous_write_share" in self.wanted:
            self._retention(trace, start, stop)

    def finish(self, train_length: int | None, length: int) -> None:
        """Add what is known at the end only."""
        for place, distribution in self.distributions.items():
            for statistic, value in distribution.statistics().items():
                self._summary(place, statistic, value, distribution.count)
        for place, pair in self.correlations.items():
            self._summary(place, "value", pair.value(), pair.count)
        if self.log_decay is not None:
            mean = self.log_decay / self.decays
            self._add_all("half_life", half_life(mean.mean(-1)), self.decays * mean.shape[-1])
            channels = torch.arange(mean.shape[-1])
            self._add_all("half_life_channel", half_life(mean.T), self.decays, index=channels)
        if isinstance(self.gram, Tensor):
            self._add_all("key_rank", effective_rank(tr.singular_values(self.gram)), self.keys)
        for name, edits in self.edited.items():
            if name in self.wanted:
                where = torch.tensor([[event.sequence, event.position, n] for event, _, n in edits])
                values = torch.stack([value for _, value, _ in edits])
                sequence, token, n = where.unbind(1)
                self.rows.add(self.index, name, values, sequence=sequence, token=token, n=n)
        if self.norms and train_length is not None and train_length < length:
            beyond = [(t + 1, norm) for t, norm in self.norms if t >= train_length - 1]
            times = torch.tensor([t for t, _ in beyond])
            norms = torch.stack([norm for _, norm in beyond], -1)  # [B,H,n]
            sequence = torch.arange(norms.shape[0])
            growth = {
                "state_growth": norms[..., -1] / norms[..., 0],
                "state_growth_exponent": growth_exponent(times, norms),
            }
            for name, ratio in growth.items():
                if name in self.wanted:
                    self.rows.add(self.index, name, ratio, sequence=sequence, n=len(beyond))

    def _add(self, name: str, value: Tensor, tokens: Tensor, micro: int | None = None) -> None:
        """Rows of value [B,n,H] at tokens [n]."""
        if name in self.wanted:
            sequence = torch.arange(value.shape[0])[:, None]
            self.rows.add(self.index, name, value, sequence=sequence, token=tokens[None], micro=micro)

    def _add_all(self, name: str, value: Tensor, n: int, index: Tensor | None = None) -> None:
        """Rows of value [...,H] that is taken over all sequences and tokens."""
        if name in self.wanted:
            self.rows.add(self.index, name, value, n=n, index=index, role="all")

    def _summary(self, place: _Of, statistic: str, value: float, n: int) -> None:
        """One row of a summary over tokens of a role."""
        name, head, role, micro = place
        self.rows.add_head(self.index, name, head, value, n=n, role=role, statistic=statistic, micro=micro)

    def _gates(self, trace: Mapping[str, Tensor], start: int, stop: int, here: Tensor) -> None:
        gates = _gate_parts(trace)
        masks: dict[str, Any] = {"all": slice(None)}
        if self.roles is not None:
            piece = self.roles[:, start:stop]
            masks |= {role: piece == code for code, role in enumerate(ROLES) if (piece == code).any()}
        means = {name: {j: x.mean(-1) for j, x in parts.items()} for name, parts in gates.items()}
        for name, micro in sorted((g, j) for g in gates.keys() & self.wanted for j in gates[g]):
            gate = gates[name][micro]
            if len(here):
                self._add(name, means[name][micro][:, here - start], here, micro)
            for role, mask in masks.items():
                for head, values in enumerate(gate[mask].reshape(-1, *gate.shape[2:]).unbind(1)):
                    key = name, head, role, micro
                    self.distributions.setdefault(key, Distribution()).add(values.numpy())
        for name, (x, y) in _PAIRS.items():
            if name not in self.wanted or x not in gates or y not in gates:
                continue
            for micro, second in means[y].items():
                first = means[x].get(micro, means[x].get(None))  # a decay is one a token
                assert first is not None
                for role, mask in masks.items():
                    pair = (mean[mask].reshape(-1, mean.shape[2]) for mean in (first, second))
                    for head, (a, b) in enumerate(zip(*(p.unbind(1) for p in pair), strict=True)):
                        key = name, head, role, micro
                        self.correlations.setdefault(key, Correlation()).add(a.numpy(), b.numpy())

    def _updates(self, trace: Mapping[str, Tensor], start: int) -> None:
        """Rows of every update, at the first token that is read with it; a layer has one set of weights."""
        tokens = start + trace["update_token"].long()
        sequence = torch.arange(len(tokens))[:, None]
        for name in sorted(self.wanted & trace.keys()):
            if QUANTITIES[name].family == "update":
                self.rows.add(self.index, name, trace[name][..., None], sequence=sequence, token=tokens)

    def _states(self, trace: Mapping[str, Tensor], start: int, stop: int) -> None:
        B, _, H, K = trace["k"].shape
        V, n = trace["v"].shape[-1], micro_steps(trace)
        fields, values = transition_fields(trace), by_token(trace["v"].double(), n)
        if self.state is None:
            step = writing_step(trace)
            if step is None:
                self.edits = None  # a token writes under several keys: none is the key of a binding
            self.step = step or 0
            extra = 0 if self.edits is None else self.edits.width
            self.state = torch.zeros(B, H, K, V + extra, dtype=torch.float64)
            if self.edits is not None:
                self.edits.begin(self.state)
        look = {t for t in self.grid.tolist() if start <= t < stop} if "state" in self.families else set()
        edit = set(self.edits.stops(start, stop)) if self.edits is not None else set()
        write, singular, quotients = by_token(write_gate(trace), n), list[Tensor](), list[Tensor]()
        times = []
        before = {t - 1 for t in look if t > start}

        def quotient(t: int, state: Tensor) -> None:
            """Of token t of the trace, from the memory before it."""
            now = {name: x[:, t] for name, x in fields.items()}
            quotients.append(tr.rayleigh_quotient(state[..., :V], **now))

        if start in look:
            quotient(0, self.state)
        for t, state in advance(trace, self.state, [t - start for t in look | edit | before]):
            if start + t in before:
                quotient(t + 1, state)
            if start + t in look:
                times.append(start + t)
                singular.append(tr.singular_values(state[..., :V]))
            if self.edits is not None and start + t in edit:
                k, z = fields["k"][:, t, self.step], write[:, t, self.step] * values[:, t, self.step]
                self.edits.at(start + t, state, k, z, self._edit)
        if times:
            values, tokens = torch.stack(singular, 1), torch.tensor(times)  # [B,n,H,R]
            norms = values.norm(dim=-1)
            self.norms += zip(times, norms.unbind(1), strict=True)
            self._add("state_frobenius", norms, tokens)
            self._add("state_spectral", values[..., 0], tokens)
            self._add("rayleigh_quotient", torch.stack(quotients, 1), tokens)
            self._add("state_effective_rank", effective_rank(values), tokens)

    def _edit(self, name: str, event: Event, value: Tensor, n: int) -> None:
        self.edited.setdefault(name, []).append((event, value, n))

    def _transitions(self, trace: Mapping[str, Tensor], start: int, here: Tensor) -> None:
        n = micro_steps(trace)
        fields = transition_fields(trace)
        own = fields["k"][:, :, [lag == 0 for lag in value_lags(trace)]]
        self.gram = self.gram + torch.einsum("btnhk,btnhl->hkl", own, own)
        self.keys += own.shape[:3].numel()
        joined = {name: torch.cat([self.tail[name], x], 1) if self.tail else x for name, x in fields.items()}
        before = joined["k"].shape[1] - fields["k"].shape[1]
        self.tail = {name: x[:, max(x.shape[1] - self.window + 1, 0) :] for name, x in joined.items()}
        if not len(here):
            return
        now = {name: x[:, here - start] for name, x in fields.items()}
        along = tr.key_eigenvalue(now["k"], now["erase"])
        for j in range(n):
            self._add("key_eigenvalue", along[:, :, j], here, j if n > 1 else None)
        matrix = tr.token_matrix(**now)
        self._add("identity_distance", tr.identity_distance(matrix), here)
        if "reflection_distance" in self.wanted:
            self._add("reflection_distance", tr.reflection_distance(matrix), here)
        if self.wanted & {"transition_norm", "orthogonal_distance"}:
            singular = tr.singular_values(matrix)
            self._add("transition_norm", singular[..., 0], here)
            self._add("orthogonal_distance", tr.orthogonal_distance(singular), here)
        if self.wanted & _OF_EIGENVALUES:
            found = tr.eigenvalues(matrix)
            self._add("eigenvalue_min", found.real[..., 0], here)
            self._add("eigenvalue_max_imaginary", found.imag.amax(-1), here)
            self._add("spectral_radius", found.abs().amax(-1), here)
            self._add("permutation_distance", tr.permutation_distance(found), here)
            for name, part in (("eigenvalue_real", found.real), ("eigenvalue_imaginary", found.imag)):
                if name in self.wanted:
                    sequence, index = torch.arange(part.shape[0])[:, None, None], torch.arange(part.shape[-1])
                    self.rows.add(
                        self.index, name, part.mT, sequence=sequence, token=here[:, None], index=index
                    )
        whole = here[here - start + before >= self.window - 1]
        if len(whole) and self.wanted & _OF_WINDOWS:
            at = (whole - start + before)[None] - torch.arange(self.window - 1, -1, -1)[:, None]
            steps = {  # [B,w,points,n,H,*] to [w n,B,points,H,*]
                name: x[:, at].movedim((1, 3), (0, 1)).flatten(0, 1) for name, x in joined.items()
            }
            product = tr.window_product(**steps)
            self._add("window_norm", tr.singular_values(product)[..., 0], whole)
            found = tr.eigenvalues(product)
            self._add("window_radius", found.abs().amax(-1), whole)
            self._add("window_eigenvalue_min", found.real[..., 0], whole)
            self._add("window_permutation_distance", tr.permutation_distance(found), whole)

    def _retention(self, trace: Mapping[str, Tensor], start: int, stop: int) -> None:
        decays = log_decay(trace)
        if decays is not None:
            total = decays.sum((0, 1))
            self.log_decay = total if self.log_decay is None else self.log_decay + total
            self.decays += decays.shape[0] * decays.shape[1]
        if not self.wanted & _OF_READS:
            return
        sequence, column = ((self.read_at >= start) & (self.read_at < stop)).nonzero(as_tuple=True)
        pairs = torch.stack([sequence, self.read_at[sequence, column]], 1).unique(dim=0)
        sequence, token = pairs.unbind(1)
        if "attention" in trace:
            if len(token):
                self._contributions(sequence, token, *_attended(trace["attention"], sequence, token, stop))
            return
        vectors, self.log_norm = remembered(trace, self.log_norm)
        if not vectors:
            return
        self.past.append(Past(start, vectors))
        if len(token):
            weights, gain = contributions(self.past, sequence, token, self.horizon)
            self._contributions(sequence, token, by_source(weights, value_lags(trace)), gain)
        later = self.read_at[self.read_at >= stop]
        oldest = int(later.min()) - self.horizon if later.numel() else stop
        self.past = [p for p in self.past if p.start + p.trace["start"].shape[1] > oldest]

    def _contributions(self, sequence: Tensor, token: Tensor, weights: Tensor, gain: Tensor) -> None:
        reads = list(zip(sequence.tolist(), token.tolist(), strict=True))
        sizes = weights.abs().sum(-1)  # of a token: of all its micro-steps
        found = {"memory_length": memory_length(sizes), "contribution_age": contribution_age(sizes)}
        for name, value in (found | {"gain_beyond": gain}).items():
            if name in self.wanted:
                self.rows.add(self.index, name, value, sequence=sequence, token=token)
        asked = [row for row, place in enumerate(reads) if place in self.pairs]
        if asked and "previous_write_share" in self.wanted:
            shares = [
                previous_write_share(sizes[row], reads[row][1], self.pairs[reads[row]]) for row in asked
            ]
            self.rows.add(
                self.index,
                "previous_write_share",
                torch.stack(shares),
                sequence=sequence[asked],
                token=token[asked],
            )
        if "contribution" not in self.wanted:
            return
        for row in (sequence < self.maps).nonzero()[:, 0].tolist():
            t = int(token[row])
            lags, J = min(t + 1, weights.shape[2], self.horizon), weights.shape[3]
            self.rows.add(
                self.index,
                "contribution",
                weights[row, :, :lags].movedim(0, -1),
                sequence=int(sequence[row]),
                token=t,
                source=(t - torch.arange(lags))[:, None],
                micro=torch.arange(J) if J > 1 else None,
            )


def _gate_parts(trace: Mapping[str, Tensor]) -> dict[str, dict[int | None, Tensor]]:
    """Gate -> micro-step -> values [B,T,H,C]; of the token (None) where it has one micro-step.

    Decay and angle are of the token, the product or sum over its micro-steps.
    """
    gates = {name: trace[name].double() for name in GATES if name in trace}
    if "write" in gates and is_matrix_memory(trace):
        gates["write"] = write_gate(trace)
    n = micro_steps(trace)
    if n == 1:
        return {name: {None: gate} for name, gate in gates.items()}
    parts = {name: by_token(gate, n) for name, gate in gates.items()}
    of_token = {"decay": torch.prod, "angle": torch.sum}
    return {
        name: {None: of_token[name](part, 2)} if name in of_token else dict(enumerate(part.unbind(2)))
        for name, part in parts.items()
    }


def _attended(weights: Tensor, sequence: Tensor, token: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """Attention weights [B,H,T,S] of reads as [n,H,lag,1], and a gain of 0: the whole past is there."""
    T, S = weights.shape[2:]
    found = torch.zeros(len(token), weights.shape[1], int(token.max()) + 1, dtype=torch.float64)
    for row, (b, t) in enumerate(zip(sequence.tolist(), token.tolist(), strict=True)):
        seen = S - (stop - t) + 1
        found[row, :, :seen] = weights[b, :, T - (stop - t), :seen].flip(-1)
    return found[..., None], torch.zeros(found.shape[:2], dtype=torch.float64)
