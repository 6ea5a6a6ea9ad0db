"""Linear attention: S_t = S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.

Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236, equations 16 to 20. Official layer: features
elu(x) + 1 on queries and keys, the read divided by the sum of its weights q^T sum_s k_s, no convolution, no
output norm, no output gate. Under ``common`` the features are the normalised q and k themselves, and there is
no divisor.
"""

from __future__ import annotations

from arena.blocks.matrix import register_memory
from arena.blocks.outer import LayerSpec
from arena.memory import NAMED

register_memory(
    "linear_attention",
    NAMED["linear_attention"],
    official=LayerSpec(conv="none", activation="none", norm="none", output_gate="none"),
    official_gates={"qk_map": "elu1", "normaliser": "sum"},
)
