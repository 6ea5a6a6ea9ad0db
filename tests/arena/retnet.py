"""An architecture in one file: RetNet, arXiv 2307.08621, S_t = gamma S_{t-1} + k_t v_t^T, one fixed gamma a
head."""

import torch

from arena.blocks.gates import GateValues
from arena.blocks.matrix import MatrixMemoryBlock, register_memory
from arena.memory import GateSpec


class RetNet(MatrixMemoryBlock):
    def make_gates(self):
        gamma = 1 - 2.0 ** (-5 - torch.arange(self.n_heads))
        self.register_buffer("log_gamma", gamma.log())

    def gates(self, x):
        return GateValues(log_decay=self.log_gamma.expand(*x.shape[:2], -1))


register_memory("retnet", GateSpec(decay="scalar"), block=RetNet)
