"""What the curvature operators share: streamed batches, products with several vectors, processes.

An operator is a symmetric matrix over the parameters, mean of the matrices of single samples. Its
subclasses say how a batch is linearised; here batches are weighted by their sizes, linearisations
are kept while they fit, and shards of several processes are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops._linearisation import Linearisation, without_randomness
from transfuse.ops._parameter_vectors import ParameterSpace, Rows, Vectors
from transfuse.ops._progress import Progress, reporter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batches = Iterable[Any]
# What linearisations may hold between two products.
DEFAULT_MEMORY = 2**30


class _Batch(NamedTuple):
    linearisation: Linearisation
    size: int


class CurvatureOperator:
    """Base of :class:`HessianOperator` and :class:`GGNOperator`; see there."""

    _value_name = "loss"

    def __init__(
        self,
        params: Mapping[str, Tensor],
        batches: Batches,
        *,
        size_of: Callable[[Any], int] | None = None,
        group: ProcessGroup | None = None,
        memory: int = DEFAULT_MEMORY,
        check: bool = True,
        progress: Progress = False,
    ) -> None:
        self._space = ParameterSpace(params)
        self._params = dict(params)
        if not isinstance(batches, Iterable) or isinstance(batches, (str, Tensor, Mapping)):
            raise TypeError(
                f"batches: expected an iterable of batches, got {_checks.describe(batches)}"
            )
        if isinstance(batches, Iterator):
            raise TypeError(
                "batches: expected something that can be iterated again for every product (a list, "
                "a DataLoader), got an iterator, which can be read once"
            )
        if size_of is not None and not callable(size_of):
            raise TypeError(
                f"size_of: expected a callable or None, got {_checks.describe(size_of)}"
            )
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
            raise ValueError(f"memory: expected bytes, an integer of at least 0, got {memory!r}")
        reporter(progress, "", None)  # refuses what is no progress
        self._batches = batches
        self._size_of = batch_size if size_of is None else size_of
        self._group = group
        self._memory = memory
        self._check = bool(check)
        self._progress = progress
        self._kept: list[_Batch] | None = None
        self._state: tuple[object, ...] | None = None
        self._seen: tuple[int, float] | None = None

    # ---- what a matrix has -----------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P) for P parameters in all."""
        return (self._space.size, self._space.size)

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters, in which products are computed."""
        return self._space.dtype

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return self._space.device

    @property
    def T(self) -> CurvatureOperator:
        """The operator itself: the matrix is symmetric."""
        return self

    @property
    def H(self) -> CurvatureOperator:
        """The operator itself: the matrix is real and symmetric."""
        return self

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._space.size} x {self._space.size}, "
            f"{len(self._space.names)} parameters, {_checks.dtype_name(self.dtype)}, {self.device})"
        )

    def __matmul__(self, vectors: Vectors) -> Vectors:
        """Products with one or several vectors, in the form they are given in.

        Args:
            vectors: (P,) or (P, K); or a list, tuple or dict of tensors in the shapes of the
                parameters, each with the same trailing dimension K or without one.
        """
        rows, back = self._space.rows(vectors)
        return back(self._products(rows))

    def to_scipy(self):
        """The operator as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays.

        Half precision is seen as float32, which NumPy has.

        Raises:
            ImportError: SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy needs SciPy: pip install scipy") from error
        dtype = _accumulator(self.dtype)

        def product(array):
            vectors = torch.as_tensor(array, dtype=dtype).to(self.device)
            return (self @ vectors).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
        return LinearOperator(
            self.shape,
            matvec=lambda x: product(x.reshape(-1)),
            rmatvec=lambda x: product(x.reshape(-1)),
            matmat=product,
            rmatmat=product,
            dtype=numpy_dtype,
        )

    def release(self) -> None:
        """Let go of the linearisations kept for the next product."""
        self._kept = self._state = self._seen = None

    # ---- products --------------------------------------------------------------------------------

    def _linearise(self, batch: Any) -> Linearisation:
        raise NotImplementedError

    def _value(self, batch: Any) -> float:
        """The number ``value`` of a linearisation, evaluated anew without one."""
        raise NotImplementedError

    def _products(self, rows: Rows) -> Rows:
        """Rows (K, P) times the matrix, in the accumulation dtype."""
        total = torch.zeros(rows.shape, dtype=_accumulator(self.dtype), device=self.device)
        pieces = [self._space.pieces(row) for row in rows]
        sums = [self._space.pieces(row) for row in total]

        def add(linearisation: Linearisation, index: int, size: int) -> None:
            linearisation.add_product(pieces[index], sums[index], weight=size)

        return self._mean(rows, total, add)

    def quadratic_forms(self, vectors: Vectors) -> Tensor:
        """v^T A v for one or several vectors, cheaper than the products A v.

        Args:
            vectors: in any form that ``@`` takes.

        Returns:
            () for one vector, (K,) for several; float64.
        """
        rows, _ = self._space.rows(vectors)
        total = torch.zeros(rows.shape[0], dtype=torch.float64, device=self.device)
        pieces = [self._space.pieces(row) for row in rows]

        def add(linearisation: Linearisation, index: int, size: int) -> None:
            total[index] += size * linearisation.form(pieces[index])

        self._mean(rows, total, add)
        return total[0] if self._space.single(vectors) else total

    def _mean(
        self, rows: Rows, total: Tensor, add: Callable[[Linearisation, int, int], None]
    ) -> Tensor:
        """``total`` after adding every batch for every row, over all processes, per sample."""
        if self._group is None:
            count = self._add_local(rows.shape[0], add)
        else:
            failure: Exception | None = None
            count = 0
            try:
                count = self._add_local(rows.shape[0], add)
            except Exception as error:
                # The other processes must hear of it, or they would wait for this one.
                failure = error
            count = self._sum_processes(rows, total, count, failure)
        if count == 0:
            raise ValueError("batches: expected at least one sample, got none")
        total /= count
        if not bool(total.isfinite().all()):
            if not bool(rows.isfinite().all()):
                raise ValueError("vectors: expected finite numbers, got infinity or NaN")
            raise FloatingPointError(
                f"the product holds infinity or NaN although loss and vectors are finite: it "
                f"overflows {_checks.dtype_name(self.dtype)}, or a derivative of the loss is not "
                "finite here"
            )
        return total

    def _add_local(self, vectors: int, add: Callable[[Linearisation, int, int], None]) -> int:
        """Adds every batch of this process; the number of samples."""
        length = len(self._batches) if isinstance(self._batches, Sized) else None
        steps = None if length is None else length * vectors
        report = reporter(self._progress, type(self).__name__, steps)
        count = done = 0
        for linearisation, size in self._linearised():
            for index in range(vectors):
                add(linearisation, index, size)
                done += 1
                report(done)
            count += size
            del linearisation
        return count

    def _linearised(self) -> Iterator[_Batch]:
        """Every batch that is not empty, linearised now or for an earlier product."""
        state = self._fingerprint()
        if state != self._state:
            self._kept = self._seen = None
            self._state = state
        if self._kept is not None:
            yield from self._kept
            return
        keep: list[_Batch] | None = []
        held, count, loss = 0, 0, 0.0
        for index, batch in enumerate(self._batches):
            size = self._size(batch)
            if size == 0:
                continue
            with without_randomness("loss_fn", self.device) if self._check else nullcontext():
                linearisation = self._linearise(batch)
            if not math.isfinite(linearisation.value):
                raise ValueError(
                    f"batches[{index}]: expected a finite {self._value_name}, "
                    f"got {linearisation.value}"
                )
            if count == 0 and self._check and self._seen is None:
                self._compare(linearisation.value, self._value(batch), "evaluated twice")
            count, loss = count + size, loss + size * linearisation.value
            held += linearisation.saved_bytes
            keep = (
                None
                if keep is None or held > self._memory
                else [*keep, _Batch(linearisation, size)]
            )
            yield _Batch(linearisation, size)
            del linearisation  # not beside the next one
        if self._check and self._seen is not None:
            if self._seen[0] != count:
                raise ValueError(
                    f"batches: expected the same samples for every product, got {count} after "
                    f"{self._seen[0]}"
                )
            self._compare(self._seen[1] / max(count, 1), loss / max(count, 1), "in two products")
        self._seen, self._kept = (count, loss), keep

    def _compare(self, first: float, second: float, where: str) -> None:
        # Batches in another order change the last digits; noise changes the first ones.
        slack = min(1e3 * torch.finfo(self.dtype).eps, 1e-2) * max(abs(first), abs(second))
        if abs(first - second) > slack + torch.finfo(self.dtype).tiny:
            raise ValueError(
                f"loss_fn: expected a function of parameters and batch, got {first:.8g} and "
                f"{second:.8g} for the same {where}; fix what is random (dropout, augmented or "
                "incomplete data), or pass check=False"
            )

    def _fingerprint(self) -> tuple[object, ...]:
        """Changes when a parameter does, be it by an optimiser or through ``.data``."""
        values = [p.detach() for p in self._params.values()]
        norms = torch._foreach_norm(values, dtype=_accumulator(self.dtype))
        return (
            *(p._version if not p.is_inference() else 0 for p in values),
            *(p.data_ptr() for p in values),
            *torch.stack(norms).tolist(),
        )

    def _size(self, batch: Any) -> int:
        size = self._size_of(batch)
        if isinstance(size, Tensor):
            size = size.item()
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"size_of: expected an integer of at least 0, got {size!r}")
        return size

    def _sum_processes(
        self, rows: Rows, total: Tensor, count: int, failure: Exception | None
    ) -> int:
        """Sums products and numbers of samples over the group; agrees on failure first."""
        from torch import distributed

        vectors = float(rows.shape[0])
        check = float(rows.sum(dtype=torch.float64)) if failure is None else 0.0
        scale = float(rows.abs().sum(dtype=torch.float64)) if failure is None else 0.0
        limits = torch.tensor(
            [failure is not None, vectors, -vectors, check, -check, scale],
            dtype=torch.float64,
            device=self.device,
        )
        distributed.all_reduce(limits, op=distributed.ReduceOp.MAX, group=self._group)
        failed, most, least, high, low, scale = limits.tolist()
        if failure is not None:
            raise failure
        if failed > 0:
            raise RuntimeError("the product failed in another process of the group; see its error")
        if most != -least or high + low > 1e-9 * scale:
            raise ValueError(
                "vectors: expected the same in every process of the group, got different ones"
            )
        counts = torch.tensor([count], dtype=torch.int64, device=self.device)
        distributed.all_reduce(counts, group=self._group)
        distributed.all_reduce(total, group=self._group)
        return int(counts)


def batch_size(batch: Any) -> int:
    """Leading dimension of the first tensor in a batch (a tensor, or nested lists and mappings).

    Raises:
        TypeError: there is no tensor with a leading dimension.
    """
    first = _first_tensor(batch)
    if first is None or first.dim() == 0:
        raise TypeError(
            "batches: expected a batch with a tensor whose leading dimension counts samples, got "
            f"{_checks.describe(batch)}; pass size_of"
        )
    return first.shape[0]


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for entry in batch:
            found = _first_tensor(entry)
            if found is not None:
                return found
    return None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
