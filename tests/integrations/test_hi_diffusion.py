"""HiDiffusion's RAU-Net on real diffusers UNets with random tiny configurations."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hi_diffusion_unets import CONFIGS, RUN, SD, SDXL, WHY, always, diffusers, inputs, run
from patched_models import snapshot

from transfuse.methods.diffusion_control.hi_diffusion import (
    HiDiffusion,
    HiDiffusionOptions,
    RAUSchedule,
    UNetLayout,
)
from transfuse.testing.models import tiny_unet

if diffusers is not None:
    from diffusers import UNet2DConditionModel, UNet2DModel

pytestmark = pytest.mark.skipif(diffusers is None, reason=WHY)


@torch.no_grad()
def written_out(model, size, time, *, strided=None, pooled=None, down=None, mid=None):
    """The UNet's forward with both devices in plain torch.

    Args:
        strided, pooled: number of the down block of each device; None: it does not act.
        down, mid: residuals of a ControlNet.
    """
    x, text = inputs(size)
    emb = model.time_embedding(model.time_proj(torch.full((x.shape[0],), time)))
    h = model.conv_in(x)
    skips, remembered, count = [h], None, len(model.down_blocks)

    def layers(block):
        return itertools.zip_longest(block.resnets, getattr(block, "attentions", None) or [])

    for i, block in enumerate(model.down_blocks):
        for j, (resnet, attention) in enumerate(layers(block)):
            h = resnet(h, emb)
            if attention is not None:
                h = attention(h, encoder_hidden_states=text, return_dict=False)[0]
            if i == pooled and j == 0:
                remembered = h.shape[2:]
                h = F.avg_pool2d(h, (2, 2), ceil_mode=True)
            skips.append(h)
        if block.downsamplers is not None:
            conv = block.downsamplers[0].conv
            geometry = (4, 2, 2) if i == strided else (2, 1, 1)
            h = F.conv2d(h, conv.weight, conv.bias, *geometry)
            skips.append(h)
    h = model.mid_block(h, emb, encoder_hidden_states=text)
    if down is not None:
        skips = [
            s + F.interpolate(r, s.shape[2:], mode="bicubic")
            for s, r in zip(skips, down, strict=True)
        ]
        h = h + F.interpolate(mid, h.shape[2:], mode="bicubic")
    for u, block in enumerate(model.up_blocks):
        mirrored = count - 1 - u
        for j, (resnet, attention) in enumerate(layers(block)):
            h = resnet(torch.cat([h, skips.pop()], dim=1), emb)
            if attention is not None:
                h = attention(h, encoder_hidden_states=text, return_dict=False)[0]
            if mirrored == pooled and j == len(model.down_blocks[pooled].resnets) - 1:
                h = F.interpolate(h, remembered, mode="bicubic")
        if block.upsamplers is not None:
            h = F.interpolate(h, skips[-1].shape[2:], mode="nearest")
            h = block.upsamplers[0].conv(h)
    return model.conv_out(model.conv_act(model.conv_norm_out(h)))


def residuals(model, size):
    """What a ControlNet of this UNet gives, at the sizes of the plain UNet."""
    shapes, sizes = [], tuple(size)

    def note(channels):
        shapes.append((2, channels, *sizes))

    note(model.conv_in.out_channels)
    for block in model.down_blocks:
        for resnet in block.resnets:
            note(resnet.out_channels)
        if block.downsamplers is not None:
            sizes = tuple(-(-side // 2) for side in sizes)
            note(block.resnets[-1].out_channels)
    g = torch.Generator().manual_seed(2)
    made = [torch.randn(shape, generator=g) for shape in shapes]
    return made, torch.randn(made[-1].shape, generator=g)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (17, 30), (13, 9)])
@pytest.mark.parametrize(("strided", "pooled"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("controlled", [False, True])
def test_raunet_equals_the_forward_written_out(kind, size, strided, pooled, controlled):
    model = tiny_unet(**CONFIGS[kind])
    extra, names = {}, {}
    if controlled:
        down, mid = residuals(model, size)
        extra = {"down": down, "mid": mid}
        names = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    plain = run(model, size, **names)
    torch.testing.assert_close(written_out(model, size, 900, **extra), plain, rtol=1e-4, atol=1e-5)
    where = {"strided": {"sd": 0, "sdxl": 1}[kind] if strided else None}
    where["pooled"] = 1 if pooled else None
    expected = written_out(model, size, 900, **where, **extra)
    with HiDiffusion(model, always(strided=strided, pooled=pooled)).set_timesteps(RUN):
        out = run(model, size, **names)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert (out - plain).abs().max() > 1e-3
    assert torch.equal(run(model, size, **names), plain)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_table_decides_which_device_acts(kind):
    """Each step of a run of 25 is the written-out one with that step's devices."""
    model, size = tiny_unet(**CONFIGS[kind]), (8, 24)
    times = [990 - 40 * step for step in range(25)]
    where = {"strided": {"sd": 0, "sdxl": 1}[kind], "pooled": 1}
    acting = {
        "sd": {**dict.fromkeys(range(10), ("strided",))},
        "sdxl": {
            **dict.fromkeys(range(4), ("strided",)),
            **dict.fromkeys(range(4, 10), ("pooled",)),
        },
    }[kind]
    with HiDiffusion(model, HiDiffusionOptions(windows=False)) as raunet:
        raunet.set_timesteps(torch.tensor(times))
        for step in (0, 3, 4, 9, 10, 24, 2, 2):  # any order, and twice
            out = run(model, size, times[step])
            devices = {name: where[name] for name in acting.get(step, ())}
            with torch.no_grad():
                raunet_off = written_out_unhooked(model, size, times[step], devices, raunet)
            torch.testing.assert_close(out, raunet_off, rtol=1e-4, atol=1e-5)


def written_out_unhooked(model, size, time, devices, patched):
    """The written-out forward on a copy without hooks."""
    assert patched.installed
    other = tiny_unet(**{k: model.config[k] for k in CONFIGS["sdxl"] if k in model.config})
    other.load_state_dict(model.state_dict())
    return written_out(other, size, time, **devices)


def test_steps_between_listed_times_and_before_the_first():
    model = tiny_unet(**SD)
    with HiDiffusion(model, HiDiffusionOptions(windows=False)) as raunet:
        with pytest.raises(RuntimeError, match=r"does not know the run: call follow\(pipeline\)"):
            run(model)
        raunet.set_timesteps(RUN)  # the downsampler acts in steps 0 and 1
        on, also_on, off = run(model, time=700), run(model, time=600.5), run(model, time=499)
        with pytest.raises(ValueError, match="timestep 950 lies before the first of the run, 900"):
            run(model, time=950)
        run(model, time=902)  # 900, rounded to bfloat16 and back by a caller
        with pytest.raises(ValueError, match="timestep: expected one for the whole batch"):
            run(model, time=torch.tensor([900, 700]))
    plain = [run(model, time=time) for time in (700, 600.5, 499)]
    assert not torch.equal(on, plain[0])
    assert not torch.equal(also_on, plain[1])
    assert torch.equal(off, plain[2])
    raunet = HiDiffusion(model)
    for timesteps, error in (([], ValueError), (["a"], TypeError)):
        with pytest.raises(error, match="timesteps: expected"):
            raunet.set_timesteps(timesteps)
    with pytest.raises(TypeError, match="follow: expected a pipeline with a scheduler"):
        raunet.follow(model)


def test_an_interrupted_call_leaves_nothing():
    model = tiny_unet(**SD)
    before, plain = snapshot(model), run(model)
    conv = model.down_blocks[0].downsamplers[0].conv
    for error in (RuntimeError, KeyboardInterrupt):

        def stop(module, args, error=error):
            raise error("stop")

        raunet = HiDiffusion(model, always(strided=True)).set_timesteps(RUN)
        hook = conv.register_forward_pre_hook(stop)
        with pytest.raises(error, match="stop"):
            run(model)
        hook.remove()
        assert torch.isfinite(run(model)).all()
        hook = conv.register_forward_pre_hook(stop)
        with pytest.raises(error, match="stop"):
            run(model)
        hook.remove()
        raunet.remove()
        assert (conv.stride, conv.padding, conv.dilation) == ((2, 2), (1, 1), (1, 1))
        assert torch.equal(run(model), plain)
    assert snapshot(model) == before


def test_adapters_and_other_structures_are_refused():
    model = tiny_unet(**SD)
    down, mid = residuals(model, (16, 16))
    with HiDiffusion(model, always(strided=True)).set_timesteps(RUN):
        with pytest.raises(ValueError, match=r"residuals: expected 12 residuals .* got 3"):
            run(
                model,
                down_block_additional_residuals=down[:3],
                mid_block_additional_residual=mid,
            )
        for extra in (
            {"down_intrablock_additional_residuals": list(down)},
            {"down_block_additional_residuals": down},
        ):
            with pytest.raises(ValueError, match=r"T2I-Adapter adds its own: use it with raunet="):
                run(model, **extra)
        with pytest.raises(ValueError, match="has a RAU-Net already"):
            HiDiffusion(model, HiDiffusionOptions(windows=False))
    wrong = HiDiffusionOptions(windows=False, schedule=lambda latent, steps: (0, 3))
    with (
        HiDiffusion(model, wrong).set_timesteps(RUN),
        pytest.raises(TypeError, match=r"schedule: expected it to return a RAUSchedule, got \(0"),
    ):
        run(model)
    deep = tiny_unet(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    before = snapshot(deep)
    with pytest.raises(
        ValueError, match=r"self-attention from down block 2 on: supported are .* or layout="
    ):
        HiDiffusion(deep)
    with HiDiffusion(
        deep, HiDiffusionOptions(raunet=False, shift=1), layers=["down_blocks.2"]
    ) as h:
        assert len(h.layers) == 1
        assert run(deep).isfinite().all()
    layout = UNetLayout(model="sdxl", windows=("down_blocks.2",), strided=0, pooled=7)
    with pytest.raises(ValueError, match="layout: pooled expected one of 3 down blocks, got 7"):
        HiDiffusion(deep, HiDiffusionOptions(layout=layout))
    layout = UNetLayout(model="sdxl", windows=("down_blocks.2",), strided=2, pooled=1)
    with pytest.raises(ValueError, match=r"needs a downsampler in down_blocks\.2"):
        HiDiffusion(deep, HiDiffusionOptions(layout=layout))
    assert snapshot(deep) == before
    layout = UNetLayout(model="sdxl", windows=("down_blocks.2",), strided=1, pooled=0)
    with HiDiffusion(deep, HiDiffusionOptions(layout=layout)).set_timesteps(RUN):
        assert run(deep).isfinite().all()
    torch.manual_seed(0)
    other = UNet2DModel(
        norm_num_groups=4,
        block_out_channels=(8, 8),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        upsample_type="resnet",
        attention_head_dim=4,
    )
    with pytest.raises(
        ValueError, match=r"up_blocks\.0: RAU-Net needs upsamplers that take an out"
    ):
        HiDiffusion(other)
    other = tiny_unet(**{**SD, "downsample_padding": 0})
    with pytest.raises(ValueError, match=r"down_blocks\.0: RAU-Net needs a downsampler with a 3"):
        HiDiffusion(other)


def test_layouts_of_the_real_models():
    """Stable Diffusion 1.5 and SDXL in full size (without memory): the official lists of blocks."""
    shared = {"sample_size": 64, "layers_per_block": 2}
    sd15 = {
        **shared,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": SD["down_block_types"],
        "up_block_types": SD["up_block_types"],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    sdxl = {
        **shared,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": SDXL["down_block_types"],
        "up_block_types": SDXL["up_block_types"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    }
    block = "{}.attentions.{}.transformer_blocks.{}.attn1".format
    expected = {
        "sd15": [block("down_blocks.0", i, 0) for i in range(2)]
        + [block("up_blocks.3", i, 0) for i in range(3)],
        "sdxl": [block("down_blocks.1", i, j) for i in range(2) for j in range(2)]
        + [block("up_blocks.1", i, j) for i in range(3) for j in range(2)],
    }
    for name, config in (("sd15", sd15), ("sdxl", sdxl)):
        with torch.device("meta"):
            model = UNet2DConditionModel(**config)
        with HiDiffusion(model) as patched:
            assert list(patched.layers) == expected[name]
            strided = [n for n, m in model.named_modules() if m._forward_hooks_always_called]
            assert f"down_blocks.{int(name == 'sdxl')}.downsamplers.0" in strided
            assert (
                patched.schedule((256, 256), 50)
                == {
                    "sd15": RAUSchedule(range(35), range(15)),
                    "sdxl": RAUSchedule(range(8), range(8, 20)),
                }[name]
            )
        with HiDiffusion(model, HiDiffusionOptions(model="sdxl_turbo")) as turbo:
            assert turbo.schedule((128, 128), 4) == RAUSchedule(range(0), range(2))


def test_an_inpainting_unet_is_not_aggressive():
    model = tiny_unet(**SDXL, in_channels=9)
    for aggressive, expected in ((None, (0, 20)), (True, (8, 20))):
        with HiDiffusion(model, HiDiffusionOptions(aggressive=aggressive)) as raunet:
            assert raunet.schedule((64, 64), 50).pooled == range(*expected)
    windows = HiDiffusion(model, HiDiffusionOptions(raunet=False))
    with pytest.raises(ValueError, match="schedule: raunet is False"):
        windows.schedule((64, 64), 50)
