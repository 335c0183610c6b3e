"""The digits of scikit-learn, and copies of a small network fine-tuned on some of their classes."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn


def digits():
    """1797 digits of 64 pixels in [0, 1], centred pixel by pixel, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data / 16).float()
    return x - x.mean(0), torch.tensor(data.target)


def trained(model, x, y, *, steps, lr):
    """The model after steps of Adam on all samples."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def copies(model, x, y, groups, *, steps, lr):
    """One copy of the model per group of classes, fine-tuned on the samples of that group."""
    found = []
    for classes in groups:
        own = torch.isin(y, torch.tensor(classes))
        found.append(trained(copy.deepcopy(model), x[own], y[own], steps=steps, lr=lr))
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
