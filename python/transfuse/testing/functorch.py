"""How an op behaves under autograd, ``torch.func`` and ``torch.compile``: a table of reusable
checks.

Every check computes something through a transform and compares it with plain reverse-mode autograd
of the reference. The outcome is *right*, *raises* or *wrong*; an op may refuse a transform loudly,
but never return a wrong number, and zero where the truth is not zero is a wrong number (a check
whose truth is zero throughout is refused as one that shows nothing).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from transfuse.testing import oracle
from transfuse.testing.oracle import Function
from transfuse.testing.spec import Case, OpSpec, Outputs, Tensors

LANES = 3


@dataclass(frozen=True)
class Probe:
    """A call as a function of tensors, with the directions a check uses."""

    fn: Function
    tensors: Tensors
    names: tuple[str, ...]
    cotangents: Sequence[Tensor]
    direction: Sequence[Tensor]
    second: Sequence[Tensor]

    @property
    def named(self) -> tuple[Tensor, ...]:
        """The differentiable tensors."""
        return tuple(self.tensors[name].detach() for name in self.names)

    def of_named(self, *named: Tensor) -> Outputs:
        """The call as a function of its differentiable tensors alone."""
        return self.fn({**self.tensors, **dict(zip(self.names, named, strict=True))})

    def loss(self, *named: Tensor) -> Tensor:
        """``sum <cotangent, result>``, leaving out rows at -inf, where no loss is defined."""
        return _pair(self.of_named(*named), self.cotangents)

    def lanes(self, name: str) -> Tensor:
        """Several versions of one tensor, stacked in front."""
        tensor = self.tensors[name]
        if tensor.is_floating_point():
            return torch.stack([tensor * factor for factor in (1.0, -0.5, 0.25)])
        dim = tensor.dim() - 1
        if dim < 0:
            return torch.stack([tensor] * LANES)
        return torch.stack([tensor.roll(shift, dim) for shift in range(LANES)])


def _pair(results: Outputs, cotangents: Sequence[Tensor]) -> Tensor:
    total = None
    for result, cotangent in zip(results, cotangents, strict=True):
        # -inf (an empty softmax) times a cotangent is not a number to optimise.
        product = torch.where(result == -torch.inf, 0.0, result) * cotangent
        total = product.sum() if total is None else total + product.sum()
    return total


Compute = Callable[[Probe], Sequence[Tensor]]


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Args:
        name: unique.
        kind: what it belongs to in the support matrix: ``"forward"``, ``"backward"``, ``"double
            backward"``, ``"forward mode"``, ``"vmap"`` or ``"compile"``.
        compute: through the transform under test.
        expect: the same numbers by plain autograd and loops.
        units: tolerance, see ``transfuse.testing.oracle``.
        tiny: True if it takes as many calls as there are numbers, so that it needs a tiny case.
        may_raise: message of a refusal that is torch's own and so not held against the op.
    """

    name: str
    kind: str
    compute: Compute
    expect: Compute
    units: float
    tiny: bool = False
    may_raise: str | None = None


@dataclass(frozen=True)
class Outcome:
    """``status`` is ``"right"``, ``"raises"`` or ``"wrong"``."""

    status: str
    detail: str = ""


def run(
    check: Check,
    spec: OpSpec,
    case: Case,
    *,
    backend: str | None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Outcome:
    """Run one check on one case."""
    args = case.build(dtype, device, seed)
    fn = oracle.function(args, spec.op, backend)
    reference = oracle.function(args, spec.reference)
    probe = probe_of(fn, args.tensors, case.differentiable, reference)
    if spec.underivable is not None and check.expect is not _values:
        return _promised_refusal(check, probe)
    wide = Probe(
        reference,
        oracle.widen(probe.tensors),
        probe.names,
        *([t.to(torch.float64) for t in part] for part in _parts(probe)),
    )
    truth = check.expect(wide)
    if all(not bool((t != 0).any()) for t in truth) and any(t.numel() > 0 for t in truth):
        raise ValueError(f"check {check.name!r} on case {case.name!r}: the truth is zero")
    eager = None
    if dtype != torch.float64:
        eager = check.expect(Probe(reference, probe.tensors, probe.names, *_parts(probe)))
    try:
        with warnings.catch_warnings():
            # torch's own deprecations and notes on performance; none is about a wrong result.
            warnings.simplefilter("ignore")
            results = check.compute(probe)
    except Exception as error:  # any refusal counts as one; the caller judges its message
        return Outcome("raises", f"{type(error).__name__}: {error}")
    problems = oracle.compare_all(
        results,
        truth,
        eager,
        units=check.units,
        terms=oracle.magnitude(*truth),
        names=[f"{check.name}[{i}]" for i in range(len(results))],
        dtype=None if check.units == oracle.VALUE_UNITS else dtype,
    )
    return Outcome("wrong", "; ".join(problems)) if problems else Outcome("right")


def _promised_refusal(check: Check, probe: Probe) -> Outcome:
    """Of an op without derivatives, any result of a derivative is a wrong one."""
    try:
        check.compute(probe)
    except Exception as error:  # the caller judges its message
        return Outcome("raises", f"{type(error).__name__}: {error}")
    return Outcome("wrong", "gave a result, though the op has no derivative")


def refusal_allowed(check: Check, spec: OpSpec, detail: str) -> bool:
    """Whether a check that raised was allowed to, by torch's limits or by the spec's word."""
    patterns = [spec.refuses.get(check.name)]
    patterns.append(check.may_raise if spec.underivable is None else spec.underivable)
    patterns = [p for p in patterns if p is not None]
    return any(re.search(pattern, detail) for pattern in patterns)


def probe_of(
    fn: Function, tensors: Tensors, names: Sequence[str], reference: Function, seed: int = 1
) -> Probe:
    """Draw the directions for a call."""
    generator = torch.Generator().manual_seed(seed)
    outputs = oracle.values(reference, tensors)
    named = [tensors[name] for name in names]
    return Probe(
        fn,
        tensors,
        tuple(names),
        oracle.directions(outputs, generator),
        # Where an input forbids with -inf, moving it means nothing.
        [_still(d, t) for d, t in zip(oracle.directions(named, generator), named, strict=True)],
        [_still(d, t) for d, t in zip(oracle.directions(named, generator), named, strict=True)],
    )


def _still(direction: Tensor, at: Tensor) -> Tensor:
    return torch.where(at.isfinite(), direction, 0.0)


def _parts(probe: Probe) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    return probe.cotangents, probe.direction, probe.second


# -- the truth: plain reverse mode and loops ----------------------------------------------------


def _values(probe: Probe) -> Sequence[Tensor]:
    return oracle.values(probe.fn, probe.tensors)


def _gradients(probe: Probe) -> Sequence[Tensor]:
    named = [t.requires_grad_() for t in probe.named]
    return torch.autograd.grad(probe.loss(*named), named, materialize_grads=True)


def _tangents(probe: Probe) -> Sequence[Tensor]:
    """Forward mode by reverse mode twice: the gradient of <x, J^T u> with respect to u is J x."""
    named = [t.requires_grad_() for t in probe.named]
    results = probe.of_named(*named)
    seeds = [torch.zeros_like(r, requires_grad=True) for r in results]
    grads = torch.autograd.grad(results, named, seeds, create_graph=True, materialize_grads=True)
    inner = sum((g * d).sum() for g, d in zip(grads, probe.direction, strict=True))
    return torch.autograd.grad(inner, seeds, materialize_grads=True)


def _tangents_where_finite(probe: Probe) -> Sequence[Tensor]:
    return _mute_empty(_values(probe), _tangents(probe))


def _mute_empty(results: Sequence[Tensor], tangents: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tangent of -inf is 0 by agreement; leave it out of the comparison."""
    return [torch.where(r == -torch.inf, 0.0, t) for r, t in zip(results, tangents, strict=True)]


def _second(probe: Probe) -> Sequence[Tensor]:
    named = [t.requires_grad_() for t in probe.named]
    first = torch.autograd.grad(
        probe.loss(*named), named, create_graph=True, materialize_grads=True
    )
    inner = sum((g * d).sum() for g, d in zip(first, probe.direction, strict=True))
    return torch.autograd.grad(inner, named, materialize_grads=True)


def _curvature(probe: Probe) -> Sequence[Tensor]:
    rows = zip(_second(probe), probe.second, strict=True)
    return [sum((h * s).sum() for h, s in rows)]


def _jacobian(probe: Probe) -> Sequence[Tensor]:
    """Of the first result with respect to the first named tensor."""
    named = [t.requires_grad_() for t in probe.named]
    result = probe.of_named(*named)[0]
    rows = [
        torch.autograd.grad(entry, named[0], retain_graph=True, materialize_grads=True)[0]
        for entry in result.reshape(-1)
    ]
    return [torch.stack(rows).reshape(*result.shape, *named[0].shape)]


def _hessian(probe: Probe) -> Sequence[Tensor]:
    """Of the loss with respect to the first named tensor."""
    named = [t.requires_grad_() for t in probe.named]
    (first,) = torch.autograd.grad(probe.loss(*named), named[:1], create_graph=True)
    rows = [
        torch.autograd.grad(entry, named[0], retain_graph=True, materialize_grads=True)[0]
        for entry in first.reshape(-1)
    ]
    return [torch.stack(rows).reshape(*named[0].shape, *named[0].shape)]


def _loop(probe: Probe, names: Sequence[str], each: Compute) -> Sequence[Tensor]:
    lanes = {name: probe.lanes(name) for name in names}
    results = []
    for lane in range(LANES):
        tensors = {**probe.tensors, **{name: stack[lane] for name, stack in lanes.items()}}
        results.append(each(_with(probe, tensors)))
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def _with(probe: Probe, tensors: Tensors) -> Probe:
    return Probe(probe.fn, tensors, probe.names, *_parts(probe))


# -- the transforms -----------------------------------------------------------------------------


def _func_grad(probe: Probe) -> Sequence[Tensor]:
    return torch.func.grad(probe.loss, argnums=_all(probe))(*probe.named)


def _func_vjp(probe: Probe) -> Sequence[Tensor]:
    results, pull = torch.func.vjp(probe.of_named, *probe.named)
    cotangents = [
        torch.where(r == -torch.inf, 0.0, c) for r, c in zip(results, probe.cotangents, strict=True)
    ]
    return pull(tuple(cotangents))


def _func_jvp(probe: Probe) -> Sequence[Tensor]:
    results, tangents = torch.func.jvp(probe.of_named, probe.named, tuple(probe.direction))
    return _mute_empty(results, tangents)


def _forward_ad(probe: Probe) -> Sequence[Tensor]:
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(t, d) for t, d in zip(probe.named, probe.direction, strict=True)
        ]
        parts = [forward_ad.unpack_dual(r) for r in probe.of_named(*duals)]
        return _mute_empty(
            [p.primal for p in parts],
            [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in parts],
        )


def _each_alone(probe: Probe) -> Sequence[Tensor]:
    """Gradients with one input at a time requiring them."""
    grads = []
    for number in range(len(probe.names)):
        named = list(probe.named)
        named[number].requires_grad_()
        grads.extend(
            torch.autograd.grad(probe.loss(*named), [named[number]], materialize_grads=True)
        )
    return grads


def _each_jvp_alone(probe: Probe) -> Sequence[Tensor]:
    """Forward mode with a tangent on one input at a time; the sum is the whole tangent."""
    total: list[Tensor] | None = None
    results: Outputs = ()
    for number in range(len(probe.names)):
        named = list(probe.named)

        def of_one(one: Tensor, named: list[Tensor] = named, number: int = number) -> Outputs:
            return probe.of_named(*named[:number], one, *named[number + 1 :])

        results, tangents = torch.func.jvp(of_one, (named[number],), (probe.direction[number],))
        tangents = _mute_empty(results, tangents)
        total = (
            list(tangents)
            if total is None
            else [a + b for a, b in zip(total, tangents, strict=True)]
        )
    return total


def _batched_backward(probe: Probe) -> Sequence[Tensor]:
    """Several output gradients at once, as ``torch.autograd.functional`` vectorises Jacobians."""
    named = [t.requires_grad_() for t in probe.named]
    results = probe.of_named(*named)
    return torch.autograd.grad(
        results, named, _many(probe), is_grads_batched=True, materialize_grads=True
    )


def _batched_loop(probe: Probe) -> Sequence[Tensor]:
    named = [t.requires_grad_() for t in probe.named]
    results = probe.of_named(*named)
    rows = [
        torch.autograd.grad(results, named, lane, retain_graph=True, materialize_grads=True)
        for lane in zip(*_many(probe), strict=True)
    ]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _many(probe: Probe) -> list[Tensor]:
    return [torch.stack([c, -0.5 * c, c.flip(-1)]) for c in probe.cotangents]


def _inference(probe: Probe) -> Sequence[Tensor]:
    with torch.inference_mode():
        results = probe.fn(probe.tensors)
    return [r.clone() for r in results]


def _checkpoint(probe: Probe) -> Sequence[Tensor]:
    from torch.utils.checkpoint import checkpoint

    named = [t.requires_grad_() for t in probe.named]
    loss = checkpoint(probe.loss, *named, use_reentrant=False)
    return torch.autograd.grad(loss, named, materialize_grads=True)


def _grad_of_grad(probe: Probe) -> Sequence[Tensor]:
    def inner(*named: Tensor) -> Tensor:
        first = torch.func.grad(probe.loss, argnums=_all(probe))(*named)
        return sum((g * d).sum() for g, d in zip(first, probe.direction, strict=True))

    return torch.func.grad(inner, argnums=_all(probe))(*probe.named)


def _jvp_of_grad(probe: Probe) -> Sequence[Tensor]:
    first = torch.func.grad(probe.loss, argnums=_all(probe))
    return torch.func.jvp(first, probe.named, tuple(probe.direction))[1]


def _grad_of_jvp(probe: Probe) -> Sequence[Tensor]:
    def inner(*named: Tensor) -> Tensor:
        return torch.func.jvp(probe.loss, named, tuple(probe.direction))[1]

    return torch.func.grad(inner, argnums=_all(probe))(*probe.named)


def _jvp_of_jvp(probe: Probe) -> Sequence[Tensor]:
    def inner(*named: Tensor) -> Tensor:
        return torch.func.jvp(probe.loss, named, tuple(probe.direction))[1]

    return [torch.func.jvp(inner, probe.named, tuple(probe.second))[1]]


def _func_jacrev(probe: Probe) -> Sequence[Tensor]:
    return [torch.func.jacrev(lambda *named: probe.of_named(*named)[0])(*probe.named)]


def _func_jacfwd(probe: Probe) -> Sequence[Tensor]:
    return [torch.func.jacfwd(lambda *named: probe.of_named(*named)[0])(*probe.named)]


def _func_hessian(probe: Probe) -> Sequence[Tensor]:
    return [torch.func.hessian(probe.loss)(*probe.named)]


def _vmap_each(probe: Probe) -> Sequence[Tensor]:
    """Over one tensor at a time, whatever its dtype."""
    results: list[Tensor] = []
    for name in probe.tensors:
        results.extend(_vmap(probe, (name,), lambda p: p.fn(p.tensors)))
    return results


def _loop_each(probe: Probe) -> Sequence[Tensor]:
    results: list[Tensor] = []
    for name in probe.tensors:
        results.extend(_loop(probe, (name,), _values))
    return results


def _vmap_all(probe: Probe) -> Sequence[Tensor]:
    return _vmap(probe, tuple(probe.tensors), lambda p: p.fn(p.tensors))


def _loop_all(probe: Probe) -> Sequence[Tensor]:
    return _loop(probe, tuple(probe.tensors), _values)


def _vmap_last(probe: Probe) -> Sequence[Tensor]:
    """The lanes as the last axis of every differentiable tensor."""
    return _vmap(probe, probe.names, lambda p: p.fn(p.tensors), dim=-1)


def _loop_named(probe: Probe) -> Sequence[Tensor]:
    return _loop(probe, probe.names, _values)


def _vmap_of_grad(probe: Probe) -> Sequence[Tensor]:
    return _vmap(probe, probe.names, _func_grad)


def _loop_of_grad(probe: Probe) -> Sequence[Tensor]:
    return _loop(probe, probe.names, _gradients)


def _vmap_of_jvp(probe: Probe) -> Sequence[Tensor]:
    return _vmap(probe, probe.names, _func_jvp)


def _loop_of_jvp(probe: Probe) -> Sequence[Tensor]:
    return _loop(probe, probe.names, _tangents_where_finite)


def _grad_of_vmap(probe: Probe) -> Sequence[Tensor]:
    stacks = tuple(probe.lanes(name) for name in probe.names)

    def loss(*stacks: Tensor) -> Tensor:
        return torch.vmap(probe.loss)(*stacks).sum()

    return torch.func.grad(loss, argnums=_all(probe))(*stacks)


def _backward_of_vmap(probe: Probe) -> Sequence[Tensor]:
    stacks = tuple(probe.lanes(name).requires_grad_() for name in probe.names)
    loss = torch.vmap(probe.loss)(*stacks).sum()
    return torch.autograd.grad(loss, stacks, materialize_grads=True)


def _vmap(probe: Probe, names: Sequence[str], each: Compute, dim: int = 0) -> Sequence[Tensor]:
    stacks = [probe.lanes(name).movedim(0, dim) for name in names]

    def of_lanes(*lanes: Tensor) -> tuple[Tensor, ...]:
        tensors = {**probe.tensors, **dict(zip(names, lanes, strict=True))}
        return tuple(each(_with(probe, tensors)))

    return torch.vmap(of_lanes, in_dims=tuple(dim for _ in names))(*stacks)


def _all(probe: Probe) -> tuple[int, ...]:
    return tuple(range(len(probe.names)))


def _compiled(each: Callable[..., object], backend: str = "aot_eager") -> Callable[..., object]:
    torch._dynamo.reset()
    return torch.compile(each, fullgraph=True, backend=backend)


def _compile_forward(probe: Probe) -> Sequence[Tensor]:
    return _compiled(lambda tensors: probe.fn(tensors))(probe.tensors)


def _symbolic(tensors: Iterable[Tensor]) -> None:
    """Symbolic sizes only: dynamic=True would also make the options (a group number) symbolic."""
    for tensor in tensors:
        for dim in range(tensor.dim()):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _compile_dynamic(probe: Probe) -> Sequence[Tensor]:
    _symbolic(probe.tensors.values())
    return _compile_forward(probe)


def _compile_backward(probe: Probe) -> Sequence[Tensor]:
    named = [t.requires_grad_() for t in probe.named]
    return torch.autograd.grad(_compiled(probe.loss)(*named), named, materialize_grads=True)


def _compile_both(probe: Probe) -> Sequence[Tensor]:
    """Values and gradients of one graph with symbolic sizes."""
    named = [t.requires_grad_() for t in probe.named]
    _symbolic((*probe.tensors.values(), *named))
    results = _compiled(probe.of_named)(*named)
    loss = _pair(results, probe.cotangents)
    return [
        *(r.detach() for r in results),
        *torch.autograd.grad(loss, named, materialize_grads=True),
    ]


def _both(probe: Probe) -> Sequence[Tensor]:
    return [*_values(probe), *_gradients(probe)]


def _compile_inductor(probe: Probe) -> Sequence[Tensor]:
    named = [t.requires_grad_() for t in probe.named]
    loss = _compiled(probe.loss, backend="inductor")(*named)
    return torch.autograd.grad(loss, named, materialize_grads=True)


def _compile_double_backward(probe: Probe) -> Sequence[Tensor]:
    named = [t.requires_grad_() for t in probe.named]
    first = torch.autograd.grad(
        _compiled(probe.loss)(*named), named, create_graph=True, materialize_grads=True
    )
    inner = sum((g * d).sum() for g, d in zip(first, probe.direction, strict=True))
    # Not materialize_grads: it would turn torch's complaint of an unused input into zeros.
    return torch.autograd.grad(inner, named)


def _compile_func_grad(probe: Probe) -> Sequence[Tensor]:
    return _compiled(lambda *named: torch.func.grad(probe.loss, argnums=_all(probe))(*named))(
        *probe.named
    )


def _compile_func_jvp(probe: Probe) -> Sequence[Tensor]:
    return _compiled(lambda named, direction: torch.func.jvp(probe.of_named, named, direction)[1])(
        probe.named, tuple(probe.direction)
    )


def _compile_func_vmap(probe: Probe) -> Sequence[Tensor]:
    stacks = tuple(probe.lanes(name) for name in probe.names)
    return _compiled(lambda *lanes: torch.vmap(probe.of_named)(*lanes))(*stacks)


_ONE = oracle.VALUE_UNITS
_TWO = oracle.GRADIENT_UNITS
_ALONG = oracle.TANGENT_UNITS
_THREE = oracle.SECOND_UNITS
# What torch 2.10 to 2.13 themselves do not do, whatever the op.
_AOT_SECOND = "does not currently support double backward|not have been used in the graph"

CHECKS: tuple[Check, ...] = (
    Check("inference mode", "forward", _inference, _values, _ONE),
    Check("backward", "backward", _gradients, _gradients, _TWO),
    Check("backward, one input", "backward", _each_alone, _gradients, _TWO),
    Check("func.grad", "backward", _func_grad, _gradients, _TWO),
    Check("func.vjp", "backward", _func_vjp, _gradients, _TWO),
    Check("func.jacrev", "backward", _func_jacrev, _jacobian, _TWO, tiny=True),
    Check("batched backward", "backward", _batched_backward, _batched_loop, _TWO),
    Check("checkpoint", "backward", _checkpoint, _gradients, _TWO),
    Check("func.jvp", "forward mode", _func_jvp, _tangents_where_finite, _ALONG),
    Check("func.jvp, one input", "forward mode", _each_jvp_alone, _tangents_where_finite, _ALONG),
    Check("forward_ad", "forward mode", _forward_ad, _tangents_where_finite, _ALONG),
    Check("func.jacfwd", "forward mode", _func_jacfwd, _jacobian, _TWO, tiny=True),
    Check("double backward", "double backward", _second, _second, _THREE),
    Check("grad of grad", "double backward", _grad_of_grad, _second, _THREE),
    Check("jvp of grad", "double backward", _jvp_of_grad, _second, _THREE),
    Check("grad of jvp", "double backward", _grad_of_jvp, _second, _THREE),
    Check("jvp of jvp", "double backward", _jvp_of_jvp, _curvature, _THREE),
    Check("func.hessian", "double backward", _func_hessian, _hessian, _THREE, tiny=True),
    Check("vmap, one tensor", "vmap", _vmap_each, _loop_each, _ONE),
    Check("vmap, all tensors", "vmap", _vmap_all, _loop_all, _ONE),
    Check("vmap, last axis", "vmap", _vmap_last, _loop_named, _ONE),
    Check("vmap of grad", "vmap", _vmap_of_grad, _loop_of_grad, _TWO),
    Check("vmap of jvp", "vmap", _vmap_of_jvp, _loop_of_jvp, _ALONG),
    Check("grad of vmap", "vmap", _grad_of_vmap, _loop_of_grad, _TWO),
    Check("backward of vmap", "vmap", _backward_of_vmap, _loop_of_grad, _TWO),
    Check("compile", "compile", _compile_forward, _values, _ONE),
    Check("compile, dynamic", "compile", _compile_dynamic, _values, _ONE),
    Check("compile, backward", "compile", _compile_backward, _gradients, _TWO),
    Check("compile, inductor", "compile", _compile_inductor, _gradients, _TWO),
    Check(
        "compile, double backward",
        "compile",
        _compile_double_backward,
        _second,
        _THREE,
        may_raise=_AOT_SECOND,
    ),
    Check("compile, func.grad", "compile", _compile_func_grad, _gradients, _TWO),
    Check("compile, func.jvp", "compile", _compile_func_jvp, _tangents, _ALONG),
    Check("compile, func.vmap", "compile", _compile_func_vmap, _loop_named, _ONE),
)

# One compilation in place of two, for runs that cannot afford both (Triton's interpreter).
COMPILED = Check("compile, values and gradients", "compile", _compile_both, _both, _TWO)
