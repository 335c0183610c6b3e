"""What GPU backends promise beyond the contract of every op: streams, CUDA graphs, recorded plans.

The contract tests (value, gradient, strides, poison, determinism, compile, ...) try every backend
where there is a GPU; ``bench/gpu.sh`` runs them and these.
"""

from __future__ import annotations

import pytest
import torch

from transfuse.ops import match_tokens, merge_tokens, multi_dot, trim_largest, unmerge_tokens
from transfuse.testing import OpSpec, backends, golden
from transfuse.testing.specs import all_specs, find_spec

pytestmark = pytest.mark.gpu

KERNELS = [(s, b) for s in all_specs() for b in s.backends if b in backends.ON_CUDA]
IDS = [f"{spec.name}-{backend}" for spec, backend in KERNELS]
# It refuses numbers that do not fit, so it waits for them: nothing to capture.
WAITS = frozenset({"ratio_merge"})
# Triton finds the tensors of a list by addresses that are copied to the device at every call, which
# cannot be recorded.
UNRECORDED = {"lincomb", "multi_norm", "multi_gram", "ratio_merge", "ties_merge"}
RECORDED = [(s, b) for s, b in KERNELS if b != "triton" or s.name not in UNRECORDED]
GOLDEN = golden.load("ops_token_merging")


def call_of(spec: OpSpec, device: torch.device):
    """The op's first case as a call without gradients."""
    case = next(c for c in spec.cases if c.name == spec.gradcheck[0])
    args = case.build(torch.float32, device)

    def call(backend: str) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return args.run(spec.op, args.tensors, backend)

    return args, call


@pytest.mark.parametrize(("spec", "backend"), KERNELS, ids=IDS)
def test_another_stream(spec, backend, device_for):
    """Work goes to the current stream: it sees what was queued there before it."""
    args, call = call_of(spec, device_for(spec, backend, torch.float32))
    want = call(backend)
    tensors = [t for t in args.tensors.values() if t.is_floating_point()]
    kept = [t.clone() for t in tensors]
    for tensor in tensors:
        tensor.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # long enough for a kernel of another stream to come first
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.copy_(values)
        got = call(backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("spec", "backend"), RECORDED, ids=[f"{spec.name}-{backend}" for spec, backend in RECORDED]
)
def test_cuda_graph(spec, backend, device_for):
    """A call can be captured, and replayed on other numbers in the same memory."""
    if spec.name in WAITS:
        pytest.skip(f"{spec.name} looks at numbers")
    args, call = call_of(spec, device_for(spec, backend, torch.float32))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(backend)
    for tensor in args.tensors.values():
        if tensor.is_floating_point():
            tensor.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, call(backend), strict=True))


def test_lists_of_tensors_without_a_spec(device_for):
    """Whose kernels other ops have too."""
    device = device_for(find_spec("multi_gram"), "triton", torch.float32)
    generator = torch.Generator().manual_seed(0)
    xs, ys = (
        [torch.randn(s, generator=generator).to(device) for s in ((70, 900), (), (0,), (5,))]
        for _ in range(2)
    )
    found = multi_dot(xs, ys, backend="triton")
    exact = multi_dot([x.double() for x in xs], [y.double() for y in ys], backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = [x.to(dtype) for x in xs]
        kept = trim_largest(own, 0.2, backend="triton")
        want = trim_largest(own, 0.2, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(kept, want, strict=True))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("case", ["grid", "rand_odd"])
def test_recorded_plans(backend, case, device_for):
    """The pairs and the tokens given back are those recorded from the official implementation."""
    device = device_for(find_spec("match_tokens"), backend, torch.float32)
    data, want, params = GOLDEN.inputs(case), GOLDEN.outputs(case), GOLDEN.params(case)
    destination = want["dst_tokens"].flatten().to(device)
    metric, x = data["metric"].to(device), data["x"].to(device)
    plan = match_tokens(metric, params["r_requested"], destination=destination, backend=backend)
    rows = plan.rows.cpu()
    assert torch.equal(rows.gather(1, want["merged_tokens"]), rows.gather(1, want["dst_of_merged"]))
    y = merge_tokens(x, plan, mode=params["modes"][0], backend=backend)
    GOLDEN.check(unmerge_tokens(y, plan, backend=backend).cpu(), "unmerge", case)
