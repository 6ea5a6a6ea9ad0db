"""The experiment that tests of the command line and of the grid run: two architectures, three steps."""

TINY = """
name = "tiny"
title = "A tiny grid"
archs = ["gdn", "gdn-neg"]
seeds = 2
[model]
d_model = 8
n_layers = 1
n_heads = 1
[train]
steps = 3
batch_size = 4
eval_examples = 8
[[tasks]]
name = "parity"
train_lengths = [3, 8]
eval_lengths = [24, 32]
"""
