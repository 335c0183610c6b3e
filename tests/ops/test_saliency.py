"""What the saliency ops promise beyond the contract of every op."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from outer_products import REDUCE, entries

from transfuse.ops import finish_map, grad_weighted_map, normgrad_map
from transfuse.testing.specs import find_spec

SPEC = find_spec("normgrad_map")
METHODS = ("gradcam", "gradcam++", "xgradcam", "layercam", "hirescam", "elementwise", "linear")


@pytest.fixture(params=["reference", "cpu"])
def backend(request, device_for) -> str:
    device_for(SPEC, request.param, torch.float32)
    return request.param


@pytest.mark.parametrize("phase2", REDUCE)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_closed_forms_are_those_of_the_outer_products(backend, layout, phase2):
    act, grad = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).unbind()
    out = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    conv = {"stride": 2, "padding": 1, "dilation": 2}

    def found(act, grad, **options):
        if layout == "nhwc":
            act, grad = (x.movedim(1, -1).contiguous() for x in (act, grad))
        return normgrad_map(act, grad, phase2=phase2, layout=layout, backend=backend, **options)

    for phase1 in ("scaling", "bias", "conv1x1", "conv3x3", "conv3x3_depthwise"):
        want = REDUCE[phase2](entries(act, grad, phase1, padding=1))
        torch.testing.assert_close(found(act, grad, phase1=phase1), want, msg=phase1)
    want = REDUCE[phase2](entries(act, out, "conv", 2, **conv))
    torch.testing.assert_close(found(act, out, phase1="conv", kernel_size=2, **conv), want)


def test_neighbours_in_a_volume(backend):
    """Against the same statistics of a convolution with ones."""
    act, grad = torch.randn(2, 1, 2, 3, 4, 5, dtype=torch.float64).unbind()
    ones = torch.ones(1, 1, 3, 3, 3, dtype=torch.float64)
    near = F.conv3d(act.square().sum(1, keepdim=True), ones, padding=1)[:, 0]
    found = normgrad_map(act, grad, phase1="conv3x3", backend=backend)
    torch.testing.assert_close(found, near.sqrt() * grad.norm(dim=1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_that_cancel_stay_finite(backend, method, sign):
    """Before a ReLU activations cancel: divisors keep their sign, and away from zero."""
    act = torch.tensor([[[[1.0, -1.0]], [[-1.0, -3.0]]]])
    grad = sign * torch.tensor([[[[0.5, 0.5]], [[0.5, 1e-7]]]])
    found = grad_weighted_map(act, grad, method=method, backend=backend)
    assert found.isfinite().all()
    want = grad_weighted_map(act.double(), grad.double(), method=method, backend="reference")
    torch.testing.assert_close(found.double(), want, rtol=1e-3, atol=1e-6)


def test_weights_by_hand(backend):
    act = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]], dtype=torch.float64)
    grad = torch.tensor([[[[2.0, -1.0]], [[0.0, 4.0]]]], dtype=torch.float64)
    plus = [8 / (8 + 3 * 8 + 1e-6), 64 / (32 + 8 * 64 + 1e-6)]
    for method, weights in {
        "gradcam": [0.5, 2.0],
        "gradcam++": plus,
        "xgradcam": [0.0, 20 / 8.0000001],
    }.items():
        want = weights[0] * act[:, 0] + weights[1] * act[:, 1]
        found = grad_weighted_map(act, grad, method=method, backend=backend)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    for method, want in {
        "layercam": [2.0, 20.0],
        "hirescam": [2.0, 18.0],
        "linear": [2.0, 18.0],
        "elementwise": [2.0, 20.0],
    }.items():
        found = grad_weighted_map(act, grad, method=method, backend=backend)
        assert found.tolist() == [[want]]


def test_half_precision_does_not_overflow(backend):
    """Squares of 60,000 and cubes of 1e-6 leave float16."""
    act, grad = torch.full((1, 8, 2, 2), 6e4).half(), torch.full((1, 8, 2, 2), 6e4).half()
    for phase2, factor in (("norm", 8), ("filter_norm", 8), ("sum", 64), ("max", 1)):
        found = normgrad_map(act, grad, phase2=phase2, backend=backend)
        torch.testing.assert_close(found, torch.full((1, 2, 2), 3.6e9 * factor), rtol=1e-3, atol=0)
    small = torch.full((1, 2, 2, 2), 1e-6).half()
    found = grad_weighted_map(act[:, :2], small, method="gradcam++", backend=backend)
    assert (found > 0).all()
    # The product of the squares leaves float32; the product of the norms does not.
    large = torch.full((1, 1, 1, 1), 1e15)
    found = normgrad_map(large, large, phase2="filter_norm", backend=backend)
    torch.testing.assert_close(found, torch.full((1, 1, 1), 1e30))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_nan_is_seen_where_it_is(backend, layout):
    act, grad = torch.randn(2, 2, 5, 4, 9).unbind()
    act[0, 3, 1, 2] = torch.nan
    if layout == "nhwc":
        act, grad = (x.movedim(1, -1).contiguous() for x in (act, grad))
    for phase1, seen in (("conv1x1", 1), ("scaling", 1), ("conv3x3", 9), ("conv3x3_depthwise", 9)):
        for phase2 in REDUCE:
            found = normgrad_map(
                act, grad, phase1=phase1, phase2=phase2, layout=layout, backend=backend
            )
            assert found[0].isnan().sum() == seen, (phase1, phase2)
            assert not found[1].isnan().any()
    for method in METHODS:
        found = grad_weighted_map(act, grad, method=method, layout=layout, backend=backend)
        pooled = method in ("gradcam++", "xgradcam")
        assert found[0].isnan().sum() == (36 if pooled else 1), method
        assert not found[1].isnan().any()


def test_gradients_where_a_norm_is_zero():
    """0, and not NaN, at locations without activation or gradient."""
    act = torch.zeros(1, 2, 2, 2).requires_grad_()
    grad = torch.randn(1, 2, 2, 2).requires_grad_()
    for phase1 in ("conv1x1", "conv3x3", "conv3x3_depthwise", "scaling"):
        for phase2 in ("norm", "filter_norm"):
            found = normgrad_map(act, grad, phase1=phase1, phase2=phase2)
            for gradient in torch.autograd.grad(found.sum(), (act, grad)):
                assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_map_can_be_trained_through():
    """A penalty on the map of a layer, whose gradient is itself a derivative."""
    torch.manual_seed(0)
    conv, head = torch.nn.Conv2d(2, 4, 3).double(), torch.nn.Linear(4, 3).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)

    def penalty(op, weight):
        act = F.conv2d(x, weight, conv.bias)
        score = torch.tanh(head(act.square().mean((2, 3))))[:, 0].sum()
        (grad,) = torch.autograd.grad(score, act, create_graph=True)
        return op(act, grad).square().sum()

    def by_hand(act, grad):
        return act.norm(dim=1) * grad.norm(dim=1)

    weight = conv.weight.detach().requires_grad_()
    results = [
        torch.autograd.grad(penalty(op, weight), weight)[0] for op in (normgrad_map, by_hand)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_threads_share_samples_or_parts_of_them(batch, layout, device_for):
    device_for(SPEC, "cpu", torch.float32)
    shape = (batch, 200, 30, 31) if layout == "nchw" else (batch, 30, 31, 200)
    act, grad = torch.randn(2, *shape).unbind()
    for call in (
        lambda: grad_weighted_map(act, grad, layout=layout),
        lambda: normgrad_map(act, grad, layout=layout, phase1="conv3x3", phase2="filter_norm"),
    ):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


# ---- finish_map ----------------------------------------------------------------------------------


def test_finish_in_order():
    m = torch.tensor([[[-4.0, 1.0], [3.0, 0.0]], [[2.0, 2.0], [4.0, 6.0]]])
    found = finish_map(m, relu=True, normalize="max", eps=0.0)
    assert torch.equal(found, m.relu() / torch.tensor([3.0, 6.0])[:, None, None])
    found = finish_map(m, size=(5, 7), normalize=None)
    want = F.interpolate(m[:, None], (5, 7), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(found, want)
    scaled = finish_map(m, size=(5, 7), eps=0.0)
    low, high = want.amin((1, 2), keepdim=True), want.amax((1, 2), keepdim=True)
    torch.testing.assert_close(scaled, (want - low) / (high - low))
    assert finish_map(torch.rand(2, 3, 4, 5), size=6).shape == (2, 6, 6, 6)
    assert finish_map(torch.rand(2, 5), size=3).shape == (2, 3)
    assert finish_map(torch.zeros(0, 3, 4), size=(6, 8)).shape == (0, 6, 8)
    half = finish_map(m.half(), normalize=None)
    assert half.dtype == torch.float32


def test_maps_are_combined():
    maps = list(torch.rand(3, 2, 4, 5).unbind())
    done = [finish_map(m) for m in maps]
    torch.testing.assert_close(finish_map(maps), sum(done) / 3)
    torch.testing.assert_close(finish_map(maps, combine="product"), done[0] * done[1] * done[2])
    weights = [1.0, 0.0, 3.0]
    found = finish_map(maps, weights=weights)
    torch.testing.assert_close(found, 0.25 * done[0] + 0.75 * done[2])
    found = finish_map(maps, weights=weights, combine="product")
    torch.testing.assert_close(found, done[0] ** 0.25 * done[2] ** 0.75)
    mixed = finish_map([maps[0], maps[1][:, :2]], size=(4, 5), normalize=None)
    assert mixed.shape == (2, 4, 5)


@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_constant_maps_are_zero_and_said_to_be(eps):
    m = torch.stack([torch.full((2, 3), 5.0), torch.rand(2, 3)])
    with pytest.warns(UserWarning, match="1 of 2 saliency maps are constant"):
        found = finish_map(m, eps=eps)
    assert torch.equal(found[0], torch.zeros(2, 3))
    with pytest.warns(UserWarning, match="1 of 2 saliency maps are nowhere above 0"):
        found = finish_map(torch.stack([-m[1], m[1]]), normalize="max", eps=eps)
    assert torch.equal(found[0], torch.zeros(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = finish_map(torch.rand(2, 1, 1), normalize=None)
        assert one.shape == (2, 1, 1)
        bad = finish_map(torch.tensor([[[1.0, torch.nan]], [[1.0, 2.0]]]))
        compiled = torch.compile(finish_map, backend="eager", fullgraph=True)(m)
        torch.vmap(finish_map)(m[None])
    assert bad[0].isnan().all()
    assert not bad[1].isnan().any()
    assert torch.equal(compiled[0], torch.zeros(2, 3))


def test_finish_is_differentiable():
    m = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda m: finish_map(m, size=(5, 6)), m, check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda m: finish_map([m, m * m], size=(5, 6)), m)
    zero = torch.zeros(1, 2, 2, requires_grad=True)
    with pytest.warns(UserWarning, match="constant"):
        (grad,) = torch.autograd.grad(finish_map(zero, eps=0.0).sum(), zero)
    assert torch.equal(grad, torch.zeros(1, 2, 2))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"maps": 3}, TypeError, "maps: expected a tensor or several, got 3"),
        ({"maps": []}, TypeError, "maps: expected a tensor or several"),
        ({"maps": torch.zeros(3)}, ValueError, "maps: expected a batch and 1 to 3 axes"),
        ({"maps": torch.zeros(2, 0, 3)}, ValueError, "at least one location"),
        ({"maps": torch.zeros(2, 2).long()}, TypeError, "maps: expected float32"),
        (
            {"maps": [torch.zeros(2, 3, 3), torch.zeros(1, 3, 3)]},
            ValueError,
            r"maps\[1\]: expected the batch",
        ),
        (
            {"maps": [torch.zeros(2, 3, 3), torch.zeros(2, 4, 3)]},
            ValueError,
            "size: expected one for maps of several sizes",
        ),
        ({"size": (3,)}, ValueError, "size: expected 2 integers, got 1"),
        ({"size": 0}, ValueError, "size: expected an integer of at least 1"),
        ({"size": 2.5}, TypeError, "size: expected an integer"),
        ({"normalize": "softmax"}, ValueError, "normalize: expected one of None, 'minmax'"),
        ({"combine": "max"}, ValueError, "combine: expected one of"),
        ({"relu": 1}, TypeError, "relu: expected True or False"),
        ({"eps": -1.0}, ValueError, "eps: expected a number of at least 0"),
        ({"weights": [1.0]}, ValueError, "weights: expected only with a sequence"),
        ({"maps": [torch.zeros(2, 3)], "weights": [0]}, ValueError, "not all 0"),
        ({"maps": [torch.zeros(2, 3)], "weights": [1, 2]}, ValueError, "weights: expected 1"),
    ],
)
def test_finish_refuses(changes, error, match):
    given = {"maps": torch.zeros(2, 3, 4), **changes}
    with pytest.raises(error, match=match):
        finish_map(given.pop("maps"), **given)
