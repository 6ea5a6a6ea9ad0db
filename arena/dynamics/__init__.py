"""Look inside trained memories: measurements in one vocabulary for all architectures."""

from arena.dynamics.dictionary import COLUMNS, QUANTITIES, data_dictionary, data_dictionary_markdown
from arena.dynamics.directory import choose_runs, measure_directory, measure_runs, summarise
from arena.dynamics.measure import measure
from arena.dynamics.record import Chunk, blocks_of, record

__all__ = [
    "COLUMNS",
    "QUANTITIES",
    "Chunk",
    "blocks_of",
    "choose_runs",
    "data_dictionary",
    "data_dictionary_markdown",
    "measure",
    "measure_directory",
    "measure_runs",
    "record",
    "summarise",
]
