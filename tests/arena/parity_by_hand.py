"""Real ``deltanet-neg`` and ``mamba2-neg`` models, weights set by hand: one head solves parity by reflection.

Head ``counter``: key fixed, value fixed, erase = write = 2 at token 1 and 0 at token 0, so that what is read
along the key goes 0, 2 v, 0, 2 v, ... with the ones. Every other head writes a little at every token and is
read by nothing. With ``mamba2-neg`` the counter's step is about 50 at token 1 and 0 at token 0, and so its
decay -1 and 1.
"""

import torch

from arena.model import ModelConfig, build_model

D, HEADS = 16, 4
ONE, ZERO, ALWAYS, ANSWER = 0, 1, 2, 3  # features of the residual stream


def parity_model(counter=2, arch="deltanet-neg"):
    config = ModelConfig(
        arch=arch, vocab_size=2, n_classes=2, d_model=D, n_layers=1, n_heads=HEADS, conv="none"
    )
    model = build_model(config, seed=0).double()
    block, layer = model.blocks[0], model.layers[0]
    with torch.no_grad():
        for parameter in (*block.parameters(), *layer.mlp.parameters(), *model.head.parameters()):
            parameter.zero_()
        block.norm.weight.fill_(1.0)
        model.embedding.weight.zero_()
        model.embedding.weight[1, [ONE, ALWAYS]] = 1.0
        model.embedding.weight[0, [ZERO, ALWAYS]] = 1.0
        K = D // HEADS
        qkv = block.qkv.weight.view(3, HEADS, K, D)
        qkv[:, :, 0, ALWAYS] = 1.0  # q, k and v along their first channel, whatever the token
        gate = block.gate.erase if arch == "deltanet-neg" else block.gate.decay_in
        gate.weight[:, ALWAYS] = -0.2  # the idle heads: erase a little below 1, or a small step
        gate.weight[counter] = 0.0
        gate.weight[counter, ONE] = 20.0  # 2 sigmoid(+-56): 2 or 0; softplus(+-56): 56 or 0
        gate.weight[counter, ZERO] = -20.0
        block.gate_out.linear.weight[:, ALWAYS] = 1.0
        block.out.weight[ANSWER, counter * K] = 1.0
        model.head.weight[1, ANSWER] = 1.0
        model.head.weight[1, ALWAYS] = -0.1  # above a tenth of the constant: odd
    return model.eval()
