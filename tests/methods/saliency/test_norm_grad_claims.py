"""The claim of NormGrad: its maps show the terms of a virtual identity layer's gradient."""

from __future__ import annotations

import pytest
import torch
from outer_products import REDUCE, entries
from torch import nn

from transfuse.methods.saliency._capture import capture
from transfuse.methods.saliency.norm_grad import NormGrad


@pytest.mark.claim
def test_a_virtual_identity_layer(net, photograph):
    """Inserted for real after a layer of a small network, on a photograph: nothing changes, its
    weight's gradient is the sum of the terms, and all 20 maps are those of the terms."""
    x, target = photograph[..., ::8, ::8].contiguous(), 1
    before = net(x).detach()
    found = capture(net, x, ["norm"], target)
    act, grad = found.activations[0], found.gradients[0]
    for kernel in (1, 3):
        identity = nn.Conv2d(6, 6, kernel, padding=kernel // 2, bias=False)
        nn.init.dirac_(identity.weight)
        own = net.norm
        net.norm = nn.Sequential(own, identity)
        try:
            score = net(x)[0, target]
            (gradient,) = torch.autograd.grad(score, identity.weight)
        finally:
            net.norm = own
        torch.testing.assert_close(score.detach(), before[0, target], rtol=1e-5, atol=1e-6)
        total = entries(act, grad, f"conv{kernel}x{kernel}", padding=kernel // 2).sum((2, 3))[0]
        torch.testing.assert_close(total.view_as(gradient), gradient, rtol=1e-5, atol=1e-6)
    for phase1 in ("conv1x1", "conv3x3", "conv3x3_depthwise", "scaling", "bias"):
        for phase2, reduce in REDUCE.items():
            (raw,) = NormGrad(net, "norm", phase1=phase1, phase2=phase2).raw(x, target)
            want = reduce(entries(act, grad, phase1, padding=1))
            error = (raw - want).abs().max()
            assert error <= 1e-4 * want.abs().max(), (phase1, phase2)
