"""The name and the options of TTT-E2E; the architecture, which is a whole model, is in ``arena.ttt``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from arena.blocks.registry import register


@register("ttt_e2e")
@dataclass(frozen=True, kw_only=True)
class TTTOptions:
    """Options of ``ttt_e2e``; see :class:`arena.ttt.TTTModel` for the equations.

    Raises:
        ValueError: an option is out of its range; the message says which.
    """

    whole_model: ClassVar[bool] = True

    mini_batch: int = 16
    """b: tokens between two updates; 0: never (the same model without test-time training). A b of at least
    the length of a sequence gives no update either."""
    window: int = 64
    """Tokens that attention sees, the present one included; at least b."""
    updated_share: float = 0.25
    """Share of the blocks, counted from the last, that have an updated MLP; at least one block has."""
    inner_lr: float = 1.0
    """Learning rate of the updates."""
    inner_warmup: float = 0.1
    """In training the inner rate rises linearly from a tenth of ``inner_lr`` over this share of the steps."""
    inner_clip: float = 1.0
    """Largest norm of a sequence's inner gradient, over all updated weights; infinity: no clipping."""
    naive: bool = False
    """Control: no updates in training mode (``model.train()``), so that nothing is meta-learnt; updates in
    evaluation mode alone."""
    next_token_head: str = "embedding"
    """What makes next-token logits of the last norm's output: ``"embedding"``, the transposed embedding, or
    ``"task"``, the head itself, for tasks whose classes are their tokens. (Where the targets are the next
    tokens too, as in ``in_context_recall`` and ``noisy_recall``, inner and outer loss are one, as in the
    paper.)"""
    next_token_weight: float = 0.0
    """Weight of the next-token loss, every mini-batch under the weights before its update, beside the task's
    loss in what training minimises; reported losses leave it out. 0: none, as for all other architectures."""
    rope_theta: float | None = None
    """Base of the rotary wavelengths; None: 10,000 in common, the paper's 500,000 in official."""

    def __post_init__(self) -> None:
        if self.mini_batch < 0:
            raise ValueError(f"mini_batch must be 0 (no updates) or more, not {self.mini_batch}")
        if self.window < max(self.mini_batch, 1):
            raise ValueError(
                f"window must be at least mini_batch, for what an update has not read yet must be seen: "
                f"window {self.window}, mini_batch {self.mini_batch}"
            )
        if not 0.0 < self.updated_share <= 1.0:
            raise ValueError(f"updated_share must be within 0..1 (0 excluded), not {self.updated_share}")
        if not (self.inner_lr >= 0.0 and math.isfinite(self.inner_lr)):
            raise ValueError(f"inner_lr must be finite and 0 or more, not {self.inner_lr}")
        if not 0.0 <= self.inner_warmup <= 1.0:
            raise ValueError(f"inner_warmup must be within 0..1, not {self.inner_warmup}")
        if not self.inner_clip > 0.0:
            raise ValueError(f"inner_clip must be positive, not {self.inner_clip}")
        if self.next_token_head not in ("embedding", "task"):
            raise ValueError(f"next_token_head must be 'embedding' or 'task', not {self.next_token_head!r}")
        if not (self.next_token_weight >= 0.0 and math.isfinite(self.next_token_weight)):
            raise ValueError(f"next_token_weight must be finite and 0 or more, not {self.next_token_weight}")
        if self.naive and self.mini_batch == 0:
            raise ValueError("naive updates at test: it needs a mini_batch of at least 1")
        if self.naive and self.next_token_head == "embedding" and self.next_token_weight == 0.0:
            raise ValueError(
                "naive needs a next-token loss in training, or its updates would follow an untrained head: "
                "give next_token_weight, or next_token_head = 'task'"
            )

    def updated_layers(self, n_layers: int) -> int:
        """How many of the last blocks have an updated MLP."""
        return max(1, round(self.updated_share * n_layers))
