"""Ablations: grids in gate space around one architecture."""
