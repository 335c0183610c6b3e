"""Low-rank adapted linear and convolution layers, with an expert per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.ops._lora_call import conv2d_call, linear_call

__all__ = ["lora_conv2d", "lora_linear"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scale: float | Tensor = 1.0,
    expert: int | Tensor | None = None,
) -> Tensor:
    r"""A linear layer plus the low-rank delta of one expert, chosen for each sample.

    .. math:: y = W x + b + \mathrm{scale}_e\, B_e A_e x

    Args:
        x: (B, ..., I).
        weight: W (O, I), shared by all experts.
        bias: b, (O,), or (E, O) with one per expert, or None.
        down: A (E, r, I).
        up: B (E, O, r).
        scale: alpha / r: a number, or a tensor (E,).
        expert: which expert each sample uses: int64 (B,), or one number for all; None: the only
            one.

    Returns:
        (B, ..., O).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Notes:
        A composition of torch operations, on purpose. The shared part is one matrix product of all
        samples, and the low-rank part r / min(I, O) of its work; each is a library GEMM, the floor
        here. Neither W + B A nor a weight per sample is formed. Samples of at least r rows take the
        factors of their own experts, in one batched product that adds to the shared part; shorter
        ones, whose factors would be most of what is moved, are grouped by expert. Experts that no
        sample uses cost nothing, and gradients of any order are torch's own.

    Reference:
        Hu et al. 2022, LoRA (arXiv:2106.09685), equation 3.

    Example:
        >>> import torch
        >>> from transfuse.ops import lora_linear
        >>> x, w = torch.randn(2, 5, 8), torch.randn(4, 8)
        >>> down, up = torch.randn(3, 2, 8), torch.zeros(3, 4, 2)
        >>> y = lora_linear(x, w, None, down, up, scale=0.5, expert=torch.tensor([2, 0]))
        >>> torch.equal(y, torch.nn.functional.linear(x, w))
        True
    """
    chosen, scale = linear_call(x, weight, bias, down, up, scale, expert)
    if bias is not None and bias.dim() == 2:
        shift = bias[chosen] if isinstance(chosen, int) else bias.index_select(0, chosen)
        shared = F.linear(x, weight)
        shift = shift.view(-1, *([1] * (x.dim() - 2)), shift.shape[-1])
        shared = shared + shift
    else:
        shared = F.linear(x, weight, bias)
    if isinstance(chosen, int):
        low = _scaled(F.linear(x, down[chosen]), scale, chosen)
        return _added(shared, low, up[chosen])
    if x.dim() > 2 and x.shape[1:-1].numel() >= down.shape[1]:
        return _gathered(x, shared, down, up, chosen, scale)

    def each(part: Tensor, e: int) -> Tensor:
        return F.linear(_scaled(F.linear(part, down[e]), scale, e), up[e])

    return shared + _by_expert(x, chosen, each)


def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scale: float | Tensor = 1.0,
    expert: int | Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    r"""A convolution plus the low-rank delta of one expert, chosen for each sample.

    .. math:: y = (W + \mathrm{scale}_e\, \mathrm{reshape}(B_e A_e)) * x + b

    with :math:`B_e A_e` of shape (O k, I k) read as (O, I, k, k), as the adapters of loralib do.

    Args:
        x: (B, I, H, W).
        weight: (O, I, k, k), a square kernel, one group.
        bias: (O,), or (E, O) with one per expert, or None.
        down: A (E, r, I k).
        up: B (E, O k, r).
        scale: alpha / r: a number, or a tensor (E,).
        expert: int64 (B,), or one number for all; None: the only one.
        stride, padding, dilation: of ``torch.nn.functional.conv2d``.

    Returns:
        (B, O, H', W').

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Notes:
        The reshape mixes rows of B A across output channels and kernel rows, so the delta has no
        small factorisation as two convolutions: it is formed, once per expert in use (not per
        sample or forward of each layer of each expert), and added to the shared weight, so that
        each group of samples takes one convolution. Merged for good, see ``merge`` of the methods.

    Example:
        >>> import torch
        >>> from transfuse.ops import lora_conv2d
        >>> x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
        >>> down, up = torch.randn(1, 2, 9), torch.randn(1, 12, 2)
        >>> lora_conv2d(x, w, None, down, up, scale=0.5, padding=1).shape
        torch.Size([2, 4, 6, 6])
    """
    chosen, scale = conv2d_call(x, weight, bias, down, up, scale, expert)

    def each(part: Tensor, e: int) -> Tensor:
        delta = _scaled(up[e] @ down[e], scale, e).view(weight.shape)
        shift = bias[e] if bias is not None and bias.dim() == 2 else bias
        return F.conv2d(part, weight + delta, shift, stride, padding, dilation)

    return _by_expert(x, chosen, each)


def _scaled(low: Tensor, scale: float | Tensor, e: int) -> Tensor:
    return low * (scale[e].to(low.dtype) if isinstance(scale, Tensor) else scale)


def _added(shared: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """``shared + low up^T``, the sum taken by the matrix product."""
    rows = torch.addmm(shared.flatten(0, -2), low.flatten(0, -2), up.mT)
    return rows.view(shared.shape)


def _gathered(
    x: Tensor, shared: Tensor, down: Tensor, up: Tensor, expert: Tensor, scale: float | Tensor
) -> Tensor:
    """``shared`` plus the low-rank part, a pair of factors for every sample."""
    low = torch.bmm(x.flatten(1, -2), down.index_select(0, expert).mT)
    if isinstance(scale, Tensor):
        scale = scale.to(low.dtype).index_select(0, expert).view(-1, 1, 1)
    rows = torch.baddbmm(shared.flatten(1, -2), low * scale, up.index_select(0, expert).mT)
    return rows.view(shared.shape)


def _by_expert(x: Tensor, expert: int | Tensor, each: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``each(samples, e)`` for the samples of each expert in use, put back in order."""
    if not isinstance(expert, Tensor):
        return each(x, expert)
    used = expert.unique().tolist()
    if len(used) == 0:
        return each(x, 0)
    if len(used) == 1:
        return each(x, used[0])
    order = torch.argsort(expert, stable=True)
    sizes = torch.bincount(expert, minlength=used[-1] + 1)[used].tolist()
    parts = x.index_select(0, order).split(sizes)
    results = torch.cat([each(part, e) for part, e in zip(parts, used, strict=True)])
    return results.index_select(0, torch.argsort(order))
