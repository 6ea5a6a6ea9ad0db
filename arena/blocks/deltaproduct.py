"""DeltaProduct: n steps of the delta rule a token, each with a key, a value and a beta of its own.

    S_{t,0} = S_{t-1}    S_{t,j} = (I - beta_tj k_tj k_tj^T) S_{t,j-1} + beta_tj k_tj v_tj^T

and S_t = S_{t,n}, o_t = S_t^T q_t, with ||k|| = 1. Siems et al., arXiv 2502.10297, section 3: beta =
sigmoid(w_j x), one a head and step; k_tj and v_tj from linear maps of their own, convolved and with SiLU as
DeltaNet's. A token's transition is a product of n generalised Householder matrices. ``deltaproduct[n]-neg``:
beta is doubled (erase and write alike), so that two of them can rotate; that is the paper's own setting.
``deltaproduct[1]`` is DeltaNet, whose official layer it has.
"""

from __future__ import annotations

from arena.blocks.deltanet import OFFICIAL
from arena.blocks.matrix import register_product

for _name in ("deltanet", "deltanet-neg"):
    register_product(_name.replace("deltanet", "deltaproduct[n]"), _name, official=OFFICIAL)
