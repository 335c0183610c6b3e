"""Adaptive instance normalisation: the mean and deviation of one tensor given to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse import _backend, _native, _triton_ops
from transfuse._autograd import needs_derivative
from transfuse.ops import _adain_core, _adain_ops
from transfuse.ops._adain_call import normalise
from transfuse.ops._adain_core import Static
from transfuse.ops._adain_reference import adain_reference, composed

__all__ = ["adain"]

_backend.declare("adain", ("reference", "cpu", "triton", "cuda"))
_adain_ops.register_triton()
if _native.status().loaded:
    _adain_ops.register()


def adain(
    content: Tensor,
    style: Tensor,
    *,
    dims: Sequence[int] = (-2, -1),
    eps: float = 1e-4,
    backend: str | None = None,
) -> Tensor:
    r"""Gives the content the mean and standard deviation of the style, per remaining index.

    .. math:: \mathrm{out} = \sigma_s \, \frac{\mathrm{content} - \mu_c}{\sigma_c + \mathrm{eps}}
              + \mu_s

    with means and unbiased standard deviations (n - 1) taken over ``dims``.

    Args:
        content: 1 to 8 dimensions, float32, float64, bfloat16 or float16; any strides
            (channels_last is as fast as contiguous).
        style: as many dimensions, same dtype and device. Dimensions in ``dims`` may have any extent
            of at least 1; the others are those of content, and the first (the batch) may also be 1.
        dims: dimensions the statistics are taken over: ``(-2, -1)`` per sample and channel of
            images, ``(0, 2, 3)`` per channel of a batch.
        eps: added to the content's deviation, at least 0.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        Shape, dtype and layout of content.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Memory is touched as little as possible: style is read once, content once from memory and
        once from the cache, the result is written once. Statistics are float32 (float64 for
        float64) over short stretches, merged in float64, so a large mean or an outlier costs no
        digits. The same bits come out on every run and for every number of threads.

        The deviation of a single element is 0. A constant plane has deviation 0 with derivative 0,
        and becomes the style's mean, also with ``eps=0``: no NaN arises that was not there before.

        First derivatives (reverse and forward mode) and the reverse of either are fused kernels of
        the same cost; forward mode over forward mode, and double backward with ``"triton"``, are
        composed of eager torch operations. Third derivatives raise; the reference has them.

    Reference:
        Huang & Belongie 2017, Arbitrary style transfer in real-time with adaptive instance
        normalization (arXiv:1703.06868), equation 8.

    Example:
        >>> import torch
        >>> from transfuse.ops import adain
        >>> content, style = torch.randn(2, 4, 8, 8), 3 * torch.randn(1, 4, 16, 16) + 1
        >>> out = adain(content, style)
        >>> torch.allclose(out.mean((2, 3)), style.mean((2, 3)).expand(2, 4), atol=1e-5)
        True
    """
    if backend == "reference":
        return adain_reference(content, style, dims=dims, eps=eps)
    axes, eps = normalise(content, style, dims, eps)
    chosen = _backend.choose("adain", backend, content.device, content.dtype)
    if chosen == "composed":
        return composed(content, style, axes, eps)
    static = Static(axes, eps, _triton_ops.traced(chosen))
    if needs_derivative((content, style)) and not torch.compiler.is_compiling():
        return _adain_core.functions.forward(static, (content, style))[0]
    return _adain_core.forward(static, (content, style))[0]
