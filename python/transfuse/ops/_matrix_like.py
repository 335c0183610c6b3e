"""What the estimators ask of a matrix: a shape and products; dense tensors and operators alike."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from transfuse import _checks


class MatrixLike(Protocol):
    """Anything square with ``shape`` and ``@`` on (P,) and (P, K) tensors."""

    @property
    def shape(self) -> tuple[int, int]: ...

    # Operators return what they are given: a vector, columns, or lists of tensors.
    def __matmul__(self, vectors: Any, /) -> Any: ...


class Matrix(NamedTuple):
    """A checked operator, and the dtype and device of vectors for it."""

    operator: MatrixLike
    size: int
    dtype: torch.dtype
    device: torch.device

    def products(self, rows: Tensor) -> Tensor:
        """Rows (K, P) times the (symmetric) matrix."""
        result = self.operator @ rows.mT
        if not isinstance(result, Tensor) or result.shape != rows.mT.shape:
            raise ValueError(
                f"operator: expected a product of shape {tuple(rows.mT.shape)}, "
                f"got {_checks.describe(result)}"
            )
        return result.mT

    def forms(self, rows: Tensor) -> list[float]:
        """z^T A z for every row z; from products where the operator has no cheaper way."""
        quadratic = getattr(self.operator, "quadratic_forms", None)
        if quadratic is not None:
            return quadratic(rows.mT).tolist()
        pairs = zip(rows, self.products(rows), strict=True)
        return [float(z.double() @ product.double()) for z, product in pairs]

    def product(self, vector: Tensor) -> Tensor:
        """The matrix times one vector (P,)."""
        return self.products(vector[None])[0]


def as_matrix(operator: Any) -> Matrix:
    """Checks a square operator; without a dtype or device of its own it gets float32 and the CPU.

    Vectors for half precision are float32: the operator rounds them, sums of them do not.

    Raises:
        TypeError, ValueError: it has no shape of two equal numbers, or no product.
    """
    shape = getattr(operator, "shape", None)
    if shape is None or not hasattr(operator, "__matmul__"):
        raise TypeError(
            f"operator: expected something with shape and @, got {_checks.describe(operator)}"
        )
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"operator: expected a square matrix, got shape {tuple(shape)}")
    if shape[0] == 0:
        raise ValueError("operator: expected at least one row, got none")
    dtype = getattr(operator, "dtype", torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"operator: expected a floating torch dtype, got {dtype}")
    if isinstance(operator, Tensor):
        wide = torch.promote_types(dtype, torch.float32)
        operator = operator.detach().to(wide)
    device = torch.device(getattr(operator, "device", "cpu"))
    return Matrix(operator, int(shape[0]), torch.promote_types(dtype, torch.float32), device)
