"""HiDiffusion in diffusers pipelines, and in runs other than a whole one in single precision."""

from __future__ import annotations

import pytest
import torch
from hi_diffusion_unets import CONFIGS, RUN, SD, SDXL, WHY, diffusers, inputs, run
from patched_models import snapshot

from transfuse.integrations.diffusers import patch
from transfuse.methods.diffusion_control.hi_diffusion import (
    HiDiffusion,
    HiDiffusionOptions,
    RAUSchedule,
)
from transfuse.testing.models import tiny_unet

if diffusers is not None:
    from diffusers import (
        DDIMScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

pytestmark = pytest.mark.skipif(diffusers is None, reason=WHY)


def pipeline(kind, scheduler=None):
    scheduler = DDIMScheduler() if scheduler is None else scheduler
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": scheduler}
    if kind == "sd":
        unet = tiny_unet(**SD, sample_size=16)
        pipe = StableDiffusionPipeline(
            **parts, unet=unet, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    else:
        unet = tiny_unet(
            **SDXL,
            sample_size=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 6,
        )
        pipe = StableDiffusionXLPipeline(
            **parts, unet=unet, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, size=(128, 128), steps=10, guidance=5.0):
    g = torch.Generator().manual_seed(3)
    text, empty = torch.randn(2, 1, 5, 12, generator=g).unbind(0)
    extra = {}
    if isinstance(pipe, StableDiffusionXLPipeline):
        pooled = torch.randn(2, 1, 6, generator=g).unbind(0)
        extra = {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=empty,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
        **extra,
    ).images


def acting(pipe, patched):
    """Which device acts in each call of the model: sizes are noted where they change."""
    conv = pipe.unet.down_blocks[patched._layout.strided].downsamplers[0].conv
    first, second = pipe.unet.down_blocks[patched._layout.pooled].resnets[:2]
    seen, sizes = [], {}
    hooks = [
        conv.register_forward_hook(
            lambda m, args, out: sizes.update(down=args[0].shape[-1] / out.shape[-1])
        ),
        first.register_forward_hook(lambda m, args, out: sizes.update(before=out.shape[-1])),
        second.register_forward_pre_hook(
            lambda m, args: sizes.update(pool=sizes["before"] / args[0].shape[-1])
        ),
        pipe.unet.register_forward_hook(
            lambda m, args, out: seen.append((sizes["down"] > 3, sizes["pool"] > 1.5))
        ),
    ]
    return seen, hooks


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [(128, 128), (136, 200)])
def test_in_a_pipeline(kind, size):
    pipe = pipeline(kind)
    before, plain = snapshot(pipe.unet), sample(pipe, size)
    with patch(pipe, HiDiffusionOptions()) as patched:
        seen, hooks = acting(pipe, patched)
        out = sample(pipe, size)
        assert len(patched.drawn) == 10  # guidance is one call: both halves share the shifts
        for hook in hooks:
            hook.remove()
    expected = {
        "sd": [(s < 4, False) for s in range(10)],
        "sdxl": [(s < 1, 1 <= s < 4) for s in range(10)],
    }[kind]
    assert seen == expected
    assert out.isfinite().all()
    assert (out - plain).abs().max() > 1e-3
    with patch(pipe, HiDiffusionOptions()):
        assert torch.equal(sample(pipe, size), out)
    assert snapshot(pipe.unet) == before
    assert torch.equal(sample(pipe, size), plain)


def test_runs_that_confuse_call_counters():
    """Two calls per step, an interrupted run, another scheduler, another number of steps."""
    pipe = pipeline("sd", HeunDiscreteScheduler())
    with patch(pipe, HiDiffusionOptions(windows=False)) as patched:
        seen, hooks = acting(pipe, patched)
        sample(pipe, steps=5)
        assert len(seen) == 9
        # 9 timesteps, each after the first twice: steps 0, 2, 2, 4, 4, ... of which 0.4 x 9 act
        assert [strided for strided, _ in seen] == [True] * 3 + [False] * 6

        def stop(pipe, step, time, given):
            if step == 1:
                raise KeyboardInterrupt
            return given

        pipe.scheduler = EulerDiscreteScheduler()
        with pytest.raises(KeyboardInterrupt):
            pipe(
                prompt_embeds=torch.zeros(1, 5, 12), height=128, width=128, guidance_scale=1.0,
                num_inference_steps=10, output_type="latent", callback_on_step_end=stop,
            )  # fmt: skip
        seen.clear()
        sample(pipe, steps=25, guidance=1.0)
        assert [strided for strided, _ in seen] == [True] * 10 + [False] * 15
        for hook in hooks:
            hook.remove()


def test_a_run_that_starts_late():
    """As in image-to-image: steps are counted from where the run begins."""
    model, scheduler = tiny_unet(**SD), DDIMScheduler()
    scheduler.set_timesteps(10)
    scheduler.begin_index = 5  # what set_begin_index of the other schedulers leaves
    with HiDiffusion(model, HiDiffusionOptions(windows=False)) as raunet:
        raunet.follow(scheduler)
        times = scheduler.timesteps[5:]
        outs = [run(model, time=time) for time in times]
    plain = [run(model, time=time) for time in times]
    same = [torch.equal(a, b) for a, b in zip(outs, plain, strict=True)]
    assert same == [False, False, True, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = tiny_unet(**SDXL).to(dtype)
    x, text = (t.to(dtype) for t in inputs((18, 22)))
    options = HiDiffusionOptions(schedule=lambda latent, steps: RAUSchedule(range(5), range(5)))
    with torch.no_grad(), HiDiffusion(model, options).set_timesteps(RUN):
        out = model(x, 900, text).sample
    assert out.dtype == dtype
    assert out.isfinite().all()
