"""TTT-E2E from its equations: one sequence at a time, one mini-batch after the other, no cache, no state.

The attention blocks are the model's own, run over the whole past for every mini-batch; they have tests of
their own."""

import torch
import torch.nn.functional as F


def norm(x, module):
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.eps)


def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up) @ down.T


def ttt_reference(model, tokens, *, updates=True, lr=None):
    """Logits of one sequence, tokens [T] or [T,C], and the loss of each mini-batch before its update."""
    options = model.options
    lr = options.inner_lr if lr is None else lr
    T = tokens.shape[0]
    b = options.mini_batch if updates and options.mini_batch else T
    C = model.config.tokens_per_position
    table = model.embedding.weight
    vocabulary = model.head.weight if options.next_token_head == "task" else table
    n, tail = len(model.layers), options.updated_layers(len(model.layers))
    read = [[] for _ in range(n)]  # what the attention of each layer has read, piece by piece
    fast = [
        w for layer in model.layers[n - tail :] for w in (layer.fast.gate_up.weight, layer.fast.down.weight)
    ]
    hidden, losses = [], []
    for start in range(0, T, b):
        stop = min(start + b, T)
        x = torch.stack([torch.cat([table[i] for i in tokens[t].reshape(-1)]) for t in range(start, stop)])
        weights = iter(fast)
        for index, layer in enumerate(model.layers):
            read[index].append(norm(x, layer.norm))
            y = layer.block(torch.cat(read[index])[None])[0][0, start:stop]
            x = x + (y if layer.post_norm is None else norm(y, layer.post_norm))
            if index >= n - tail:
                x = x + norm(
                    swiglu(norm(x, layer.fast_norm), next(weights), next(weights)), layer.fast_post_norm
                )
            y = swiglu(norm(x, layer.mlp_norm), layer.mlp.gate_up.weight, layer.mlp.down.weight)
            x = x + (y if layer.mlp_post_norm is None else norm(y, layer.mlp_post_norm))
        h = norm(x, model.norm)
        hidden.append(h)
        if stop == T:  # the target of its last token is unknown
            break
        nll = []
        for t in range(start, stop):
            for c, part in enumerate(h[t - start].chunk(C)):
                nll.append(-torch.log_softmax(vocabulary @ part, 0)[tokens[t + 1].reshape(-1)[c]])
        loss = torch.stack(nll).mean()
        losses.append(loss)
        grads = torch.autograd.grad(loss, fast, create_graph=True)
        size = torch.sqrt(sum(g.square().sum() for g in grads))
        factor = 1.0 if size <= options.inner_clip else options.inner_clip / size
        fast = [w - lr * factor * g for w, g in zip(fast, grads, strict=True)]
    h = torch.cat(hidden)
    return model.head(h), losses
