"""Models whose weights are set by hand: the abilities that the toolkit measures, in its own blocks.

They show, without training, that a block can hold an ability and that the operator carries it through tens
of thousands of tokens in float32. Parity needs erase 2 (Grazzi et al., arXiv 2411.12537, theorem 1 says that
nothing in [0, 1] does it), S3 in one layer two Householder factors with eigenvalues down to -1 (Siems et al.,
2502.10297), counting decay 1, and recall of K pairs K orthogonal keys.

Every model is an ordinary one of :func:`arena.model.build_model` in the common layer without convolution,
whose SiLU is a map on queries, keys and values that the weights have to undo (:func:`before_silu`).
"""

from arena.constructions.measure import CONSTRUCTIONS, LENGTH, Construction, Measured, measure
from arena.constructions.models import before_silu, counting_model, parity_model, recall_model, s3_model

__all__ = [
    "CONSTRUCTIONS",
    "LENGTH",
    "Construction",
    "Measured",
    "before_silu",
    "counting_model",
    "measure",
    "parity_model",
    "recall_model",
    "s3_model",
]
