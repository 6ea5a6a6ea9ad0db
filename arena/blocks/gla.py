"""Gated linear attention: S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

Yang et al., arXiv 2312.06635, section 4: alpha = sigmoid(W_2 W_1 x + b)^(1/16) with W_1 of rank 16. Official
layer: keys of width d_model / 2 and values of width d_model over all heads, no convolution and nothing else
on q and k, RMSNorm per head, times SiLU of a full linear map.
"""

from __future__ import annotations

from arena.blocks.matrix import register_memory
from arena.blocks.outer import LayerSpec
from arena.memory import NAMED

register_memory(
    "gla",
    NAMED["gla"],
    official=LayerSpec(key_ratio=0.5, conv="none", activation="none"),
    official_gates={"qk_map": "none"},
)
