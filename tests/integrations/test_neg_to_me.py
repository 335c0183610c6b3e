"""Negative token merging on real diffusers models with random tiny configurations."""

from __future__ import annotations

import pytest
import torch

from transfuse.integrations.diffusers import patch
from transfuse.methods.diffusion_control.neg_to_me import (
    NegToMe,
    NegToMeOptions,
    push_from_first,
)

try:
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel
except Exception as error:  # a broken dependency of diffusers is no ImportError
    pytest.skip(f"diffusers is not usable: {error}", allow_module_level=True)


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval()


@torch.no_grad()
def run_unet(model, time=950, batch=4):
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(batch, 4, 8, 8, generator=g), torch.randn(batch, 5, 12, generator=g)
    return model(x, time, text).sample


@torch.no_grad()
def run_flux(model, time=950, batch=3):
    g = torch.Generator().manual_seed(1)
    side = torch.arange(4.0)
    ids = torch.stack(torch.meshgrid(torch.zeros(1), side, side, indexing="ij"), -1)
    return model(
        hidden_states=torch.randn(batch, 16, 4, generator=g),
        encoder_hidden_states=torch.randn(batch, 5, 12, generator=g),
        pooled_projections=torch.randn(batch, 8, generator=g),
        timestep=torch.full((batch,), time / 1000),
        img_ids=ids.reshape(16, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample


def fingerprint(model):
    return [
        (name, sorted(m.__dict__), [len(v) for k, v in vars(m).items() if k.endswith("_hooks")])
        for name, m in model.named_modules()
    ]


OPTIONS = NegToMeOptions(threshold=0.2, min_side=0)
MODELS = [(unet, run_unet), (flux, run_flux)]


@pytest.mark.parametrize(("make", "run"), MODELS)
def test_patch_run_remove(make, run):
    model = make()
    before, plain, late = fingerprint(model), run(model), run(model, time=700)
    handle = patch(model, OPTIONS)
    assert isinstance(handle, NegToMe)
    pushed = run(model)
    assert pushed.isfinite().all()
    torch.testing.assert_close(pushed[0], plain[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pushed[1:], plain[1:], rtol=1e-2, atol=1e-3)
    assert torch.equal(run(model, time=700), late)
    handle.remove()
    assert not handle.installed
    assert fingerprint(model) == before
    assert torch.equal(run(model), plain)


def test_unet_decoder_layers_of_a_side():
    model = unet()
    with patch(model, OPTIONS) as handle:
        assert all(name.startswith("up_blocks") for name in handle.layers)
        assert {name.rsplit(".", 1)[1] for name in handle.layers} == {"attn1", "attn2"}
    plain = run_unet(model)
    with patch(model, NegToMeOptions(threshold=0.2)):  # 8 x 8 tokens are fewer than 32 x 32
        assert torch.equal(run_unet(model), plain)
    with patch(model, NegToMeOptions(threshold=0.2, min_side=8, guidance=True)):
        out = run_unet(model)
    torch.testing.assert_close(out[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out[[1, 3]], plain[[1, 3]], rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_flux_pushes_image_tokens_only_and_before_the_projection():
    model = flux()
    seen = {}
    joint, single = model.transformer_blocks[1].attn, model.single_transformer_blocks[0].attn

    def note(name):
        return lambda module, args, out: seen.setdefault(name, []).append((args, out))

    hooks = [joint.register_forward_hook(note("joint"))]
    hooks.append(joint.to_out[0].register_forward_hook(note("to_out")))
    hooks.append(single.register_forward_hook(note("single")))
    run_flux(model)
    with patch(model, OPTIONS, layers=["transformer_blocks.1"]):
        run_flux(model)
    plain, pushed = (entry[0][0] for entry in seen["to_out"])
    expected = push_from_first(plain, alpha=0.9, threshold=0.2)
    assert not torch.equal(expected, plain)
    torch.testing.assert_close(pushed, expected)
    texts = [entry[1][1] for entry in seen["joint"]]
    assert torch.equal(texts[0], texts[1])
    for hook in hooks:
        hook.remove()
    seen.clear()
    hook = single.register_forward_hook(note("before"))
    run_flux(model)
    hook.remove()
    with patch(model, OPTIONS, layers=["single_transformer_blocks.0"]):
        hook = single.register_forward_hook(note("after"))
        run_flux(model)
        hook.remove()
    (_, plain), (_, pushed) = seen["before"][0], seen["after"][0]
    assert torch.equal(pushed[:, :5], plain[:, :5])
    expected = push_from_first(plain[:, 5:], alpha=0.9, threshold=0.2)
    torch.testing.assert_close(pushed[:, 5:], expected)
    assert not torch.equal(pushed[:, 5:], plain[:, 5:])
