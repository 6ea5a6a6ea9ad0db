"""Gated DeltaProduct: DeltaProduct's n steps a token, after one decay of the memory.

    S_{t,0} = a_t S_{t-1}    S_{t,j} = (I - beta_tj k_tj k_tj^T) S_{t,j-1} + beta_tj k_tj v_tj^T

and S_t = S_{t,n}, o_t = S_t^T q_t, with ||k|| = 1. Siems et al., arXiv 2502.10297, section 3: a as in Gated
DeltaNet, one a head and token, the rest as in ``deltaproduct[n]``. ``gdnproduct[n]-neg``: beta is doubled,
erase and write alike (the paper's own setting). ``gdnproduct[1]`` is Gated DeltaNet, whose official layer it
has.
"""

from __future__ import annotations

from arena.blocks.gdn import OFFICIAL
from arena.blocks.matrix import register_product

for _name in ("gdn", "gdn-neg"):
    register_product(_name.replace("gdn", "gdnproduct[n]"), _name, official=OFFICIAL)
