"""The outer products behind NormGrad maps, formed: what the closed forms are compared with."""

from __future__ import annotations

import torch.nn.functional as F

REDUCE = {
    "norm": lambda s: s.norm(dim=1),
    "filter_norm": lambda s: s.relu().norm(dim=1),
    "sum": lambda s: s.sum(1),
    "max": lambda s: s.amax(1),
}


def entries(act, grad, phase1, kernel=3, **geometry):
    """All entries of every location's outer product, (B, entries, *S), by unfolding."""
    if phase1 in ("scaling", "bias"):
        return act * grad if phase1 == "scaling" else grad
    if phase1 == "conv1x1":
        kernel, geometry = 1, {}
    near = F.unfold(act, kernel, **geometry).unflatten(1, (act.shape[1], -1))
    g = grad.flatten(2)[:, :, None]
    if phase1 == "conv3x3_depthwise":
        found = (near * g).flatten(1, 2)
    else:
        found = (near.flatten(1, 2)[:, None] * g).flatten(1, 2)
    return found.unflatten(2, grad.shape[2:])
