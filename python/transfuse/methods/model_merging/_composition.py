"""A frozen model whose parameters are moved along task vectors by learned coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse.methods.model_merging import _state_dicts as states_of
from transfuse.methods.model_merging._task_vectors import (
    LowRankTaskVector,
    TaskVector,
    same_names,
)
from transfuse.ops import lincomb

Vectors = Sequence[TaskVector | LowRankTaskVector]
_GRANULARITIES = ("block", "task")


class _Held(NamedTuple):
    model: nn.Module
    vectors: tuple
    base: dict[str, Tensor]


class Composition(nn.Module):
    r"""A model at :math:`\theta_0^{(j)} + \sum_i \lambda_i^{(j)} \tau_i^{(j)}`, for every tensor j.

    Args:
        model: pre-trained; its parameters are read, never changed. They and the task vectors are
            not parameters of this module.
        vectors: n task vectors of the same names, all dense or all low-rank. Parameters that they
            do not name stay as they are; buffers are the model's.
        granularity: ``"block"``: a coefficient per task and tensor; ``"task"``: one per task; an
            integer K: K per task and tensor, each entry of a tensor having one of them at random.
        partition: of granularity K, by name, uint8 or uint16 numbers below K in the shape of the
            tensor; None: hashed from ``seed`` and the entry's number, which costs no memory.
        rank2_only: matrices alone are moved, as the released code does for K.
        linearised: evaluate f(theta_0) + J sum_i lambda_i tau_i instead.
        dtype: of the composed parameters; None: the model's.
        seed: of the partition.

    Raises:
        TypeError, ValueError: no task vectors, names or shapes that do not fit (with a list), an
            option out of range.

    Notes:
        Coefficients start at 0, where the model is the pre-trained one. Each call composes all
        parameters once: the memory of one model, whatever the number of task vectors; the backward
        pass forms nothing of that size but the gradient of the parameters. Sums are float32.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> tau = TaskVector.of({n: torch.ones_like(p) for n, p in model.named_parameters()})
        >>> composed = Composition(model, [tau])
        >>> composed.coef.shape, [name for name, _ in composed.named_parameters()]
        (torch.Size([1, 2]), ['coef'])
    """

    active: Tensor
    _held: _Held

    def __init__(
        self,
        model: nn.Module,
        vectors: Vectors,
        *,
        granularity: str | int = "block",
        partition: Mapping[str, Tensor] | None = None,
        rank2_only: bool = False,
        linearised: bool = False,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {_checks.describe(model)}")
        for name, flag in (("rank2_only", rank2_only), ("linearised", linearised)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected a bool, got {_checks.describe(flag)}")
        if dtype is not None and dtype not in _checks.FLOATING:
            raise TypeError(f"dtype: expected a floating dtype or None, got {dtype!r}")
        self.granularity, self.partitions = _granularity(granularity)
        self.rank2_only, self.linearised, self.dtype, self.seed = (
            rank2_only,
            linearised,
            dtype,
            seed,
        )
        base = _base(model, vectors)
        self.names = tuple(base)
        self.moved = tuple(n for n in base if not rank2_only or base[n].dim() == 2)
        if not self.moved:
            raise ValueError("vectors: expected a matrix among the tensors, got none")
        self.low_rank = isinstance(vectors[0], LowRankTaskVector)
        if self.low_rank and self.partitions is not None:
            raise ValueError(
                f"granularity: expected 'block' or 'task' for low-rank vectors, got {granularity}; "
                "expand them for partitions"
            )
        # Not registered: neither trained nor stored with the coefficients.
        object.__setattr__(self, "_held", _Held(model, tuple(vectors), base))
        self._ids = self._checked_ids(partition)
        shape: tuple[int, ...] = (len(vectors),)
        if self.granularity != "task":
            shape = (*shape, len(self.names))
        if self.partitions is not None:
            shape = (*shape, self.partitions)
        first = base[self.names[0]]
        kind = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.coef = nn.Parameter(torch.zeros(shape, dtype=kind, device=first.device))
        self.register_buffer("active", torch.ones(shape[:2], dtype=torch.bool, device=first.device))

    @property
    def vectors(self) -> tuple:
        """The task vectors."""
        return self._held.vectors

    @property
    def model(self) -> nn.Module:
        """The pre-trained model."""
        return self._held.model

    def extra_repr(self) -> str:
        kind = "low-rank " if self.low_rank else ""
        return (
            f"{len(self.vectors)} {kind}task vectors of {len(self.names)} tensors, "
            f"granularity={self.granularity!r}, linearised={self.linearised}"
        )

    def _checked_ids(self, partition: Mapping[str, Tensor] | None) -> list[Tensor] | None:
        if partition is None:
            return None
        if self.partitions is None:
            raise ValueError("partition: expected None unless granularity is a number")
        missing = [n for n in self.moved if n not in partition]
        if missing:
            raise ValueError(f"partition: expected every tensor that moves, {missing[:8]} missing")
        return [partition[n] for n in self.moved]

    def coefficients(self) -> Tensor:
        """Those in use, with 0 for task vectors that are not (see ``active``)."""
        active = self.active
        while active.dim() < self.coef.dim():
            active = active.unsqueeze(-1)
        return torch.where(active, self.coef, 0.0)

    def change(self) -> dict[str, Tensor]:
        """sum_i lambda_i tau_i by name, in the dtypes of the model; differentiable."""
        return self._combined(with_base=False)

    def parameters_at(self) -> dict[str, Tensor]:
        """The composed parameters by name; differentiable with respect to the coefficients."""
        return self._combined(with_base=True)

    def _combined(self, *, with_base: bool) -> dict[str, Tensor]:
        base = self._held.base
        table = self.coefficients()
        if table.dim() > 1 and self.moved != self.names:
            known = {n: j for j, n in enumerate(self.names)}
            table = table[:, [known[n] for n in self.moved]]
        still = {n: t.detach() for n, t in base.items()} if with_base else {}
        first = [base[n].detach() for n in self.moved]
        if self.dtype is not None:
            still = {n: t.to(self.dtype) for n, t in still.items()}
        if self.low_rank:
            made = self._low_rank(first, table, with_base)
        else:
            lists = [[v[n] for n in self.moved] for v in self.vectors]
            options: dict[str, Any] = {}
            if self.partitions is not None:
                options["partition"] = self.seed if self._ids is None else self._ids
            # A base of zeros sets the precision of the change: vectors may be half.
            start = first if with_base else [torch.zeros_like(t) for t in first]
            made = lincomb(lists, table, base=start, **options)
        if self.dtype is not None:
            made = [t.to(self.dtype) for t in made]
        return {**still, **dict(zip(self.moved, made, strict=True))}

    def _low_rank(self, first: list[Tensor], table: Tensor, with_base: bool) -> list[Tensor]:
        """One matrix product per weight over the factors of all tasks side by side."""
        made = []
        for j, (name, start) in enumerate(zip(self.moved, first, strict=True)):
            pairs = [v[name] for v in self.vectors]
            column = table if table.dim() == 1 else table[:, j]
            dtype = torch.promote_types(start.dtype, torch.float32)
            down = torch.cat([p.down for p in pairs]).to(dtype)
            up = torch.cat(
                [p.up.to(dtype) * (p.scale * c) for p, c in zip(pairs, column, strict=True)], dim=1
            )
            product = up @ down
            made.append((start.to(dtype) + product if with_base else product).to(start.dtype))
        return made

    def forward(self, *inputs: Any) -> Any:
        """The model's output for its positional inputs."""
        model = self.model
        if not self.linearised:
            return torch.func.functional_call(model, self.parameters_at(), inputs)
        base = self._held.base
        start = {n: base[n].detach() for n in self.moved}
        if self.dtype is not None:
            start = {n: t.to(self.dtype) for n, t in start.items()}

        def at(params: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(model, params, inputs)

        value, slope = torch.func.jvp(at, (start,), (self.change(),))  # type: ignore[misc]
        return value + slope

    @torch.no_grad()
    def materialize(self) -> dict[str, Tensor]:
        """A state dict of the model with the composed parameters, and no cost at inference.

        Raises:
            ValueError: coefficients that are not finite.
        """
        if not bool(self.coef.isfinite().all()):
            raise ValueError("coef: expected finite coefficients, got some that are not")
        if self.linearised:
            raise ValueError("materialize: a linearised model is none of the model's own form")
        made = self.parameters_at()
        names = _names_by_memory(self.model, made)
        state = {
            n: t.detach().clone() for n, t in self.model.state_dict().items() if n not in names
        }
        for name, source in names.items():
            state[name] = made[source]
        return {name: state[name] for name in self.model.state_dict()}


def _granularity(value: object) -> tuple[str | int, int | None]:
    if isinstance(value, str) and value in _GRANULARITIES:
        return value, None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"granularity: expected 'block', 'task' or a number of partitions, got {value!r}"
        )
    return value, _checks.positive_int("granularity", value)


def _base(model: nn.Module, vectors: object) -> dict[str, Tensor]:
    """The parameters that the vectors name, in the model's order, each once."""
    if isinstance(vectors, Mapping) or not isinstance(vectors, Sequence):
        raise TypeError(
            f"vectors: expected a list of task vectors, got {_checks.describe(vectors)}"
        )
    if len(vectors) == 0:
        raise ValueError("vectors: expected at least one task vector, got none")
    kind = type(vectors[0])
    for i, vector in enumerate(vectors):
        if not isinstance(vector, (TaskVector, LowRankTaskVector)) or type(vector) is not kind:
            raise TypeError(
                f"vectors[{i}]: expected task vectors of one kind, got {type(vector).__name__}"
            )
    same_names(list(vectors))
    once = dict(model.named_parameters())
    every = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in model.named_buffers()}
    first = vectors[0]
    problems = [
        f"{n} is no parameter of the model"
        for n in first
        if n not in every | dict.fromkeys(buffers)
    ]
    found: dict[str, Tensor] = {}
    for name, p in once.items():
        if name not in first:
            continue
        trouble = states_of.quantised(p)
        if trouble is not None:
            problems.append(f"{name} {trouble}")
        elif not p.is_floating_point():
            problems.append(f"{name} is {_checks.dtype_name(p.dtype)}")
        elif first[name].shape != p.shape:
            problems.append(
                f"{name} has shape {tuple(first[name].shape)} in the vectors, {tuple(p.shape)} in "
                "the model"
            )
        found[name] = p
    states_of.refuse(problems)
    if not found:
        raise ValueError("vectors: expected names of parameters of the model, got none")
    return found


def _names_by_memory(model: nn.Module, made: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name of the state dict that stands for a composed parameter, tied ones included."""
    every = dict(model.named_parameters(remove_duplicate=False))
    by_parameter = {id(every[name]): name for name in made}
    return {n: by_parameter[id(p)] for n, p in every.items() if id(p) in by_parameter}
