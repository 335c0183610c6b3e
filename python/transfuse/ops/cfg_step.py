"""Classifier-free guidance and one sampler update in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse import _backend, _native
from transfuse.ops import _cfg_reference, _mix_ops
from transfuse.ops._cfg_call import Call, normalise
from transfuse.ops._cfg_reference import CFGCosines, CFGOriginal, cosine, needs_of
from transfuse.ops._mix_core import Mixed, mix, read_at_once
from transfuse.ops._sampler_updates import DDIM, DDPM, Euler, Number, Predict, Update

__all__ = [
    "DDIM",
    "DDPM",
    "CFGCosines",
    "CFGOriginal",
    "Euler",
    "Predict",
    "cfg_step",
    "cfg_step_with_cosine",
    "cfg_step_with_original",
]

_backend.declare("cfg_step", ("reference", "cpu", "triton", "cuda"))
_mix_ops.register_triton()
if _native.status().loaded:
    _mix_ops.register()

# Numbers of the inputs in a call of mix: cond, uncond, sample, noise, those that there are.
_CC, _CU, _UU = (0, 0), (0, 1), (1, 1)


def cfg_step(
    sample: Tensor | None,
    cond: Tensor,
    uncond: Tensor | None,
    update: Update,
    *,
    scale: float | Tensor,
    rescale: float = 0.0,
    prediction: str = "epsilon",
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Guides a prediction and takes one sampler step with it.

    .. math:: g = u + s\,(c - u), \qquad
              m = g\,\bigl(1 - r + r\,\mathrm{std}(c) / \mathrm{std}(g)\bigr), \qquad
              x' = a x + b m + k\,\mathrm{noise}

    with a, b, k of the update and the prediction type, standard deviations per sample.

    Args:
        sample: latent x, (B, ...), float32, float64, bfloat16 or float16; None with ``Predict``.
        cond: model output c with the condition; shape, dtype and device of sample.
        uncond: model output u without it, or with a negative prompt; None if ``scale`` is 1.
        update: ``DDIM(alpha=, alpha_next=, eta=)``, ``DDPM(alpha=, alpha_next=, variance=)``,
            ``Euler(sigma=, sigma_next=)``, or ``Predict()`` for the guided prediction itself. Their
            levels are numbers or tensors (B,).
        scale: guidance strength s, any number or a tensor (B,).
        rescale: share r in [0, 1] of the rescaled prediction, which has the deviation of cond.
        prediction: what the model predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        noise: standard normal numbers, for an update that adds noise (eta > 0, DDPM).
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        The next latent, in the shape and dtype of cond.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Reads every input once and writes the result once; ``rescale`` takes one more reading of
        cond and uncond, for their deviations. Coefficients are float64, arithmetic is float32
        (float64 for float64). An input whose coefficient is exactly 0 (uncond at scale 1, noise in
        a last step) is not read. Inputs of different memory layouts are copied to one first. The
        same bits come out on every run and for every number of threads.

        Gradients reach all tensors, scale and levels included, to any order, in reverse and forward
        mode. Where the deviation of c or g is 0 nothing is rescaled. Deviations are made of float64
        moments about 0: a mean of k deviations costs k^2 of their digits.

    Reference:
        Ho & Salimans 2022, Classifier-free diffusion guidance (arXiv:2207.12598); Lin et al. 2023,
        Common diffusion noise schedules and sample steps are flawed (arXiv:2305.08891), section 3.4
        (rescale).

    Example:
        >>> import torch
        >>> from transfuse.ops import DDIM, cfg_step
        >>> x, c, u = torch.randn(3, 2, 4, 8, 8).unbind(0)
        >>> x = cfg_step(x, c, u, DDIM(alpha=0.5, alpha_next=0.6), scale=7.5)
        >>> x.shape
        torch.Size([2, 4, 8, 8])
    """
    call = normalise(
        sample, cond, uncond, update,
        scale=scale, rescale=rescale, prediction=prediction, noise=noise,
    )  # fmt: skip
    chosen = _choose(call, backend)
    if chosen is None:
        return _cfg_reference.composed(call)
    return _run(call, chosen, original=False).outputs[0]


def cfg_step_with_original(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    update: Update,
    *,
    scale: float | Tensor,
    rescale: float = 0.0,
    prediction: str = "epsilon",
    noise: Tensor | None = None,
    backend: str | None = None,
) -> CFGOriginal:
    r"""As :func:`cfg_step`, with the clean latent that the guided prediction implies.

    .. math:: x_0 = p x + q m, \qquad \text{for noise predictions }
              (x - \sqrt{1 - \bar\alpha}\, m) / \sqrt{\bar\alpha}

    Args:
        sample: latent x, (B, ...).
        cond: see :func:`cfg_step`, as the others.
        uncond: model output without the condition.
        update: with a known noise level (``Predict(alpha=...)``).
        scale: guidance strength.
        rescale: share of the rescaled prediction.
        prediction: what the model predicts.
        noise: for an update that adds noise.
        backend: see :func:`cfg_step`.

    Returns:
        ``CFGOriginal(sample, original)``: the next latent and the clean one.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Example:
        >>> import torch
        >>> from transfuse.ops import DDIM, cfg_step_with_original
        >>> x, c, u = torch.randn(3, 2, 4, 8, 8).unbind(0)
        >>> step = cfg_step_with_original(x, c, u, DDIM(alpha=0.5, alpha_next=1.0), scale=3.0)
        >>> torch.allclose(step.sample, step.original, atol=1e-5)
        True
    """
    call = normalise(
        sample, cond, uncond, update,
        scale=scale, rescale=rescale, prediction=prediction, noise=noise, need=("sample", "alpha"),
    )  # fmt: skip
    chosen = _choose(call, backend)
    if chosen is None:
        return CFGOriginal(_cfg_reference.composed(call), _cfg_reference.composed_original(call))
    return CFGOriginal(*_run(call, chosen, original=True).outputs)


def cfg_step_with_cosine(
    sample: Tensor | None,
    cond: Tensor,
    uncond: Tensor,
    update: Update,
    *,
    scale: float | Tensor,
    rescale: float = 0.0,
    prediction: str = "epsilon",
    noise: Tensor | None = None,
    space: str = "prediction",
    backend: str | None = None,
) -> CFGCosines:
    r"""As :func:`cfg_step`, with the cosine between the two predictions of each sample.

    .. math:: \gamma = \langle c, u \rangle / (\lVert c \rVert \lVert u \rVert)

    Args:
        sample: latent x, (B, ...); None with ``Predict`` in prediction space.
        cond: see :func:`cfg_step`, as the others.
        uncond: model output without the condition.
        update: the sampler update.
        scale: guidance strength.
        rescale: share of the rescaled prediction.
        prediction: what the model predicts.
        noise: for an update that adds noise.
        space: ``"prediction"``: cosine of the model outputs; ``"original"``: of the clean latents
            that each of them implies.
        backend: see :func:`cfg_step`.

    Returns:
        ``CFGCosines(sample, cosine)``: the next latent, and (B,) float32 (float64 for float64).
        The cosine of two zero vectors is 1, of one zero vector 0.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        No pass over the data beyond those of :func:`cfg_step`. Products are summed in float64, so a
        cosine of half-precision predictions is good to float32, also for clean latents at high
        noise, where most of x and prediction cancel.

    Example:
        >>> import torch
        >>> from transfuse.ops import Predict, cfg_step_with_cosine
        >>> c = torch.randn(2, 4, 8, 8)
        >>> step = cfg_step_with_cosine(None, c, 2 * c, Predict(), scale=2.0)
        >>> step.cosine
        tensor([1., 1.])
    """
    call = normalise(
        sample, cond, uncond, update,
        scale=scale, rescale=rescale, prediction=prediction, noise=noise, need=needs_of(space),
    )  # fmt: skip
    chosen = _choose(call, backend)
    if chosen is None:
        return CFGCosines(
            _cfg_reference.composed(call), _cfg_reference.composed_cosine(call, space)
        )
    pairs: tuple[tuple[int, int], ...] = (_CC, _CU, _UU)
    if space == "original":
        pairs += ((0, 2), (1, 2), (2, 2))
    result = _run(call, chosen, original=False, pairs=pairs)
    moments = (call.move.p, call.move.q) if space == "original" else (0.0, 1.0)
    if chosen == "cpu" and _plain((result.outputs[0], result.products, *moments)):
        # The same formula in Python, which costs less than as many small tensor operations.
        values = [_cosine_number(*_moments(row, *moments)) for row in result.products.tolist()]
        found = torch.tensor(values, dtype=_statistics(cond))
    else:
        found = cosine(*_moments(result.products.unbind(1), *moments)).to(_statistics(cond))
    return CFGCosines(result.outputs[0], found)


def _plain(values: Sequence[object]) -> bool:
    """Whether small results may be read and computed with as Python numbers."""
    if isinstance(values[-1], Tensor) or isinstance(values[-2], Tensor):
        return False
    tensors = [t for t in values if isinstance(t, Tensor)]
    return read_at_once("cpu", tensors) and not any(t.requires_grad for t in tensors)


def _moments(products: Sequence, p: Number, q: Number) -> tuple:
    """|a|^2, <a, b>, |b|^2 for a = p x + q c and b = p x + q u, from the products of c, u and x."""
    cc, cu, uu, *rest = products
    if not rest:
        return cc, cu, uu
    cx, ux, xx = rest
    base, linear, square = p * p * xx, p * q, q * q
    return (
        base + 2.0 * linear * cx + square * cc,
        base + linear * (cx + ux) + square * cu,
        base + 2.0 * linear * ux + square * uu,
    )


def _cosine_number(first: float, cross: float, second: float) -> float:
    """``cosine`` of numbers."""
    if first > 0.0 and second > 0.0:
        return cross / (math.sqrt(first) * math.sqrt(second))
    if math.isnan(first) or math.isnan(second):
        return math.nan
    return 1.0 if first == second == 0.0 else 0.0


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _choose(call: Call, backend: str | None) -> str | None:
    """The backend with kernels that runs; None for eager torch."""
    if backend == "reference":
        return None
    chosen = _backend.choose("cfg_step", backend, call.cond.device, call.cond.dtype)
    return None if chosen == "composed" else chosen


def _run(
    call: Call, backend: str, *, original: bool, pairs: tuple[tuple[int, int], ...] = ()
) -> Mixed:
    """The next latent, the clean one if wanted, and products of the inputs."""
    inputs = [t for t in (call.cond, call.uncond, call.sample, call.noise) if t is not None]
    factor: Number | list[float] = 1.0
    if call.rescale > 0.0 and call.uncond is not None:
        # 2 stands for the constant 1: sums of either prediction.
        moments = mix(inputs[:2], (), (_CC, _CU, _UU, (0, 2), (1, 2)), backend).products
        factor = _rescaling(call, moments)
    move = call.move
    if isinstance(factor, list):
        if any(isinstance(n, Tensor) for n in move):
            factor = torch.tensor(factor, dtype=torch.float64)
        else:
            return _run_numbers(call, inputs, factor, backend, original, pairs)
    of_cond, of_uncond = factor * call.scale, factor * (1.0 - call.scale)
    rows = [_row(call, of_cond, of_uncond, move.a, move.b, move.c)]
    if original:
        rows.append(_row(call, of_cond, of_uncond, move.p, move.q, 0.0))
    return mix(inputs, rows, pairs, backend)


def _run_numbers(
    call: Call,
    inputs: Sequence[Tensor],
    factors: list[float],
    backend: str,
    original: bool,
    pairs: tuple[tuple[int, int], ...],
) -> Mixed:
    """As :func:`_run`, with one factor per sample and numbers otherwise."""
    s, move = call.scale, call.move
    rows = []
    for a, b, c in ((move.a, move.b, move.c), (move.p, move.q, 0.0))[: 2 if original else 1]:
        own = [b * f * s for f in factors]
        rest = [b * f * (1.0 - s) for f in factors]
        row: list = [own, rest]
        row += [n for t, n in ((call.sample, a), (call.noise, c)) if t is not None]
        rows.append([*row, 0.0])
    return mix(inputs, rows, pairs, backend)


def _row(
    call: Call, of_cond: Number, of_uncond: Number, a: Number, b: Number, c: Number
) -> Sequence[Number]:
    row = [b * of_cond]
    for tensor, number in ((call.uncond, b * of_uncond), (call.sample, a), (call.noise, c)):
        if tensor is not None:
            row.append(number)
    return [*row, 0.0]


def _rescaling(call: Call, products: Tensor) -> Tensor | list[float]:
    """Factor of the guided prediction, (B,), from the moments of the two predictions; a list where
    nothing watches."""
    s, r = call.scale, call.rescale
    count = max(call.cond.shape[1:].numel(), 1)
    if not isinstance(s, Tensor) and products.device.type == "cpu" and _plain((products, 0.0, s)):
        factors = []
        for row in products.tolist():
            own, guided, least = _variances(row, s, count)
            varied = own > least[0] and guided > least[1]
            factors.append(1.0 - r + r * math.sqrt(own / guided) if varied else 1.0)
        return factors
    own, guided, least = _variances(products.unbind(1), s, count)
    varied = (own > least[0]) & (guided > least[1])
    ratio = torch.where(varied, own, 1.0) / torch.where(varied, guided, 1.0)
    return 1.0 - r + r * ratio.sqrt()


def _variances(products: Sequence, s: Number, count: int) -> tuple:
    """Sums of squares about the mean of the conditional and of the guided prediction, and what of
    either is only the rounding of a constant prediction."""
    cc, cu, uu, sum_c, sum_u = products
    own = cc - sum_c * sum_c / count
    cross, other = cu - sum_c * sum_u / count, uu - sum_u * sum_u / count
    rest = 1.0 - s
    guided = s * s * own + 2.0 * s * rest * cross + rest * rest * other
    return own, guided, (1e-14 * cc, 1e-14 * (s * s * cc + rest * rest * uu))
