"""Every quantity that a measurement emits, with unit, meaning and equation."""

from __future__ import annotations

from typing import NamedTuple


class Quantity(NamedTuple):
    """One entry of the data dictionary."""

    family: str
    unit: str
    rows: str
    """What there is a row for, beside layer and head."""
    meaning: str
    equation: str
    default: bool = True
    """Measured unless other quantities are asked for."""


_GATE_ROWS = "token (mean over channels); role x statistic (over channels, tokens, sequences)"

QUANTITIES: dict[str, Quantity] = {
    "decay": Quantity("gates", "1", _GATE_ROWS, "factor on the old memory, signed", "D_t = diag(decay_t)"),
    "erase": Quantity(
        "gates", "1", _GATE_ROWS, "part of the old value at the key that is taken out", "e_t = erase_t * k_t"
    ),
    "write": Quantity("gates", "1", _GATE_ROWS, "factor on the value that is written", "z_t = write_t * v_t"),
    "angle": Quantity(
        "gates", "rad", _GATE_ROWS, "by how much the memory turns, in pairs of key channels", "R_t in D_t R_t"
    ),
    "step": Quantity(
        "gates",
        "1",
        _GATE_ROWS,
        "step size from which decay and write both come (Mamba-2, Mamba-3)",
        "decay = exp(-A step), write = step; Mamba-3: (1 - lambda) decay step, then lambda step",
    ),
    "input_gate": Quantity(
        "gates",
        "1",
        _GATE_ROWS,
        "pre-activation of the input gate",
        "mLSTM, sLSTM: write = exp(input_gate); LSTM: write = sigmoid(input_gate)",
    ),
    "forget_gate": Quantity(
        "gates", "1", _GATE_ROWS, "pre-activation of the forget gate", "decay = sigmoid(forget_gate)"
    ),
    "corr_erase_write": Quantity(
        "gates",
        "1",
        "role",
        "correlation of erase and write over tokens and sequences",
        "Pearson's r of the gates' means over their channels; null where one does not vary",
    ),
    "corr_decay_write": Quantity(
        "gates",
        "1",
        "role",
        "correlation of decay and write over tokens and sequences",
        "Pearson's r of the gates' means over their channels; null where one does not vary",
    ),
    "state_frobenius": Quantity(
        "state", "1", "token", "size of the memory after the token", "||S_t||_F, mLSTM's stabiliser undone"
    ),
    "state_spectral": Quantity(
        "state",
        "1",
        "token",
        "largest gain of the memory as a map from query to value",
        "largest singular value of S_t",
    ),
    "state_effective_rank": Quantity(
        "state",
        "1",
        "token",
        "over how many directions the memory is spread; 0 where it is zero",
        "exp(-sum_i p_i ln p_i), p_i = s_i / sum_j s_j, s singular values of S_t (Roy and Vetterli 2007)",
    ),
    "rayleigh_quotient": Quantity(
        "state",
        "1",
        "token",
        "factor of the transition on what the memory holds: 1 kept, 0 taken out, -1 all of it flipped",
        "<S_{t-1}, M_t S_{t-1}> / ||S_{t-1}||_F^2",
    ),
    "normaliser": Quantity(
        "state",
        "1",
        "token",
        "what the read is divided by",
        "mLSTM: max(|n_t . q_t|, 1) + 1e-6 exp(m_t); linear attention: n_t . q_t + 1e-6; sLSTM: n_t "
        "relative to its stabiliser exp(m_t), mean over channels",
    ),
    "cell_norm": Quantity(
        "state",
        "1",
        "token",
        "size of the cell of a scalar memory",
        "||c_t||_2; sLSTM's c_t is relative to its stabiliser exp(m_t)",
    ),
    "state_growth": Quantity(
        "state",
        "1",
        "sequence",
        "growth of the memory beyond the training length",
        "||S_T||_F / ||S_L||_F, L training length, T > L length of the sequence",
    ),
    "state_growth_exponent": Quantity(
        "state",
        "1",
        "sequence",
        "how fast it grows there: 0 saturated, 1/2 a random walk, 1 a counter",
        "least-squares slope of ln ||S_t||_F over ln t, L <= t <= T, at the tokens that are measured",
    ),
    "update_norm": Quantity(
        "update",
        "1",
        "token (the first that is read with the update)",
        "size of an update of a layer's weights (TTT-E2E)",
        "||W_{i+1} - W_i||_F over all weights of the updated MLP",
    ),
    "update_drift": Quantity(
        "update",
        "1",
        "token (the first that is read with the update)",
        "how far the updates have led from the learnt start",
        "||W_{i+1} - W_0||_F over all weights of the updated MLP",
    ),
    "inner_loss_before": Quantity(
        "update",
        "nat",
        "token (the first that is read with the update)",
        "the model's next-token loss on a mini-batch, before the update on it; the same for all its layers",
        "mean of -ln p(x_{t+1}) over the mini-batch, weights W_i",
    ),
    "inner_loss_after": Quantity(
        "update",
        "nat",
        "token (the first that is read with the update)",
        "the same after the update of all layers: what one step gained on its own mini-batch",
        "mean of -ln p(x_{t+1}) over the mini-batch, weights W_{i+1}",
    ),
    "key_eigenvalue": Quantity(
        "transition",
        "1",
        "token",
        "factor on the old value along the key, without decay: -1 reflects",
        "1 - sum_i erase_i k_i^2, the eigenvalue of I - k e^T that is not 1",
    ),
    "eigenvalue_min": Quantity(
        "transition",
        "1",
        "token",
        "smallest real part of an eigenvalue of the transition",
        "min_i Re l_i(M_t), M_t = (I - k_t e_t^T) D_t R_t",
    ),
    "eigenvalue_max_imaginary": Quantity(
        "transition",
        "1",
        "token",
        "largest imaginary part of an eigenvalue: what rotates",
        "max_i Im l_i(M_t)",
    ),
    "spectral_radius": Quantity(
        "transition", "1", "token", "largest modulus of an eigenvalue", "max_i |l_i(M_t)|"
    ),
    "transition_norm": Quantity(
        "transition",
        "1",
        "token",
        "largest growth of a column in one step (above 1: no contraction)",
        "largest singular value of M_t",
    ),
    "identity_distance": Quantity(
        "transition", "1", "token", "distance of the transition to doing nothing", "||M_t - I||_F"
    ),
    "reflection_distance": Quantity(
        "transition",
        "1",
        "token",
        "distance to the nearest reflection",
        "min over ||u|| = 1 of ||M_t - (I - 2 u u^T)||_F",
    ),
    "permutation_distance": Quantity(
        "transition",
        "1",
        "token",
        "distance of the spectrum to that of a permutation of up to 5 points, in whatever basis",
        "min over permutations P and matchings of sqrt(sum_i |l_i(M_t) - l_i(P)|^2), l eigenvalues",
    ),
    "orthogonal_distance": Quantity(
        "transition",
        "1",
        "token",
        "distance to the nearest orthogonal map; a permutation in any orthonormal basis is no nearer",
        "sqrt(sum_i (s_i(M_t) - 1)^2)",
    ),
    "key_rank": Quantity(
        "transition",
        "1",
        "head",
        "over how many directions the keys are spread",
        "exp(-sum_i p_i ln p_i), p eigenvalues of sum k k^T over tokens and sequences, over their sum",
    ),
    "window_norm": Quantity(
        "transition",
        "1",
        "token",
        "largest growth over the last w tokens (window)",
        "largest singular value of M_t ... M_{t-w+1}",
    ),
    "window_radius": Quantity(
        "transition",
        "1",
        "token",
        "largest modulus of an eigenvalue over the last w tokens",
        "max_i |l_i(M_t ... M_{t-w+1})|",
    ),
    "window_eigenvalue_min": Quantity(
        "transition",
        "1",
        "token",
        "smallest real part of an eigenvalue over the last w tokens",
        "min_i Re l_i(M_t ... M_{t-w+1})",
    ),
    "window_permutation_distance": Quantity(
        "transition",
        "1",
        "token",
        "the same over the last w tokens: a rotation takes two reflections",
        "as permutation_distance, of M_t ... M_{t-w+1}",
    ),
    "eigenvalue_real": Quantity(
        "transition",
        "1",
        "token x index",
        "real part of each eigenvalue, by rising real part",
        "Re l_i(M_t)",
        default=False,
    ),
    "eigenvalue_imaginary": Quantity(
        "transition",
        "1",
        "token x index",
        "imaginary part of each eigenvalue, in the same order",
        "Im l_i(M_t)",
        default=False,
    ),
    "half_life": Quantity(
        "retention",
        "token",
        "head",
        "tokens after which the decay alone leaves one half",
        "ln 2 / -(mean of ln |decay| over channels, tokens, sequences)",
    ),
    "half_life_channel": Quantity(
        "retention",
        "token",
        "index (key channel)",
        "the same for each channel of the decay",
        "ln 2 / -(mean of ln |decay| over tokens, sequences)",
    ),
    "contribution": Quantity(
        "retention",
        "1",
        "token (of the read) x source (token that is read)",
        "measured weight of the source's value in the read, gates given",
        "w(t,s) = mean over channels c of d read_tc / d v_sc; matrix memory: q_t^T M_t ... M_{s+1} k_s "
        "write_s / normaliser_t; attention: the attention weight",
    ),
    "memory_length": Quantity(
        "retention",
        "token",
        "token (of the read)",
        "effective number of tokens that the read is made of",
        "(sum_s |w(t,s)|)^2 / sum_s w(t,s)^2",
    ),
    "contribution_age": Quantity(
        "retention",
        "token",
        "token (of the read)",
        "mean age of what is read",
        "sum_s |w(t,s)| (t - s) / sum_s |w(t,s)|",
    ),
    "gain_beyond": Quantity(
        "retention",
        "1",
        "token (of the read)",
        "gain with which memory from before the horizon still reaches the read; 0: all was looked at",
        "||M_{t-h+1}^T ... M_t^T q_t|| / ||q_t||, h horizon; cells: product of decays, mean over channels",
    ),
    "old_value_held": Quantity(
        "edit",
        "1",
        "token (last of the write)",
        "weight of the key's old value under its key before the write",
        "k_s^T M_{t'} ... M_{s+1} k_s / ||k_s||^2, s the last write of the key, t' the token before this one",
    ),
    "old_value_left": Quantity(
        "edit",
        "1",
        "token (last of the write)",
        "share of that weight left after the write: 0 replaced, 1 untouched, -1 reflected",
        "k_s^T M_t ... M_{s+1} k_s / k_s^T M_{t'} ... M_{s+1} k_s; null where less than 0.05 was held",
    ),
    "other_value_left": Quantity(
        "edit",
        "1",
        "token (last of the write)",
        "the same share for the other keys that are bound, mean",
        "as old_value_left, over the other keys whose value is held; n is the number of all others",
    ),
    "interference": Quantity(
        "edit",
        "1",
        "token (last of the write)",
        "change of what other keys read over the write (decay included), mean",
        "||(S_t - S_t')^T k_o|| / ||S_t'^T k_o|| over the other bound keys o whose value is held (0.05, as "
        "above); n is the number of all others",
    ),
    "previous_write_share": Quantity(
        "edit",
        "1",
        "token (of the question)",
        "of what a question reads from the last two writes of its key, the share of the earlier one: 0 only "
        "the last, 1/2 both alike",
        "W_1 / (W_1 + W_2), W_i = sum over positions s of write i of |w(t,s)|, 2 the last; w: contribution",
    ),
    "overwrite_error": Quantity(
        "edit",
        "1",
        "token (last of the write)",
        "what the key reads beside the value just written",
        "||S_t^T k_hat - ||k_t|| z_t|| / || ||k_t|| z_t ||, k_hat = k_t / ||k_t||",
    ),
    "key_similarity": Quantity(
        "edit",
        "1",
        "token (last of the write)",
        "largest similarity of the written key to another bound key",
        "max_o |cos(k_t, k_o)|; n is the number of other keys",
    ),
}
"""Name -> entry. M_t, S_t, q, k, z as in ``arena.memory.GateSpec``."""
