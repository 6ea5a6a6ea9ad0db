"""Public checkpoints: read them as our models, keep them, write them back."""

from arena.checkpoints.checkpoint import (
    Checkpoint,
    export_checkpoint,
    import_checkpoint,
    load_checkpoint,
    save_checkpoint,
    translate,
)
from arena.checkpoints.layout import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "export_checkpoint",
    "import_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "translate",
]
