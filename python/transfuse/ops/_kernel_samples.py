"""What divergences of samples share: checks, row sums in float64, and a logarithm that does not
underflow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from transfuse import _checks
from transfuse.ops import _kernel_sums_core
from transfuse.ops._kernel_sums_call import of_factors, working_dtype
from transfuse.ops._kernel_sums_reference import CHUNK, kernel_product_sums_reference

# A sum of float32 kernels below this has lost most of its terms.
UNDERFLOW = 1e-30


def samples(name: str, value: object, *, least: int = 1) -> Tensor:
    """(N, d) of at least ``least`` rows."""
    value = _checks.dense(name, value)
    if value.dim() != 2:
        advice = "" if value.dim() != 1 else f"; {name}[:, None] is one number per sample"
        raise ValueError(
            f"{name}: expected 2 dimensions (N, d), got {value.dim()} "
            f"(shape {tuple(value.shape)}){advice}"
        )
    _checks.floating(name, value)
    if value.shape[0] < least:
        raise ValueError(f"{name}: expected at least {least} samples, got {value.shape[0]}")
    return value


def paired(name: str, value: object, of: str, reference: Tensor, *, least: int = 1) -> Tensor:
    """(N, d) with as many rows as another sample, on its device."""
    value = samples(name, value)
    _checks.size(name, value, 0, reference.shape[0], f"samples of {of}")
    _checks.same_device(name, value, of, reference)
    return samples(name, value, least=least)


def same_width(name: str, value: Tensor, of: str, reference: Tensor) -> None:
    """As many columns as another sample."""
    _checks.size(name, value, 1, reference.shape[1], f"width of {of}")
    _checks.same_device(name, value, of, reference)


def promoted(*tensors: Tensor) -> list[Tensor]:
    """The same in one dtype."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return [t.to(dtype) for t in tensors]


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def bandwidth(name: str, value: object) -> float | Tensor:
    """A positive number or a tensor of 0 dimensions, which the sums check themselves."""
    if isinstance(value, Tensor):
        return value
    return _checks.number(name, value, positive=True)


def halved(h: float | Tensor) -> float | Tensor:
    """The bandwidth of a Gaussian kernel squared."""
    return h * math.sqrt(0.5)


def row_sums(
    factors: Sequence[object],
    products: Sequence[Sequence[int]],
    *,
    weights: Tensor | None = None,
    kernel: str = "rbf",
    exclude: bool = False,
    backend: str | None,
) -> Tensor:
    """``kernel_product_sums`` in float64."""
    if backend == "reference":
        found = kernel_product_sums_reference(
            factors, products, weights=weights, kernel=kernel, exclude_diagonal=exclude
        )
        return found.to(torch.float64)
    call = of_factors(factors, products, weights, kernel, exclude)
    return _kernel_sums_core.sums(call, backend)


def log_total(
    total: Tensor, factors: Sequence[tuple[Tensor, Tensor | None, float | Tensor]],
    log_weights: Tensor | None, names: str,
) -> Tensor:  # fmt: skip
    """log of sum_ij w_i prod_f k_f(x_i, y_j), which ``total`` is unless it has underflown.

    Raises:
        ValueError: nothing is left even in logarithms.
    """
    if torch.compiler.is_compiling() or bool(total.detach() > UNDERFLOW):
        return total.log()
    rows = log_row_sums(factors)
    found = (rows if log_weights is None else rows + log_weights).logsumexp(0)
    if not bool(found.detach().isfinite()):
        raise ValueError(
            f"{names}: expected finite samples within reach of the bandwidth, got a sum of kernels "
            f"of {float(total.detach())} and its logarithm {float(found.detach())}; a larger "
            "bandwidth, or standardised samples, may help"
        )
    return found


def log_row_sums(
    factors: Sequence[tuple[Tensor, Tensor | None, float | Tensor]],
) -> Tensor:
    """log sum_j prod_f k_f(x_i, y_j) of Gaussian kernels, (N,) float64, by log-sum-exp."""

    def of_rows(start: int, stop: int, *flat: Tensor) -> Tensor:
        exponent = flat[0].new_zeros(())
        for i in range(0, len(flat), 3):
            x, y, h = flat[i : i + 3]
            centre = y.mean(0, keepdim=True).detach()
            x, y = x[start:stop] - centre, y - centre
            norms = x.square().sum(-1)[:, None] + y.square().sum(-1)
            exponent = exponent - 0.5 * (norms - 2.0 * (x @ y.mT)).clamp_min(0.0) / h.square()
        return exponent.to(torch.float64).logsumexp(1)

    flat: list[Tensor] = []
    for x, y, h in factors:
        wide = working_dtype(x.dtype)
        flat += [
            x.to(wide),
            (x if y is None else y).to(wide),
            torch.as_tensor(h, dtype=wide, device=x.device),
        ]
    rows, columns = flat[0].shape[0], flat[1].shape[0]
    step = max(1, CHUNK // max(1, columns * len(factors)))
    # The matrix of a stretch of rows is made again for its gradient.
    parts = [
        checkpoint(of_rows, i, min(rows, i + step), *flat, use_reentrant=False)
        for i in range(0, rows, step)
    ]
    return torch.cat(parts)
