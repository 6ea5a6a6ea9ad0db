"""Gated DeltaNet: S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t, with ||k|| =
1.

Yang et al., arXiv 2412.06464, equation 10: a = exp(-A softplus(w x + dt_bias)) and beta = sigmoid(w' x), both
one a head, A uniform in (0, 16). Official layer: keys of width 3/4 d_model and values of width 3/2 d_model
over all heads (so that a layer has some 6 d_model^2 weights), RMSNorm per head, times SiLU of a full linear
map. ``gdn-neg``: beta is doubled (arXiv 2411.12537), erase and write alike.
"""

from __future__ import annotations

from arena.blocks.matrix import register_memory
from arena.blocks.outer import LayerSpec
from arena.memory import NAMED

OFFICIAL = LayerSpec(key_ratio=0.75, value_ratio=1.5)

for _name in ("gdn", "gdn-neg"):
    register_memory(_name, NAMED[_name], official=OFFICIAL)
