"""Grad-CAM: recorded outputs, the CAM identity, every option and refusal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.saliency.grad_cam import (
    GradCAM,
    guided_backprop,
    guided_grad_cam,
    token_grid,
)
from transfuse.testing import golden

GOLDEN = golden.load("grad_cam")
METHODS = {
    "gradcam": "gradcam",
    "gradcam++": "plusplus",
    "xgradcam": "xgradcam",
    "layercam": "layercam",
    "hirescam": "hirescam",
    "elementwise": "elementwise",
}


class Recorded(nn.Module):
    """The network of the recording."""

    def __init__(self, arrays):
        super().__init__()
        self.c1 = nn.Conv2d(3, 6, 3, padding=1)
        self.c2 = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.h = nn.Conv2d(5, 5, 3, padding=1)
        self.fc = nn.Linear(30, 4)
        for name, parameter in self.named_parameters():
            parameter.data.copy_(arrays[name.replace(".", "_")])

    def forward(self, x):
        x = F.relu(self.c1(x), inplace=True)
        x = F.relu(self.c2(x), inplace=True)
        x = torch.tanh(self.h(x))
        return self.fc(F.adaptive_avg_pool2d(x, (2, 3)).flatten(1))


@pytest.fixture
def recorded():
    arrays = GOLDEN.inputs("net")
    return Recorded(arrays), arrays["x"], arrays["target"]


@pytest.mark.parametrize("method", METHODS)
def test_golden(recorded, method):
    """Before ReLU and finished; the network changes its activations in place."""
    net, x, target = recorded
    cam = GradCAM(net, "c2", method=method)
    (raw,) = cam.raw(x, target)
    GOLDEN.check(raw, "raw", METHODS[method])
    GOLDEN.check(cam(x, target), "map", METHODS[method])


def test_golden_layers_and_targets(recorded):
    net, x, target = recorded
    GOLDEN.check(GradCAM(net, ["c1", "c2", "h"])(x, target), "map_multilayer", "gradcam")
    GOLDEN.check(GradCAM(net, "c2")(x), "map_argmax", "gradcam")
    assert torch.equal(net(x).argmax(1), GOLDEN.outputs("gradcam")["argmax"])
    (raw,) = GradCAM(net, "c2").raw(x, target)
    GOLDEN.check(raw, "raw", "captum")
    GOLDEN.check(raw.relu(), "raw_relu", "captum")


def test_golden_tokens():
    """From the recorded activations on: tokens as images of channels."""
    arrays = GOLDEN.inputs("tok")
    act, grad = (arrays[name] for name in ("act", "grad"))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            tokens = torch.cat([torch.zeros(3, 1, 8), act.flatten(2).mT], 1)
            mixed = self.layer(tokens)[:, 1:]
            return (mixed * grad.flatten(2).mT).sum((1, 2))[:, None] + 0 * x.sum()

    cam = GradCAM(Net(), "layer", reshape=token_grid((3, 2)))
    GOLDEN.check(cam(torch.zeros(3, 3, 15, 10), 0), "map", "tok")


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool3d(1)])
def test_cam_identity(pool):
    """conv -> global average pooling -> linear: the map is CAM / (h w), in two and three axes."""
    volume = isinstance(pool, nn.AdaptiveAvgPool3d)
    conv = nn.Conv3d(2, 7, 3) if volume else nn.Conv2d(2, 7, 3)
    net = nn.Sequential(conv, nn.ReLU(inplace=True), pool, nn.Flatten(), nn.Linear(7, 4))
    x = torch.randn(3, 2, *((6, 9, 8) if volume else (9, 8)))
    targets = [0, 3, 1]
    features = net[1](net[0](x))
    classic = torch.einsum("bc,bc...->b...", net[4].weight[targets], features)
    (raw,) = GradCAM(net, "1").raw(x, targets)
    torch.testing.assert_close(raw, classic / features[0, 0].numel(), rtol=1e-5, atol=1e-7)
    (exact,) = GradCAM(net, "1", method="hirescam").raw(x, targets)
    torch.testing.assert_close(exact, raw)
    assert GradCAM(net, "1")(x).shape == (3, *x.shape[2:])


def test_nothing_is_left_behind(net, images):
    def fingerprint():
        return [
            (name, m.training, len(m._forward_hooks), len(m._backward_hooks), sorted(m.__dict__))
            for name, m in net.named_modules()
        ]

    net.train()
    net.norm.eval()
    net.conv.weight.requires_grad_(False)
    before = fingerprint(), {k: v.clone() for k, v in net.state_dict().items()}
    own = images.clone()
    cam = GradCAM(net, ["norm", "last"])
    first, second = cam(images), cam(images)
    assert torch.equal(first, second), "dropout was off"
    with pytest.raises(ZeroDivisionError):
        cam(images, lambda output: 1 // 0)
    assert fingerprint() == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in net.state_dict().items())
    assert torch.equal(images, own)
    assert all(p.grad is None for p in net.parameters())
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["conv.weight"]


def test_only_what_follows_the_layer_is_recorded(net, images):
    """No gradient of parameters, and no graph before the layer."""
    seen = []
    net.act.register_forward_hook(lambda m, args, output: seen.append(output.requires_grad))
    GradCAM(net, "last")(images)
    GradCAM(net, "conv")(images)
    assert seen == [False, True]


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_surroundings_do_not_matter(net, images, surroundings):
    want = GradCAM(net, "last")(images, 1)
    net.requires_grad_(False)
    with surroundings():
        assert torch.equal(GradCAM(net, "last")(images, 1), want)


def test_targets(net, images):
    cam = GradCAM(net, "last")
    best = net(images).argmax(1)
    want = cam(images)
    assert torch.equal(cam(images, best), want)
    assert torch.equal(cam(images, best.tolist()), want)
    by_hand = cam(images, lambda y: y.gather(1, best[:, None])[:, 0])
    assert torch.equal(by_hand, want)
    assert torch.equal(cam(images, 2), cam(images, [2, 2, 2]))

    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return Output(self.net(x))

    assert torch.equal(GradCAM(Wrapped(), "net.last")(images), want)


def test_counterfactual(net, images):
    (raw,) = GradCAM(net, "last").raw(images, 1)
    (against,) = GradCAM(net, "last", counterfactual=True).raw(images, 1)
    assert torch.equal(against, -raw)


def test_samples_do_not_meet(net, images):
    cam = GradCAM(net, ["norm", "last"], method="gradcam++")
    together = cam(images, [0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(cam(images[i : i + 1], i)[0], together[i], rtol=1e-4, atol=1e-5)


def test_sizes_and_scales(net, images):
    cam = GradCAM(net, "last")
    assert cam(images).shape == (3, 13, 10)
    assert cam(images, size=None).shape == (3, 7, 5)
    assert cam(images, size=(4, 30)).shape == (3, 4, 30)
    (raw,) = cam.raw(images)
    assert torch.equal(cam(images, size=None, normalize=None), raw.relu())
    scaled = cam(images, normalize="max")
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    with pytest.raises(ValueError, match="size: expected 'input', None or integers"):
        cam(images, size="layer")
    with pytest.raises(ValueError, match="several sizes"):
        GradCAM(net, ["conv", "last"])(images, size=None)


def test_a_map_without_anything_positive_is_zero(images):
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(1.0)
        net[3].weight.fill_(-1.0)
    with pytest.warns(UserWarning, match="3 of 3 saliency maps are constant"):
        found = GradCAM(net, "0")(images)
    assert torch.equal(found, torch.zeros(3, 13, 10))


def test_eigen_smoothing(net, images):
    """The direction of most variance, up to a sign that agrees with the plain map."""
    (smooth,) = GradCAM(net, "last", eigen_smooth=True).raw(images, 0)
    (raw,) = GradCAM(net, "last").raw(images, 0)
    act = []
    handle = net.last.register_forward_hook(lambda m, a, y: act.append(y.detach().clone()))
    captured = torch.autograd.functional.jacobian(
        lambda a: net.fc(F.adaptive_avg_pool2d(a.relu(), 2).flatten(1))[:, 0].sum(),
        (net(images), act[0])[1],
    )
    handle.remove()
    terms = (captured.mean((2, 3), keepdim=True) * act[0]).flatten(2)
    for one, row, plain in zip(terms, smooth.flatten(1), raw.flatten(1), strict=True):
        centred = (one - one.mean(1, keepdim=True)).T.double()
        value, vector = torch.linalg.eigh(centred.T @ centred)
        want = centred @ vector[:, -1]
        want = want if want @ plain.double() >= 0 else -want
        torch.testing.assert_close(row.double(), want, rtol=1e-3, atol=1e-5 * float(value[-1]))


def test_augmentation(net, images):
    plain = GradCAM(net, "last")
    targets = net(images).argmax(1)
    want = sum(
        plain(f * images, targets) + plain(f * images.flip(-1), targets).flip(-1)
        for f in (0.9, 1.0, 1.1)
    )
    found = GradCAM(net, "last", augment=True)(images)
    torch.testing.assert_close(found, want / 6)


def test_guided(net, images):
    """ReLUs as modules let positive gradients pass only; nothing stays in the model."""
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.ReLU6(),
                          nn.Flatten(), nn.Linear(5 * 54, 3))  # fmt: skip
    found = guided_backprop(chain, images, [0, 1, 2])
    x = images.clone().requires_grad_()

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, top):
            ctx.save_for_backward(z)
            ctx.top = top
            return z.clamp(0, top)

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            return g.clamp_min(0) * ((z > 0) & (z < ctx.top)), None

    hidden = Guided.apply(chain[2](Guided.apply(chain[0](x), float("inf"))), 6.0)
    logits = chain[5](chain[4](hidden))
    (want,) = torch.autograd.grad(logits[[0, 1, 2], [0, 1, 2]].sum(), x)
    torch.testing.assert_close(found, want)
    plain = torch.autograd.grad(chain(x)[[0, 1, 2], [0, 1, 2]].sum(), x)[0]
    assert not torch.allclose(found, plain)
    cam = GradCAM(chain, "2")
    product = guided_grad_cam(cam, images, [0, 1, 2])
    assert torch.equal(product, found * cam(images, [0, 1, 2])[:, None])
    with pytest.raises(ValueError, match=r"needs nn\.ReLU"):
        guided_backprop(nn.Sequential(nn.Flatten(), nn.Linear(390, 2)), images)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(net, images, memory_format):
    want = GradCAM(net, "last")(images, 0)
    found = GradCAM(net.to(memory_format=memory_format), "last")(
        images.to(memory_format=memory_format), 0
    )
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_softmax_is_warned_about(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1))
    with pytest.warns(UserWarning, match="sum to 1"):
        GradCAM(net, "0")(images)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.unused = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.pair, self.aside = Pair(), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        self.aside(x)
        x, _ = self.pair(self.conv(self.conv(x)))
        return x.mean((2, 3))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("layers", "error", "match"),
    [
        ("conv", ValueError, "'conv' runs more than once"),
        ("unused", ValueError, "did not run 'unused'"),
        ("aside", ValueError, "does not depend on 'aside'|does not depend on the layers"),
        ("pair", TypeError, "'pair' puts out an object of type tuple"),
    ],
)
def test_layers_that_cannot_be_explained(images, layers, error, match):
    model = Twice()
    with pytest.raises(error, match=match):
        GradCAM(model, layers)(images)
    assert all(not m._forward_hooks for m in model.modules())


def test_refusals(net, images):
    cam = GradCAM(net, "last")
    for targets, error, match in (
        (4, ValueError, r"targets: expected entries in \[0, 4\), got 4"),
        ([0, 1], ValueError, r"targets: expected shape \(3,\)"),
        ([0, 1, -1], ValueError, "got -1"),
        ("cat", TypeError, "targets: expected None, an integer"),
        ([0.0, 1.0, 2.0], TypeError, "targets: expected integers"),
        (lambda y: y, TypeError, "one floating number or one per sample"),
        (lambda y: y.sum().detach(), ValueError, "score does not depend on the layers"),
        (lambda y: images.sum(), ValueError, "score does not depend on the layers"),
    ):
        with pytest.raises(error, match=match):
            cam(images, targets)
    with pytest.raises(ValueError, match="no module 'lost'; did you mean 'last'"):
        GradCAM(net, "lost")
    with pytest.raises(ValueError, match="different names"):
        GradCAM(net, ["last", "last"])
    with pytest.raises(TypeError, match="layers: expected names"):
        GradCAM(net, [])
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        GradCAM(lambda x: x, "last")
    with pytest.raises(ValueError, match="method: expected one of"):
        GradCAM(net, "last", method="scorecam")
    with pytest.raises(TypeError, match="x: expected a tensor"):
        cam([1.0])
    with pytest.raises(ValueError, match=r"'fc' gives shape \(3, 4\).*token_grid"):
        GradCAM(net, "fc")(images)
    with torch.inference_mode():
        inside = images + 1
        frozen = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match="x: made in inference mode"):
        cam(inside)
    with pytest.raises(ValueError, match="parameter 'weight' was made in inference mode"):
        GradCAM(frozen, "")(images)
    with pytest.raises(ValueError, match=r"expected 1 \+ 2 x 2 tokens, got 6"):
        token_grid((2, 2))(torch.zeros(1, 6, 3))


def test_a_view_changed_in_place_is_noticed(images):
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.keep = nn.Identity()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            x = x * self.weight
            y = self.keep(x)
            x.mul_(2)
            return (x * y).mean((2, 3))

    with pytest.raises(RuntimeError, match="changed in place"):
        GradCAM(Alias(), "keep")(images)


def test_half_precision(net, images):
    want = GradCAM(net, "last")(images, 0)
    net = net.bfloat16()
    found = GradCAM(net, "last")(images.bfloat16(), 0)
    assert found.dtype == torch.float32
    assert (found - want).abs().max() < 0.1
    assert "GradCAM('gradcam', layers=['last'])" in repr(GradCAM(net, "last"))
