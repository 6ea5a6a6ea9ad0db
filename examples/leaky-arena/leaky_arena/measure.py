"""How large the weights of a trained model are."""

import polars as pl


def weight_norm(model, task, length):
    """Root mean square of every weight matrix. It needs no sequence: ``task`` and ``length`` are unused."""
    rows = [
        {"quantity": name.split(".")[-2], "value": float(weight.pow(2).mean().sqrt()), "weight": name}
        for name, weight in model.named_parameters()
        if weight.dim() == 2
    ]
    return pl.DataFrame(rows)
