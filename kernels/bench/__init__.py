"""Speed of the operators beside the public alternatives that are installed.

``python -m kernels.bench`` prints those of docs/speed.md; ``python -m kernels.bench operators`` times
every operator on the CPU or a GPU and writes JSON. Torch and numpy are enough; ``arena bench kernels`` makes
a table and a figure of the same rows.
"""
