"""NormGrad: what a virtual identity layer's parameters would receive from each location."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transfuse import _backend, _native
from transfuse.ops import _saliency_core, _saliency_ops
from transfuse.ops._saliency_call import layer, plan
from transfuse.ops._saliency_core import Normed
from transfuse.ops._saliency_reference import normgrad

__all__ = ["normgrad_map"]

_backend.declare("normgrad_map", ("reference", "cpu", "triton", "cuda"))
_saliency_ops.register_triton()
if _native.status().loaded:
    _saliency_ops.register()


def normgrad_map(
    act: Tensor,
    grad: Tensor,
    *,
    phase1: str = "conv1x1",
    phase2: str = "norm",
    layout: str = "nchw",
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor:
    r"""Size of each location's contribution to the gradient of a layer's parameters.

    Phase 1 says which contribution S of location u, with activations a and gradients g:

    - ``"conv1x1"``: the outer product :math:`g_u a_u^T`;
    - ``"conv3x3"``: of :math:`g_u` and the 3 x 3 neighbourhood of a around u, zeros outside
      (3 x 3 x 3 in a volume);
    - ``"conv3x3_depthwise"``: :math:`g_{cu}` times the neighbourhood of :math:`a_c`, every c;
    - ``"scaling"``: :math:`a_{cu} g_{cu}`; ``"bias"``: :math:`g_{cu}`;
    - ``"conv"``: of the convolution that really follows: the patch that it sees at output u,
      with the gradient of that output.

    Phase 2 reduces the entries of S to one number: ``"norm"``
    :math:`\lVert S \rVert_2`, ``"filter_norm"`` :math:`\lVert \max(S, 0) \rVert_2`, ``"sum"``,
    ``"max"``. NormGrad is conv1x1 with norm, :math:`\lVert a_u \rVert \lVert g_u \rVert`;
    selective NormGrad is scaling with filter_norm; scaling with sum is the linear approximation.

    Args:
        act: activations, float32, float64, bfloat16 or float16; any strides. For ``"conv"`` the
            input of the convolution.
        grad: gradient of the score with respect to them, of the same shape and dtype. For
            ``"conv"`` the gradient with respect to the output of the convolution.
        phase1: which contribution, see above.
        phase2: which reduction, see above.
        layout: ``"nchw"``: (B, C, h, w) or (B, C, d, h, w); ``"nhwc"``: (B, h, w, C) or
            (B, d, h, w, C); ``"tokens"``: (B, T, C), for phases without neighbours.
        kernel_size: of the convolution, for phase ``"conv"`` alone, as the next three: an integer
            or one per spatial axis.
        stride: of the convolution.
        padding: of the convolution, by zeros.
        dilation: of the convolution.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        (B, h, w), (B, d, h, w) or (B, T) at the locations of grad, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument that does not fit, or a geometry that does not lead from
            the locations of act to those of grad; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        No outer product and no patch is formed. With sums of squares, of squares of positive and
        of negative parts, and extremes at each location (n, p, m, M, m', of a summed or taken over
        the neighbourhood), norm is :math:`\sqrt{n_a n_g}`, filter_norm
        :math:`\sqrt{p_a p_g + m_a m_g}`, sum the product of sums, max the largest of the four
        products of extremes. Squares are float32: entries above 1e18 or below 1e-19 leave their
        range. Each tensor is read once. NaN stays where it is seen. The kernels give the same bits
        on every run and for every number of threads. Derivatives of any order are those of the
        eager definition, 0 where a norm is 0; forward over forward raises.

    Reference:
        Rebuffi et al. 2020, There and Back Again: Revisiting Backpropagation Saliency Methods
        (arXiv:2004.02866).

    Example:
        >>> import torch
        >>> from transfuse.ops import normgrad_map
        >>> act, grad = torch.randn(2, 2, 5, 7, 7).unbind()
        >>> outer = torch.einsum("bchw,bdhw->bcdhw", grad, act)
        >>> torch.allclose(normgrad_map(act, grad), outer.flatten(1, 2).norm(dim=1), atol=1e-5)
        True
    """
    found = layer(act, grad, layout, alike=phase1 != "conv")
    given = {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    which = plan(found, act, grad, phase1, phase2, layout, given)
    if backend == "reference":
        result = normgrad(found.act, found.grad, which)
    else:
        chosen = _backend.choose("normgrad_map", backend, act.device, act.dtype)
        result = _saliency_core.call(Normed(which, chosen), found.act, found.grad)
    return result.unflatten(1, found.out_space)
