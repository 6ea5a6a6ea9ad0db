"""Look inside the memories of a model that reads given tokens: no task, no targets, so no accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from arena.dynamics.effects import EFFECT_COLUMNS, EIGENVALUE_COLUMNS, head_eigenvalues
from arena.dynamics.fields import FIELD_COLUMNS
from arena.dynamics.figures import draw_figures
from arena.dynamics.findings import number
from arena.dynamics.measure import measure
from arena.dynamics.probe import PROBE_COLUMNS
from arena.dynamics.record import record
from arena.dynamics.study import ACCURACY_COLUMNS, RUN_COLUMNS, Tables, dictionary_markdown
from arena.model import Model, model_params
from arena.report.document import Document, Section, to_markdown
from arena.report.page import write_html

EIGENVALUE_TOKENS = 512
"""Of each sequence, from its beginning: transitions are taken token by token."""
_FIGURES = ("gates", "eigenvalues", "retention", "state")
_MEASURED = {
    "decay": ("q50", "median decay"),
    "erase": ("q50", "median erase"),
    "write": ("q50", "median write"),
    "half_life": ("value", "half-life by the decay, tokens"),
    "memory_length": ("value", "effective memory length, tokens"),
    "state_frobenius": ("value", "norm of the memory"),
    "state_effective_rank": ("value", "effective rank"),
}
"""Quantity -> statistic and heading in the table of layers."""


def study_tokens(
    model: Model,
    tokens: Tensor,
    out: str | Path,
    *,
    name: str,
    source: str,
    chunk: int = 256,
    on_line: Callable[[str], None] | None = None,
) -> list[Path]:
    """Measure a model on sequences of tokens, read in chunks, and write tables and a page to ``out``.

    Files: measurements.parquet (columns of ``arena.dynamics.COLUMNS``), layers (.parquet, .csv: the table of
    the page), eigenvalues (likewise), loss.csv, dictionary.md, page.html, page.md and the figures.

    Args:
        model: the model.
        tokens: int64 [B,T].
        out: a folder, made where it does not exist.
        name: of the model.
        source: what the tokens are from.
        chunk: tokens that are read at once.
        on_line: told what is being done.

    Returns:
        The files, the page first.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    say = on_line or (lambda line: None)
    length = tokens.shape[1]
    say(f"{name}: loss on {tokens.shape[0]} sequences of {length} tokens")
    loss = next_token_loss(model, tokens, chunk=chunk)
    say(f"{name}: gates, states, transitions and retention")
    measured = measure(model, tokens, chunk=chunk, points=64)
    say(f"{name}: eigenvalues")
    few = tokens[:, :EIGENVALUE_TOKENS]
    eigenvalues = head_eigenvalues(model, few, {"all": torch.ones_like(few, dtype=torch.bool)})
    tables = _tables(model, name, source, length, measured, eigenvalues)
    layers = by_layer(measured, eigenvalues)
    measured.write_parquet(out / "measurements.parquet")
    for title, frame in (("layers", layers), ("eigenvalues", eigenvalues)):
        frame.write_parquet(out / f"{title}.parquet")
        frame.write_csv(out / f"{title}.csv")
    loss.write_csv(out / "loss.csv")
    (out / "dictionary.md").write_text(dictionary_markdown(), encoding="utf-8")
    figures = draw_figures(tables, {(source, "{}"): source}, out)
    document = _document(model, name, source, tokens, loss, layers, figures)
    html, markdown = out / "page.html", out / "page.md"
    write_html(document, html)
    markdown.write_text(to_markdown(document), encoding="utf-8")
    return [html, markdown, *figures.values()]


def next_token_loss(model: Model, tokens: Tensor, *, chunk: int = 256) -> pl.DataFrame:
    """Cross-entropy of the next token, by sequence: sequence, loss (nats a token), n (tokens predicted)."""
    total = torch.zeros(tokens.shape[0], dtype=torch.float64)
    for piece in record(model, tokens, chunk=chunk):
        target = tokens[:, piece.start + 1 : piece.stop + 1].to(piece.output.device)
        logits = piece.output[:, : target.shape[1]].double()
        chosen = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        total -= chosen.sum(1).cpu()
    n = tokens.shape[1] - 1
    mean = (total / n).tolist() if n else [None] * len(total)
    return pl.DataFrame(
        {"sequence": range(len(total)), "loss": mean, "n": [n] * len(total)},
        schema={"sequence": pl.Int64, "loss": pl.Float64, "n": pl.Int64},
    )


def by_layer(measured: pl.DataFrame, eigenvalues: pl.DataFrame) -> pl.DataFrame:
    """A row a layer and head: :data:`_MEASURED`, mean over sequences and tokens, and the least eigenvalue."""
    numbers = (
        measured.filter(
            pl.col("quantity").is_in(list(_MEASURED)),
            pl.col("value").is_not_null() & pl.col("value").is_finite(),
            pl.col("head").is_not_null() & pl.col("index").is_null() & pl.col("source").is_null(),
            pl.col("role").is_null() | (pl.col("role") == "all") | pl.col("token").is_not_null(),
        )
        .filter(
            pl.any_horizontal(
                (pl.col("quantity") == quantity) & (pl.col("statistic") == statistic)
                for quantity, (statistic, _) in _MEASURED.items()
            )
        )
        .group_by("layer", "block", "head", "quantity")
        .agg(pl.col("value").mean())
        .pivot(on="quantity", on_columns=list(_MEASURED), index=["layer", "block", "head"], values="value")
    )
    least = eigenvalues.select(
        pl.col("layer", "head").cast(pl.Int32), pl.col("least_eigenvalue").cast(pl.Float64)
    )
    return numbers.join(least, on=["layer", "head"], how="left").sort("layer", "head")


def _tables(
    model: Model, name: str, source: str, length: int, measured: pl.DataFrame, eigenvalues: pl.DataFrame
) -> Tables:
    """As the figures want it: one run, whose task is the file."""
    about = {
        "run_id": name, "arm": name, "arch": model.config.arch, "task": source, "task_params": "{}",
        "seed": 0, "length": length,
    }  # fmt: skip
    columns = RUN_COLUMNS | ACCURACY_COLUMNS
    row = about | {"train_length_max": length}
    runs = pl.DataFrame(
        {key: [row.get(key)] for key in columns}, schema={key: kind for key, (kind, _) in columns.items()}
    )
    labels = [pl.lit(value, dtype=RUN_COLUMNS[key][0]).alias(key) for key, value in about.items()]

    def empty(own: dict) -> pl.DataFrame:
        return pl.DataFrame(schema={key: kind for key, (kind, _) in (RUN_COLUMNS | own).items()})

    found = eigenvalues.select(*labels, pl.all())
    return Tables(
        runs,
        measured.lazy().select(*labels, pl.all()),
        found.select(empty(EIGENVALUE_COLUMNS).columns),
        empty(EFFECT_COLUMNS),
        empty(PROBE_COLUMNS),
        empty(FIELD_COLUMNS),
    )


def _document(
    model: Model,
    name: str,
    source: str,
    tokens: Tensor,
    loss: pl.DataFrame,
    layers: pl.DataFrame,
    figures: dict[str, Path],
) -> Document:
    B, T = tokens.shape
    known = loss["loss"].drop_nulls().to_list()
    said = (
        f"Loss of the next token: {sum(known) / len(known):.3f} nats, mean over sequences." if known else ""
    )
    shown = {quantity: heading for quantity, (_, heading) in _MEASURED.items()}
    shown["least_eigenvalue"] = "least eigenvalue"
    shown = {key: text for key, text in shown.items() if layers[key].is_not_null().any()}
    rows = [
        [str(part["layer"][0]), part["block"][0], str(len(part)), *(_spread(part[key]) for key in shown)]
        for part in layers.partition_by("layer", maintain_order=True)
    ]
    titles = {"gates": "Gates", "eigenvalues": "Eigenvalues", "retention": "Retention", "state": "State"}
    sections = [
        Section(
            heading="Layer by layer",
            columns=["layer", "block", "heads", *shown.values()],
            rows=rows,
            caption="Median over the heads of a layer (lowest to highest head); of a head, the median gate "
            "over all tokens, else the mean over tokens and sequences. Least eigenvalue: of (I - k e^T) D, "
            f"mean over the first {min(T, EIGENVALUE_TOKENS)} tokens. Head by head: layers.csv.",
        ),
        *(Section(heading=titles[key], figures=[figures[key]]) for key in _FIGURES if key in figures),
        Section(
            heading="What cannot be said",
            lines=[
                "There is no task here: no accuracy, no intervention and no probe, and the lengths that the "
                "model was trained at are not known.",
                f"{B} sequences of {T} tokens of one file: other text may look different.",
            ],
        ),
        Section(
            heading="Data",
            lines=[
                "measurements.parquet: gates, states, transitions and retention, one row a number",
                "layers, eigenvalues (.parquet, .csv): head by head",
                "loss.csv: loss of the next token by sequence",
                "dictionary.md: name, unit, meaning and equation of every quantity and column",
            ],
        ),
    ]
    notes = [
        f"{name}: {model.config.arch}, {model.config.n_layers} layers, width {model.config.d_model}, "
        f"{model_params(model):,} parameters, read in fp32; {B} sequences of {T} tokens of {source}.",
        *([said] if said else []),
    ]
    return Document(title=f"Memory dynamics: {name}", claim="", notes=notes, sections=sections)


def _spread(values: pl.Series) -> str:
    values = values.drop_nulls()
    if values.is_empty():
        return "-"
    middle, low, high = (number(float(x)) for x in (values.median(), values.min(), values.max()))  # type: ignore[arg-type]
    return middle if low == high else f"{middle} ({low} to {high})"
