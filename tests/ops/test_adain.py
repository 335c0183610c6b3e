"""What ``adain`` promises beyond the contract of every op."""

from __future__ import annotations

import pytest
import torch

import transfuse
from transfuse import _backend, _native
from transfuse.ops import adain
from transfuse.ops._adain_reference import adain_reference
from transfuse.testing import oracle
from transfuse.testing.specs import find_spec

SPEC = find_spec("adain")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def cpu(device_for) -> str:
    """The name of the native backend; skips where it is not built."""
    device_for(SPEC, "cpu", torch.float32)
    return "cpu"


# -- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_large_mean_costs_no_digits(cpu, layout):
    content = (torch.randn(2, 16, 96, 96) + 1e4).to(memory_format=layout)
    style = torch.randn(2, 16, 40, 40)
    result = adain(content, style, backend=cpu)
    truth = adain_reference(content.double(), style.double())
    # Numbers of size 4 and eps 1.2e-7: the mean of 1e4, whose own spacing is 1e-3, leaves no trace.
    assert oracle.distance(result, truth) < 2e-6
    style = style + 1e4
    result = adain(content, style, backend=cpu)
    truth = adain_reference(content.double(), style.double())
    assert oracle.distance(result, truth) <= torch.finfo(torch.float32).eps * 1e4


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("place", ["first", "edge", "last"])
def test_outliers_cost_no_digits(cpu, layout, place):
    content, style = torch.randn(1, 16, 64, 64), torch.randn(1, 16, 64, 64)
    where = {"first": (0, 0), "edge": (0, slice(None)), "last": (-1, -1)}[place]
    content[:, :, where[0], where[1]] += 1e3
    content = content.to(memory_format=layout)
    result = adain(content, style, backend=cpu)
    truth = adain_reference(content.double(), style.double())
    eager = adain_reference(content, style)
    assert oracle.compare(result, truth, eager).ok


@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("size", [1, 3, 7, 50, 131])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_constant_planes_take_the_mean_of_the_style(cpu, dtype, eps, size, layout):
    value = torch.tensor([0.1, -1e4, 3e-5, 0.0, 1 / 3, 7.0, 8.0, 9.0, 1e3]).view(1, 9, 1, 1)
    content = value.expand(2, 9, size, size).contiguous(memory_format=layout).to(dtype)
    style = torch.randn(1, 9, 6, 5).to(dtype)
    content.requires_grad_()
    style.requires_grad_()
    result = adain(content, style, eps=eps, backend=cpu)
    mean = style.detach().double().mean((2, 3), keepdim=True).to(dtype).expand_as(result)
    torch.testing.assert_close(result.detach(), mean)
    grads = torch.autograd.grad(result.square().sum(), (content, style))
    assert all(g.isfinite().all() for g in grads)


def test_one_element_has_deviation_zero(cpu):
    content, style = torch.randn(2, 3, 1, 1), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(adain(content, style, backend=cpu), style.mean((2, 3), keepdim=True))
    content, style = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 1, 1)
    assert torch.equal(adain(content, style, backend=cpu), style.expand_as(content))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_plane(cpu, layout, value):
    content = torch.randn(2, 17, 40, 40).contiguous(memory_format=layout)
    style = torch.randn(1, 17, 8, 8)
    content[1, 3, 39, 39] = value
    bad = adain(content, style, backend=cpu).isfinite().logical_not().flatten(2)
    assert bad[1, 3].all()
    assert bad.sum() == 1600


# -- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((2, 160, 64, 64), (-2, -1)),  # a result that bypasses the cache
        ((1, 9, 400, 500), (-2, -1)),  # planes in several segments
        ((3, 12, 33, 31), (0, 2, 3)),
        ((2, 1300, 9, 9), (-2, -1)),
    ],
)
def test_threads_do_not_change_a_bit(cpu, layout, shape, dims):
    content = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    style = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(shape)

    def run(threads: int) -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(threads)
        out = adain(content, style, dims=dims, backend=cpu)
        return out.detach(), *torch.autograd.grad(out, (content, style), grad)

    one = run(1)
    for threads in (2, 3, 2):
        assert all(torch.equal(a, b) for a, b in zip(one, run(threads), strict=True))


# -- layouts, sharing, backends -----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_result_has_the_layout_of_the_content(cpu, layout):
    content = torch.randn(2, 16, 6, 5).contiguous(memory_format=layout)
    style = torch.randn(1, 16, 3, 3)
    assert adain(content, style, backend=cpu).stride() == content.stride()
    plain = adain(content.contiguous(), style, backend=cpu)
    torch.testing.assert_close(adain(content, style, backend=cpu), plain)


def test_a_shared_style_gets_the_sum_of_its_gradients(cpu):
    content, grad = torch.randn(2, 4, 9, 6, 5, dtype=torch.float64).unbind(0)
    shared = torch.randn(1, 9, 3, 3, dtype=torch.float64)
    grads = []
    for style in (shared, shared.repeat(4, 1, 1, 1)):
        style.requires_grad_()
        out = adain(content, style, backend=cpu)
        grads.append(torch.autograd.grad(out, style, grad)[0])
    torch.testing.assert_close(grads[0], grads[1].sum(0, keepdim=True))


def test_only_the_gradient_that_is_wanted_is_made(cpu):
    content, style = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    ops = torch.ops.transfuse
    both = ops.adain_backward(content, content, style, [2, 3], 1e-4, True, True)
    first, none = ops.adain_backward(content, content, style, [2, 3], 1e-4, True, False)
    assert torch.equal(first, both[0])
    assert none.numel() == 0
    none, second = ops.adain_backward(content, content, style, [2, 3], 1e-4, False, True)
    assert torch.equal(second, both[1])
    assert none.numel() == 0


def test_raw_ops_refuse_what_would_read_out_of_bounds(cpu):
    ops = torch.ops.transfuse
    x = torch.zeros(2, 3, 4, 4)
    for args, match in (
        ((x, x[:, :2], [2, 3], 1e-4), "style axis 1 must be 1 or 3"),
        ((x, x, [4], 1e-4), "dims must be different axes"),
        ((x, x, [2, 2], 1e-4), "dims must be different axes"),
        ((x, x, [], 1e-4), "dims must name"),
        ((x, x.double(), [2, 3], 1e-4), "style must have the dtype"),
        ((x, x[:, :, :0], [2, 3], 1e-4), "at least one element"),
        ((x, x, [2, 3], -1.0), "eps must be"),
    ):
        with pytest.raises(RuntimeError, match=match):
            ops.adain_forward(*args)
    with pytest.raises(RuntimeError, match="grad must have shape"):
        ops.adain_backward(x[:1], x, x, [2, 3], 1e-4, True, True)


def test_third_derivatives_are_refused(cpu):
    content = torch.randn(2, 3, 3, 3, requires_grad=True)
    out = adain(content, torch.randn(2, 3, 3, 3), backend=cpu).pow(2).sum()
    (first,) = torch.autograd.grad(out, content, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), content, create_graph=True)
    with pytest.raises(NotImplementedError, match="not implemented"):
        torch.autograd.grad(second.sum(), content)


def test_explain_and_the_cuda_library():
    x = torch.zeros(1, 2, 3, 3)
    text = transfuse.explain("adain", x)
    assert "reference: runs when named" in text or "reference (" in text
    assert "the cuda backend needs a CUDA device" in text
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        adain(x, x, backend="cuda")
    state = _native.cuda_status()
    if not torch.cuda.is_available():
        assert not state.loaded
        reason = _backend.why_not("adain", "cuda", torch.device("cuda"), torch.float32)
        assert reason.startswith("the CUDA library is not loaded: ")
        assert state.reason in reason


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_results_do_not_vary(device_for, backend, layout):
    device = device_for(SPEC, backend, torch.float32)
    content = torch.randn(2, 64, 64, 64, device=device).contiguous(memory_format=layout)
    content.requires_grad_()
    style = torch.randn(1, 64, 32, 32, device=device, requires_grad=True)
    stream = torch.cuda.Stream()
    runs = []
    for _ in range(3):
        with torch.cuda.stream(stream):
            out = adain(content, style, backend=backend)
            runs.append((out, *torch.autograd.grad(out.pow(2).sum(), (content, style))))
    torch.cuda.synchronize()
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
