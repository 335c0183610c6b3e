"""HiDiffusion's windows on real diffusers UNets, and with other patches on the same model."""

from __future__ import annotations

import itertools

import pytest
import torch
from hi_diffusion_unets import CONFIGS, RUN, SD, WHY, diffusers, inputs, run
from patched_models import snapshot

from transfuse.integrations.diffusers import AttendProcessor, TokenMerging, patch
from transfuse.methods.diffusion_control.hi_diffusion import (
    HiDiffusion,
    HiDiffusionOptions,
    RAUSchedule,
)
from transfuse.methods.diffusion_control.style_injection import StyleInjectionOptions
from transfuse.testing.models import tiny_unet

if diffusers is not None:
    from diffusers import UNet2DModel

pytestmark = pytest.mark.skipif(diffusers is None, reason=WHY)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (13, 18)])
@pytest.mark.parametrize("odd", ["exact", "resize"])
def test_windows_of_the_right_layers(kind, size, odd):
    """One window as large as the grid is no window; four are one."""
    model = tiny_unet(**CONFIGS[kind])
    plain = run(model, size)
    setting = HiDiffusionOptions(raunet=False, odd=odd)
    with HiDiffusion(model, setting) as patched:
        levels = {name.split(".attentions")[0] for name in patched.layers}
        out = run(model, size)
    places = {"sd": ("down_blocks.0", "up_blocks.3"), "sdxl": ("down_blocks.1", "up_blocks.1")}
    assert levels == set(places[kind])
    assert out.isfinite().all()
    assert (out - plain).abs().max() > 1e-4
    assert torch.equal(run(model, size), plain)


def test_attention_masks_are_refused():
    model = tiny_unet(**SD)
    with (
        HiDiffusion(model, HiDiffusionOptions(raunet=False)),
        pytest.raises(ValueError, match="received an attention mask"),
    ):
        run(model, attention_mask=torch.ones(2, 256))


def test_a_unet_without_text():
    """Attention directly on (B, C, H, W), with a group norm and a residual of its own."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=4,
        layers_per_block=1,
        in_channels=4,
        out_channels=4,
    ).eval()
    x = inputs((12, 10))[0]
    with torch.no_grad():
        plain = model(x, 900).sample
        with HiDiffusion(model).set_timesteps(RUN):
            out = model(x, 900).sample
        assert torch.equal(model(x, 900).sample, plain)
    assert out.shape == plain.shape
    assert (out - plain).abs().max() > 1e-4


def test_training_with_recomputed_blocks():
    grads = []
    for checkpointing in (False, True):
        model = tiny_unet(**SD).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        x, text = inputs()
        text.requires_grad_()
        options = HiDiffusionOptions(
            schedule=lambda latent, steps: RAUSchedule(range(5), range(5)), seed=3
        )
        with HiDiffusion(model, options).set_timesteps(RUN):
            model(x, 900, text).sample.square().sum().backward()
        grads.append((text.grad, *(p.grad for p in model.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# ---- other patches on the same model ------------------------------------------------------------


def test_with_token_merging():
    model = tiny_unet(**SD)
    before, plain = snapshot(model), run(model)
    # On the finest level both want the same layers.
    for ratio in (0.5, 0.75):  # 0.75 leaves as many tokens as the next level has
        for first, second in itertools.permutations(
            [HiDiffusionOptions(raunet=False), TokenMerging(ratio=ratio)]
        ):
            one, other = patch(model, first), patch(model, second)
            with pytest.raises(RuntimeError, match=r"tokens enter its block .*token merging"):
                run(model)
            one.remove()
            other.remove()
    # On different levels they work together, in any order of coming and going.
    merging = TokenMerging(max_downsample=8, random=False)
    outs = []
    for order in (0, 1):
        options = HiDiffusionOptions(
            shift=1, schedule=lambda latent, steps: RAUSchedule(range(5), range(5))
        )
        handles = []
        for which in (order, 1 - order):
            if which:
                handles.append(patch(model, options).set_timesteps(RUN))
            else:
                handles.append(patch(model, merging, layers=["down_blocks.1", "up_blocks.2"]))
        outs.append(run(model))
        handles[0].remove()
        run(model)
        handles[1].remove()
    torch.testing.assert_close(*outs)
    assert (outs[0] - plain).abs().max() > 1e-3
    assert snapshot(model) == before
    assert torch.equal(run(model), plain)


def test_with_style_injection():
    model = tiny_unet(**SD)
    before, plain = snapshot(model), run(model)
    options = HiDiffusionOptions(
        shift=1, schedule=lambda latent, steps: RAUSchedule(range(5), range(0))
    )
    windows = patch(model, options).set_timesteps(RUN)
    # Both active on one layer: refused whichever came last, while capturing and injecting.
    shared = patch(model, StyleInjectionOptions())
    alone = run(model)  # the injector is idle: the windows run
    assert (alone - plain).abs().max() > 1e-4
    with shared.capture("content"), pytest.raises(RuntimeError, match="both active"):
        run(model)
    shared.remove()
    windows.remove()
    shared = patch(model, StyleInjectionOptions())
    with HiDiffusion(model, options).set_timesteps(RUN):
        torch.testing.assert_close(run(model), alone)
        with shared.capture("content"), pytest.raises(RuntimeError, match="both active"):
            run(model)
    shared.remove()
    # On different layers, with features that RAU-Net resized.
    windows = patch(model, options).set_timesteps(RUN)
    apart = patch(model, StyleInjectionOptions(), layers=["up_blocks.1", "up_blocks.2"])
    for role in ("content", "style"):
        with apart.capture(role):
            run(model)
    with apart.inject():
        injected = run(model)
    assert (injected - alone).abs().max() > 1e-4
    windows.remove()
    apart.remove()
    assert snapshot(model) == before
    assert torch.equal(run(model), plain)


def test_above_another_processor():
    model = tiny_unet(**SD)
    with patch(model, AttendProcessor()):
        plain = run(model)
        with patch(model, HiDiffusionOptions(raunet=False, shift=0)):
            assert (run(model) - plain).abs().max() > 1e-4
        assert torch.equal(run(model), plain)
