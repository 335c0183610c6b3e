"""What an op promises, as data: tests, benchmarks and the support matrix are driven by one
``OpSpec``.

A new op writes one module under ``transfuse.testing.specs`` and lists it there; the contract tests
(value, gradient, gradcheck, forward mode, functorch, compile, strides, errors, poison, determinism)
and the support matrix follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

TAGS = frozenset({"tiny", "awkward", "real", "bench"})


@dataclass(frozen=True)
class CallArgs:
    """One call of an op: its tensors by name, and how to make the call from them.

    Args:
        call: ``call(op, tensors, backend)`` builds the op's arguments from tensors with the names
            of ``tensors`` (the same ones, or variants of them) and calls ``op``. With ``backend``
            None it does not pass a backend at all, so that it also calls references.
        tensors: every tensor of the call, integers and masks included.
    """

    call: Callable[[Callable[..., object], Tensors, str | None], Tensor | Outputs]
    tensors: Tensors

    def run(
        self, op: Callable[..., object], tensors: Tensors, backend: str | None = None
    ) -> Outputs:
        """The call's results, always as a tuple."""
        result = self.call(op, tensors, backend)
        return (result,) if isinstance(result, Tensor) else tuple(result)


@dataclass(frozen=True)
class Case:
    """A named way to call an op.

    Args:
        name: unique within its spec.
        make: builds the call for a dtype, device and generator. The generator is a CPU generator,
            so that one seed gives the same numbers on every device.
        differentiable: names of the tensors that a gradient must reach.
        tags: ``"tiny"`` (fit for derivatives by finite differences), ``"awkward"`` (edges and
            odd sizes), ``"real"`` (a model's shape, small enough to test), ``"bench"`` (too large
            for a dense oracle in tests).
        refused_by: backends that do not take a case of this size.
    """

    name: str
    make: Callable[[torch.dtype, torch.device, torch.Generator], CallArgs]
    differentiable: tuple[str, ...]
    tags: frozenset[str] = frozenset()
    refused_by: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        unknown = self.tags - TAGS
        if unknown:
            raise ValueError(
                f"tags of case {self.name!r}: expected {sorted(TAGS)}, got {sorted(unknown)}"
            )

    def build(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> CallArgs:
        """The call for one seed."""
        return self.make(dtype, torch.device(device), torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class BadCase:
    """A call that must be refused: ``call(op)`` raises ``error`` with a message matching
    ``match``."""

    name: str
    call: Callable[[Callable[..., object]], object]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class RawCall:
    """A sample call of a private registered op, for ``torch.library.opcheck``."""

    name: str
    op: object
    args: tuple[object, ...]
    kwargs: Mapping[str, object] = field(default_factory=dict)

    def on(self, device: torch.device) -> RawCall:
        """The same call with its tensors on a device; leaves stay leaves."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.detach().to(device).requires_grad_(value.requires_grad)
            return [move(entry) for entry in value] if isinstance(value, list) else value

        kwargs = {name: move(value) for name, value in self.kwargs.items()}
        return RawCall(self.name, self.op, tuple(move(value) for value in self.args), kwargs)


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """Everything the tests, the benchmarks and the documentation know about an op.

    Args:
        name: the public name in ``transfuse.ops``.
        op: the public wrapper.
        reference: takes the same call without ``backend``; eager, float64-capable.
        cases: ways to call it, at least one tagged ``"tiny"``.
        dtypes: dtypes every backend supports.
        backends: names that ``op`` accepts as ``backend``.
        flops: floating-point operations of a call.
        bytes: bytes a call must read and write at least.
        errors: calls that must be refused.
        gradcheck: names of cases checked by finite differences in float64, to second order. The
            first one also stands for the op in the support matrix.
        refuses: checks of ``transfuse.testing.functorch`` that may raise instead of giving the
            right result, as ``{check name: regular expression for the message}``.
        vanishing: checks of ``transfuse.testing.functorch`` whose truth is zero for this op (the
            Hessian of an op that is linear in its first tensor), which show nothing.
        fuzz: ``fuzz(choose)`` returns a random case; ``choose(options)`` picks one of a sequence.
        raw_calls: ``raw_calls(backend)`` gives sample calls of the registered private ops behind a
            backend.
        varying: what may have other bits with another number of threads, as ``"tangent"`` or
            ``"second gradient"``: derivatives composed of torch's matrix products.
        declared_as: name of the op whose backends it uses; None: its own, or none at all if it
            is composed of other operations.
        underivable: for an op without derivatives, the regular expression of the message with which
            every derivative and every ``torch.func`` transform must be refused; the ``gradcheck``
            and ``differentiable`` names then say of what they are asked. None: it has them.
        noise: ``noise(seed)`` is a case of an op that draws noise, which must depend on that seed
            and on no global generator.
    """

    name: str
    op: Callable[..., object]
    reference: Callable[..., object]
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...]
    backends: tuple[str, ...]
    flops: Callable[[CallArgs], int]
    bytes: Callable[[CallArgs], int]
    errors: tuple[BadCase, ...]
    gradcheck: tuple[str, ...]
    refuses: Mapping[str, str] = field(default_factory=dict)
    vanishing: frozenset[str] = frozenset()
    fuzz: Callable[[Callable[[Sequence[object]], object]], Case] | None = None
    raw_calls: Callable[[str], tuple[RawCall, ...]] | None = None
    varying: frozenset[str] = frozenset()
    declared_as: str | None = None
    underivable: str | None = None
    noise: Callable[[int], Case] | None = None

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"cases of {self.name!r}: names must be unique, got {twice} twice")
        missing = sorted(set(self.gradcheck) - set(names))
        if missing or len(self.gradcheck) == 0:
            raise ValueError(
                f"gradcheck of {self.name!r}: expected names of cases, got {list(self.gradcheck)}"
            )

    def case(self, name: str) -> Case:
        """The case of a name."""
        for case in self.cases:
            if case.name == name:
                return case
        raise KeyError(name)

    def tagged(self, *tags: str) -> tuple[Case, ...]:
        """The cases with any of the tags."""
        return tuple(case for case in self.cases if case.tags.intersection(tags))
