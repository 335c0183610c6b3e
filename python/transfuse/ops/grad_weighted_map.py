"""Grad-CAM and its relatives: channels of a layer weighted by gradients and summed."""

from __future__ import annotations

from torch import Tensor

from transfuse import _backend, _checks, _native
from transfuse.ops import _saliency_core, _saliency_ops
from transfuse.ops._saliency_call import METHODS, layer
from transfuse.ops._saliency_core import Weighted
from transfuse.ops._saliency_reference import weighted_map

__all__ = ["grad_weighted_map"]

_backend.declare("grad_weighted_map", ("reference", "cpu", "triton", "cuda"))
_saliency_ops.register_triton()
if _native.status().loaded:
    _saliency_ops.register()


def grad_weighted_map(
    act: Tensor,
    grad: Tensor,
    *,
    method: str = "gradcam",
    layout: str = "nchw",
    backend: str | None = None,
) -> Tensor:
    r"""Sum over channels of a layer's activations, weighted by the gradients of a score.

    .. math:: m_u = \sum_c w_{cu} a_{cu}

    with the weights

    - ``"gradcam"``: :math:`w_c = \frac1n \sum_v g_{cv}`;
    - ``"gradcam++"``: :math:`w_c = \sum_v \frac{g_{cv}^2 \max(g_{cv}, 0)}
      {2 g_{cv}^2 + (\sum_u a_{cu}) g_{cv}^3 \pm 10^{-6}}`;
    - ``"xgradcam"``: :math:`w_c = \sum_v g_{cv} a_{cv} / (\sum_v a_{cv} \pm 10^{-7})`;
    - ``"layercam"``: :math:`w_{cu} = \max(g_{cu}, 0)`;
    - ``"hirescam"``, also named ``"linear"``: :math:`w_{cu} = g_{cu}`;
    - ``"elementwise"``: the same, and negative products :math:`g_{cu} a_{cu}` are left out.

    Constants take the sign of what they are added to, which they keep away from zero.

    Args:
        act: activations, float32, float64, bfloat16 or float16; any strides.
        grad: gradient of the score with respect to them, of the same shape and dtype.
        method: how the weights are made, see above.
        layout: ``"nchw"``: (B, C, h, w) or (B, C, d, h, w); ``"nhwc"``: (B, h, w, C) or
            (B, d, h, w, C); ``"tokens"``: (B, T, C).
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        (B, h, w), (B, d, h, w) or (B, T) in float32 (float64 for float64), before any ReLU.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Each tensor is read once (the activations twice for ``"gradcam++"`` and ``"xgradcam"`` in
        layouts with channels last), nothing of its size is stored. Spatial axes that are not one
        run of memory are copied first. NaN stays at its location, and reaches a whole channel's
        weight where weights are pooled. The kernels give the same bits on every run and for every
        number of threads. Derivatives of any order are those of the eager definition, which forms
        the weights; forward over forward raises.

    Reference:
        Selvaraju et al. 2017, Grad-CAM (arXiv:1610.02391); Chattopadhay et al. 2018, Grad-CAM++
        (arXiv:1710.11063); Fu et al. 2020, XGrad-CAM (arXiv:2008.02312); Jiang et al. 2021,
        LayerCAM; Draelos and Carin 2020, HiResCAM (arXiv:2011.08891).

    Example:
        >>> import torch
        >>> from transfuse.ops import grad_weighted_map
        >>> act, grad = torch.randn(2, 2, 5, 7, 7).unbind()
        >>> weights = grad.mean((2, 3), keepdim=True)
        >>> torch.allclose(grad_weighted_map(act, grad), (weights * act).sum(1), atol=1e-6)
        True
    """
    code = _checks.choice("method", method, METHODS)
    found = layer(act, grad, layout, alike=True)
    if backend == "reference":
        result = weighted_map(found.act, found.grad, code)
    else:
        chosen = _backend.choose("grad_weighted_map", backend, act.device, act.dtype)
        result = _saliency_core.call(Weighted(code, chosen), found.act, found.grad)
    return result.unflatten(1, found.space)
