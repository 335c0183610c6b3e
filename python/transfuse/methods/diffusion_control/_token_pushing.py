"""Tokens of images pushed away from those of others: the functions of negative token merging."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops import nearest_tokens, noise_mix, push_tokens

VARIANTS = ("paper", "official")


def push_from_reference(
    x: Tensor,
    reference: Tensor,
    *,
    alpha: float,
    threshold: float,
    mask: Tensor | None = None,
    variant: str = "paper",
    detach: bool = True,
    backend: str | None = None,
) -> Tensor:
    r"""Pushes the tokens of images away from those of a reference.

    .. math:: y_i = x_i + \alpha (x_i - r_{j(i)}) \quad\text{if}\quad \cos(x_i, r_{j(i)}) > \tau

    Args:
        x: (F, N, D) tokens of F images.
        reference: (M, D), (1, M, D) or (F, M, D); M = N with ``variant="official"``.
        alpha: Strength, at least 0.
        threshold: Cosine in [-1, 1] that must be exceeded.
        mask: (M,) bool, tokens of the reference that may be matched (official: positions that may
            be pushed). None: all.
        variant: ``"paper"`` or ``"official"``, see the module.
        detach: No gradient flows into the reference.
        backend: Backend of the ops; None chooses.

    Returns:
        Shape and dtype of x. Tokens that are not pushed are the same bits.

    Raises:
        TypeError, ValueError: An argument that does not fit.

    Reference:
        Singh et al. 2024 (arXiv:2412.01339), section 3.

    Example:
        >>> import torch
        >>> from transfuse.methods.diffusion_control.neg_to_me import push_from_reference
        >>> x, reference = torch.tensor([[[1.0, 0.2]]]), torch.tensor([[1.0, 0.0]])
        >>> push_from_reference(x, reference, alpha=0.5, threshold=0.9)
        tensor([[[1.0000, 0.3000]]])
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    if _checks.number("alpha", alpha) < 0.0:
        raise ValueError(f"alpha: expected a number of at least 0, got {alpha}; push_tokens pulls")
    if isinstance(reference, Tensor) and reference.dim() == 2:
        reference = reference[None]
    reference = reference.detach() if detach else reference
    push = push_tokens if variant == "paper" else _push_official
    return push(x, reference, mask=mask, alpha=alpha, threshold=threshold, backend=backend)


def _push_official(
    x: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None,
    alpha: float,
    threshold: float,
    backend: str | None,
) -> Tensor:
    """The official code's maximum over the generated tokens, for every position."""
    if reference.shape[-2] != x.shape[-2]:
        raise ValueError(
            f"reference: expected {x.shape[-2]} tokens (those of x) with variant 'official', "
            f"got {reference.shape[-2]}"
        )
    threshold = _checks.number("threshold", threshold)
    if not -1.0 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a cosine in [-1, 1], got {threshold}")
    reference = reference.expand(x.shape[0], -1, -1)
    found = nearest_tokens(reference.detach(), x.detach(), backend=backend)
    pushed = found.similarity > threshold
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != (x.shape[1],):
            raise ValueError(
                f"mask: expected a bool tensor of shape ({x.shape[1]},), "
                f"got {_checks.describe(mask)}"
            )
        pushed = pushed & mask
    if x.numel() == 0:
        return x.clone()
    index = found.index[..., None].expand(-1, -1, x.shape[2])
    wide = torch.promote_types(x.dtype, torch.float32)
    other, own = reference.gather(1, index).to(wide), x.to(wide)
    moved = (own + alpha * (own - other)).to(x.dtype)
    return torch.where(pushed[..., None], moved, x)


def push_from_first(
    x: Tensor,
    *,
    alpha: float,
    threshold: float,
    mask: Tensor | None = None,
    variant: str = "paper",
    detach: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Pushes images 1, 2, ... of a batch away from image 0, which stays as it is.

    Args:
        x: (F, N, D) tokens of F images.
        alpha: As for :func:`push_from_reference`, like everything else.
        threshold: Cosine that must be exceeded.
        mask: (N,) bool.
        variant: ``"paper"`` or ``"official"``.
        detach: No gradient flows into image 0 from what is pushed.
        backend: Backend of the ops; None chooses.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError, ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from transfuse.methods.diffusion_control.neg_to_me import push_from_first
        >>> x = torch.randn(3, 16, 8)
        >>> y = push_from_first(x, alpha=0.9, threshold=0.5)
        >>> torch.equal(y[0], x[0]), y.shape
        (True, torch.Size([3, 16, 8]))
    """
    x = _checks.tensor("x", x, ("F", "N", "D"))
    rest = push_from_reference(
        x[1:],
        x[:1],
        alpha=alpha,
        threshold=threshold,
        mask=mask,
        variant=variant,
        detach=detach,
        backend=backend,
    )
    return torch.cat([x[:1], rest])


def push_all_pairs(
    x: Tensor, *, alpha: float, threshold: float, detach: bool = True, backend: str | None = None
) -> Tensor:
    """Pushes every image of a batch away from the tokens of all others (an extension).

    Args:
        x: (F, N, D) tokens of F images.
        alpha: Strength, at least 0.
        threshold: Cosine that must be exceeded.
        detach: No gradient flows into the tokens that are pushed from.
        backend: Backend of the ops; None chooses.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError, ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from transfuse.methods.diffusion_control.neg_to_me import push_all_pairs
        >>> push_all_pairs(torch.randn(3, 16, 8), alpha=0.9, threshold=0.5).shape
        torch.Size([3, 16, 8])
    """
    x = _checks.tensor("x", x, ("F", "N", "D"))
    if x.shape[0] < 2:
        return x.clone()
    pushed = []
    for f in range(x.shape[0]):
        others = torch.cat([x[:f], x[f + 1 :]]).flatten(0, 1)
        pushed.append(
            push_from_reference(
                x[f : f + 1],
                others,
                alpha=alpha,
                threshold=threshold,
                detach=detach,
                backend=backend,
            )
        )
    return torch.cat(pushed)


def push_from_mean(
    x: Tensor,
    *,
    alpha: float,
    threshold: float,
    detach: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Pushes every image of a batch away from the mean of the others, place by place.

    An extension of the paper, as :func:`push_all_pairs`, at the cost of one reference for each
    image whatever their number.

    Args:
        x: (F, N, D) tokens of F images.
        alpha: Strength, at least 0.
        threshold: Cosine that must be exceeded.
        detach: No gradient flows into the mean.
        backend: Backend of the ops; None chooses.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError, ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from transfuse.methods.diffusion_control.neg_to_me import push_from_mean
        >>> push_from_mean(torch.randn(3, 16, 8), alpha=0.9, threshold=0.5).shape
        torch.Size([3, 16, 8])
    """
    x = _checks.tensor("x", x, ("F", "N", "D"))
    if x.shape[0] < 2:
        return x.clone()
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    others = ((wide.sum(0) - wide) / (x.shape[0] - 1)).to(x.dtype)
    return push_from_reference(
        x, others, alpha=alpha, threshold=threshold, detach=detach, backend=backend
    )


def place_reference(
    latent: Tensor,
    reference: Tensor,
    *,
    noise: Tensor | None = None,
    alpha: float = 1.0,
    sigma: float = 0.0,
    guidance: bool = False,
) -> Tensor:
    """The latents of a step with a reference's in the place of image 0.

    Args:
        latent: (F, ...) latents of the step.
        reference: clean latent of the reference, the shape of one image.
        noise: standard normal numbers of that shape, the same at every step; None: the reference
            stays clean at every level, as released for FLUX.
        alpha: signal coefficient of the step's noise level, see ``transfuse.ops.noise_mix``.
        sigma: noise coefficient.
        guidance: the batch is two halves, each with an image 0 of its own.

    Returns:
        A new tensor in the shape and dtype of latent.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> from transfuse.methods.diffusion_control.neg_to_me import place_reference
        >>> x, own, noise = torch.zeros(3, 2), torch.ones(2), torch.full((2,), 10.0)
        >>> place_reference(x, own, noise=noise, alpha=0.8, sigma=0.6)
        tensor([[6.8000, 6.8000],
                [0.0000, 0.0000],
                [0.0000, 0.0000]])
    """
    if not isinstance(latent, Tensor) or latent.dim() < 2 or latent.shape[0] < 1 + guidance:
        raise ValueError(
            f"latent: expected (F, ...) of at least {1 + guidance} images, "
            f"got {_checks.describe(latent)}"
        )
    if guidance and latent.shape[0] % 2 == 1:
        raise ValueError(f"latent: expected two halves, got {latent.shape[0]} images")
    for name, value in (("reference", reference), ("noise", noise)):
        if value is None and name == "noise":
            continue
        if not isinstance(value, Tensor) or value.shape != latent.shape[1:]:
            raise ValueError(
                f"{name}: expected a tensor of shape {tuple(latent.shape[1:])}, "
                f"got {_checks.describe(value)}"
            )
        _checks.same_dtype(name, value, "latent", latent)
        _checks.same_device(name, value, "latent", latent)
    own = reference
    if noise is not None:
        own = noise_mix(reference[None], noise[None], alpha=alpha, sigma=sigma)[0]
    placed = latent.clone()
    placed[:: latent.shape[0] // 2 if guidance else latent.shape[0]] = own
    return placed
