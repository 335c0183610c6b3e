"""Relation Rectification in Diffusion Model ("RRNet").

Yinwei Wu, Xingyi Yang, Xinchao Wang; CVPR 2024; arXiv 2403.20249; official code
WUyinwei-hah/RRNet.

For a prompt "A R B" a small network on a directed graph of five nodes gives a vector that is added
to the prompt's end-of-text embedding: Z[e] <- Z[e] + w delta. Nodes: objects (A, B) and relation
(R), with the input embeddings of their words; end-of-text embeddings (of "this is a photo of A", of
the prompt). Edges: A->A, B->B; A->R; R->B; A->eot 1, B->eot 1, A->eot 0; R->eot 1. Two layers of
heterogeneous graph attention (:class:`HeteroGAT`); delta is the output at eot 1 for the prompt, at
eot 0 for the prompt of A alone.

Trained on a pair of swapped prompts with a few images of each, everything else frozen:

    loss = 10 L+ - 2 L-,   L+ = mean |e(z_i, t; P_i) - noise_i|^2 over both,
                           L- = the same with the two images exchanged, noise and prompts kept,

t drawn with p(t) ~ 1 - alpha cos(pi t / T).

Deviations from the official code, all deliberate:

- The paper speaks of graph convolution; this is the attention of the code. DGL is not needed.
- The addition is functional; the code adds in place to a leaf.
- L- can be limited (``limit``): its weight is negative and it has no bound. The default is the
  code's, which relies on few epochs.
- Words of several sub-words may be averaged; the code takes the first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods._hetero_gat import HeteroGAT, HeteroGATLayer
from transfuse.methods.diffusion_control._ddim import add_noise

__all__ = [
    "EDGES",
    "TRAINING_PAIRS",
    "HeteroGAT",
    "HeteroGATLayer",
    "RectificationLoss",
    "RelationGraph",
    "RelationRectifier",
    "eot_positions",
    "rectification_loss",
    "rectify",
    "relation_graph",
    "sample_timesteps",
    "timestep_probabilities",
    "word_features",
]

EDGES = {
    ("object", "link_oo", "object"): ((0, 0), (1, 1)),
    ("object", "link_or", "relation"): ((0, 0),),
    ("relation", "link_ro", "object"): ((0, 1),),
    ("object", "link_oe", "eot"): ((0, 1), (1, 1), (0, 0)),
    ("relation", "link_re", "eot"): ((0, 1),),
}

# One epoch: an optimiser step for each pair of prompts.
TRAINING_PAIRS = (("ARB", "BRA"), ("ARB", "A"), ("ARB", "B"), ("BRA", "B"), ("BRA", "A"))

_PROMPTS = {"relation": 1, "object": 0}  # which eot node each prompt reads


class RelationGraph(NamedTuple):
    """Node features (..., 2, D), (..., 1, D), (..., 2, D); the edges are :data:`EDGES`."""

    object: Tensor
    relation: Tensor
    eot: Tensor


def relation_graph(a: Tensor, r: Tensor, b: Tensor, o_a: Tensor, o: Tensor) -> RelationGraph:
    """The graph of "A R B"; for "B R A" exchange a and b and take that prompt's o_b and o.

    Args:
        a, r, b: (D,) or (B, D) word features of A, R and B; see :func:`word_features`.
        o_a: End-of-text output of the prompt of A alone, the same shape.
        o: End-of-text output of the prompt, the same shape.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> graph = relation_graph(*torch.randn(5, 8))
        >>> graph.object.shape, graph.eot.shape
        (torch.Size([2, 8]), torch.Size([2, 8]))
    """
    named = {"a": a, "r": r, "b": b, "o_a": o_a, "o": o}
    for name, x in named.items():
        if x.ndim not in (1, 2) or x.shape != a.shape:
            raise ValueError(
                f"{name}: expected (D,) or (B, D), the shape of a {tuple(a.shape)}, "
                f"got {tuple(x.shape)}"
            )
    if a.numel() and torch.equal(a, b):
        warnings.warn(
            "A and B have the same features (the same first sub-word, perhaps): the graph cannot "
            "tell them apart; average their sub-words",
            stacklevel=2,
        )
    return RelationGraph(
        torch.stack([a, b], dim=-2), r.unsqueeze(-2), torch.stack([o_a, o], dim=-2)
    )


def word_features(embedding: Tensor, tokens: Sequence[int], *, mode: str = "first") -> Tensor:
    """Features (D,) of a word from the text encoder's input embeddings (V, D).

    Args:
        embedding: The embedding matrix.
        tokens: Ids of the word's sub-words, without special tokens.
        mode: ``"first"`` (official) or ``"mean"`` of the sub-words.

    Raises:
        ValueError: No token, an id out of range, or an unknown mode.

    Example:
        >>> word_features(torch.eye(3), [2, 0], mode="mean")
        tensor([0.5000, 0.0000, 0.5000])
    """
    if mode not in ("first", "mean"):
        raise ValueError(f"mode: expected first or mean, got {mode!r}")
    _checks.tensor("embedding", embedding, ("V", "D"))
    if len(tokens) == 0:
        raise ValueError("tokens: expected at least one sub-word, got none")
    for token in tokens:
        if not 0 <= token < embedding.shape[0]:
            raise ValueError(f"tokens: expected ids in [0, {embedding.shape[0]}), got {token}")
    return embedding[tokens[0]] if mode == "first" else embedding[list(tokens)].mean(0)


def eot_positions(input_ids: Tensor, eot_id: int, *, max_length: int = 77) -> Tensor:
    """Position of the FIRST end-of-text token of each prompt (B,); padding may repeat it.

    Raises:
        ValueError: A prompt without one, or one that fills all ``max_length`` places: it has been
            cut, or has no room.

    Example:
        >>> eot_positions(torch.tensor([[0, 5, 9, 9], [0, 9, 9, 9]]), 9)
        tensor([2, 1])
    """
    _checks.tensor("input_ids", input_ids, ("B", "T"))
    found = input_ids == eot_id
    if not bool(found.any(1).all()):
        row = int((~found.any(1)).nonzero()[0])
        raise ValueError(f"input_ids: row {row} has no end-of-text token {eot_id}")
    first = found.int().argmax(1)
    if bool((first >= max_length - 1).any()):
        row = int((first >= max_length - 1).nonzero()[0])
        raise ValueError(
            f"input_ids: row {row} fills all {max_length} places and may have been cut; shorten it"
        )
    return first


def rectify(
    prompt_embeds: Tensor, eot_index: int | Tensor, delta: Tensor, *, weight: float = 1.0
) -> Tensor:
    """Z with w delta added at the end-of-text position; nothing else changes, nor does the input.

    Args:
        prompt_embeds: (B, T, D), or (T, D).
        eot_index: Position, or one for each prompt (B,); see :func:`eot_positions`.
        delta: (D,) or (B, D).
        weight: w, 1 in training, in [0, 1] at generation; 0 gives the input bit for bit.

    Returns:
        The shape of ``prompt_embeds``, with gradients to it and to ``delta``.

    Raises:
        ValueError, TypeError: A position out of range, shapes that do not fit, w not finite.

    Example:
        >>> rectify(torch.zeros(3, 2), 1, torch.ones(2), weight=0.5)[:, 0]
        tensor([0.0000, 0.5000, 0.0000])
    """
    weight = _checks.number("weight", weight)
    if prompt_embeds.ndim == 2:
        return rectify(prompt_embeds[None], eot_index, delta, weight=weight)[0]
    batch, length, width = _checks.tensor("prompt_embeds", prompt_embeds, ("B", "T", "D")).shape
    if delta.shape not in ((width,), (batch, width)):
        raise ValueError(
            f"delta: expected ({width},) or ({batch}, {width}), got {tuple(delta.shape)}"
        )
    index = torch.as_tensor(eot_index, device=prompt_embeds.device)
    if index.is_floating_point() or index.dtype == torch.bool or index.ndim > 1:
        raise TypeError(f"eot_index: expected integers, got {_checks.describe(eot_index)}")
    index = index.to(torch.int64).expand(batch)
    if batch and not bool(((index >= 0) & (index < length)).all()):
        raise ValueError(f"eot_index: expected positions in [0, {length}), got {index.tolist()}")
    if weight == 0.0:
        return prompt_embeds.clone()
    added = (weight * delta).to(prompt_embeds.dtype).expand(batch, width)
    rows = torch.arange(batch, device=prompt_embeds.device)
    return prompt_embeds.index_put((rows, index), added, accumulate=True)


@register(
    title="Relation Rectification in Diffusion Model",
    authors=("Yinwei Wu", "Xingyi Yang", "Xinchao Wang"),
    year=2024,
    venue="CVPR",
    arxiv="2403.20249",
    repository="https://github.com/WUyinwei-hah/RRNet",
    kind="layer",
    ops=("attend",),
)
class RelationRectifier(nn.Module):
    """The network of one relation word: graph of a prompt -> vector for its end-of-text embedding.

    Args:
        dim: D of the text encoder.
        hidden: Width per head of the first layer.
        heads: Of the two layers.
        generator: For the initial weights.

    Raises:
        ValueError, TypeError: Sizes below 1.

    Notes:
        15.8 million parameters at D = 1024. Graphs of several prompts are batched.

    Example:
        >>> rectifier = RelationRectifier(8, hidden=4)
        >>> delta = rectifier(relation_graph(*torch.randn(5, 3, 8)))
        >>> rectify(torch.zeros(3, 77, 8), 5, delta).shape
        torch.Size([3, 77, 8])
    """

    def __init__(
        self,
        dim: int = 1024,
        *,
        hidden: int = 512,
        heads: tuple[int, int] = (2, 2),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.network = HeteroGAT(dim, hidden, dim, EDGES, heads=heads, generator=generator)

    def forward(self, graph: RelationGraph) -> Tensor:
        """:meth:`delta` of the relation prompt."""
        return self.delta(graph)

    def delta(
        self,
        graph: RelationGraph,
        *,
        prompt: str = "relation",
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The vector to add, (D,) or (B, D).

        Args:
            graph: See :func:`relation_graph`.
            prompt: ``"relation"``: for "A R B"; ``"object"``: for the prompt of A alone.
            noise: Deviation of Gaussian noise added to it: 0.05 for object prompts in training.
            generator: For the noise.

        Raises:
            ValueError: An unknown prompt, negative noise, or a D that is not the network's.
        """
        if prompt not in _PROMPTS:
            raise ValueError(f"prompt: expected one of {', '.join(_PROMPTS)}, got {prompt!r}")
        noise = _checks.number("noise", noise)
        if noise < 0:
            raise ValueError(f"noise: expected a deviation of at least 0, got {noise}")
        delta = self.network(graph._asdict())["eot"][..., _PROMPTS[prompt], :]
        if noise > 0:
            # Drawn where the generator lives, so that a seed means the same on every device.
            where = delta.device if generator is None else generator.device
            drawn = torch.randn(delta.shape, generator=generator, device=where)
            delta = delta + noise * drawn.to(delta)
        return delta


def timestep_probabilities(num_train_steps: int = 1000, alpha: float = 0.5) -> Tensor:
    """p(t) ~ 1 - alpha cos(pi t / T) for t = 0 .. T - 1, (T,) float64; favours noisy t.

    Raises:
        ValueError: T below 1, or alpha outside [0, 1].

    Example:
        >>> timestep_probabilities(2, 0.5)
        tensor([0.3333, 0.6667], dtype=torch.float64)
    """
    _checks.positive_int("num_train_steps", num_train_steps)
    if not 0 <= _checks.number("alpha", alpha) <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    t = torch.arange(num_train_steps, dtype=torch.float64)
    weight = 1 - alpha * torch.cos(math.pi * t / num_train_steps)
    total = weight.sum()
    # T = 1 and alpha = 1 leave no weight at all: the only step there is.
    return torch.ones_like(weight) if float(total) == 0.0 else weight / total


def sample_timesteps(
    num_train_steps: int = 1000,
    alpha: float = 0.5,
    n: int = 1,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """n time labels (n,) int64 drawn from :func:`timestep_probabilities`.

    Example:
        >>> sample_timesteps(10, 0.5, 3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """
    _checks.positive_int("n", n)
    weights = timestep_probabilities(num_train_steps, alpha)
    device = None if generator is None else generator.device
    return torch.multinomial(weights.to(device), n, replacement=True, generator=generator)


class RectificationLoss(NamedTuple):
    """The loss and its two parts, all scalars."""

    loss: Tensor
    positive: Tensor
    negative: Tensor


def rectification_loss(
    eps_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    z1: Tensor,
    z2: Tensor,
    p1: Tensor,
    p2: Tensor,
    t: Tensor | int,
    noise: Tensor,
    *,
    alphas_cumprod: Tensor,
    pos: float = 10.0,
    neg: float = 2.0,
    limit: float | None = None,
) -> RectificationLoss:
    """pos L+ - neg L-: each prompt explains its own image, and not the other's.

    Args:
        eps_fn: (noisy latents (4 B, ...), time labels (4 B,), prompts (4 B, T, D)) -> noise; one
            call, images as they belong and exchanged together.
        z1, z2: (B, ...) clean latents of the images of either prompt.
        p1, p2: (B, T, D) rectified prompts, or (1, T, D).
        t: Time label, or one for each of the B samples.
        noise: (2, B, ...), for prompt 1 and prompt 2; the same for images in place and exchanged.
        alphas_cumprod: (num_train_steps,).
        pos, neg: Weights.
        limit: L- counts up to ``limit`` times the present L+; None: as it is, without bound.

    Returns:
        :class:`RectificationLoss`; computed in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: Shapes that do not fit, labels out of range, weights not finite.

    Notes:
        Costs one call with 4 B samples and its backward to the prompts.
    """
    for name, value in (("pos", pos), ("neg", neg)):
        _checks.number(name, value)
    if limit is not None:
        _checks.number("limit", limit, positive=True)
    if z1.shape != z2.shape or z1.ndim < 2:
        raise ValueError(
            f"z1 and z2: expected one shape (B, ...), got {tuple(z1.shape)}, {tuple(z2.shape)}"
        )
    if noise.shape != (2, *z1.shape):
        raise ValueError(f"noise: expected {(2, *z1.shape)}, got {tuple(noise.shape)}")
    batch = z1.shape[0]
    label = torch.as_tensor(t, device=z1.device)
    if label.is_floating_point() or label.ndim > 1 or label.numel() not in (1, batch):
        raise ValueError(f"t: expected an integer label or ({batch},), got {_checks.describe(t)}")
    label = label.to(torch.int64).expand(batch)
    if batch and not bool(((label >= 0) & (label < alphas_cumprod.shape[0])).all()):
        raise ValueError(
            f"t: expected labels in [0, {alphas_cumprod.shape[0]}), got {label.tolist()}"
        )
    prompts = []
    for name, prompt in (("p1", p1), ("p2", p2)):
        _checks.tensor(name, prompt, ("B", "T", "D"))
        if prompt.shape[0] not in (1, batch):
            raise ValueError(f"{name}: expected batch 1 or {batch}, got {tuple(prompt.shape)}")
        prompts.append(prompt.expand(batch, -1, -1))
    images = torch.cat([z1, z2, z2, z1])  # as they belong, then exchanged
    noises = noise.flatten(0, 1).repeat(2, *[1] * (z1.ndim - 1))
    labels = label.repeat(4)
    alphas = alphas_cumprod.to(z1.device)[labels]
    output = eps_fn(add_noise(images, noises, alphas), labels, torch.cat(prompts * 2))
    if output.shape != images.shape:
        raise ValueError(
            f"eps_fn: expected a result {tuple(images.shape)}, got {tuple(output.shape)}"
        )
    work = torch.float64 if output.dtype == torch.float64 else torch.float32
    error = F.mse_loss(output.to(work), noises.to(work), reduction="none")
    positive, negative = error[: 2 * batch].mean(), error[2 * batch :].mean()
    counted = negative
    if limit is not None:
        counted = torch.minimum(negative, limit * positive.detach())
    return RectificationLoss(pos * positive - neg * counted, positive, negative)
