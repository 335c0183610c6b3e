"""Grad-SAM on a real diffusers UNet, random and tiny."""

from __future__ import annotations

import pytest
import torch

from transfuse.integrations.diffusers import AttendProcessor, patch
from transfuse.methods.diffusion_control.easy_ref import EasyRefOptions
from transfuse.methods.diffusion_control.grad_sam import (
    GradSAM,
    GradSAMOptions,
    keep_subjects,
    make_mask,
)
from transfuse.testing.models import tiny_unet

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)


def unet():
    return tiny_unet(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(*s, generator=g).to(dtype) for s in ((1, 4, 4, 4), (1, 5, 12))]


class MapProcessor:
    """Attention through an explicit map that can be replaced by a leaf."""

    def __init__(self):
        self.leaf = self.map = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def split(x):
            return x.reshape(*x.shape[:2], attn.heads, -1).permute(0, 2, 1, 3)

        q = split(attn.to_q(hidden_states))
        k, v = (split(f(encoder_hidden_states)) for f in (attn.to_k, attn.to_v))
        self.map = (q @ k.mT * attn.scale).softmax(-1)
        out = (self.map if self.leaf is None else self.leaf) @ v
        return attn.to_out[0](out.permute(0, 2, 1, 3).reshape(*hidden_states.shape[:2], -1))


@pytest.mark.parametrize("below", ["default", "attend"])
def test_every_layer_equals_the_dense_jacobian(below):
    x, text = inputs(torch.float64)
    model = unet().double()
    processors = dict(model.attn_processors)
    expected_output = model(x, 11, text).sample
    names = [n.removesuffix(".processor") for n in processors if "attn2" in n]
    handles = [patch(model, AttendProcessor())] if below == "attend" else []
    sam = patch(model, GradSAMOptions(chunk=20), layers=names)
    assert set(sam.layers) == set(names)
    result = sam.score(lambda: model(x, 11, text).sample, [[1], [2, 4]])
    torch.testing.assert_close(result.output, expected_output)
    for handle in (sam, *handles):
        handle.remove()
    assert model.attn_processors == processors
    assert torch.equal(model(x, 11, text).sample, expected_output)

    for i, name in enumerate(sam.layers):
        reference = unet().double()
        explicit = MapProcessor()
        reference.get_submodule(name).set_processor(explicit)
        with torch.no_grad():
            reference(x, 11, text)
        a = explicit.map

        def run(leaf, explicit=explicit, reference=reference):
            explicit.leaf = leaf
            return reference(x, 11, text).sample[0]

        per_column = (a * torch.autograd.functional.jacobian(run, a).abs()).sum((3, 4, 5))
        for j, columns in enumerate(([1], [2, 4])):
            expected = per_column[..., columns].sum(-1)
            torch.testing.assert_close(result.scores[0, i, j], expected, rtol=1e-7, atol=1e-10)


def test_masked_text_has_no_score_and_the_rest_that_of_the_shorter_text():
    x, text = inputs(torch.float64)
    model = unet().double()
    mask = torch.tensor([[1, 1, 1, 0, 0]], dtype=torch.bool)
    with patch(model, AttendProcessor()), GradSAM(model) as sam:
        masked = sam.score(
            lambda: model(x, 11, text, encoder_attention_mask=mask).sample, [[1], [3]]
        )
        shorter = sam.score(lambda: model(x, 11, text[:, :3]).sample, [[1]])
    torch.testing.assert_close(masked.scores[:, :, 0], shorter.scores[:, :, 0])
    assert masked.scores[:, :, 1].abs().max() == 0


def test_default_is_the_last_layer_of_the_decoder():
    with GradSAM(unet()) as sam:
        assert sam.layers == ("up_blocks.1.attentions.1.transformer_blocks.0.attn2",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_ddpm_steps_in_inference_mode(dtype):
    model = unet().to(dtype)
    with torch.inference_mode():
        several_ddpm_steps(model, dtype)


def several_ddpm_steps(model, dtype):
    x, text = inputs(dtype)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(6)
    labels = [int(t) for t in scheduler.timesteps]
    reference = torch.full_like(x, 0.5)

    def sample(at):
        generator = torch.Generator().manual_seed(3)
        return keep_subjects(
            sam,
            lambda z, t: model(z, t, text).sample,
            lambda e, t, z: scheduler.step(e, t, z, generator=generator).prev_sample,
            x,
            reference,
            subjects=[[1]],
            labels=labels,
            alphas_cumprod=scheduler.alphas_cumprod,
            noise=torch.zeros_like(x),
            predict_unconditional=lambda z, t: model(z, t, torch.zeros_like(text)).sample,
            at=at,
        )

    with patch(model, EasyRefOptions()) as references, patch(model, GradSAMOptions()) as sam:
        references.set_references(torch.ones(1, 3, 12, dtype=dtype), 0.3)
        first, second, plain = sample((2, 4)), sample((2, 4)), sample(())
    assert first.dtype == dtype
    assert first.isfinite().all()
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)


def test_masks_of_a_real_call():
    x, text = inputs()
    model = unet()
    with GradSAM(model) as sam:
        mask = make_mask(sam.score(lambda: model(x, 11, text).sample, [[1], [3]]).scores)
    assert mask.shape == (1, 4, 4, 4)
    assert 0 < mask.sum() < mask.numel()
