"""``arena bench``: the kernels beside public alternatives, and what a training step costs.

Measuring needs torch and numpy only (``kernels.bench``, ``arena.bench.training``); tables and figures are in
``arena.bench.report``.
"""
