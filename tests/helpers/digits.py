"""The digits of scikit-learn, and copies of a small network fine-tuned on some of their classes."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn


def digits():
    """1797 digits of 64 pixels in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16).float(), torch.tensor(data.target)


def trained(model, x, y, *, steps, lr, generator, batch=64):
    """The model after steps of Adam on random batches."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def copies(model, x, y, groups, *, steps, lr, generator):
    """One copy of the model per group of classes, fine-tuned on the samples of that group."""
    found = []
    for classes in groups:
        own = torch.isin(y, torch.tensor(classes))
        found.append(
            trained(copy.deepcopy(model), x[own], y[own], steps=steps, lr=lr, generator=generator)
        )
    return found


def network(*widths, seed):
    """A ReLU network of these widths."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def accuracy(model, x, y):
    """Part of the samples that are right."""
    return (model(x).argmax(1) == y).double().mean().item()
