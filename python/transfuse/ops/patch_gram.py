"""The second moment of image patches, without unfolding the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse import _backend, _native, _triton_ops
from transfuse._autograd import needs_derivative
from transfuse.ops import _patch_gram_core, _patch_gram_ops
from transfuse.ops._patch_gram_call import normalise
from transfuse.ops._patch_gram_core import Static
from transfuse.ops._patch_gram_reference import composed, defined

__all__ = ["patch_gram"]

_backend.declare("patch_gram", ("reference", "cpu", "triton"))
_patch_gram_ops.register_triton()
if _native.status().loaded:
    _patch_gram_ops.register()


def patch_gram(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor:
    r"""Sum over all patches of a batch of images of the patch times itself.

    .. math:: S = \sum_p x_p x_p^T

    where the patches :math:`x_p` are the columns of ``torch.nn.functional.unfold``.

    Args:
        x: (B, C, H, W), float32, float64, bfloat16 or float16; any strides.
        kernel_size: height and width of a patch, or one number for both.
        stride: steps between patches.
        padding: zeros around the images; pad before the call for other modes.
        dilation: distance of the pixels of a patch.
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"``; a named one never falls back.

    Returns:
        (n, n), symmetric to the bit, n = C kh kw, in ``unfold``'s order of rows; float32 (float64
        for float64). Divided by the number of patches it is their second moment.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Entries of one distance within the patch are one correlation of the image with itself
        shifted, up to the border. Each correlation is computed once, borders are added apart (never
        subtracted), half of the matrix is mirrored, and no patch is formed: for a 7 x 7 kernel of
        stride 2 a seventh of the operations of the product of unfolded patches. Sums are float32
        over short stretches and then float64. Where patches do not overlap (patch embeddings), that
        product is the best there is, and what runs by default. Up to 16 MiB of packed images (or
        one image) stay with the calling thread.

        The kernels give the same bits on every run and for every number of threads. Derivatives of
        any order are composed of torch operations, which unfold; forward over forward raises.

    Reference:
        Petersen et al. 2024, TrAct: Making first-layer pre-activations trainable
        (arXiv:2410.23970): the matrix its update inverts.

    Example:
        >>> import torch
        >>> from transfuse.ops import patch_gram
        >>> x = torch.randn(2, 3, 9, 9)
        >>> p = torch.nn.functional.unfold(x, 3, stride=2).transpose(1, 2).flatten(0, 1)
        >>> torch.allclose(patch_gram(x, 3, stride=2), p.T @ p, atol=1e-4)
        True
    """
    x, geometry = normalise(x, kernel_size, stride, padding, dilation)
    if backend == "reference":
        return defined(x[None], geometry)[0]
    chosen = _backend.choose("patch_gram", backend, x.device, x.dtype)
    if backend is None and geometry.apart:
        chosen = "composed"
    static = Static(geometry, _triton_ops.traced(chosen))
    if needs_derivative((x,)) and not torch.compiler.is_compiling():
        return _patch_gram_core.function(static, (x[None],))[0][0]
    if chosen == "composed":
        if needs_derivative((x,)):
            return defined(x[None], geometry)[0]
        return composed(x[None], geometry)[0]
    return _patch_gram_core.forward(static, (x[None],))[0][0]
