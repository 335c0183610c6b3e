"""Token merging on real diffusers UNets with random tiny configurations."""

from __future__ import annotations

import warnings

import pytest
import torch
from patched_models import snapshot

from transfuse.integrations.diffusers import AttendProcessor, TokenMerging, patch
from transfuse.methods.diffusion_control.style_injection import StyleInjectionOptions
from transfuse.ops import match_tokens, merge_tokens, unmerge_tokens
from transfuse.testing import golden
from transfuse.testing.models import tiny_unet

try:
    import diffusers
    from diffusers import UNet2DModel
except Exception as error:  # a broken dependency of diffusers is no ImportError
    diffusers = None
    WHY = f"diffusers is not usable: {type(error).__name__}: {error}"
else:
    WHY = ""

pytestmark = pytest.mark.skipif(diffusers is None, reason=WHY)


def inputs(batch=2, size=(8, 8)):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, *size, generator=g), torch.randn(batch, 5, 12, generator=g)


@torch.no_grad()
def run(model, batch=2, size=(8, 8), **extra):
    x, text = inputs(batch, size)
    return model(x, 11, text, **extra).sample


@pytest.mark.parametrize("options", [{}, {"random": False}, {"cross_attention": True}])
def test_removal_restores_bit_for_bit(options):
    model = tiny_unet()
    before, expected = snapshot(model), run(model)
    handle = patch(model, TokenMerging(**options))
    merged = run(model)
    assert merged.isfinite().all()
    assert not torch.equal(merged, expected)
    assert repr(handle) == f"HookHandle({len(handle.layers)} layers, installed)"
    handle.remove()
    handle.remove()
    assert not handle.installed
    assert snapshot(model) == before
    assert torch.equal(run(model), expected)
    with pytest.raises(KeyboardInterrupt), patch(model, TokenMerging()):
        raise KeyboardInterrupt
    assert snapshot(model) == before


@pytest.mark.parametrize(("batch", "size"), [(2, (8, 8)), (1, (8, 8)), (3, (10, 6)), (2, (7, 9))])
@pytest.mark.parametrize("max_downsample", [1, 2])
@pytest.mark.parametrize(
    "layers", [{}, {"cross_attention": True, "feed_forward": True}, {"attention": False}]
)
def test_equals_tomesd(batch, size, max_downsample, layers):
    tomesd = pytest.importorskip("tomesd")
    ours, theirs = tiny_unet(), tiny_unet()
    names = {"cross_attention": "merge_crossattn", "feed_forward": "merge_mlp"}
    names["attention"] = "merge_attn"
    tomesd.apply_patch(
        theirs,
        ratio=0.4,
        max_downsample=max_downsample,
        use_rand=False,
        **{names[k]: v for k, v in layers.items()},
    )
    options = TokenMerging(ratio=0.4, max_downsample=max_downsample, random=False, **layers)
    plain = run(ours, batch, size)
    with patch(ours, options):
        out = run(ours, batch, size)
    expected = run(theirs, batch, size)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    if layers.get("attention", True) or len(layers) > 1:
        assert not torch.allclose(expected, plain, rtol=1e-4, atol=1e-5)


def test_geometry_of_tomesd():
    from transfuse.integrations._diffusers_merging import merge_geometry

    data = golden.load("ops_token_merging")
    rows = data.inputs("dims")["H_W_N_B_ratio"].tolist()
    for row, expected in zip(rows, data.outputs("dims")["h_w_r_userand"].tolist(), strict=True):
        height, width, tokens, _, ratio = row
        found = merge_geometry((int(height), int(width)), int(tokens), ratio, 64)
        assert list(found) == expected[:3]
        assert merge_geometry((int(height), int(width)), int(tokens), ratio, 0) is None


def test_only_self_attention_of_the_finest_grid_by_default():
    model = tiny_unet()
    lengths = {}

    def note(name):
        def hook(module, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            lengths[name] = (x.shape[1], output.shape[1])

        return hook

    hooks = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith((".attn1", ".attn2", ".ff"))
    ]
    with patch(model, TokenMerging()):
        run(model)
    for hook in hooks:
        hook.remove()
    assert {n: v[0] for n, v in lengths.items() if "down_blocks.0" in n} == {
        n: 32 if n.endswith("attn1") else 64 for n in lengths if "down_blocks.0" in n
    }
    assert all(v[0] == 16 for n, v in lengths.items() if "down_blocks.1" in n)


def test_random_destinations():
    model = tiny_unet()
    state = torch.get_rng_state()
    outs = []
    for seed in (0, 0, 1):
        with patch(model, TokenMerging(seed=seed)):
            outs.append((run(model), run(model)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])
    assert not torch.equal(outs[0][0], outs[0][1])  # drawn anew for every call
    assert not torch.equal(outs[0][0], outs[2][0])
    with patch(model, TokenMerging()), patch(tiny_unet(), TokenMerging(random=False)):
        odd = run(model, batch=1)
    with patch(model, TokenMerging(random=False)):
        assert torch.equal(run(model, batch=1), odd)


def test_with_other_patches_in_any_order():
    model = tiny_unet()
    before, expected = snapshot(model), run(model)
    with patch(model, TokenMerging(random=False)):
        merged = run(model)
        with patch(model, AttendProcessor()):
            torch.testing.assert_close(run(model), merged, rtol=1e-4, atol=1e-5)
        assert torch.equal(run(model), merged)
    first, second = patch(model, TokenMerging()), patch(model, StyleInjectionOptions())
    run(model)
    first.remove()
    second.remove()
    assert snapshot(model) == before
    assert torch.equal(run(model), expected)


def test_training_with_recomputed_blocks():
    """The gradients of a merged model do not depend on gradient checkpointing."""
    grads = []
    for checkpointing in (False, True):
        model = tiny_unet().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        x, text = inputs()
        text.requires_grad_()
        with patch(model, TokenMerging()):
            model(x, 11, text).sample.square().sum().backward()
        grads.append((text.grad, *(p.grad for p in model.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_the_block_does_what_it_says():
    model = tiny_unet()
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = torch.randn(2, 64, 16), torch.randn(2, 5, 12)
    seen = {}
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with patch(model, TokenMerging(random=False)):
        run(model)
        with torch.no_grad():
            out = block(seen["x"], encoder_hidden_states=text)
    hook.remove()
    with torch.no_grad():
        plan = match_tokens(seen["x"], 32, size=(8, 8))
        y = block.attn1(merge_tokens(block.norm1(seen["x"]), plan))
        x = unmerge_tokens(y, plan) + seen["x"]
        x = x + block.attn2(block.norm2(x), encoder_hidden_states=text)
        x = x + block.ff(block.norm3(x))
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-5)


def test_chosen_layers_and_refusals():
    model = tiny_unet()
    with patch(model, TokenMerging(), layers=["up_blocks"]) as handle:
        assert all(name.startswith("up_blocks") for name in handle.layers)
    with pytest.raises(ValueError, match="no transformer block matches 'up_block'"):
        patch(model, TokenMerging(), layers=["up_block"])
    with pytest.raises(TypeError, match="layers must be a sequence of names"):
        patch(model, TokenMerging(), layers="up_blocks")
    with pytest.raises(TypeError, match="expected names of a transformer block, got 3"):
        patch(model, TokenMerging(), layers=[3])
    plain = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    with pytest.raises(ValueError, match="has no BasicTransformerBlock"):
        TokenMerging().attach(plain)
    for options, error, match in (
        ({"ratio": 1.0}, ValueError, r"ratio: expected a number in \[0, 1\), got 1.0"),
        ({"ratio": "half"}, TypeError, "ratio: expected a number"),
        ({"max_downsample": 3}, ValueError, "max_downsample: expected 1, 2, 4 or 8, got 3"),
        ({"stride": (0, 2)}, ValueError, "stride: expected two numbers"),
    ):
        with pytest.raises(error, match=match):
            TokenMerging(**options)
    with patch(model, TokenMerging(ratio=0.9)), pytest.warns(UserWarning, match="between 0 and 48"):
        run(model)
    with patch(model, TokenMerging()), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="received a mask of its own tokens"):
            run(model, attention_mask=torch.ones(2, 64))
