"""Vectors over the parameters of a model: one flat tensor, or one tensor for each parameter.

A flat vector is the concatenation of the flattened parameters in their order. Products work on
rows, (K, P) with one vector each, because the part of a row that belongs to a parameter is a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from transfuse import _checks

Rows = Tensor
Vectors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class ParameterSpace:
    """Names, shapes and places of some parameters in a flat vector.

    Args:
        params: name -> floating tensor; one dtype and one device.

    Raises:
        TypeError, ValueError: no mapping of names to such tensors; the message names the entry.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        if not isinstance(params, Mapping):
            raise TypeError(
                f"params: expected a dict of names to tensors, got {_checks.describe(params)}"
            )
        if len(params) == 0:
            raise ValueError("params: expected at least one parameter, got none")
        first: tuple[str, Tensor] | None = None
        for key, value in params.items():
            if not isinstance(key, str):
                raise TypeError(f"params: expected names of type str, got {_checks.describe(key)}")
            name = f"params[{key!r}]"
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {_checks.describe(value)}")
            _checks.tensor(name, value, ["axis"] * value.dim())
            _checks.floating(name, value)
            if first is None:
                first = (name, value)
            _checks.same_dtype(name, value, *first)
            _checks.same_device(name, value, *first)
        self.names = tuple(params)
        self.shapes = tuple(value.shape for value in params.values())
        self.sizes = tuple(shape.numel() for shape in self.shapes)
        self.size = sum(self.sizes)
        self.dtype, self.device = value.dtype, value.device

    def pieces(self, row: Tensor) -> list[Tensor]:
        """A row (P,) as views in the shapes of the parameters."""
        parts = row.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def single(self, vectors: Vectors) -> bool:
        """Whether an accepted form holds one vector, without a dimension that counts them."""
        if isinstance(vectors, Tensor):
            return vectors.dim() == 1
        if isinstance(vectors, Mapping):
            return vectors[self.names[0]].dim() == len(self.shapes[0])
        return vectors[0].dim() == len(self.shapes[0])

    def rows(self, vectors: Vectors) -> tuple[Rows, Callable[[Rows], Vectors]]:
        """Any accepted form as rows (K, P), and the way back to that form and its dtype.

        Raises:
            TypeError, ValueError: another form, shape, dtype or device; the message names it.
        """
        if isinstance(vectors, Tensor):
            return self._flat_rows(vectors)
        if isinstance(vectors, Mapping):
            rows, back = self._listed_rows(self._ordered(vectors), self.names)
            return rows, lambda out: dict(zip(self.names, back(out), strict=True))
        if isinstance(vectors, Sequence) and not isinstance(vectors, str):
            rows, back = self._listed_rows(list(vectors), range(len(vectors)))
            return rows, (lambda out: tuple(back(out))) if isinstance(vectors, tuple) else back
        raise TypeError(
            f"vectors: expected a tensor of {self.size} rows, or a list or dict of tensors in the "
            f"shapes of the parameters, got {_checks.describe(vectors)}"
        )

    def _check(self, name: str, value: object) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_checks.describe(value)}")
        _checks.tensor(name, value, ["axis"] * value.dim())
        _checks.floating(name, value)
        if value.device != self.device:
            raise ValueError(
                f"{name}: expected device {self.device} (that of the parameters), "
                f"got {value.device}"
            )
        return value.detach()

    def _flat_rows(self, vectors: Tensor) -> tuple[Rows, Callable[[Rows], Vectors]]:
        vectors = self._check("vectors", vectors)
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.size:
            raise ValueError(
                f"vectors: expected shape ({self.size},) or ({self.size}, K), "
                f"got {tuple(vectors.shape)}"
            )
        single, dtype = vectors.dim() == 1, vectors.dtype
        rows = vectors[None] if single else vectors.mT
        return rows.to(self.dtype).contiguous(), lambda out: (out[0] if single else out.mT).to(
            dtype
        )

    def _ordered(self, vectors: Mapping[str, Tensor]) -> list[Tensor]:
        if set(vectors) != set(self.names):
            missing = sorted(set(self.names) - set(vectors))
            extra = sorted(str(name) for name in set(vectors) - set(self.names))
            raise ValueError(
                f"vectors: expected one entry for each parameter, got none for {missing} "
                f"and unknown ones {extra}"
            )
        return [vectors[name] for name in self.names]

    def _listed_rows(
        self, vectors: list[Tensor], keys: Sequence[object]
    ) -> tuple[Rows, Callable[[Rows], list[Tensor]]]:
        if len(vectors) != len(self.names):
            raise ValueError(
                f"vectors: expected {len(self.names)} tensors, one for each parameter, "
                f"got {len(vectors)}"
            )
        labels = [f"vectors[{key!r}]" for key in keys]
        vectors = [self._check(label, v) for label, v in zip(labels, vectors, strict=True)]
        # A trailing dimension, in all of them or in none, counts vectors.
        single = self.single(vectors)
        count = 1 if single else vectors[0].shape[-1] if vectors[0].dim() > 0 else 0
        for label, value, shape in zip(labels, vectors, self.shapes, strict=True):
            expected = tuple(shape) if single else (*shape, count)
            if tuple(value.shape) != expected:
                raise ValueError(f"{label}: expected shape {expected}, got {tuple(value.shape)}")
            _checks.same_dtype(label, value, labels[0], vectors[0])
        dtype = vectors[0].dtype
        flat = [v.reshape(n, count).mT for v, n in zip(vectors, self.sizes, strict=True)]
        rows = torch.cat(flat, dim=1).to(self.dtype)

        def back(out: Rows) -> list[Tensor]:
            parts = out.to(dtype).split(self.sizes, dim=1)
            return [
                part[0].view(shape) if single else part.mT.reshape(*shape, count)
                for part, shape in zip(parts, self.shapes, strict=True)
            ]

        return rows, back
