"""``arena import``, ``arena export``, and ``arena dynamics`` on a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena.cli.common import OK, complain, wrong

LENGTH, SEQUENCES = 1024, 4


def import_(
    path: Annotated[
        Path,
        typer.Argument(help="A folder with config.json and *.safetensors, in the layout of Hugging Face."),
    ],
    out: Annotated[
        str | None, typer.Option(help="Where to write; default checkpoints/NAME of the folder.")
    ] = None,
) -> int:
    """Read a public model (flash-linear-attention, Mamba-2) as one of ours; no code of it is run."""
    from arena.checkpoints import import_checkpoint, save_checkpoint
    from arena.model import model_params

    if out is not None and (not out.strip() or Path(out).is_file()):
        wrong(f"--out is a folder, not {out!r}")
    checkpoint = import_checkpoint(path)
    folder = Path(out) if out is not None else Path("checkpoints") / checkpoint.name
    save_checkpoint(checkpoint, folder)
    config = checkpoint.model.config
    block = checkpoint.model.blocks[0]
    heads, sizes = getattr(block, "n_heads", "?"), (getattr(block, f"{x}_dim", "?") for x in ("key", "value"))
    print(
        f"{checkpoint.family}: {config.arch}, {config.n_layers} layers, width {config.d_model}, {heads} "
        f"heads with memories of {' x '.join(map(str, sizes))}, {model_params(checkpoint.model):,} parameters"
    )
    print(f"written: {folder}")
    print(f"look inside: arena dynamics --checkpoint {folder} --tokens FILE")
    return OK


def export(
    path: Annotated[Path, typer.Argument(help="A folder that arena import wrote.")],
    out: Annotated[Path, typer.Option(help="Where to write; a new or empty folder.")],
) -> int:
    """Write an imported model back in its public layout."""
    from arena.checkpoints import export_checkpoint, load_checkpoint

    export_checkpoint(load_checkpoint(path), out)
    print(f"written: {out}")
    return OK


def look_inside(
    checkpoint: Path, tokens: Path, *, out: str | None, length: int | None, sequences: int | None
) -> int:
    """``arena dynamics --checkpoint``."""
    from arena.checkpoints import load_checkpoint
    from arena.checkpoints.tokens import is_text, read_tokens
    from arena.dynamics.tokens import study_tokens

    found = load_checkpoint(checkpoint)
    read = read_tokens(
        tokens,
        vocab_size=found.model.config.vocab_size,
        length=length or LENGTH,
        sequences=sequences or SEQUENCES,
        tokenizer=found.tokenizer,
    )
    source = tokens.name
    if is_text(tokens):
        source += " as bytes" if found.tokenizer is None else " by tokenizer.json"
        if found.tokenizer is None:
            complain(f"{checkpoint} has no tokenizer.json: {tokens} is read as bytes, ids 0 to 255")
    folder = Path(out) if out is not None else checkpoint / "dynamics"
    written = study_tokens(found.model, read, folder, name=found.name, source=source, on_line=print)
    print("written: " + ", ".join(str(path) for path in written))
    return OK
