"""Self-attention of style injection written out: the oracle of its tests."""

import torch


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def dense(query, key, value, *, content=None, gamma=0.0, temperature=1.0):
    """The method written out, independent of the library: explicit map, explicit repeats."""
    batch = query.shape[0]
    if content is not None:
        query = gamma * content.expand_as(query) + (1 - gamma) * query
    key, value = (x.expand(batch, *x.shape[1:]) for x in (key, value))
    logits = temperature * torch.einsum("bhnd,bhmd->bhnm", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhnm,bhmv->bhnv", logits.softmax(-1), value)
