"""Kimi Delta Attention: S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t.

Kimi Linear, arXiv 2510.26692, equation 1 and section 4: ||k|| = 1, beta = sigmoid(w x) one a head, a = exp(-A
softplus(W_2 W_1 x + dt_bias)) one a key channel, of rank V. Official layer: RMSNorm per head, times the
sigmoid of a linear map of rank V with a bias on the second factor. ``gates={"decay_form": "bounded"}`` is the
bounded gate of its public port. ``kda-neg``: beta is doubled (arXiv 2411.12537), erase and write alike.
"""

from __future__ import annotations

from arena.blocks.matrix import register_memory
from arena.blocks.outer import LayerSpec
from arena.memory import NAMED

OFFICIAL = LayerSpec(output_gate="sigmoid", output_gate_rank="head")

for _name in ("kda", "kda-neg"):
    register_memory(_name, NAMED[_name], official=OFFICIAL)
