"""What ``attend`` promises beyond the contract of every op."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import subprocess
import sys

import pytest
import torch

import transfuse
from transfuse import _backend
from transfuse.ops import KV, Blend, attend, attend_with_lse, merge_attention
from transfuse.ops._attention_reference import attend_reference
from transfuse.testing import oracle
from transfuse.testing.specs import find_spec

SPEC = find_spec("attend")
SMALL = [case for case in SPEC.cases if not case.tags & {"real", "bench"}]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@pytest.fixture
def cpu(device_for) -> str:
    """The name of the native backend; skips where it is not built."""
    device_for(SPEC, "cpu", torch.float32)
    return "cpu"


# -- exact ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_blend_ends_are_exact(cpu, dtype):
    query, key, value = (normal(2, 2, 19, 24, dtype=dtype) for _ in range(3))
    unused = torch.full_like(query, torch.nan)
    plain = attend(query, KV(key, value), backend=cpu)

    def same(query, source, blend=None):
        assert torch.equal(attend(query, source, blend=blend, backend=cpu), plain)

    same(query, KV(key, value, gate=1.0))
    same(query, KV(key, value, gate=torch.ones(2, 1, 1)))
    same(query, KV(key, value), Blend(unused, 0.0))
    same(unused, KV(key, value), Blend(query, 1.0))
    same(query, KV(key, value, blend=Blend(unused, 0.0)))
    same(query, KV(unused, value, blend=Blend(key, 1.0)))
    same(query, [KV(key, value), KV(unused, unused, group=1, gate=0.0)])


def test_tensor_weights_at_the_ends_are_exact(cpu):
    query, other, key, value = (normal(2, 2, 19, 24) for _ in range(4))
    weight = torch.zeros(2, 1, 19)
    weight[1] = 1.0
    out = attend(query, KV(key, value), blend=Blend(other, weight), backend=cpu)
    assert torch.equal(out[0], attend(query, KV(key, value), backend=cpu)[0])
    assert torch.equal(out[1], attend(other, KV(key, value), backend=cpu)[1])


# -- numbers at the edge ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_do_not_overflow(cpu, dtype):
    """Scale and temperature meet the product in float32: q k^T here exceeds float16."""
    query, key, value = (normal(1, 2, 33, 160, dtype=dtype) for _ in range(3))
    query, key = query * 40.0, key * 40.0
    source = KV(key, value, temperature=3.0)
    out = attend(query, source, backend=cpu)
    exact = attend_reference(query.double(), KV(key.double(), value.double(), temperature=3.0))
    eager = attend_reference(query, source)
    assert out.isfinite().all()
    verdict = oracle.compare(out, exact, eager)
    assert verdict.ok, str(verdict)


def test_very_negative_bias_is_not_a_mask(cpu):
    query, key, value = (normal(1, 1, 9, 8) for _ in range(3))
    out, lse = attend_with_lse(query, KV(key, value, bias=torch.tensor(-1e30)), backend=cpu)
    plain = attend(query, KV(key, value), backend=cpu)
    assert lse.isfinite().all()
    assert out.isfinite().all()
    # Logits vanish beside the bias, so every key weighs the same.
    torch.testing.assert_close(out, value.mean(dim=2, keepdim=True).expand_as(plain))


def test_nan_stays_in_its_row(cpu):
    query, key, value = (normal(1, 2, 40, 16) for _ in range(3))
    plain = attend(query, KV(key, value), backend=cpu)
    query[0, 1, 17, 3] = torch.nan
    out = attend(query, KV(key, value), backend=cpu)
    assert out[0, 1, 17].isnan().all()
    out[0, 1, 17] = plain[0, 1, 17]
    assert torch.equal(out, plain)


def test_masked_tiles_change_nothing(cpu):
    """Wholly masked blocks are skipped; the rest is bit for bit what it is without them."""
    query, key, value = normal(1, 2, 70, 32), normal(1, 2, 400, 32), normal(1, 2, 400, 32)
    mask = torch.zeros(400, dtype=torch.bool)
    mask[:64] = True
    out = attend(query, KV(key, value, mask=mask), backend=cpu)
    short = attend(query, KV(key[:, :, :64], value[:, :, :64]), backend=cpu)
    torch.testing.assert_close(out, short, rtol=1e-6, atol=1e-6)
    value[:, :, 200:] = torch.nan
    torch.testing.assert_close(attend(query, KV(key, value, mask=mask), backend=cpu), out)


def test_raw_op_has_gradients_where_every_source_is_masked(cpu):
    """torch.compile calls raw ops. torch takes a list of nothing but tensors as differentiable."""
    query, key, value = (t.requires_grad_() for t in torch.randn(3, 2, 2, 5, 8).unbind(0))
    mask, index = torch.rand(2, 1, 5, 5) > 0.3, torch.tensor([1, 0])
    core = ([key], [value], [], [-1], [mask], [index], [0.5], [0], [])
    out, _ = torch.ops.transfuse.attention_forward(query, *core)
    expected = attend(query, KV(key, value, mask=mask, index=index), scale=0.5, backend=cpu)
    found, want = (
        torch.autograd.grad(o.square().sum(), (query, key, value)) for o in (out, expected)
    )
    torch.testing.assert_close(found, want)


# -- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_parts_restores_the_whole(cpu, dtype):
    query, key, value = (normal(2, 3, 45, 40, dtype=dtype) for _ in range(3))
    parts = [
        attend_with_lse(query, KV(key[:, :, s], value[:, :, s]), backend=cpu)
        for s in (slice(0, 7), slice(7, 7), slice(7, 45))
    ]
    merged = merge_attention([p.out for p in parts], [p.lse for p in parts])
    whole = attend_with_lse(query, KV(key, value), backend=cpu)
    tolerance = {"rtol": 0.0, "atol": 4 * torch.finfo(dtype).eps * float(whole.out.abs().max())}
    torch.testing.assert_close(merged.out, whole.out, **tolerance)
    torch.testing.assert_close(merged.lse, whole.lse)


# -- backends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name.replace(" ", "_"))
def test_composition_where_no_kernel_is_a_default(case, dtype, monkeypatch):
    """What runs on devices without a proven kernel, with its gradients."""
    monkeypatch.setattr(_backend, "choose", lambda *_: "composed")
    args = case.build(dtype)
    fn = oracle.function(args, attend)
    reference = oracle.function(args, attend_reference)
    wide = oracle.widen(args.tensors)
    value = fn(args.tensors)[0]
    truth = reference(wide)[0]
    # Blends, temperatures and scaled_dot_product_attention round in the dtype of the call.
    units = 2 * oracle.VALUE_UNITS
    terms = oracle.magnitude(*args.tensors.values())
    verdict = oracle.compare(value, truth, reference(args.tensors)[0], units=units, terms=terms)
    assert verdict.ok, str(verdict)
    ones = torch.ones_like(value)
    names = case.differentiable
    results = oracle.gradients(fn, args.tensors, names, [ones])
    truths = oracle.gradients(reference, wide, names, [ones.double()])
    eager = oracle.gradients(reference, args.tensors, names, [ones])
    problems = oracle.compare_all(
        results,
        truths,
        eager,
        units=4 * oracle.GRADIENT_UNITS,
        terms=oracle.magnitude(*truths),
        names=names,
        dtype=dtype,
    )
    assert not problems, "\n".join(problems)


def test_a_named_backend_never_falls_back():
    query = normal(1, 1, 3, 4)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="attend: backend 'triton' cannot run: "):
            attend(query, KV(query, query), backend="triton")
    meta = query.to("meta")
    with pytest.raises(RuntimeError, match=r"attend: backend 'cpu' cannot run: .* meta"):
        attend(meta, KV(meta, meta), backend="cpu")


def test_explain_names_the_backend_that_runs(cpu):
    text = transfuse.explain(attend, normal(1, 1, 3, 4))
    assert text.startswith("attend on cpu, float32: cpu")
    assert "triton: " in text


def test_autocast_runs_in_the_autocast_dtype(cpu):
    query, key, value = (normal(1, 2, 9, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(query, KV(key, value))
    assert out.dtype == torch.bfloat16
    expected = attend(*(t.bfloat16() for t in (query,)), KV(key.bfloat16(), value.bfloat16()))
    assert torch.equal(out, expected)


# -- processes and threads ----------------------------------------------------------------------


def test_threads_of_python_do_not_disturb_each_other(cpu):
    tensors = [[normal(2, 2, 65, 40) for _ in range(3)] for _ in range(8)]

    def call(parts: list[torch.Tensor]) -> torch.Tensor:
        return attend(parts[0], KV(parts[1], parts[2]), backend=cpu)

    expected = [call(parts) for parts in tensors]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(call, tensors))
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def _in_child(queue: multiprocessing.Queue, parts: list[torch.Tensor]) -> None:
    query, key, value = (t.clone().requires_grad_() for t in parts)
    out = attend(query, KV(key, value), backend="cpu")
    out.sum().backward()
    queue.put(out.detach().numpy())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_hang(cpu):
    torch.set_num_threads(2)
    parts = [normal(2, 2, 65, 40) for _ in range(3)]
    expected = attend(parts[0], KV(*parts[1:]), backend=cpu)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, parts))
    child.start()
    try:
        result = queue.get(timeout=60)
    finally:
        child.join(timeout=10)
        if child.is_alive():
            child.terminate()
    assert torch.equal(torch.from_numpy(result), expected)


def test_importing_the_ops_is_light():
    """Neither methods nor Triton, and not torch's compiler, which takes seconds to load."""
    code = (
        "import sys, transfuse, transfuse.ops; "
        "heavy = [m for m in ('triton', 'torch._dynamo', 'diffusers', 'transfuse.methods', "
        "'transfuse.testing', 'transfuse.triton_kernels') if m in sys.modules]; "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
