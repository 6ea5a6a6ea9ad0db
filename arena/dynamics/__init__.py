"""Look inside trained memories: measurements in one vocabulary for all architectures."""

from arena.dynamics.record import Chunk, blocks_of, record

__all__ = ["Chunk", "blocks_of", "record"]
