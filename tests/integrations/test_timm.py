"""Token merging and fused windows on real timm models with random tiny configurations."""

from __future__ import annotations

import builtins
import copy
import sys

import pytest
import torch

from transfuse.integrations.timm import SwinAttention, TokenMerging, patch


def _import_timm():
    """timm and its transformer; where torchvision's binary does not fit torch, with the two ops
    that torchvision's Python code asks for declared in its place."""
    try:
        import timm
        from timm.models.vision_transformer import VisionTransformer
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _import_timm.library = library  # the schemas live as long as it does
        import timm
        from timm.models.vision_transformer import VisionTransformer
    return timm, VisionTransformer


try:
    timm, VisionTransformer = _import_timm()
except Exception as error:  # not installed, or broken beyond that
    timm = None
    WHY = f"timm is not usable: {type(error).__name__}: {error}"
else:
    WHY = ""

needs_timm = pytest.mark.skipif(timm is None, reason=WHY)


def vit(**changes):
    torch.manual_seed(0)
    config = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 5,
        **changes,
    }
    return VisionTransformer(**config).eval()


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model):
    return model(images())


def published(model, x, merged, proportional=True):
    """ToMe as its published code goes about it, on the model's own layers; one prefix token."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    size = None
    for block, r in zip(model.blocks, merged, strict=True):
        attn, y = block.attn, block.norm1(x)
        batch, tokens, _ = y.shape
        qkv = attn.qkv(y).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        if size is not None and proportional:
            logits = logits + size.log()[:, None, None, :, 0]
        y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, -1)
        x = x + block.ls1(attn.proj(attn.norm(y)))
        r = min(r, (tokens - 1) // 2)
        if r > 0:
            metric = k.mean(1)
            metric = metric / metric.norm(dim=-1, keepdim=True)
            scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
            scores[:, 0] = -torch.inf
            best, index = scores.max(-1)
            edge = best.argsort(dim=-1, descending=True)[..., None]
            unmerged, source = edge[:, r:].sort(dim=1)[0], edge[:, :r]
            target = index[..., None].gather(1, source)

            def add(t, unmerged=unmerged, source=source, target=target):
                src, dst, width = t[:, ::2], t[:, 1::2], t.shape[2]
                moved = src.gather(1, source.expand(-1, -1, width))
                dst = dst.scatter_add(1, target.expand(-1, -1, width), moved)
                return torch.cat([src.gather(1, unmerged.expand(-1, -1, width)), dst], 1)

            size = torch.ones_like(x[..., :1]) if size is None else size
            x, size = add(x * size), add(size)
            x = x / size
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


@needs_timm
@pytest.mark.parametrize("merged", [8, (20, 0, 7), 40])
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(
    "config", [{}, {"qk_norm": True, "init_values": 0.5}, {"global_pool": "avg"}]
)
@torch.no_grad()
def test_equals_the_published_procedure(merged, proportional, config):
    model = vit(**config)
    counts = (merged,) * 3 if isinstance(merged, int) else merged
    expected = published(model, images(), counts, proportional)
    plain = run(model)
    with patch(model, TokenMerging(merged=merged, proportional=proportional)):
        out = run(model)
        again = run(model)  # sizes start anew with every call
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(out, again)
    assert not torch.allclose(out, plain, rtol=1e-4, atol=1e-5)


@needs_timm
def test_removal_restores_bit_for_bit():
    model = vit()
    expected = run(model)
    before = [dict(m.__dict__) for m in model.modules()]
    handle = patch(model, TokenMerging())
    assert len(handle.layers) == 3
    assert repr(handle) == "HookHandle(3 layers, installed)"
    assert not torch.equal(run(model), expected)
    with pytest.raises(ValueError, match="block 0 is patched already"):
        patch(model, TokenMerging())
    handle.remove()
    handle.remove()
    assert [dict(m.__dict__) for m in model.modules()] == before
    assert torch.equal(run(model), expected)


@needs_timm
def test_merging_nothing_changes_nothing():
    model = vit()
    expected = run(model)
    with patch(model, TokenMerging(merged=0)):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


@needs_timm
@torch.no_grad()
def test_prefix_tokens_keep_their_places():
    model = vit(reg_tokens=3)
    assert model.num_prefix_tokens == 4
    rows = []
    model.blocks[-1].register_forward_hook(lambda m, args, out: rows.append((args[0], out)))
    with patch(model, TokenMerging(merged=10)):
        assert run(model).isfinite().all()
    assert rows[0][0].shape[1] == 4 + 64 - 20
    assert rows[0][1].shape[1] == 4 + 64 - 30
    # Without merging in the first block, its prefix tokens are those of the plain model.
    firsts = []
    hook = model.blocks[0].register_forward_hook(lambda m, args, out: firsts.append(out))
    run(model)
    with patch(model, TokenMerging(merged=10)):
        run(model)
    hook.remove()
    torch.testing.assert_close(firsts[1][:, :4], firsts[0][:, :4], rtol=1e-4, atol=1e-5)


@needs_timm
def test_training_and_gradient_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = vit().train()
        model.set_grad_checkpointing(checkpointing)
        with patch(model, TokenMerging(merged=9)):
            model(images()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        assert all(g is not None and g.isfinite().all() for g in grads[-1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    model = vit().train()
    expected = published(model, images(), (9, 9, 9)).square().sum()
    truth = torch.autograd.grad(expected, list(model.parameters()))
    for one, other in zip(grads[0], truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@needs_timm
def test_refusals():
    with pytest.raises(TypeError, match="model: expected a timm VisionTransformer, got Linear"):
        patch(torch.nn.Linear(2, 2), TokenMerging())
    with pytest.raises(TypeError, match="expected TokenMerging or SwinAttention, got int"):
        patch(vit(), 8)
    with pytest.raises(ValueError, match="merged: expected 3 numbers, one per block"):
        patch(vit(), TokenMerging(merged=(1, 2)))
    with pytest.raises(TypeError, match="merged: expected whole numbers"):
        TokenMerging(merged=0.5)
    with pytest.raises(ValueError, match="merged: expected numbers of at least 0"):
        TokenMerging(merged=-1)
    from timm.models.vision_transformer import ResPostBlock

    with pytest.raises(TypeError, match=r"block 0: expected a timm Block .* got ResPostBlock"):
        patch(vit(block_fn=ResPostBlock), TokenMerging())
    model = vit(attn_drop_rate=0.1).train()
    with (
        patch(model, TokenMerging()),
        pytest.raises(ValueError, match="does not support attention dropout"),
    ):
        model(images())
    model = vit()
    with patch(model, TokenMerging()), pytest.raises(ValueError, match="attention masks"):
        model(images(), is_causal=True)


def test_the_error_without_timm_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "timm":
            raise ImportError("No module named 'timm'")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"transfuse\[timm\]"):
        patch(None, TokenMerging())


# -- Swin ---------------------------------------------------------------------------------------


def swin(**changes):
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    config = {
        "img_size": 64,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 3),
        "num_classes": 5,
        **changes,
    }
    model = SwinTransformer(**config).eval()
    with torch.no_grad():
        # A freshly initialised table is too small to be missed.
        for module in model.modules():
            if hasattr(module, "relative_position_bias_table"):
                module.relative_position_bias_table.normal_()
    return model


@needs_timm
@pytest.mark.parametrize("changes", [{}, {"window_size": (4, 8)}, {"window_size": 16}])
def test_swin_computes_the_same_and_is_restored(changes):
    model = swin(**changes)
    with torch.no_grad():
        plain = model(images(size=64))
        with patch(model, SwinAttention()) as handle:
            fused = model(images(size=64))
        assert len(handle.layers) == 4
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
        assert not torch.equal(fused, torch.zeros_like(fused))
        assert torch.equal(model(images(size=64)), plain)


@needs_timm
def test_gradients_equal_the_models():
    model = swin().double()
    other = copy.deepcopy(model)
    x = images(size=64).double()
    model(x).square().sum().backward()
    patch(other, SwinAttention())
    other(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=name)


@needs_timm
def test_refuses_what_it_cannot_do():
    model = swin()
    with pytest.raises(TypeError, match="expected a timm Swin model"):
        patch(torch.nn.Linear(2, 2), SwinAttention())
    with pytest.raises(TypeError, match="expected TokenMerging or SwinAttention"):
        patch(model, object())
    handle = patch(model, SwinAttention())
    with pytest.raises(ValueError, match="patched already"):
        patch(model, SwinAttention())
    handle.remove()
    ragged = swin(img_size=56, strict_img_size=False)
    with patch(ragged, SwinAttention()), pytest.raises(ValueError, match="whole 4 x 4 windows"):
        ragged(images(size=56))
    dropping = swin(attn_drop_rate=0.1).train()
    with patch(dropping, SwinAttention()), pytest.raises(ValueError, match="dropout"):
        dropping(images(size=64))
