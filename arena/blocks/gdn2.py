"""Gated DeltaNet-2: S_t = (I - k_t (b_t * k_t)^T) diag(a_t) S_{t-1} + k_t (w_t * v_t)^T, o_t = S_t^T q_t.

arXiv 2605.22791, equations 8 to 10 and section 3.5: ||k|| = 1, erase b = sigmoid(W_b x) one a key channel,
write w = sigmoid(W_w x) one a value channel, a as in KDA. Official layer: RMSNorm per head, times SiLU of a
linear map of rank V with a bias on the second factor; every linear map Xavier-uniform of gain 2^-2.5.
``output_gate="sigmoid"`` is what flash-linear-attention's port does instead. ``gdn2-neg``: b is doubled, w is
not.
"""

from __future__ import annotations

from arena.blocks.matrix import register_memory
from arena.blocks.outer import LayerSpec
from arena.memory import NAMED

OFFICIAL = LayerSpec(output_gate_rank="head", init="xavier")

for _name in ("gdn2", "gdn2-neg"):
    register_memory(_name, NAMED[_name], official=OFFICIAL)
