"""Antithetic gradient estimates with noise that is never stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse import _backend, _checks, _native, _triton_ops
from transfuse._autograd import needs_derivative
from transfuse.ops import _nes_reference

__all__ = ["nes_gradient", "nes_perturb"]

_backend.declare("nes_perturb", ("reference", "cpu", "triton"))
_backend.declare("nes_gradient", ("reference", "cpu", "triton"))


def nes_perturb(
    x: Tensor,
    count: int,
    *,
    sigma: float,
    seed: int,
    start: int = 0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Antithetic perturbations of a tensor, their noise made from a counter.

    .. math:: x + \sigma \xi_i, \quad x - \sigma \xi_i, \qquad i = \text{start}, \ldots,
              \text{start} + \text{count} - 1, \quad \xi_i \sim N(0, I) \odot \text{mask}

    Args:
        x: any shape, float32, float64, bfloat16 or float16.
        count: number of pairs, at least 0.
        sigma: deviation of the noise, greater than 0.
        seed: 64-bit integer that names the noise.
        start: number of the first sample: chunks of one estimate share a seed and go on counting.
        mask: bool, broadcasts to x; no noise where it is False (there the result is x, to the bit).
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"``; a named one never falls back.

    Returns:
        (2 count, *x.shape) in the dtype of x: first all ``+``, then all ``-``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.
        NotImplementedError: a derivative is asked for. The ops exist for functions without one.

    Notes:
        Noise of sample i depends on (seed, i) and the place in x alone, not on the machine, the
        number of threads, or what else is computed: see ``_nes_reference.py`` for its definition
        (Philox 4x32-10 and Box-Muller). Memory is that of the result. No global generator is read.

    Reference:
        Wierstra et al. 2014, Natural evolution strategies (JMLR 15); Salimans et al. 2017,
        Evolution strategies as a scalable alternative to reinforcement learning (arXiv:1703.03864),
        section 2 (antithetic sampling); Salmon et al. 2011, Parallel random numbers: as easy as 1,
        2, 3.

    Example:
        >>> import torch
        >>> from transfuse.ops import nes_perturb
        >>> moved = nes_perturb(torch.zeros(2, 3), 4, sigma=0.1, seed=0)
        >>> moved.shape, torch.equal(moved[:4], -moved[4:])
        (torch.Size([8, 2, 3]), True)
    """
    x = _checked_tensor("x", x)
    count, start = _integer("count", count, 0), _integer("start", start, 0)
    sigma = _checks.number("sigma", sigma, positive=True)
    seed, mask = _integer("seed", seed, None), _checked_mask(mask, x, "x")
    chosen = _choose("nes_perturb", backend, x)
    _refuse_derivatives("nes_perturb", x)
    if chosen is None:
        return _nes_reference.perturb(x, count, sigma, seed, start, mask)
    return _kernel(chosen, "nes_perturb")(x.contiguous(), mask, _signed(seed), start, count, sigma)


def nes_gradient(
    weights: Tensor,
    like: Tensor,
    *,
    seed: int,
    start: int = 0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Weighted sum of the noise that :func:`nes_perturb` used, made again and never stored.

    .. math:: g = \sum_i w_i \xi_{\text{start} + i}

    With :math:`w_i = (\ell_i^+ - \ell_i^-) / (2 n \sigma)` it is the antithetic estimate of the
    gradient of a loss from n pairs.

    Args:
        weights: (n,), floating.
        like: tensor whose shape, dtype and device the noise was made for.
        seed: see :func:`nes_perturb`, as the others.
        start: number of the first sample.
        mask: where there is noise.
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        The shape of ``like``, float32 (float64 for float64). Exactly 0 outside the mask.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.
        NotImplementedError: a derivative is asked for.

    Notes:
        Memory is that of the result, for any number of samples. Samples are added in their order,
        so the same bits come out for every number of threads.

    Example:
        >>> import torch
        >>> from transfuse.ops import nes_gradient, nes_perturb
        >>> x, slope = torch.zeros(50), torch.linspace(-1, 1, 50)
        >>> losses = nes_perturb(x, 4000, sigma=0.1, seed=1) @ slope
        >>> weights = (losses[:4000] - losses[4000:]) / (2 * 4000 * 0.1)
        >>> gradient = nes_gradient(weights, x, seed=1)
        >>> bool(torch.cosine_similarity(gradient, slope, dim=0) > 0.97)
        True
    """
    like = _checked_tensor("like", like)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a tensor, got {_checks.describe(weights)}")
    _checks.tensor("weights", weights, ("n",))
    _checks.floating("weights", weights)
    _checks.same_device("weights", weights, "like", like)
    start, seed = _integer("start", start, 0), _integer("seed", seed, None)
    mask = _checked_mask(mask, like, "like")
    chosen = _choose("nes_gradient", backend, like)
    _refuse_derivatives("nes_gradient", weights)
    weights = weights.to(torch.float64).contiguous()
    if chosen is None:
        return _nes_reference.gradient(weights, like, seed, start, mask)
    # Only the shape, dtype and device of the tensor matter.
    like = like.detach().contiguous()
    return _kernel(chosen, "nes_gradient")(weights, like, mask, _signed(seed), start)


def _checked_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_checks.describe(value)}")
    _checks.tensor(name, value, ["axis"] * value.dim())
    _checks.floating(name, value)
    return value


def _checked_mask(mask: object, like: Tensor, of: str) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor or None, got {_checks.describe(mask)}")
    _checks.same_device("mask", mask, of, like)
    shape = tuple(like.shape)
    mask = _checks.broadcast("mask", mask, shape, [f"that of {of}"])
    return mask.expand(shape).contiguous()


def _integer(name: str, value: object, least: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {_checks.describe(value)}")
    if least is None and not -(2**63) <= value < 2**64:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")
    if least is not None and not least <= value < 2**63:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")
    return value


def _signed(seed: int) -> int:
    """The same 64 bits as a signed integer, which a schema takes."""
    return seed - 2**64 if seed >= 2**63 else seed


def _choose(op: str, backend: str | None, x: Tensor) -> str | None:
    """The backend with kernels that runs; None for eager torch."""
    if backend == "reference":
        return None
    chosen = _backend.choose(op, backend, x.device, x.dtype)
    return None if chosen == "composed" else chosen


def _refuse_derivatives(op: str, *tensors: Tensor) -> None:
    if needs_derivative(tensors):
        raise NotImplementedError(
            f"{op}: has no derivative; pass detached tensors, outside torch.func transforms"
        )


def _kernel(backend: str, name: str) -> Callable:
    if _triton_ops.traced(backend) == _triton_ops.COMPILED:
        return getattr(torch.ops.transfuse, f"{name}_triton")
    if backend == "triton":
        return _triton_ops.kernel("nes", name)
    return getattr(torch.ops.transfuse, name)


def _fake_perturb(x, mask, seed, start, samples, sigma):
    return x.new_empty((2 * samples, *x.shape))


def _fake_gradient(weights, x, mask, seed, start):
    return x.new_empty(x.shape, dtype=_nes_reference.working_dtype(x))


for _name, _schema, _fake in (
    (
        "nes_perturb",
        "(Tensor x, Tensor? mask, SymInt seed, SymInt start, SymInt samples, float sigma) "
        "-> Tensor",
        _fake_perturb,
    ),
    (
        "nes_gradient",
        "(Tensor weights, Tensor x, Tensor? mask, SymInt seed, SymInt start) -> Tensor",
        _fake_gradient,
    ),
):
    _triton_ops.define("nes", _name, _schema, recorded=True)
    torch.library.register_fake(f"transfuse::{_name}_triton", _fake)
    if _native.status().loaded:
        torch.library.register_fake(f"transfuse::{_name}", _fake)
