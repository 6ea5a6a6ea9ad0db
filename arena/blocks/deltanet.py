"""DeltaNet: S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t, with ||k|| = 1.

Schlag et al., arXiv 2102.11174; Yang et al., arXiv 2406.06484, section 3.3: beta = sigmoid(w x), one a head.
Official layer: convolution and SiLU on q, k and v, RMSNorm per head, no output gate. ``deltanet-neg``: beta
is doubled, so that eigenvalues reach -1 (Grazzi et al., arXiv 2411.12537); this doubles the write as well.
"""

from __future__ import annotations

from arena.blocks.matrix import register_memory
from arena.blocks.outer import LayerSpec
from arena.memory import NAMED

OFFICIAL = LayerSpec(output_gate="none")

for _name in ("deltanet", "deltanet-neg"):
    register_memory(_name, NAMED[_name], official=OFFICIAL)
