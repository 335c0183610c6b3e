"""Adaptive guidance as a guider of diffusers, driven as its modular pipelines drive one."""

from __future__ import annotations

import pytest
import torch

from transfuse.integrations.diffusers import adaptive_guider

try:
    import diffusers
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
except Exception as error:  # a broken dependency of diffusers is no ImportError
    pytest.skip(f"diffusers is not usable: {type(error).__name__}", allow_module_level=True)

STEPS = 6


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


@torch.no_grad()
def denoise(unet, guider, scheduler):
    """The denoising loop of the modular Stable Diffusion XL pipeline, and its model calls."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(2, 3, 5, 12, generator=generator)
    scheduler.set_timesteps(STEPS)
    calls = []
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(step=i, num_inference_steps=STEPS, timestep=t)
        batches = guider.prepare_inputs({"encoder_hidden_states": (text[0], text[1])})
        for batch in batches:
            guider.prepare_models(unet)
            batch.noise_pred = unet(
                scheduler.scale_model_input(x, t), t, batch.encoder_hidden_states
            ).sample
            guider.cleanup_models(unet)
        calls.append(len(batches))
        x = scheduler.step(guider(batches)[0], t, x).prev_sample
    return x, calls


def scheduler():
    return DDIMScheduler(clip_sample=False)


def test_it_is_a_guider_and_full_guidance_at_threshold_one(unet):
    plan = scheduler()
    guider = adaptive_guider(
        alphas_cumprod=plan.alphas_cumprod, guidance_scale=4.0, guidance_rescale=0.5, threshold=1.0
    )
    assert isinstance(guider, BaseGuidance)
    got, calls = denoise(unet, guider, plan)
    want, _ = denoise(
        unet, ClassifierFreeGuidance(guidance_scale=4.0, guidance_rescale=0.5), scheduler()
    )
    assert calls == [2] * STEPS
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not unet._forward_pre_hooks


def test_guidance_stops_when_no_sample_needs_it(unet):
    plan = scheduler()
    options = {"alphas_cumprod": plan.alphas_cumprod, "guidance_scale": 4.0}
    guider = adaptive_guider(**options, threshold=1.0)
    denoise(unet, guider, plan)
    # A threshold that each sample's own cosines reach somewhere on the way.
    guider = adaptive_guider(**options, threshold=0.5)
    first, calls = denoise(unet, guider, plan)
    switched = guider.guidance.switched_at
    assert (switched >= 0).all()
    assert calls == [2] * (int(switched.max()) + 1) + [1] * (STEPS - 1 - int(switched.max()))
    again, repeated = denoise(unet, guider, plan)  # a new trajectory begins by itself
    assert repeated == calls
    assert torch.equal(first, again)


def test_prediction_space_needs_no_table(unet):
    guider = adaptive_guider(space="prediction", min_guided_steps=2, threshold=0.1)
    _, calls = denoise(unet, guider, scheduler())
    assert calls == [2, 2, 2, 1, 1, 1]
    guider = adaptive_guider(space="prediction", start=0.5, threshold=1.0)
    assert denoise(unet, guider, scheduler())[1] == [1, 1, 1, 2, 2, 2]
    guider = adaptive_guider(space="prediction", guidance_scale=1.0)
    assert denoise(unet, guider, scheduler())[1] == [1] * STEPS
    with pytest.raises(ValueError, match="alphas_cumprod: expected the scheduler's table"):
        adaptive_guider()


def test_the_modular_pipeline_accepts_it():
    blocks = diffusers.modular_pipelines.StableDiffusionXLAutoBlocks()
    pipe = blocks.init_pipeline()
    guider = adaptive_guider(space="prediction", min_guided_steps=10)
    pipe.update_components(guider=guider)
    assert pipe.guider is guider
    assert "threshold" in guider.config
