"""transfuse on real diffusers models with random tiny configurations."""

from __future__ import annotations

import builtins
import sys

import pytest
import torch
import torch.nn.functional as F

import transfuse.integrations.diffusers as integration
from transfuse.integrations.diffusers import AttendProcessor, patch
from transfuse.methods.diffusion_control.diff_styler import DiffStylerOptions
from transfuse.methods.diffusion_control.easy_ref import EasyRefOptions
from transfuse.methods.diffusion_control.grad_sam import GradSAMOptions
from transfuse.methods.diffusion_control.style_injection import (
    StyleInjectionOptions,
    StyleInjector,
    stylize,
)
from transfuse.testing.models import tiny_unet

try:
    import diffusers
    from diffusers import AutoencoderKL, UNet2DModel
    from diffusers.models.attention_processor import Attention
except Exception as error:  # a broken dependency of diffusers is no ImportError
    diffusers = None
    WHY = f"diffusers is not usable: {type(error).__name__}: {error}"
else:
    WHY = ""

needs_diffusers = pytest.mark.skipif(diffusers is None, reason=WHY)


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=g, dtype=dtype),
        torch.randn(2, 5, 12, generator=g, dtype=dtype),
    )


@torch.no_grad()
def run(model, **extra):
    x, text = inputs(next(model.parameters()).dtype)
    return model(x, 11, text, **extra).sample


def snapshot(model):
    """Everything a patch could leave behind: processor objects, attributes, hooks, weights."""
    return [
        (
            name,
            {key: id(value) for key, value in module.__dict__.items() if key[0] != "_"},
            {key: id(value) for key, value in module._modules.items()},
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
        )
        for name, module in model.named_modules()
    ], {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


# --- the drop-in processor -----------------------------------------------------------------------


@needs_diffusers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_processor_equals_the_default(dtype):
    model = tiny_unet().to(dtype)
    expected = run(model)
    model.set_attn_processor(AttendProcessor())
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


@needs_diffusers
def test_attention_mask_is_honoured():
    model = tiny_unet()
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
    expected, unmasked = run(model, encoder_attention_mask=mask), run(model)
    assert not torch.allclose(expected, unmasked, atol=1e-3)
    with patch(model, AttendProcessor()):
        out = run(model, encoder_attention_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@needs_diffusers
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_both_kinds(dtype):
    torch.manual_seed(0)
    layer = Attention(query_dim=8, heads=2, dim_head=4)
    x, allowed = torch.randn(2, 6, 8), torch.rand(2, 1, 6) > 0.3
    mask = allowed if dtype == torch.bool else (~allowed).float() * -10000.0
    expected = layer(x, attention_mask=mask)
    layer.set_processor(AttendProcessor())
    torch.testing.assert_close(layer(x, attention_mask=mask), expected, rtol=1e-5, atol=1e-6)


@needs_diffusers
@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "shape", "context"),
    [
        ({"norm_num_groups": 2, "residual_connection": True}, (2, 8, 3, 5), None),
        ({"rescale_output_factor": 1.7, "residual_connection": True, "bias": True}, (2, 6, 8), 0),
        ({"qk_norm": "layer_norm"}, (2, 6, 8), None),
        ({"qk_norm": "rms_norm", "upcast_attention": True, "upcast_softmax": True}, (2, 6, 8), 0),
        ({"cross_attention_norm": "layer_norm", "cross_attention_dim": 12}, (2, 6, 8), 12),
        (
            {
                "cross_attention_norm": "group_norm",
                "cross_attention_norm_num_groups": 3,
                "cross_attention_dim": 12,
            },
            (2, 6, 8),
            12,
        ),
        ({"spatial_norm_dim": 3, "norm_num_groups": 2}, (2, 8, 4, 4), "temb"),
        ({"scale_qk": False}, (2, 6, 8), None),
        ({"out_dim": 16, "dropout": 0.5}, (2, 6, 8), None),
    ],
)
def test_everything_around_the_core_is_kept(options, shape, context):
    torch.manual_seed(0)
    options = {"query_dim": 8, "heads": 2, "dim_head": 4, **options}
    if "spatial_norm_dim" in options:
        # SpatialNorm groups by 32 channels.
        options.update(query_dim=32, dim_head=16, norm_num_groups=4)
        shape = (2, 32, 4, 4)
    layer = Attention(**options).eval()
    x = torch.randn(shape)
    extra = {}
    if context == "temb":
        extra["temb"] = torch.randn(2, 3, 2, 2)
    elif context:
        extra["encoder_hidden_states"] = torch.randn(2, 7, context)
    expected = layer(x, **extra)
    layer.set_processor(AttendProcessor())
    torch.testing.assert_close(layer(x, **extra), expected, rtol=1e-5, atol=1e-5)


@needs_diffusers
@torch.no_grad()
def test_autoencoder_with_image_shaped_attention():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16,), norm_num_groups=4, latent_channels=2, layers_per_block=1
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    expected = vae.encode(x).latent_dist.mean
    with patch(vae, AttendProcessor()) as handle:
        assert len(handle.layers) == 2
        out = vae.encode(x).latent_dist.mean
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(vae.encode(x).latent_dist.mean, expected)


@needs_diffusers
def test_gradients_flow_as_with_the_default():
    grads = []
    for processor in (None, AttendProcessor()):
        model = tiny_unet()
        if processor is not None:
            model.set_attn_processor(processor)
        x, text = inputs()
        text.requires_grad_()
        model(x, 11, text).sample.square().sum().backward()
        grads.append((text.grad, *(p.grad for p in model.parameters())))
    for mine, default in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(mine, default, rtol=1e-3, atol=1e-4)


@needs_diffusers
def test_backend_and_diffusers_own_switch_are_reachable():
    model = tiny_unet()
    with patch(model, AttendProcessor(backend="reference")) as handle:
        assert repr(handle) == f"PatchHandle({len(handle.layers)} layers, installed)"
        torch.testing.assert_close(run(model), run(tiny_unet()), rtol=1e-4, atol=1e-5)
    assert repr(AttendProcessor(backend="reference")) == "AttendProcessor(backend='reference')"
    for name in ("_attention_backend", "_parallel_config"):
        assert hasattr(AttendProcessor, name)


# --- putting on and taking off -------------------------------------------------------------------


def methods():
    return [
        AttendProcessor(),
        StyleInjectionOptions(),
        EasyRefOptions(),
        GradSAMOptions(),
        DiffStylerOptions(),
    ]


@needs_diffusers
@pytest.mark.parametrize("which", range(5))
def test_removal_restores_bit_for_bit(which):
    model = tiny_unet()
    before, expected = snapshot(model), run(model)
    handle = patch(model, methods()[which])
    assert handle.installed
    assert run(model).isfinite().all()
    assert model.attn_processors[f"{handle.layers[0]}.processor"] is not None
    handle.remove()
    handle.remove()
    assert not handle.installed
    assert_same(before, snapshot(model))
    assert torch.equal(run(model), expected)


@needs_diffusers
@pytest.mark.parametrize("which", range(5))
def test_exception_inside_the_context(which):
    model = tiny_unet()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), patch(model, methods()[which]):
        raise ZeroDivisionError
    assert_same(before, snapshot(model))


@needs_diffusers
@pytest.mark.parametrize(
    "order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)]
)
def test_three_patches_come_off_in_any_order(order):
    model = tiny_unet()
    before, expected = snapshot(model), run(model)
    handles = [
        patch(model, AttendProcessor()),
        patch(model, StyleInjectionOptions()),
        patch(model, AttendProcessor(), layers=["up_blocks"]),
    ]
    for index in order:
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
        handles[index].remove()
    assert_same(before, snapshot(model))
    assert torch.equal(run(model), expected)


@needs_diffusers
def test_processor_set_over_a_patch_is_left_alone():
    model = tiny_unet()
    handle = patch(model, AttendProcessor(), layers=["mid_block"])
    model.set_attn_processor(AttendProcessor())
    mine = model.attn_processors
    with pytest.warns(UserWarning, match="replaced by someone else"):
        handle.remove()
    assert model.attn_processors == mine


@needs_diffusers
def test_only_some_layers():
    model = tiny_unet()
    names = set(model.attn_processors)
    with patch(
        model, AttendProcessor(), layers=["mid_block", "up_blocks.1.attentions.0"]
    ) as handle:
        assert 0 < len(handle.layers) < len(names)
        assert all(
            name.startswith(("mid_block", "up_blocks.1.attentions.0")) for name in handle.layers
        )
    with pytest.raises(ValueError, match="no attention layer matches 'mid_blok'; "):
        patch(model, AttendProcessor(), layers=["mid_blok"])
    with pytest.raises(TypeError, match="sequence of names"):
        patch(model, AttendProcessor(), layers="mid_block")
    with pytest.raises(TypeError, match="got 3"):
        patch(model, AttendProcessor(), layers=[3])


@needs_diffusers
def test_what_cannot_be_patched_is_refused_with_a_reason():
    with pytest.raises(TypeError, match=r"expected a diffusers model .* got Linear"):
        patch(torch.nn.Linear(2, 2), AttendProcessor())
    with pytest.raises(TypeError, match=r"expected an object with attach.* got str"):
        patch(tiny_unet(), "style")
    bare = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
    )
    if hasattr(bare, "attn_processors"):
        with pytest.raises(ValueError, match="UNet2DModel has no attention layer"):
            patch(bare, AttendProcessor())
    with pytest.raises(ValueError, match="UNet2DModel has no self-attention layer"):
        StyleInjector(bare)

    class AdapterProcessor:
        def __call__(self, attn, hidden_states):
            return hidden_states

    model = tiny_unet()
    for which, kinds in (
        ("attn1", (AttendProcessor, StyleInjectionOptions, DiffStylerOptions)),
        ("attn2", (AttendProcessor, EasyRefOptions, GradSAMOptions)),
    ):
        name = f"up_blocks.1.attentions.1.transformer_blocks.0.{which}"
        layer = model.get_submodule(name)
        default = layer.processor
        layer.set_processor(AdapterProcessor())
        before = snapshot(model)
        for kind in kinds:
            with pytest.raises(ValueError, match=f"'{name}' uses the processor AdapterProcessor"):
                patch(model, kind())
        assert_same(before, snapshot(model))
        patch(model, AttendProcessor(), layers=["down_blocks"]).remove()
        layer.set_processor(default)

    added = Attention(query_dim=8, heads=2, dim_head=4, added_kv_proj_dim=8)
    with pytest.raises(ValueError, match="added key/value projections"):
        AttendProcessor().attach(torch.nn.ModuleDict({"layer": added}))


@needs_diffusers
def test_a_pipeline_stands_for_its_unet():
    class Pipeline:
        def __init__(self, unet):
            self.unet = unet

    model = tiny_unet()
    with patch(Pipeline(model), StyleInjectionOptions(gamma=0.3)) as injector:
        assert injector.options.gamma == 0.3
        assert injector.layers[-1] in {
            name.removesuffix(".processor") for name in model.attn_processors
        }


def test_missing_extra_is_named_once(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name == "diffusers":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    for call in (AttendProcessor, lambda: patch(None, None)):
        with pytest.raises(ImportError, match=r"transfuse\[diffusers\].*torchvision::nms"):
            call()


def test_the_integration_itself_imports_no_diffusers():
    assert "diffusers" not in vars(integration)


# --- style injection on a real UNet --------------------------------------------------------------


@needs_diffusers
def test_default_layers_are_the_decoder_blocks_of_the_paper():
    sd1 = tiny_unet(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    paper = tuple(
        f"up_blocks.{block}.attentions.{i}.transformer_blocks.0.attn1"
        for block in (2, 3)
        for i in range(3)
    )
    with StyleInjector(sd1) as injector:
        assert injector.layers == paper
    with StyleInjector(sd1, layers=range(6, 12)) as injector:
        assert injector.layers == paper
    with StyleInjector(sd1, layers=[7, 8, 9, 10, 11]) as injector:
        assert injector.layers == paper[1:]
    with pytest.raises(
        ValueError, match=r"matches 2; numbers with self-attention: \[3, 4, .* 11\]"
    ):
        StyleInjector(sd1, layers=[2])

    sdxl = tiny_unet(
        block_out_channels=(8, 8, 8),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
    )
    with StyleInjector(sdxl) as injector:
        assert len(injector.layers) == 6
        assert all(name.startswith("up_blocks.1.") for name in injector.layers)
    with StyleInjector(tiny_unet()) as injector:
        assert len(injector.layers) == 4, "fewer than six: all of the decoder"


class DenseProcessor:
    """Style injection written out for one layer, independent of the library."""

    def __init__(self, state):
        self.state, self.kept = state, {}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def split(x):
            return x.reshape(*x.shape[:2], attn.heads, -1).permute(0, 2, 1, 3)

        q, k, v = (split(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        factor = 1.0
        if self.state["mode"] in ("content", "style"):
            self.kept[self.state["mode"], self.state["t"]] = q, k, v
        elif self.state["mode"] == "inject":
            batch = q.shape[0]
            content = self.kept["content", self.state["t"]][0].repeat(batch, 1, 1, 1)
            k, v = (x.repeat(batch, 1, 1, 1) for x in self.kept["style", self.state["t"]][1:])
            q, factor = 0.6 * content + 0.4 * q, 1.5
        p = F.softmax(factor * (q @ k.mT) * attn.scale, dim=-1)
        out = (p @ v).permute(0, 2, 1, 3).reshape(*hidden_states.shape[:2], -1)
        return attn.to_out[0](out)


@needs_diffusers
@torch.no_grad()
@pytest.mark.parametrize("storage", ["features", "recompute"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_whole_method_on_a_unet_equals_a_dense_implementation(storage, prediction):
    model = tiny_unet().double()
    x, text = inputs(torch.float64)
    content, style, text = x[:1], x[1:] * 0.5 + 0.2, text[:1]
    alphas = torch.linspace(0.9995, 0.02, 1000, dtype=torch.float64)
    labels = (1, 251, 501, 751)

    # By hand: own processors on the same layers, own DDIM algebra, own AdaIN.
    state = {"mode": None, "t": None}
    with StyleInjector(model) as injector:
        names = [f"{name}.processor" for name in injector.layers]
    reference = tiny_unet().double()
    processors = reference.attn_processors
    reference.set_attn_processor(
        {n: DenseProcessor(state) if n in names else p for n, p in processors.items()}
    )

    def move(mode, z, t, start, end):
        state.update(mode=mode, t=t)
        output = reference(z, t, text).sample
        a, b = alphas[start], alphas[end]
        if prediction == "epsilon":
            e = output
            z0 = (z - (1 - a).sqrt() * e) / a.sqrt()
        else:
            z0 = a.sqrt() * z - (1 - a).sqrt() * output
            e = a.sqrt() * output + (1 - a).sqrt() * z
        return b.sqrt() * z0 + (1 - b).sqrt() * e

    ends = {}
    for mode, z in (("content", content), ("style", style)):
        for t, after in zip(labels, (251, 501, 751, 999), strict=True):
            z = move(mode, z, t, t, after)
        ends[mode] = z
    c, s = (ends[mode].flatten(2) for mode in ("content", "style"))
    z = (c - c.mean(2, keepdim=True)) / (c.std(2, keepdim=True) + 1e-4)
    z = (z * s.std(2, keepdim=True) + s.mean(2, keepdim=True)).view_as(content)
    for t, after in zip(reversed(labels), (501, 251, 1, 0), strict=True):
        z = move("inject", z, t, t, after)

    options = StyleInjectionOptions(gamma=0.6, temperature=1.5, storage=storage)
    model = tiny_unet().double()
    before = snapshot(model)
    with patch(model, options) as injector:
        out = stylize(
            injector,
            lambda latent, t: model(latent, t, text).sample,
            content,
            style,
            alphas_cumprod=alphas,
            num_steps=4,
            prediction=prediction,
        )
        # Two images at once read the same features; the result per image does not change.
        with injector.inject(steps=labels):
            both = model(torch.cat([content, style]), 501, text.expand(2, -1, -1)).sample
            alone = model(style, 501, text).sample
    torch.testing.assert_close(out, z, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(both[1:], alone, rtol=1e-8, atol=1e-8)
    assert_same(before, snapshot(model))


@needs_diffusers
@torch.no_grad()
def test_half_precision_unet_runs():
    model = tiny_unet().to(torch.bfloat16)
    x, text = inputs(torch.bfloat16)
    with patch(model, StyleInjectionOptions(store_dtype=torch.float16)) as injector:
        for role in ("content", "style"):
            with injector.capture(role):
                model(x[:1], 1, text[:1])
        with injector.inject():
            assert model(x, 1, text).sample.isfinite().all()
