"""The parts of EasyRef in front of the denoiser: groups of references into K context tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks


class PaddedGroups(NamedTuple):
    """Groups of different sizes as one tensor: tokens (B, L, D) and which of them exist (B, L)."""

    tokens: Tensor
    mask: Tensor


def pad_groups(groups: Sequence[Sequence[Tensor]]) -> PaddedGroups:
    """Joins the images of each group and pads the groups to one length.

    Args:
        groups: B groups; each is a sequence of images, an image is (T_i, D) tokens. The order of a
            group's images is kept: it matters to a causal model. A group may be empty.

    Returns:
        :class:`PaddedGroups`; padding is zero and at the end.

    Raises:
        ValueError: No image at all, or images of different widths.
        TypeError: An image is not a floating tensor.

    Example:
        >>> padded = pad_groups([[torch.ones(2, 3), torch.ones(1, 3)], [torch.ones(1, 3)]])
        >>> padded.mask.tolist()
        [[True, True, True], [True, False, False]]
    """
    images = [
        _checks.tensor(f"groups[{i}][{j}]", image, ("T", "D"))
        for i, group in enumerate(groups)
        for j, image in enumerate(group)
    ]
    if not images:
        raise ValueError("groups: expected at least one image, got none")
    first = images[0]
    _checks.floating("groups", first)
    for image in images:
        _checks.size("groups", image, 1, first.shape[1], "width of the first image")
        _checks.same_dtype("groups", image, "the first image", first)
    rows = [torch.cat([*group, first[:0]]) for group in groups]
    length = max(row.shape[0] for row in rows)
    tokens = torch.stack([nn.functional.pad(row, (0, 0, 0, length - row.shape[0])) for row in rows])
    counts = torch.tensor([row.shape[0] for row in rows], device=first.device)
    return PaddedGroups(tokens, torch.arange(length, device=first.device) < counts[:, None])


def reference_mask(
    valid: Tensor, num_references: int, *, causal_references: bool = False
) -> Tensor:
    """Which of L tokens followed by K references each of them may attend to, (B, 1, L + K, L + K).

    Everything that exists sees everything that exists; with ``causal_references`` a token sees only
    itself and what comes before it. References always exist. Tokens that do not exist attend to
    themselves alone, so that no row is empty.

    Args:
        valid: (B, L) bool, which tokens exist.
        num_references: K.
        causal_references: The rule that the released weights were trained under.

    Example:
        >>> reference_mask(torch.tensor([[True, False]]), 1)[0, 0].int().tolist()
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    exists = nn.functional.pad(valid, (0, num_references), value=True)
    length = exists.shape[1]
    allowed = exists[:, None, :] & exists[:, :, None]
    if causal_references:
        allowed = allowed.tril()
    own = torch.eye(length, dtype=torch.bool, device=valid.device)
    return (allowed | own)[:, None]


class ReferenceAggregator(nn.Module):
    """K learnable tokens gather what a group of images has in common: E = layer([H ; r])[-K:].

    Only this one layer runs on the longer sequence; the layers that made H do not.

    Args:
        layer: The last layer of the language model, or any module called as ``layer(hidden, mask)``
            with hidden (B, S, D) and mask (B, 1, S, S) bool, True = may attend. A tuple as its
            result stands for its first entry.
        num_references: K.
        width: D.
        norm: Applied to the K rows, as the language model's final norm is; None: nothing.
        causal_references: References see all images but only earlier references, as the released
            weights do; the default is the paper's bidirectional layer.
        generator: For the initial references, 0.1 N(0, 1).

    Raises:
        ValueError: K or D below 1.

    Example:
        >>> layer = lambda hidden, mask: hidden
        >>> ReferenceAggregator(layer, 4, 8)(torch.zeros(2, 6, 8)).shape
        torch.Size([2, 4, 8])
    """

    def __init__(
        self,
        layer: Callable[..., Tensor],
        num_references: int,
        width: int,
        *,
        norm: Callable[[Tensor], Tensor] | None = None,
        causal_references: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _checks.positive_int("num_references", num_references)
        _checks.positive_int("width", width)
        self.layer, self.norm = layer, norm
        self.causal_references = causal_references
        initial = torch.randn(num_references, width, generator=generator)
        self.references = nn.Parameter(0.1 * initial)

    def join(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[H ; r] (B, L + K, D) and :func:`reference_mask`; tokens that do not exist become zero.

        Raises:
            ValueError, TypeError: ``hidden`` is not (B, L, D) or ``mask`` not (B, L) bool.
        """
        _checks.tensor("hidden", hidden, ("B", "L", "D"))
        batch, length, _ = hidden.shape
        count, width = self.references.shape
        _checks.size("hidden", hidden, 2, width, "width of the references")
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        _checks.tensor("mask", mask, ("B", "L"))
        if mask.dtype != torch.bool or mask.shape != (batch, length):
            raise ValueError(
                f"mask: expected bool {(batch, length)} (True = exists), "
                f"got {_checks.describe(mask)}"
            )
        # Whatever fills the padding (NaN, say) must not reach a sum, be its weight zero or not.
        hidden = torch.where(mask[..., None], hidden, hidden.new_zeros(()))
        references = self.references.to(hidden.dtype).expand(batch, -1, -1)
        allowed = reference_mask(mask, count, causal_references=self.causal_references)
        return torch.cat([hidden, references], dim=1), allowed

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The K reference rows.

        Args:
            hidden: (B, L, D) tokens of the group and the prompt, after all layers but this one.
            mask: (B, L) bool, which of them exist; None: all. A row without any gives what the
                references make of themselves, whatever the padding holds.

        Returns:
            (B, K, D).
        """
        joined, allowed = self.join(hidden, mask)
        out = self.layer(joined, allowed)
        rows = (out[0] if isinstance(out, tuple) else out)[:, -self.references.shape[0] :]
        return rows if self.norm is None else self.norm(rows)

    def extra_repr(self) -> str:
        count, width = self.references.shape
        return f"num_references={count}, width={width}, causal={self.causal_references}"


class ProjectionMLP(nn.Module):
    """From the language model's width to the denoiser's context: Linear, GELU, Linear, LayerNorm.

    Args:
        width: D of the aggregator.
        context_width: C_ctx of the denoiser (2048 for SDXL).
        out_dtype: Dtype of the result, cast after the LayerNorm: the linear layers of a bfloat16
            language model can exceed the range of float16. None: the input's.

    Example:
        >>> ProjectionMLP(8, 12)(torch.zeros(2, 4, 8)).shape
        torch.Size([2, 4, 12])
    """

    def __init__(
        self, width: int, context_width: int, *, out_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        _checks.positive_int("width", width)
        _checks.positive_int("context_width", context_width)
        self.out_dtype = out_dtype
        self.inward = nn.Linear(width, width)
        self.outward = nn.Linear(width, context_width)
        self.norm = nn.LayerNorm(context_width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, D) to (B, K, C_ctx)."""
        y = self.norm(self.outward(nn.functional.gelu(self.inward(x))))
        return y if self.out_dtype is None else y.to(self.out_dtype)


class Drops(NamedTuple):
    """Which samples lose their text and which their references (bool, (n,) each)."""

    text: Tensor
    reference: Tensor


def sample_drops(n: int, *, p: float = 0.05, generator: torch.Generator | None = None) -> Drops:
    """Training drops for guidance: text alone, references alone and both with probability p each.

    A dropped reference is the blank image's group, a dropped text the empty prompt.

    Raises:
        ValueError: n below 1, or p outside [0, 1/3].

    Example:
        >>> sample_drops(4, p=0.0).text.tolist()
        [False, False, False, False]
    """
    _checks.positive_int("n", n)
    if not 0.0 <= _checks.number("p", p) <= 1 / 3:
        raise ValueError(f"p: expected a probability in [0, 1/3], got {p}")
    u = torch.rand(n, generator=generator)
    return Drops((u < p) | (u >= 2 * p) & (u < 3 * p), (u >= p) & (u < 3 * p))
