"""Look inside trained memories: measurements in one vocabulary for all architectures."""

from arena.dynamics.dictionary import COLUMNS, QUANTITIES, data_dictionary, data_dictionary_markdown
from arena.dynamics.measure import measure
from arena.dynamics.record import Chunk, blocks_of, record

__all__ = [
    "COLUMNS",
    "QUANTITIES",
    "Chunk",
    "blocks_of",
    "data_dictionary",
    "data_dictionary_markdown",
    "measure",
    "record",
]
