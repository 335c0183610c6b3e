"""The contract every op keeps, checked from its spec alone (``transfuse.testing.specs``)."""

from __future__ import annotations

import dataclasses
import inspect
import re
import zlib
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfuse.testing import (
    CallArgs,
    Case,
    OpSpec,
    backends,
    functorch,
    inputs,
    matrix,
    oracle,
)
from transfuse.testing.oracle import GRADIENT_UNITS, SECOND_UNITS, TANGENT_UNITS, VALUE_UNITS
from transfuse.testing.spec import Outputs, Tensors
from transfuse.testing.specs import all_specs

SPECS = all_specs()
FUZZ_EXAMPLES = 40


def _name(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if isinstance(value, str) else getattr(value, "name", str(value))


def over(*axes: str, keep: Callable[..., bool] = lambda *_: True) -> pytest.MarkDecorator:
    """Parametrise over specs and, per spec, any of its backends, dtypes and cases."""
    choices = {
        "backend": lambda spec: spec.backends,
        "dtype": lambda spec: spec.dtypes,
        "case": lambda spec: tuple(c for c in spec.cases if "bench" not in c.tags),
    }
    rows = [(spec,) for spec in SPECS]
    for axis in axes:
        rows = [(*row, choice) for row in rows for choice in choices[axis](row[0])]
    rows = [row for row in rows if keep(*row) and not _refused(row)]
    if "backend" in axes:
        rows = _once_if_never(rows)
    ids = ["-".join(_name(v).replace(" ", "_") for v in row) for row in rows]
    if not axes:
        rows = [row[0] for row in rows]
    return pytest.mark.parametrize(",".join(("spec", *axes)), rows, ids=ids)


def _refused(row: Sequence[object]) -> bool:
    return any(isinstance(v, Case) and not v.refused_by.isdisjoint(row[1:]) for v in row[1:])


def _once_if_never(rows: Sequence[tuple]) -> list[tuple]:
    """Of rows that start with (spec, backend), one where the backend has no device: one skip."""
    if torch.cuda.is_available():
        return list(rows)
    kept, seen = [], set()
    for row in rows:
        if row[1] in backends.ON_CUDA:
            if (row[0].name, row[1]) in seen:
                continue
            seen.add((row[0].name, row[1]))
        kept.append(row)
    return kept


def _kernel(backend: str) -> bool:
    """The reference is not compared with itself everywhere, only where dispatch could break it."""
    return backend != "reference"


def _compared(spec: OpSpec, backend: str) -> bool:
    """The only backend of a composed op is compared with the op's reference."""
    return _kernel(backend) or spec.backends == ("reference",)


def _derivable(spec: OpSpec, backend: str, dtype: torch.dtype, case: Case) -> bool:
    if spec.underivable is not None:
        return False
    if not _compared(spec, backend):
        return dtype == torch.float32 and case.name in spec.gradcheck
    return "real" not in case.tags or dtype in (torch.float32, torch.bfloat16)


def _twice_derivable(spec: OpSpec, backend: str, dtype: torch.dtype, case: Case) -> bool:
    # The dense oracle of a second derivative holds many attention maps.
    return (
        "real" not in case.tags
        and _derivable(spec, backend, dtype, case)
        and _telling(spec, dtype, case)
    )


def _telling(spec: OpSpec, dtype: torch.dtype, case: Case) -> bool:
    """Every case in float32; in the others, which only load and store differently, some."""
    return dtype == torch.float32 or case.name in spec.gradcheck


def _small(spec: OpSpec, backend: str, dtype: torch.dtype, case: Case) -> bool:
    return _kernel(backend) and "real" not in case.tags and _telling(spec, dtype, case)


def _repeatable(spec: OpSpec, backend: str, dtype: torch.dtype, case: Case) -> bool:
    """Cases large enough to be divided among threads, and some with everything else."""
    return (
        _small(spec, backend, dtype, case)
        and dtype in (torch.float32, torch.bfloat16)
        and ("tiny" not in case.tags or case.name in spec.gradcheck)
    )


def _seed(case: Case) -> int:
    return zlib.crc32(case.name.encode()) % 1000


class Judge:
    """One call, its oracle, and eager torch in the same dtype."""

    def __init__(
        self,
        spec: OpSpec,
        args: CallArgs,
        names: Sequence[str],
        dtype: torch.dtype,
        backend: str | None,
    ) -> None:
        self.dtype = dtype
        self.derivable = spec.underivable is None
        self.names = tuple(names)
        self.tensors = args.tensors
        self.fn = oracle.function(args, spec.op, backend)
        self._reference = oracle.function(args, spec.reference)
        self._probe = functorch.probe_of(self._reference, args.tensors, names, self._reference)

    def truth(self, tensors: Tensors, compute: Callable[..., Sequence[Tensor]]) -> Sequence[Tensor]:
        return compute(self._reference, oracle.widen(tensors), torch.float64)

    def differences(
        self,
        results: Sequence[Tensor],
        compute: Callable[..., Sequence[Tensor]],
        *,
        units: float,
        terms: Sequence[Tensor],
        tensors: Tensors | None = None,
    ) -> list[str]:
        """What is wrong with ``results``, given how to compute them from a function of tensors."""
        tensors = self.tensors if tensors is None else tensors
        truth = self.truth(tensors, compute)
        eager = compute(self._reference, tensors, None)
        numbered = [f"result {i}" for i in range(len(truth))]
        names = self.names if len(truth) == len(self.names) else numbered
        return oracle.compare_all(
            results,
            truth,
            eager,
            units=units,
            terms=oracle.magnitude(*(terms if len(terms) > 0 else truth)),
            names=names,
            dtype=None if units == VALUE_UNITS else self.dtype,
        )

    def replace_cotangents(self, cotangents: Sequence[Tensor]) -> None:
        self._probe = dataclasses.replace(self._probe, cotangents=list(cotangents))

    def cotangents(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [t if dtype is None else t.to(dtype) for t in self._probe.cotangents]

    def direction(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [t if dtype is None else t.to(dtype) for t in self._probe.direction]

    # Each of these is a way to compute something from (function, tensors, dtype of the directions).

    def values(self, fn, tensors: Tensors, dtype: torch.dtype | None = None) -> Outputs:
        return oracle.values(fn, tensors)

    def gradients(self, fn, tensors: Tensors, dtype: torch.dtype | None = None) -> Outputs:
        return oracle.gradients(fn, tensors, self.names, self.cotangents(dtype))

    def tangents(self, fn, tensors: Tensors, dtype: torch.dtype | None = None) -> Outputs:
        results, tangents = oracle.tangents(fn, tensors, self.names, self.direction(dtype))
        # -inf does not move; what its tangent is called is left open.
        return tuple(
            torch.where(r == -torch.inf, 0.0, t) for r, t in zip(results, tangents, strict=True)
        )

    def second(self, fn, tensors: Tensors, dtype: torch.dtype | None = None) -> Outputs:
        return oracle.second_gradients(
            fn, tensors, self.names, self.cotangents(dtype), self.direction(dtype)
        )


def judge(
    spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, device: torch.device
) -> Judge:
    return Judge(spec, case.build(dtype, device, _seed(case)), case.differentiable, dtype, backend)


def assert_none(problems: Sequence[str]) -> None:
    assert not problems, "\n".join(problems)


def assert_same_bits(results: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    assert len(results) == len(others)
    for result, other in zip(results, others, strict=True):
        assert torch.equal(result.isnan(), other.isnan())
        assert torch.equal(result.nan_to_num(), other.nan_to_num())


# -- specs --------------------------------------------------------------------------------------


@over("case")
def test_spec_is_consistent(spec: OpSpec, case: Case) -> None:
    args = case.build(torch.float32)
    assert set(case.differentiable) <= set(args.tensors)
    again = case.build(torch.float32)
    for name, tensor in args.tensors.items():
        assert torch.equal(tensor.nan_to_num(), again.tensors[name].nan_to_num()), name
    assert spec.flops(args) >= 0
    assert spec.bytes(args) >= 0


# -- numbers ------------------------------------------------------------------------------------


@over("backend", "dtype", "case")
def test_value(spec: OpSpec, backend: str, dtype: torch.dtype, case: Case, device_for) -> None:
    j = judge(spec, case, dtype, backend, device_for(spec, backend, dtype))
    before = {name: tensor.clone() for name, tensor in j.tensors.items()}
    results = j.values(j.fn, j.tensors)
    assert_none(
        j.differences(results, j.values, units=VALUE_UNITS, terms=tuple(j.tensors.values()))
    )
    for name, tensor in j.tensors.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), f"{name} was changed"
        for result in results:
            aliased = result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            assert result.numel() == 0 or not aliased, f"a result shares memory with {name}"


@over("backend", "dtype", "case", keep=_derivable)
def test_gradient(spec: OpSpec, backend: str, dtype: torch.dtype, case: Case, device_for) -> None:
    j = judge(spec, case, dtype, backend, device_for(spec, backend, dtype))
    results = j.gradients(j.fn, j.tensors)
    assert_none(j.differences(results, j.gradients, units=GRADIENT_UNITS, terms=()))


@over("backend", "dtype", "case", keep=_twice_derivable)
def test_forward_mode(
    spec: OpSpec, backend: str, dtype: torch.dtype, case: Case, device_for
) -> None:
    j = judge(spec, case, dtype, backend, device_for(spec, backend, dtype))
    results = j.tangents(j.fn, j.tensors)
    assert_none(j.differences(results, j.tangents, units=TANGENT_UNITS, terms=tuple(j.direction())))


@over("backend", "dtype", "case", keep=_twice_derivable)
def test_double_backward(
    spec: OpSpec, backend: str, dtype: torch.dtype, case: Case, device_for
) -> None:
    j = judge(spec, case, dtype, backend, device_for(spec, backend, dtype))
    results = j.second(j.fn, j.tensors)
    first = j.truth(j.tensors, j.gradients)
    second = j.truth(j.tensors, j.second)
    assert_none(j.differences(results, j.second, units=SECOND_UNITS, terms=(*first, *second)))


def _checked_by_differences(spec: OpSpec, backend: str, case: Case) -> bool:
    return case.name in spec.gradcheck and spec.underivable is None


@over("backend", "case", keep=_checked_by_differences)
def test_gradcheck(spec: OpSpec, backend: str, case: Case, device_for) -> None:
    if not _kernel(backend) and case.name != spec.gradcheck[0]:
        pytest.skip("the reference is torch's own autograd")
    device = device_for(spec, backend, torch.float64)
    args = case.build(torch.float64, device, _seed(case))
    fn = oracle.function(args, spec.op, backend)
    named = [args.tensors[name].detach().requires_grad_() for name in case.differentiable]

    def of_named(*named: Tensor) -> Outputs:
        return fn({**args.tensors, **dict(zip(case.differentiable, named, strict=True))})

    # Fast mode sees the Jacobian between random vectors only; the first case is checked in full.
    fast = case.name != spec.gradcheck[0]
    assert torch.autograd.gradcheck(of_named, named, check_forward_ad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(of_named, named, fast_mode=True)


# -- transforms ---------------------------------------------------------------------------------


# "compile, dynamic" and "compile, inductor" see the same and more; the support matrix, which is
# made by trying, tries these two.
SEEN_ELSEWHERE = frozenset({"compile", "compile, backward"})


def _checks(spec: OpSpec, backend: str) -> list[tuple[functorch.Check, str]]:
    """What is slow (compilation, Jacobians entry by entry) is tried on one case; the rest on every
    gradcheck case. The reference is plain torch: it is tried where it is the only backend, and by
    the support matrix elsewhere."""
    return [
        (check, name)
        for check in functorch.CHECKS
        for name in (
            spec.gradcheck[:1] if check.kind == "compile" or check.tiny else spec.gradcheck
        )
        if _compared(spec, backend)
        and (_kernel(backend) or name == spec.gradcheck[0])
        and check.name not in SEEN_ELSEWHERE
    ]


TRANSFORMS = _once_if_never(
    [
        (spec, backend, check, name)
        for spec in SPECS
        for backend in spec.backends
        for check, name in _checks(spec, backend)
    ]
)


@pytest.mark.parametrize(
    ("spec", "backend", "check", "name"),
    TRANSFORMS,
    ids=["-".join(_name(v).replace(" ", "_") for v in row) for row in TRANSFORMS],
)
def test_transform(
    spec: OpSpec, backend: str, check: functorch.Check, name: str, device_for
) -> None:
    if check.kind == "compile" and not _kernel(backend) and check.name != "compile, dynamic":
        pytest.skip("the reference is plain torch")
    if check.name in spec.vanishing:
        pytest.skip("zero for this op")
    # Triton kernels have no float64.
    dtype = torch.float32 if backend == "triton" else torch.float64
    device = device_for(spec, backend, dtype)
    case = spec.case(name)
    outcome = functorch.run(check, spec, case, backend=backend, dtype=dtype, device=device)
    if outcome.status == "raises":
        assert functorch.refusal_allowed(check, spec, outcome.detail), outcome.detail
    else:
        assert outcome.status == "right", outcome.detail


@over("backend")
def test_opcheck(spec: OpSpec, backend: str, device_for) -> None:
    device_for(spec, backend, torch.float32)
    calls = () if spec.raw_calls is None else spec.raw_calls(backend)
    if len(calls) == 0:
        pytest.skip("no registered ops of its own")
    for call in calls:
        # That it compiles, with symbolic sizes too, test_transform has seen through the wrapper.
        torch.library.opcheck(
            call.op,
            call.args,
            dict(call.kwargs),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@over(
    "backend",
    "case",
    keep=lambda spec, backend, case: (
        _kernel(backend) and case.name == spec.gradcheck[0] and spec.underivable is None
    ),
)
def test_change_between_forward_and_backward_is_noticed(
    spec: OpSpec, backend: str, case: Case, device_for
) -> None:
    """Or does no harm: what was copied when the call was made may change afterwards."""
    device = device_for(spec, backend, torch.float32)
    j = judge(spec, case, torch.float32, backend, device)
    unchanged = j.gradients(j.fn, j.tensors)
    noticed = 0
    for name in j.names:
        own = {n: t.clone() for n, t in oracle.leaves(j.tensors, j.names).items()}
        results = j.fn(own)
        with torch.no_grad():
            own[name].mul_(2.0)
        found, message = None, ""
        try:
            found = torch.autograd.grad(results, list(own[n] for n in j.names), j.cotangents())
        except RuntimeError as error:
            message = str(error)
        if found is not None:
            assert_same_bits(found, unchanged)
            continue
        assert "modified by an inplace operation" in message
        noticed += 1
    if noticed == 0:
        # Only where there is nothing to notice: gradients that do not depend on the tensors.
        doubled = {n: 2 * t if n in j.names else t for n, t in j.tensors.items()}
        assert_same_bits(j.gradients(j.fn, doubled), unchanged)


# -- memory -------------------------------------------------------------------------------------


def _ways(j: Judge) -> dict[str, Callable[[Tensors], Sequence[Tensor]]]:
    """Everything a kernel computes, as functions of the tensors."""
    if not j.derivable:
        return {"value": lambda tensors: j.values(j.fn, tensors)}
    return {
        "value": lambda tensors: j.values(j.fn, tensors),
        "gradient": lambda tensors: j.gradients(j.fn, tensors),
        "tangent": lambda tensors: j.tangents(j.fn, tensors),
        "second gradient": lambda tensors: j.second(j.fn, tensors),
    }


def _unlike(
    j: Judge, way: str, results: Sequence[Tensor], plain: Sequence[Tensor], units: float = 0.0
) -> list[str]:
    """What differs from the same call on contiguous tensors by more than rounding."""
    return oracle.compare_all(
        results,
        [t.double() for t in plain],
        None,
        units=max(units, VALUE_UNITS if way == "value" else GRADIENT_UNITS),
        terms=oracle.magnitude(*plain),
        names=[f"{way} {i}" for i in range(len(plain))],
        dtype=j.dtype,
    )


@over("backend", "dtype", "case", keep=_small)
def test_strides(spec: OpSpec, backend: str, dtype: torch.dtype, case: Case, device_for) -> None:
    """Inputs and output gradients with any strides give the result of contiguous ones."""
    j = judge(spec, case, dtype, backend, device_for(spec, backend, dtype))
    cotangents = j.cotangents()
    problems = []
    for kind in inputs.STRIDES:
        strided = {name: inputs.strided(tensor, kind) for name, tensor in j.tensors.items()}
        plain = {name: tensor.contiguous() for name, tensor in strided.items()}
        own = [inputs.strided(c, kind) for c in cotangents]
        for way in [way for way in _ways(j) if way in ("value", "gradient")]:
            j.replace_cotangents([c.contiguous() for c in own])
            expected = _ways(j)[way](plain)
            j.replace_cotangents(own)
            found = _unlike(j, way, _ways(j)[way](strided), expected)
            problems += [f"{kind}: {problem}" for problem in found]
    assert_none(problems)


@over("backend", "dtype", "case", keep=_small)
def test_nothing_outside_is_read(
    spec: OpSpec, backend: str, dtype: torch.dtype, case: Case, device_for
) -> None:
    j = judge(spec, case, dtype, backend, device_for(spec, backend, dtype))
    problems = []
    plain = {way: compute(j.tensors) for way, compute in _ways(j).items()}
    for kind in inputs.FRAMES:
        framed = {name: inputs.framed(tensor, kind) for name, tensor in j.tensors.items()}
        for way, compute in _ways(j).items():
            # Torch's matrix products add in another order where memory is aligned otherwise.
            units = SECOND_UNITS if way in spec.varying else 0.0
            found = _unlike(j, way, compute(framed), plain[way], units)
            problems += [f"{kind}: {problem}" for problem in found]
    assert_none(problems)


@over("backend", "dtype", "case", keep=_small)
def test_everything_is_written(
    spec: OpSpec, backend: str, dtype: torch.dtype, case: Case, device_for
) -> None:
    device = device_for(spec, backend, dtype)
    j = judge(spec, case, dtype, backend, device)
    for compute in _ways(j).values():
        plain = compute(j.tensors)
        with inputs.poisoned(device):
            assert_same_bits(compute(j.tensors), plain)


@over("backend", "dtype", "case", keep=_repeatable)
def test_same_bits_every_time(
    spec: OpSpec, backend: str, dtype: torch.dtype, case: Case, device_for
) -> None:
    """Across runs, and across numbers of threads on the CPU."""
    j = judge(spec, case, dtype, backend, device_for(spec, backend, dtype))
    for way, compute in _ways(j).items():
        results = []
        for threads in (2, 2) if way in spec.varying else (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(compute(j.tensors))
        for other in results[1:]:
            assert_same_bits(other, results[0])


# -- noise --------------------------------------------------------------------------------------


@over("backend", keep=lambda spec, backend: spec.noise is not None)
def test_noise_depends_on_its_seed_alone(spec: OpSpec, backend: str, device_for) -> None:
    """On no global generator, which it leaves as it was."""
    device = device_for(spec, backend, torch.float32)
    case = spec.noise(3)
    args = case.build(torch.float32, device)
    call = oracle.function(args, spec.op, backend)
    results = []
    for state in (0, 1):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        results.append(call(args.tensors))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_bits(*results)
    for seed in (4, 3 + 2**32):
        other = oracle.function(spec.noise(seed).build(torch.float32, device), spec.op, backend)
        for one, two in zip(results[0], other(args.tensors), strict=True):
            assert not torch.equal(one, two), f"seeds 3 and {seed} give the same"


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "bad"),
    [
        pytest.param(spec, bad, id=f"{spec.name}-{bad.name}".replace(" ", "_"))
        for spec in SPECS
        for bad in spec.errors
    ],
)
def test_refused(spec: OpSpec, bad) -> None:
    """By the op and, word for word, by its reference, unless it is about the choice of backend."""
    with pytest.raises(bad.error) as caught:
        bad.call(spec.op)
    assert type(caught.value) is bad.error
    assert re.search(bad.match, str(caught.value)), str(caught.value)
    if "backend" not in bad.name:
        with pytest.raises(bad.error) as again:
            bad.call(spec.reference)
        assert str(again.value) == str(caught.value)


# -- documents ----------------------------------------------------------------------------------


@over()
def test_documented(spec: OpSpec) -> None:
    text = inspect.getdoc(spec.op)
    assert text is not None
    for part in ("Args:", "Returns:", "Raises:", "Example:"):
        assert part in text, f"{spec.name}: the docstring has no section {part}"


# -- fuzz ---------------------------------------------------------------------------------------


def _accepted(spec: OpSpec, backend: str) -> OpSpec:
    """The spec without random cases that a backend does not take."""

    def draw(choose: Callable[[Sequence[object]], object]) -> Case:
        case = spec.fuzz(choose)
        assume(backend not in case.refused_by)
        return case

    return dataclasses.replace(spec, fuzz=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=_name)
@over("backend", keep=lambda spec, backend: spec.fuzz is not None and _compared(spec, backend))
def test_fuzz(spec: OpSpec, backend: str, dtype: torch.dtype, device_for) -> None:
    device = device_for(spec, backend, dtype)
    spec = _accepted(spec, backend)

    # The same examples on every machine: a failure here is for everybody to see. Shapes of one
    # or two numbers average nothing out, hence the wider band for gradients.
    @settings(
        max_examples=FUZZ_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = spec.fuzz(lambda options: data.draw(st.sampled_from(list(options))))
        args = case.build(dtype, device, data.draw(st.integers(0, 99)))
        j = Judge(spec, args, case.differentiable, dtype, backend)
        results = j.values(j.fn, j.tensors)
        terms = tuple(j.tensors.values())
        problems = j.differences(results, j.values, units=VALUE_UNITS, terms=terms)
        if j.derivable:
            results = j.gradients(j.fn, j.tensors)
            problems += j.differences(results, j.gradients, units=2 * GRADIENT_UNITS, terms=())
        assert not problems, "\n".join([case.name, *problems])

    check()


# -- the contract itself ------------------------------------------------------------------------


class _ZeroTangent(torch.autograd.Function):
    """Right forward and backward, and a tangent that is silently zero."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


def _toy(op: Callable[..., Tensor], **fields: object) -> OpSpec:
    """A spec of ``sin`` for an implementation of it."""

    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
        tensors = {"x": torch.randn(3, 4, generator=generator).to(device=device, dtype=dtype)}
        return CallArgs(lambda op, tensors, backend: op(tensors["x"]), tensors)

    return OpSpec(
        name="toy",
        op=op,
        reference=torch.sin,
        cases=(Case("case", make, ("x",), frozenset({"tiny"})),),
        dtypes=(torch.float64,),
        backends=("reference",),
        flops=lambda args: 0,
        bytes=lambda args: 0,
        errors=(),
        gradcheck=("case",),
        **fields,
    )


def _statuses(op: Callable[..., Tensor]) -> dict[str, str]:
    spec = _toy(op)
    checks = [check for check in functorch.CHECKS if check.kind != "compile"]
    return {c.name: functorch.run(c, spec, spec.cases[0], backend=None).status for c in checks}


def test_transforms_pass_a_right_op() -> None:
    assert set(_statuses(torch.sin).values()) == {"right"}


def test_transforms_catch_a_silent_zero() -> None:
    found = _statuses(_ZeroTangent.apply)
    assert found["backward"] == "right"
    assert found["func.jvp"] == found["forward_ad"] == "wrong"
    assert found["vmap, all tensors"] == "raises"
    found = _statuses(lambda x: x.detach().sin() + 0.0 * x)
    assert found["backward"] == found["func.grad"] == found["func.vjp"] == "wrong"


def test_a_promised_refusal_must_come() -> None:
    """And with the promised words: that a result has no graph is not one."""

    def refuse(x: Tensor) -> Tensor:
        if x.requires_grad:
            raise NotImplementedError("no derivative here")
        return x.detach().sin()

    for op, status, allowed in (
        (torch.sin, "wrong", False),
        (lambda x: x.detach().sin(), "raises", False),
        (refuse, "raises", True),
    ):
        spec = _toy(op, underivable="no derivative here")
        (check,) = [check for check in functorch.CHECKS if check.name == "backward"]
        outcome = functorch.run(check, spec, spec.cases[0], backend=None)
        assert outcome.status == status
        assert functorch.refusal_allowed(check, spec, outcome.detail) == allowed


@pytest.mark.parametrize("kind", inputs.FRAMES)
def test_frames_catch_a_read_outside(kind: str) -> None:
    x = inputs.framed(torch.ones(3, 4), kind)
    assert torch.equal(x, torch.ones(3, 4))
    beyond = x.as_strided((3, 5), x.stride(), x.storage_offset())
    assert beyond.sum().isnan()


@pytest.mark.parametrize("kind", inputs.STRIDES)
def test_strides_keep_the_numbers(kind: str) -> None:
    x = torch.arange(120.0).reshape(2, 3, 4, 5)
    strided = inputs.strided(x, kind)
    assert strided.shape == x.shape
    assert kind in ("offset", "expanded") or not strided.is_contiguous()
    if kind == "expanded":
        assert strided.stride(0) == 0
    else:
        assert torch.equal(strided, x)


def test_poison_catches_what_is_not_written() -> None:
    with inputs.poisoned():
        assert torch.empty(7).isnan().all()
        assert torch.ones(3).new_empty((2, 2)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_tolerance_rule() -> None:
    truth = torch.tensor([1.0, -2.0, -torch.inf], dtype=torch.float64)
    step = 4 * torch.finfo(torch.float32).eps * 2.0
    close = truth.float() + torch.tensor([0.9 * step, 0.0, 0.0])
    far = truth.float() + torch.tensor([2.1 * step, 0.0, 0.0])
    assert oracle.compare(close, truth).ok
    assert not oracle.compare(far, truth).ok
    assert oracle.compare(far, truth, eager=close).ok  # eager torch is as far off
    assert not oracle.compare(torch.full((3,), torch.nan), truth).ok
    assert not oracle.compare(torch.tensor([1.0, -2.0, torch.inf]), truth).ok
    assert not oracle.compare(torch.tensor([1.0, -2.0, -1e30]), truth).ok
    assert not oracle.compare(close[:2], truth).ok
    assert oracle.compare_all(
        [close.double()], [truth], [close], units=4, terms=0.0, names=["x"]
    ) == ["x: dtype torch.float64, expected torch.float32"]


def test_matrix_keeps_rows_it_cannot_try() -> None:
    tried = matrix.Row("attend", "cpu", ("float32", "yes", "yes", "yes", "yes", "yes"))
    untried = matrix.Row("attend", "triton", None, "no CUDA device")
    page = f"before\n{matrix.BEGIN}\n{matrix.END}\nafter"
    first = matrix.render([tried, untried], matrix.between(page))
    assert "not tried here: no CUDA device" in first
    proven = first.replace("not tried here: no CUDA device", "float32")
    page = matrix.replace(page, proven)
    assert page.startswith("before\n")
    assert page.endswith("\nafter")
    assert matrix.render([tried, untried], matrix.between(page)) == proven
    with pytest.raises(ValueError, match="expected the lines"):
        matrix.between("no markers")
