"""A public checkpoint as our model, the folder that holds it, and the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from arena.checkpoints import fla, mamba2
from arena.checkpoints.layout import (
    DTYPES,
    TOKENIZER,
    WEIGHTS,
    CheckpointError,
    PublicFiles,
    Stored,
    headers,
    parse_json,
    read_public,
    read_tensor,
    read_text,
    write_public,
)
from arena.checkpoints.mapping import Translation, to_ours, to_public
from arena.layer import Layer
from arena.model import Model, build_model

RECORD, PUBLIC_CONFIG = "checkpoint.json", "public_config.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A public checkpoint as our model."""

    name: str
    """Of the folder that it was read from."""
    family: str
    """``model_type``, or what :mod:`arena.checkpoints.mamba2` calls its layouts."""
    model: Model
    """fp32, on the CPU, in evaluation mode."""
    config_text: str
    """The public config.json as it stood."""
    dtypes: Mapping[str, str]
    """Public tensor -> its type there."""
    tokenizer: str | None = None
    """tokenizer.json as it stood; None: there was none."""


def translate(config: Mapping[str, Any], source: str) -> Translation:
    """What a public config.json means.

    Args:
        config: parsed.
        source: what messages call it.

    Raises:
        CheckpointError: the family is not known, or a field is missing, unknown or has a value that we have
            not; one line names it.
    """
    kind = config.get("model_type")
    try:
        if kind == mamba2.FLA:
            return mamba2.translate_fla(dict(config), source)
        if isinstance(kind, str) and kind in fla.FAMILIES:
            return fla.translate(dict(config), source)
        if kind is None and "ssm_cfg" in config:
            return mamba2.translate_authors(dict(config), source)
    except CheckpointError:
        raise
    except ValueError as error:  # what our own configuration refuses
        raise CheckpointError(f"{source}: {' '.join(str(error).split())}") from None
    known = ", ".join(sorted([*fla.FAMILIES, mamba2.FLA]))
    raise CheckpointError(
        f"{source}: model_type is {kind!r:.80}; known: {known}, and state-spaces/mamba's (ssm_cfg)"
    )


def import_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a folder in the layout of Hugging Face: config.json and *.safetensors, in shards or not.

    Nothing of it is run. The model has the same function as the public one; computed in fp32.

    Raises:
        CheckpointError: what is missing, unknown or of another shape; one line names the field or tensor.
    """
    files = read_public(folder)
    source = str(files.folder / "config.json")
    plan = translate(files.config, source)
    extra = _check_tensors(plan, files)
    model = _build(plan)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for entry in plan.all_entries():
        tensors = {
            part.name: read_tensor(files.tensors[part.name], part.name).float() for part in entry.parts
        }
        with torch.no_grad():
            parameters[entry.name].copy_(to_ours(entry, tensors, parameters[entry.name].shape))
    for name, twin in extra.items():
        if not torch.equal(read_tensor(files.tensors[name], name), read_tensor(files.tensors[twin], twin)):
            raise CheckpointError(f"{folder}: the config ties {name} to {twin}, and they differ")
    tokenizer = files.folder / TOKENIZER
    return Checkpoint(
        name=files.folder.resolve().name,
        family=plan.family,
        model=model.eval(),
        config_text=files.config_text,
        dtypes={name: stored.dtype for name, stored in files.tensors.items()},
        tokenizer=read_text(tokenizer) if tokenizer.is_file() else None,
    )


def save_checkpoint(checkpoint: Checkpoint, out: str | Path) -> None:
    """Write an imported checkpoint to a folder of ours, to be read by :func:`load_checkpoint`.

    checkpoint.json, public_config.json, model.safetensors (names as in ``arena.model.Model``, each tensor in
    the type that it came in), tokenizer.json where there was one.

    Raises:
        CheckpointError: the folder holds something else.
    """
    out = Path(out)
    _check_free(out, RECORD)
    out.mkdir(parents=True, exist_ok=True)
    plan = _plan_of(checkpoint)
    parameters = dict(checkpoint.model.named_parameters(remove_duplicate=False))
    weights = {}
    for entry in plan.all_entries():
        if plan.tied and entry.name == "head.weight":
            continue
        kinds = [DTYPES[checkpoint.dtypes[part.name]] for part in entry.parts]
        wide = kinds[0] if len(set(kinds)) == 1 else torch.float32
        weights[entry.name] = parameters[entry.name].detach().to(wide).contiguous()
    record = {
        "format": FORMAT,
        "name": checkpoint.name,
        "family": checkpoint.family,
        "arch": plan.config.arch,
        "tensors": dict(sorted(checkpoint.dtypes.items())),
    }
    (out / RECORD).unlink(missing_ok=True)  # comes last: without it the folder is not read
    save_file(weights, out / WEIGHTS)
    (out / PUBLIC_CONFIG).write_text(checkpoint.config_text, encoding="utf-8")
    if checkpoint.tokenizer is not None:
        (out / TOKENIZER).write_text(checkpoint.tokenizer, encoding="utf-8")
    else:
        (out / TOKENIZER).unlink(missing_ok=True)
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a folder that :func:`save_checkpoint` wrote, or else a public one, as :func:`import_checkpoint`.

    Raises:
        CheckpointError: it is neither, or damaged.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        return import_checkpoint(folder)
    record = parse_json(read_text(folder / RECORD), folder / RECORD)
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{folder / RECORD} has format {record.get('format')!r}, not {FORMAT}")
    dtypes = record.get("tensors")
    if not isinstance(dtypes, dict) or not all(kind in DTYPES for kind in dtypes.values()):
        raise CheckpointError(f"{folder / RECORD} does not list the public tensors and their types")
    text = read_text(folder / PUBLIC_CONFIG)
    plan = translate(parse_json(text, folder / PUBLIC_CONFIG), str(folder / PUBLIC_CONFIG))
    _check_names(plan, dtypes.keys(), str(folder / RECORD))
    stored = headers(folder / WEIGHTS)
    _check_sizes(plan, stored, folder)
    model = _build(plan)
    wanted = {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if not (plan.tied and name == "head.weight")
    }
    for name in sorted(wanted.keys() ^ stored.keys()):
        raise CheckpointError(f"{folder / WEIGHTS} {'lacks' if name in wanted else 'has an unknown'} {name}")
    for name, parameter in model.named_parameters():
        if stored[name].shape != wanted[name]:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} is {list(stored[name].shape)}, not {list(wanted[name])}"
            )
        with torch.no_grad():
            parameter.copy_(read_tensor(stored[name], name))
    tokenizer = folder / TOKENIZER
    return Checkpoint(
        name=str(record.get("name") or folder.resolve().name),
        family=plan.family,
        model=model.eval(),
        config_text=text,
        dtypes=dtypes,
        tokenizer=read_text(tokenizer) if tokenizer.is_file() else None,
    )


def export_checkpoint(checkpoint: Checkpoint, out: str | Path) -> None:
    """Write the public layout again: config.json as it stood, the tensors under their public names and in
    their types there, in one model.safetensors.

    Of a model that was not trained since, they are those that were imported, bit for bit.

    Raises:
        CheckpointError: the folder is not empty, or heads that share a tensor there differ by now.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already: give a folder that is new or empty")
    plan = _plan_of(checkpoint)
    parameters = dict(checkpoint.model.named_parameters(remove_duplicate=False))
    tensors: dict[str, Tensor] = {}
    for entry in plan.all_entries():
        tensors |= to_public(entry, parameters[entry.name].detach())
    for name, twin in _twins(plan).items():
        if name in checkpoint.dtypes:
            tensors[name] = tensors[twin]
    own = {name: tensor.to(DTYPES[checkpoint.dtypes[name]]) for name, tensor in tensors.items()}
    write_public(out, checkpoint.config_text, own, checkpoint.tokenizer)


def _plan_of(checkpoint: Checkpoint) -> Translation:
    return translate(parse_json(checkpoint.config_text, Path("config.json")), "config.json")


def _build(plan: Translation) -> Model:
    try:
        model = build_model(plan.config, seed=0)
    except ValueError as error:
        raise CheckpointError(f"config.json: {' '.join(str(error).split())}") from None
    model.norm.eps = plan.norm_eps
    for layer in cast("list[Layer]", list(model.layers)):
        for norm in (layer.norm, layer.mlp_norm):
            if norm is not None:
                norm.eps = plan.norm_eps
    if plan.tied:
        cast(nn.Linear, model.head).weight = model.embedding.weight
    return model


def _twins(plan: Translation) -> dict[str, str]:
    """Tensors that a tied model may hold a second time -> the one that counts."""
    if not plan.tied:
        return {}
    return {"lm_head.weight": plan.entries[0].parts[0].name}


def _check_names(plan: Translation, names: Any, where: str) -> None:
    """Every tensor that is needed is there, and none is left over."""
    if plan.n_layers > len(names):  # before a name is made for each
        raise CheckpointError(
            f"{where}: the config has {plan.n_layers} layers, the files {len(names)} tensors"
        )
    wanted = plan.public_shapes()
    for name in wanted:
        if name not in names:
            raise CheckpointError(f"{where}: tensor {name} is missing")
    for name in names:
        if name not in wanted and name not in _twins(plan):
            raise CheckpointError(
                f"{where}: unknown tensor {name}: it is not known here, or the config has it not"
            )


def _check_tensors(plan: Translation, files: PublicFiles) -> dict[str, str]:
    """Names and shapes, before anything is built; the tensors that are there twice."""
    _check_names(plan, files.tensors.keys(), str(files.folder))
    for name, shape in plan.public_shapes().items():
        found = files.tensors[name].shape
        if found != shape:
            raise CheckpointError(
                f"{files.folder}: tensor {name} has shape {list(found)}; by the config it is {list(shape)}"
            )
    return {name: twin for name, twin in _twins(plan).items() if name in files.tensors}


def _check_sizes(plan: Translation, stored: Mapping[str, Stored], folder: Path) -> None:
    """A config that asks for more than the file holds is refused before it fills the memory."""
    held = sum(torch.Size(one.shape).numel() for one in stored.values())
    needed = 0
    for entry in plan.all_entries():
        if not (plan.tied and entry.name == "head.weight"):
            needed += sum(torch.Size(part.shape).numel() * part.copies for part in entry.parts)
    if needed != held:
        raise CheckpointError(f"{folder / WEIGHTS} holds {held} numbers; the config has {needed}")


def _check_free(out: Path, own: str) -> None:
    """Refuse a folder that holds something that is not ours."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / own).is_file())):
        raise CheckpointError(f"{out} is there already and is no imported checkpoint: give another --out")
