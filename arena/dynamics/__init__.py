"""Look inside trained memories: measurements in one vocabulary for all architectures."""

from arena.dynamics.dictionary import COLUMNS, data_dictionary, data_dictionary_markdown
from arena.dynamics.directory import choose_runs, measure_directory, measure_runs, summarise
from arena.dynamics.effects import Intervention, measure_effects
from arena.dynamics.fields import measure_fields
from arena.dynamics.intervene import Edit, edited, parse_edit, prepare
from arena.dynamics.measure import measure
from arena.dynamics.probe import measure_decodability
from arena.dynamics.quantities import QUANTITIES
from arena.dynamics.record import Chunk, blocks_of, record

__all__ = [
    "COLUMNS",
    "QUANTITIES",
    "Chunk",
    "Edit",
    "Intervention",
    "blocks_of",
    "choose_runs",
    "data_dictionary",
    "data_dictionary_markdown",
    "edited",
    "measure",
    "measure_decodability",
    "measure_directory",
    "measure_effects",
    "measure_fields",
    "measure_runs",
    "parse_edit",
    "prepare",
    "record",
    "summarise",
]
