"""Subjects of a prompt as columns of its attention maps, and masks from scores of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse import _checks

RULES = ("paper", "official", "mean", "aggregated")


class Subjects(NamedTuple):
    """The distinct columns (n,) of all subjects, and which belong to which (subjects, n)."""

    columns: Tensor
    member: Tensor


def subject_columns(subjects: Sequence[int | Sequence[int]], tokens: int | None = None) -> Subjects:
    """Checks subjects given as token positions; one subject may have several (sub-words).

    Raises:
        ValueError: No subject, one without tokens, or a position outside [0, tokens).
        TypeError: A position that is no integer.
    """
    if isinstance(subjects, (str, int)) or len(subjects) == 0:
        raise ValueError(f"subjects: expected at least one token position, got {subjects!r}")
    groups = [[entry] if isinstance(entry, int) else list(entry) for entry in subjects]
    for number, group in enumerate(groups):
        if not group:
            raise ValueError(f"subjects[{number}]: expected at least one token position, got none")
        for position in group:
            if isinstance(position, bool) or not isinstance(position, int):
                raise TypeError(f"subjects[{number}]: expected integers, got {position!r}")
            if position < 0 or (tokens is not None and position >= tokens):
                limit = "" if tokens is None else f", below the {tokens} tokens of the context"
                raise ValueError(
                    f"subjects[{number}]: expected positions from 0{limit}, got {position}"
                )
    columns = sorted({position for group in groups for position in group})
    member = torch.tensor([[column in group for column in columns] for group in groups])
    return Subjects(torch.tensor(columns), member)


def subject_tokens(tokenizer: Any, prompt: str, words: Sequence[str]) -> list[list[int]]:
    """Positions of words in the token sequence that the text encoder sees.

    Special tokens at the start count, and a word of several sub-words has several positions: both
    are where positions within the sentence go wrong.

    Args:
        tokenizer: As transformers' tokenizers are called; ``tokenizer(text)["input_ids"]``.
        prompt: The prompt.
        words: Words or phrases of it; each one's first occurrence is meant.

    Returns:
        One list of positions for each word.

    Raises:
        ValueError: A word whose tokens do not occur in the prompt's.
    """
    whole = list(tokenizer(prompt)["input_ids"])
    found = []
    for word in words:
        # Tokenizers that mark word starts by a space know the word in mid-sentence by that.
        for spelling in (word, " " + word):
            own = list(tokenizer(spelling, add_special_tokens=False)["input_ids"])
            starts = [i for i in range(len(whole) - len(own) + 1) if whole[i : i + len(own)] == own]
            if own and starts:
                found.append(list(range(starts[0], starts[0] + len(own))))
                break
        else:
            raise ValueError(f"words: the tokens of {word!r} do not occur in those of {prompt!r}")
    return found


def _filter(scores: Tensor, kernel: Tensor) -> Tensor:
    size = kernel.shape[-1]
    planes = scores.reshape(-1, 1, *scores.shape[-2:])
    return F.conv2d(planes, kernel[None, None], padding=size // 2).view_as(scores)


def _gaussian(sigma: float, like: Tensor) -> Tensor:
    line = torch.exp(-0.5 * (torch.arange(-1.0, 2.0, dtype=torch.float64) / sigma) ** 2)
    kernel = torch.outer(line, line)
    return (kernel / kernel.sum()).to(like)


def make_mask(
    scores: Tensor, *, rule: str = "paper", sigma: float = 6.0, factor: float = 0.5
) -> Tensor:
    r"""Which latent elements belong to a subject: the intersection over layers of the union over
    subjects of :math:`S' > \mathrm{mean}(S') + \mathrm{factor} \cdot \mathrm{std}(S')`.

    Mean and unbiased standard deviation are taken over (H, W). S' is S smoothed:

    - ``"paper"``: a 3 x 3 Gaussian of ``sigma`` with zeros around, then a 3 x 3 maximum.
    - ``"official"``: a 3 x 3 sum with zeros around, which is what the released code amounts to.
    - ``"mean"``: an older rule of that code: S itself against its mean, first subject alone.
    - ``"aggregated"``: S itself against its mean, as the code does with its aggregated maps; there
      subjects are intersected too, which leaves nothing of two that lie apart, here united.

    Args:
        scores: (..., layers, subjects, C, H, W), any floating dtype.
        rule: One of these.
        sigma: Of the Gaussian, in elements, greater than 0.
        factor: Of the standard deviation; not used by the last two.

    Returns:
        (..., C, H, W) bool.

    Raises:
        ValueError, TypeError: Scores of less than 5 dimensions or without layers or subjects, an
            unknown rule, scores that are not finite, or numbers out of range.

    Notes:
        A constant plane exceeds no threshold: its mask is empty, all of it would be overwritten,
        and a warning says so.

    Example:
        >>> scores = torch.zeros(1, 1, 1, 5, 5)
        >>> scores[..., 2, 2] = 1.0
        >>> make_mask(scores, rule="mean").sum().item()
        1
        >>> make_mask(torch.nn.functional.pad(scores, (3, 3, 3, 3))).sum().item()  # 5 x 5
        25
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    sigma = _checks.number("sigma", sigma, positive=True)
    factor = _checks.number("factor", factor)
    if not isinstance(scores, Tensor) or scores.ndim < 5:
        raise ValueError(
            f"scores: expected (..., layers, subjects, C, H, W), got {_checks.describe(scores)}"
        )
    _checks.floating("scores", scores)
    if 0 in scores.shape[-5:]:
        raise ValueError(f"scores: expected no empty dimension, got {tuple(scores.shape)}")
    if not bool(scores.isfinite().all()):
        raise ValueError("scores: expected finite values, got some that are not")
    smooth = scores.detach()
    smooth = smooth if smooth.dtype == torch.float64 else smooth.float()
    if rule == "paper":
        smooth = _filter(smooth, _gaussian(sigma, smooth))
        smooth = F.max_pool2d(smooth.flatten(0, -4), 3, stride=1, padding=1).view_as(smooth)
    elif rule == "official":
        smooth = _filter(smooth, smooth.new_ones(3, 3))
    elif rule == "mean":
        smooth, factor = smooth.narrow(-4, 0, 1), 0.0
    else:
        factor = 0.0
    threshold = smooth.mean((-2, -1), keepdim=True)
    if factor != 0.0:
        threshold = threshold + factor * smooth.std((-2, -1), keepdim=True)
    mask = (smooth > threshold).any(-4).all(-4)
    if not bool(mask.flatten(-3).any(-1).all()):
        warnings.warn(
            "scores exceed no threshold anywhere (constant scores, or layers that disagree): the "
            "mask is empty, and blending would overwrite everything",
            stacklevel=2,
        )
    return mask


def blend_latents(latent: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """mask * latent + (1 - mask) * reference; where the mask is 0 or 1, one of them bit for bit.

    Args:
        latent: (..., C, H, W), kept where the mask is 1.
        reference: A shape that broadcasts to the latent's, same dtype.
        mask: bool or values in [0, 1], broadcastable to the latent's shape.

    Raises:
        ValueError: Shapes that do not fit, or mask values outside [0, 1].
        TypeError: Dtypes that differ.

    Example:
        >>> blend_latents(torch.ones(2), torch.zeros(2), torch.tensor([0.25, 1.0]))
        tensor([0.2500, 1.0000])
    """
    shape, axes = tuple(latent.shape), ["..."] * (latent.ndim - 3) + ["C", "H", "W"]
    _checks.same_dtype("reference", reference, "latent", latent)
    for name, part in (("reference", reference), ("mask", mask)):
        _checks.broadcast(name, part, shape, axes[-latent.ndim :])
    if mask.dtype == torch.bool:
        return torch.where(mask, latent, reference)
    low, high = (math.nan, math.nan) if mask.numel() == 0 else (mask.min(), mask.max())
    if mask.numel() > 0 and not (bool(low >= 0) and bool(high <= 1)):
        raise ValueError(f"mask: expected values in [0, 1], got [{float(low)}, {float(high)}]")
    weight = mask.to(latent.dtype)
    mixed = weight * latent + (1 - weight) * reference
    return torch.where(weight == 1, latent, torch.where(weight == 0, reference, mixed))
