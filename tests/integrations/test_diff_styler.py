"""DiffStyler on a real diffusers UNet, random and tiny: resnet features, LoRAs, several steps."""

from __future__ import annotations

import pytest
import torch

from transfuse.integrations.diffusers import AttendProcessor, patch
from transfuse.methods.diffusion_control.diff_styler import (
    DiffStyler,
    DiffStylerOptions,
    LowRank,
    Texts,
    invert,
    new_low_rank,
    stylize,
)
from transfuse.methods.diffusion_control.easy_ref import EasyRefOptions
from transfuse.testing.models import tiny_unet

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)

FEATURE = "up_blocks.1.resnets.1.conv2"


def unet():
    return tiny_unet(resnet_out_scale_factor=1.4)


def setting(model, n=2):
    dtype = next(model.parameters()).dtype
    g = torch.Generator().manual_seed(1)
    z, source = torch.randn(2, n, 4, 8, 8, generator=g).to(dtype)
    empty, negative, *prompts = torch.randn(4, 1, 5, 12, generator=g).to(dtype)
    loras = []
    for seed in range(2):
        lora = new_low_rank(model, 2, generator=torch.Generator().manual_seed(seed))
        g = torch.Generator().manual_seed(10 + seed)
        loras.append(
            {
                k: LowRank(p.down, 0.2 * torch.randn(p.up.shape, generator=g).to(dtype))
                for k, p in lora.items()
            }
        )
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :5], masks[1, 4:, 2:] = True, True
    return z, source, Texts(empty, negative, prompts), loras, masks


class Dense:
    """Injection for one layer as the released code writes it: thirds, dense maps, in place."""

    def __init__(self, state, name):
        self.state, self.name = state, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (f(hidden_states) for f in (attn.to_q, attn.to_k, attn.to_v))
        rate, n = self.state["rate"], self.state["n"]
        q, k = q.clone(), k.clone()
        source = self.state["stored"].get(self.name, (q[:n].clone(), k[:n].clone()))
        if rate is not None:
            for third in range(len(q) // n):
                rows = slice(third * n, third * n + n)
                q[rows] = rate * source[0] + (1 - rate) * q[rows]
                k[rows] = rate * source[1] + (1 - rate) * k[rows]
        if self.state["keep"] is not None:
            self.state["keep"][self.name] = source
        heads = [x.reshape(*x.shape[:2], attn.heads, -1).permute(0, 2, 1, 3) for x in (q, k, v)]
        out = (heads[0] @ heads[1].mT * attn.scale).softmax(-1) @ heads[2]
        return attn.to_out[0](out.permute(0, 2, 1, 3).reshape(*hidden_states.shape[:2], -1))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["base", "self"])
def test_unet_equals_copies_with_merged_weights(mode):
    """The library switches LoRAs on one model; here every LoRA is a merged copy of the model."""
    model = unet().double()
    z, source, texts, loras, masks = setting(model)
    injection = DiffStylerOptions().injection(10, 50, 401)
    assert injection == (0.802, True, 0.802, True)
    with DiffStyler(model) as styler:
        names = styler.layers
        assert styler.features == (FEATURE,)
        assert len(names) == 4
    state = {"rate": 0.802, "n": 2, "stored": {}, "keep": None}
    feature = {"stored": None, "keep": None}

    def copy(lora):
        one = unet().double()
        for name, (down, up) in lora.items():
            one.get_submodule(name).weight += up @ down
        for name in names:
            one.get_submodule(name).set_processor(Dense(state, name))

        def replace(module, args, out):
            own = out[:2] if feature["stored"] is None else feature["stored"]
            if feature["keep"] is not None:
                feature["keep"].append(own.clone())
            return own.repeat(len(out) // 2, 1, 1, 1)

        one.get_submodule(FEATURE).register_forward_hook(replace)
        return one

    def text(*parts):
        return torch.cat([p.expand(2, -1, -1) for p in parts])

    thirds = torch.cat([source, z, z])
    state["keep"], feature["keep"] = {}, []
    context = text(texts.empty, texts.negative, texts.empty)
    expected = copy({})(thirds, 401, context).sample[2:]
    stored, features = state["keep"], feature["keep"][0]
    state["keep"] = feature["keep"] = None
    for lora, prompt, mask in zip(loras, texts.prompts, masks, strict=True):
        if mode == "base":
            state["stored"], feature["stored"] = stored, features
            own = copy(lora)(thirds[2:], 401, text(texts.negative, prompt)).sample
        else:
            context = text(texts.empty, texts.negative, prompt)
            own = copy(lora)(thirds, 401, context).sample[2:]
        expected = torch.where(mask, own, expected)

    processors, plain = dict(model.attn_processors), model(z, 3, text(texts.empty)).sample
    options = DiffStylerOptions(source=mode)
    with DiffStyler(model, loras, options=options) as styler:
        out = styler.fused_noise(
            lambda x, t, c: model(x, t, c).sample,
            z,
            source,
            401,
            texts=texts,
            injection=injection,
            masks=masks,
        )
        torch.testing.assert_close(model(z, 3, text(texts.empty)).sample, plain)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    assert model.attn_processors == processors
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(model(z, 3, text(texts.empty)).sample, plain)


def test_adapters_on_fused_projections_are_refused():
    model = unet()
    lora = new_low_rank(model, 2)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"are fused.* unfuse them first"):
        DiffStyler(model, [lora])
    model.unfuse_qkv_projections()
    DiffStyler(model, [lora]).remove()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_steps_beside_other_patches(dtype):
    model = unet().to(dtype)
    z, _, texts, loras, masks = setting(model, n=1)
    alphas = torch.linspace(0.9995, 0.02, 40, dtype=torch.float64)
    text = texts.empty
    plain = model(z, 3, text).sample

    def predict(x, t, c):
        return model(x, t, c).sample

    def whole(styler):
        labels = [1, 11, 21, 31]
        sources = invert(
            predict, z, texts.empty, alphas_cumprod=alphas, labels=labels, num_steps=39
        )
        return stylize(
            styler,
            predict,
            sources,
            texts=texts,
            masks=masks,
            alphas_cumprod=alphas,
            num_steps=4,
            guidance=2.0,
        )

    with patch(model, AttendProcessor()), DiffStyler(model, loras) as styler:
        first, second = whole(styler), whole(styler)
        with patch(model, EasyRefOptions()) as references:
            references.set_references(torch.ones(1, 3, 12, dtype=dtype), 0.5)
            third = whole(styler)
    assert first.dtype == dtype
    assert first.isfinite().all()
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(model(z, 3, text).sample, plain)
