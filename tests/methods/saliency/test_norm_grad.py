"""NormGrad: recorded outputs, the virtual identity layer, every option and refusal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.saliency.grad_cam import GradCAM
from transfuse.methods.saliency.norm_grad import (
    NormGrad,
    class_sensitivity,
    meta_saliency,
)
from transfuse.ops import finish_map, normgrad_map
from transfuse.testing import golden

GOLDEN = golden.load("norm_grad")
PHASES1 = ("conv1x1", "conv3x3", "conv3x3_depthwise", "scaling", "bias")
PHASES2 = ("norm", "filter_norm", "sum", "max")


class Recorded(nn.Module):
    """The network of the recording."""

    def __init__(self, arrays):
        super().__init__()
        self.c1, self.r1 = nn.Conv2d(3, 7, 3, padding=1), nn.ReLU()
        self.c2 = nn.Conv2d(7, 6, 3, padding=1, stride=int(arrays["stride2"]))
        self.r2 = nn.ReLU(inplace=True)
        self.c3 = nn.Conv2d(6, 7, (3, 2), stride=(2, 1), padding=(1, 0))
        self.r3, self.fc = nn.ReLU(inplace=True), nn.Linear(7, 4)
        for name, parameter in self.named_parameters():
            parameter.data.copy_(arrays[name.replace(".", "_")])

    def forward(self, x):
        x = self.r2(self.c2(self.r1(self.c1(x))))
        return self.fc(self.r3(self.c3(x)).mean((2, 3)))


@pytest.fixture
def recorded():
    return Recorded(GOLDEN.inputs("net"))


@pytest.mark.parametrize("phase1", PHASES1)
@pytest.mark.parametrize("phase2", PHASES2)
def test_golden_grid(recorded, phase1, phase2):
    arrays = GOLDEN.inputs("net")
    saliency = NormGrad(recorded, "r2", phase1=phase1, phase2=phase2)
    (raw,) = saliency.raw(arrays["x"], int(arrays["target"]))
    GOLDEN.check(raw[0], f"{phase1}_{phase2}", "grid")
    layer = GOLDEN.inputs("grid")
    found = normgrad_map(
        layer["act"][None], layer["grad_score"][None], phase1=phase1, phase2=phase2
    )
    GOLDEN.check(found[0], f"{phase1}_{phase2}", "grid")
    if phase2 == "norm":
        size = layer["resized_size"].tolist()
        resized = saliency(arrays["x"], int(arrays["target"]), size=size)
        GOLDEN.check(resized[0], f"{phase1}_norm_resized", "grid")


def test_golden_layers(recorded):
    arrays = GOLDEN.inputs("net")
    size = GOLDEN.inputs("grid")["resized_size"].tolist()
    found = NormGrad(recorded, ["r1", "r2", "r3"])(arrays["x"], int(arrays["target"]), size=size)
    GOLDEN.check(found[0], "combi_conv1x1_norm", "grid")


def test_golden_batch(recorded):
    x, target = (GOLDEN.inputs("ray")[name] for name in ("x", "target"))
    for name, saliency in {
        "norm_grad": NormGrad(recorded, "r2"),
        "selective": NormGrad(recorded, "r2", phase1="scaling", phase2="filter_norm"),
        "linear_approx": NormGrad(recorded, "r2", phase1="scaling", phase2="sum"),
        "proper_conv3": NormGrad(recorded, "c3", phase1="conv"),
    }.items():
        (raw,) = saliency.raw(x, target)
        GOLDEN.check(raw[:, None], name, "ray")
    base = NormGrad(recorded, "r2")
    GOLDEN.check(base(x, target, normalize=None)[:, None], "norm_grad_resized", "ray")
    GOLDEN.check(GradCAM(recorded, "r2").raw(x, target)[0].relu()[:, None], "grad_cam", "ray")
    lr = GOLDEN.params()["meta_lr"]
    for name, ascend in (("meta_norm_grad", False), ("meta_norm_grad_negated", True)):
        found = meta_saliency(
            lambda x, k: base.raw(x, k)[0], recorded, x, target, lr=lr, ascend=ascend
        )
        GOLDEN.check(found[:, None], name, "ray")


def test_layers_together(net, images):
    layers = ["conv", "last"]
    maps = [NormGrad(net, name)(images, 1) for name in layers]
    torch.testing.assert_close(NormGrad(net, layers)(images, 1), maps[0] * maps[1])
    mean = NormGrad(net, layers, combine="mean", weights=[1.0, 3.0])(images, 1)
    torch.testing.assert_close(mean, 0.25 * maps[0] + 0.75 * maps[1])
    linear = NormGrad(net, layers, combine="mean", weights="linear")(images, 1)
    torch.testing.assert_close(linear, (maps[0] + 2 * maps[1]) / 3)
    product = NormGrad(net, layers, weights=[1, 3])(images, 1)
    torch.testing.assert_close(product, maps[0] ** 0.25 * maps[1] ** 0.75)
    with pytest.raises(ValueError, match="weights: expected 2 numbers"):
        NormGrad(net, layers, weights=[1.0])(images, 1)
    with pytest.raises(ValueError, match="weights: expected one of 'linear'"):
        NormGrad(net, layers, weights="depth")


def test_bias_before_pooling_is_constant_and_said_so():
    """Its gradient is the same everywhere: no map, where the released code divides by zero."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="2 of 2 saliency maps are constant"):
        found = NormGrad(net, "0", phase1="bias")(torch.rand(2, 3, 8, 8))
    assert torch.equal(found, torch.zeros(2, 8, 8))


@pytest.mark.parametrize("padding", ["valid", "same", 2])
def test_the_convolution_that_follows(images, padding):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=padding, dilation=2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    (raw,) = NormGrad(net, "0", phase1="conv").raw(images, 2)
    y = net[0](images).detach().requires_grad_()
    (grad,) = torch.autograd.grad(net[1:](y + 0)[:, 2].sum(), y)
    pad = {"valid": 0, "same": 2, 2: 2}[padding]
    patches = F.unfold(images, 3, dilation=2, padding=pad).unflatten(2, grad.shape[2:])
    torch.testing.assert_close(raw, patches.norm(dim=1) * grad.norm(dim=1))


def test_convolutions_that_do_not_fit(net):
    with pytest.raises(ValueError, match="'act', a ReLU"):
        NormGrad(net, "act", phase1="conv")
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="with 2 groups"):
        NormGrad(grouped, "0", phase1="conv")
    uneven = nn.Sequential(nn.Conv2d(4, 4, 2, padding="same"))
    with pytest.raises(ValueError, match="differs between its two sides"):
        NormGrad(uneven, "0", phase1="conv")
    with pytest.raises(ValueError, match="phase1: expected one of"):
        NormGrad(net, "act", phase1="conv5x5")
    assert "NormGrad('conv1x1', 'norm', layers=['act'])" in repr(NormGrad(net, "act"))


def test_meta_saliency_gives_everything_back(net, images):
    net.train()
    net.fc.weight.requires_grad_(False)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [p.requires_grad for p in net.parameters()]
    saliency = NormGrad(net, "last")
    base = saliency(images, [0, 1, 2])
    moved = meta_saliency(saliency, net, images, [0, 1, 2], lr=0.5)
    assert not torch.allclose(moved, base)
    assert torch.equal(meta_saliency(saliency, net, images, [0, 1, 2], lr=0.0), base)

    def fails(x, k):
        assert not torch.equal(net.fc.weight, state["fc.weight"]), "a frozen weight moves too"
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        meta_saliency(fails, net, images, [0, 1, 2], lr=0.5)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert all(m.training for m in net.modules())
    with pytest.raises(TypeError, match="targets: meta-saliency needs classes"):
        meta_saliency(saliency, net, images, lambda y: y.sum(), lr=0.1)
    with pytest.raises(ValueError, match=r"entries in \[0, 4\)"):
        meta_saliency(saliency, net, images, 4, lr=0.1)
    with pytest.raises(ValueError, match="lr: expected a finite number"):
        meta_saliency(saliency, net, images, 0, lr=float("nan"))


def test_class_sensitivity(net, images):
    """1 where the class plays no part; the correlation of the two maps elsewhere."""
    saliency = NormGrad(net, "last")
    logits = net(images)
    pair = torch.stack(
        [saliency(images, k).flatten(1) for k in (logits.argmax(1), logits.argmin(1))]
    )
    want = torch.stack([torch.corrcoef(pair[:, b])[0, 1] for b in range(3)])
    torch.testing.assert_close(class_sensitivity(saliency, net, images), want)
    same = class_sensitivity(lambda x, k: saliency(x, 0), net, images)
    torch.testing.assert_close(same, torch.ones(3))


def test_finished_maps_of_a_batch_are_those_of_each_sample(net, images):
    together = NormGrad(net, "conv")(images, 0)
    for i in range(3):
        torch.testing.assert_close(NormGrad(net, "conv")(images[i : i + 1], 0)[0], together[i])
    assert together.amin((1, 2)).eq(0).all()
    assert together.amax((1, 2)).eq(1).all()


def test_volumes():
    net = nn.Sequential(nn.Conv3d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(),
                        nn.Linear(24, 2))  # fmt: skip
    x = torch.rand(2, 1, 6, 7, 8)
    found = NormGrad(net, "1", phase1="conv3x3")(x)
    assert found.shape == (2, 6, 7, 8)
    (raw,) = NormGrad(net, "0", phase1="conv").raw(x)
    assert raw.shape == (2, 4, 5, 6)
    assert finish_map(raw).shape == (2, 4, 5, 6)
