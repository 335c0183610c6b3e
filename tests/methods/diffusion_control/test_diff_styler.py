"""DiffStyler: official outputs, injection, adapters, masks, the driver by hand, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import transfuse.ops
from transfuse.methods.diffusion_control import _injected_self_attention
from transfuse.methods.diffusion_control.diff_styler import (
    DiffStyler,
    DiffStylerOptions,
    LowRank,
    LowRankAdapters,
    Texts,
    fuse_noise,
    inject_features,
    injected_self_attention,
    invert,
    new_low_rank,
    read_low_rank,
    region_masks,
    stylize,
)
from transfuse.methods.diffusion_control.style_injection import StyleInjector, ddim_reverse_step
from transfuse.testing import golden

GOLDEN = golden.load("diff_styler")


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# --- against the official implementation ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["batch", "outside"])
def test_attention_matches_the_official_code(where, dtype):
    x, params = GOLDEN.inputs("attn", dtype), GOLDEN.params("attn")
    q, k, v = (split(x["x"] @ x[f"w{name}"].T, params["heads"]) for name in "qkv")
    ys = []
    for t, rate in zip(x["t"].tolist(), params["rates"], strict=True):
        if rate != params["rates"][-1]:
            assert DiffStylerOptions().rho(t) == pytest.approx(rate)
        if where == "batch":
            out = injected_self_attention(q, k, v, rate=rate, n_source=params["n"])
        else:
            source = q[:1], k[:1]
            rest = injected_self_attention(q[1:], k[1:], v[1:], rate=rate, source=source)
            own = injected_self_attention(q[:1], k[:1], v[:1], rate=0.0, n_source=1)
            out = torch.cat([own, rest])
        ys.append(out.transpose(1, 2).flatten(2) @ x["wo"].T + x["bo"])
    GOLDEN.check(torch.stack(ys), "y", "attn")


def test_features_match_the_official_code():
    x = GOLDEN.inputs("conv")
    GOLDEN.check(x["skip"] + inject_features(x["hidden"], n_source=1), "y", "conv")
    outside = inject_features(x["hidden"][1:], source=x["hidden"][:1])
    GOLDEN.check(x["skip"] + torch.cat([x["hidden"][:1], outside]), "y", "conv")


def test_fused_step_matches_the_official_code():
    x, params = GOLDEN.inputs("fuse"), GOLDEN.params("fuse")
    fused = fuse_noise(x["eps_base"], x["eps_lora"], x["masks"])
    free, conditional = fused[1:2], fused[2:3]
    output = free + params["guidance_scale"] * (conditional - free)
    a, b = x["alphas_cumprod_t_prev"]
    step = ddim_reverse_step(x["x"], output, alpha=a, alpha_next=b)
    GOLDEN.check(step.sample, "x_prev", "fuse")


# --- injection -----------------------------------------------------------------------------------


def qkv(dtype=torch.float64, n=2, rows=6, tokens=7):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, 3, tokens, d, generator=g, dtype=torch.float64).to(dtype)
        for d in (8, 8, 5)
    ]


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_injection_is_the_formula(rate, masked):
    q, k, v = qkv()
    mask = torch.rand(7, 7) > 0.3 if masked else None
    mixed_q, mixed_k = (
        torch.cat([x[:2], *(rate * x[:2] + (1 - rate) * x[i : i + 2] for i in (2, 4))])
        for x in (q, k)
    )
    logits = mixed_q @ mixed_k.mT / 8**0.5
    if masked:
        mask.fill_diagonal_(True)
        logits = logits.masked_fill(~mask, -math.inf)
    expected = logits.softmax(-1) @ v
    out = injected_self_attention(q, k, v, rate=rate, n_source=2, mask=mask)
    torch.testing.assert_close(out, expected)
    source = q[:2], k[:2]
    outside = injected_self_attention(q[2:], k[2:], v[2:], rate=rate, source=source, mask=mask)
    torch.testing.assert_close(outside, expected[2:])


def test_source_rows_are_untouched_and_rate_zero_is_plain_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = qkv(dtype)
        plain = transfuse.ops.attend(q, transfuse.ops.KV(k, v))
        assert torch.equal(injected_self_attention(q, k, v, rate=0.0, n_source=2), plain)
        out = injected_self_attention(q, k, v, rate=0.7, n_source=2)
        assert torch.equal(out[:2], plain[:2])
        before = [x.clone() for x in (q, k, v)]
        injected_self_attention(q, k, v, rate=1.0, n_source=2)
        assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_one_call_of_attend_with_index_maps(monkeypatch):
    calls = []

    def spy(query, sources, **options):
        calls.append((sources, options["blend"]))
        return transfuse.ops.attend(query, sources, **options)

    monkeypatch.setattr(_injected_self_attention, "attend", spy)
    q, k, v = qkv()
    injected_self_attention(q, k, v, rate=0.5, n_source=2)
    ((source, blend),) = calls
    assert source.value is v
    assert blend.other.shape[0] == source.blend.other.shape[0] == 2
    assert blend.index.tolist() == source.blend.index.tolist() == [0, 1, 0, 1, 0, 1]
    assert blend.other.data_ptr() == q.data_ptr()


def test_gradients_flow_through_own_features_alone():
    q, k, v = (x.requires_grad_() for x in qkv())
    injected_self_attention(q, k, v, rate=0.4, n_source=2)[2:].square().sum().backward()
    for x in (q, k, v):
        assert x.grad[:2].abs().max() == 0
        assert x.grad[2:].abs().min() > 0
    hidden = torch.randn(3, 2, requires_grad=True)
    inject_features(hidden, n_source=1).square().sum().backward()
    assert hidden.grad[1:].abs().max() == 0
    assert hidden.grad[0].abs().min() > 0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rate": 1.5}, ValueError, r"rate: expected a number in \[0, 1\]"),
        ({"rate": math.nan}, ValueError, "rate"),
        ({"rate": "1"}, TypeError, "rate"),
        ({"n_source": 4}, ValueError, "multiple of the 4 source rows, got 6"),
        ({"n_source": 0}, ValueError, "n_source"),
        ({"n_source": None}, ValueError, "exactly one"),
        ({"source": (torch.zeros(1), torch.zeros(1))}, ValueError, "exactly one"),
    ],
)
def test_injection_refuses(change, error, match):
    q, k, v = qkv(torch.float32)
    with pytest.raises(error, match=match):
        injected_self_attention(q, k, v, **{"rate": 0.5, "n_source": 2, **change})
    for options in ({"n_source": 2, "source": q}, {}, {"n_source": 4}, {"source": q[..., :2]}):
        with pytest.raises(ValueError, match=r"exactly one|multiple|after the batch"):
            inject_features(q, **options)


# --- adapters ------------------------------------------------------------------------------------


def pair(inner, outer, rank=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inner, generator=g), torch.randn(outer, rank, generator=g))


def test_adapters_are_a_weight_delta_and_come_off():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, loras = torch.randn(2, 4), [{"0": pair(4, 5)}, {"0": pair(4, 5, 3, 1), "2": pair(5, 3, 1)}]
    plain, state = model(x), {n: w.clone() for n, w in model.state_dict().items()}
    with LowRankAdapters(model, loras, scale=0.5) as adapters:
        assert len(adapters) == 2
        assert adapters.layers == ("0", "2")
        assert torch.equal(model(x), plain)
        for number, lora in enumerate(loras):
            w = {n: p.clone() for n, p in state.items()}
            for name, (down, up) in lora.items():
                w[f"{name}.weight"] += 0.5 * up @ down
            merged = torch.func.functional_call(model, w, x)
            with adapters.using(number):
                assert adapters.current == number
                torch.testing.assert_close(model(x), merged)
            assert torch.equal(model(x), plain)
        with adapters.using(1):
            model(x).sum().backward()
        grads = [p.grad is not None for p in adapters.parameters()]
        assert grads.count(True) == 4
        with pytest.raises(ValueError, match=r"adapter in \[0, 2\), got 2"), adapters.using(2):
            pass
    assert torch.equal(model(x), plain)
    assert not model[0]._forward_hooks
    assert model.state_dict().keys() == state.keys()
    with pytest.raises(RuntimeError, match="removed"), adapters.using(0):
        pass


def test_adapters_refuse():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    for lora, error, match in (
        ({"3": pair(4, 5)}, ValueError, r"adapters\[0\]: no layer '3'"),
        ({"1": pair(4, 5)}, TypeError, "expected a linear layer at '1', got Tanh"),
        ({"0": pair(3, 5)}, ValueError, r"expected down \(r, 4\) and up \(5, r\)"),
        ({"0": (torch.zeros(2, 4), torch.zeros(5, 3))}, ValueError, r"got \(2, 4\) and \(5, 3\)"),
    ):
        with pytest.raises(error, match=match):
            LowRankAdapters(model, [lora])
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    ("down", "up", "layer"),
    [
        ("unet.a.attn1.to_q.lora_A.weight", "unet.a.attn1.to_q.lora_B.weight", "a.attn1.to_q"),
        ("a.to_k.lora.down.weight", "a.to_k.lora.up.weight", "a.to_k"),
        ("a.to_v.lora_linear_layer.down.weight", "a.to_v.lora_linear_layer.up.weight", "a.to_v"),
        (
            "unet.a.attn1.processor.to_out_lora.down.weight",
            "unet.a.attn1.processor.to_out_lora.up.weight",
            "a.attn1.to_out.0",
        ),
        (
            "base_model.model.a.to_out.0.lora_A.default.weight",
            "base_model.model.a.to_out.0.lora_B.default.weight",
            "a.to_out.0",
        ),
    ],
)
def test_state_dicts_of_every_format(down, up, layer):
    a, b = pair(4, 5)
    assert {n: tuple(x) for n, x in read_low_rank({down: a, up: b}).items()} == {layer: (a, b)}


def test_alpha_is_folded_in_and_strange_names_are_refused():
    a, b = pair(4, 5)
    state = {"x.lora_down.weight": a, "x.lora_up.weight": b, "x.alpha": torch.tensor(8.0)}
    assert torch.equal(read_low_rank(state)["x"].up, 4 * b)
    with pytest.raises(ValueError, match=r"names of a LoRA state dict, got 'x.weight'"):
        read_low_rank({"x.weight": a})
    with pytest.raises(ValueError, match="layer 'x' has no up matrix"):
        read_low_rank({"x.lora_A.weight": a})


def test_new_adapters_start_at_nothing(denoiser):
    lora = new_low_rank(denoiser, 3, generator=torch.Generator().manual_seed(0))
    assert len(lora) == 8 * 4
    again = new_low_rank(denoiser, 3, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(lora[name].down, again[name].down) for name in lora)
    x = torch.randn(1, 4, 3, 3)
    with LowRankAdapters(denoiser, [lora]) as adapters, adapters.using(0):
        adapted = denoiser(x, 1)
    assert torch.equal(adapted, denoiser(x, 1))
    with pytest.raises(ValueError, match="no attention layer"):
        new_low_rank(nn.Linear(2, 2))


# --- masks ---------------------------------------------------------------------------------------


def test_regions_are_averaged_and_cut_at_one_half():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :4] = True
    mask[6, 6] = True  # a quarter of its area
    out = region_masks(mask[None], (4, 4))
    assert out.dtype == torch.bool
    assert out.sum() == 4
    soft = region_masks(mask[None].float(), (4, 4))
    assert soft[0, 3, 3] == 0.25
    larger = region_masks([mask], (16, 16))
    assert larger.sum() == 4 * mask.sum()
    assert region_masks([], (4, 4)).shape == (0, 4, 4)
    for bad, error, match in (
        ([mask[:6]], ValueError, r"aspect ratio of the latent 4 x 4, got 6 x 8"),
        ([mask, mask.float()], TypeError, "all bool or all"),
        ([2.0 * mask], ValueError, r"values in \[0, 1\]"),
        ([mask.float() * math.nan], ValueError, r"values in \[0, 1\]"),
        ([mask.long()], TypeError, "expected bool or floating"),
        ([mask[0]], ValueError, "2 dimensions"),
    ):
        with pytest.raises(error, match=match):
            region_masks(bad, (4, 4))


def test_fusion_rules():
    g = torch.Generator().manual_seed(0)
    base, one, two = torch.randn(3, 2, 4, 5, 5, generator=g).unbind()
    masks = torch.rand(2, 5, 5, generator=g) > 0.5
    out = fuse_noise(base, [one, two], masks)
    expected = torch.where(masks[1], two, torch.where(masks[0], one, base))
    assert torch.equal(out, expected)
    assert torch.equal(fuse_noise(base, [one, two], masks.float()), expected)
    assert torch.equal(fuse_noise(base, [], torch.zeros(0, 5, 5)), base)
    soft = torch.rand(2, 5, 5, generator=g)
    first = (1 - soft[0]) * base + soft[0] * one
    torch.testing.assert_close(
        fuse_noise(base, [one, two], soft), (1 - soft[1]) * first + soft[1] * two
    )
    for weights in (masks, soft):
        w = weights.float()
        total = w.sum(0)
        mixed = (1 - total).clamp_min(0) * base + (w[0] * one + w[1] * two) / total.clamp_min(1)
        out = fuse_noise(base, [one, two], weights, overlap="normalised")
        torch.testing.assert_close(out, mixed)
    alone = masks[0] & ~masks[1]
    out = fuse_noise(base, [one, two], masks, overlap="normalised")
    assert torch.equal(out[..., alone], one[..., alone])
    outside = ~masks.any(0)
    assert torch.equal(out[..., outside], base[..., outside])
    poison = [torch.where(masks[0], one, math.nan), two]
    assert fuse_noise(base, poison, masks).isfinite().all()
    assert fuse_noise(base, poison, masks, overlap="normalised").isfinite().all()
    for styled, given, options, match in (
        ([one], masks, {}, "masks: expected 1"),
        ([one, two], masks[:, :4], {}, "the latent's size"),
        ([one, two[:1]], masks, {}, r"styled\[1\]"),
        ([one, two], masks, {"overlap": "first"}, "overlap"),
    ):
        with pytest.raises(ValueError, match=match):
            fuse_noise(base, styled, given, **options)


# --- the driver by hand --------------------------------------------------------------------------


def by_hand(
    model, z, t, text, *, lora=None, rate=None, source=None, third=None, layers=(), scale=1.0
):
    """The text denoiser with injection written out; returns output and (q, k) of each layer."""

    def project(name, module, x):
        y = module(x)
        if lora is not None and name in lora:
            down, up = lora[name]
            y = y + scale * (x @ down.T) @ up.T
        return y

    def attend(name, layer, x, context, inject):
        q = project(f"{name}.to_q", layer.to_q, x)
        k, v = (project(f"{name}.to_{c}", getattr(layer, f"to_{c}"), context) for c in "kv")
        kept[name] = q, k
        if inject and rate is not None:
            if source is not None:
                qs, ks = source[name]
                times = len(q) // len(qs)
                q = rate * qs.repeat(times, 1, 1) + (1 - rate) * q
                k = rate * ks.repeat(times, 1, 1) + (1 - rate) * k
            else:
                own = third
                q = torch.cat([q[:own], rate * q[:own].repeat(2, 1, 1) + (1 - rate) * q[own:]])
                k = torch.cat([k[:own], rate * k[:own].repeat(2, 1, 1) + (1 - rate) * k[own:]])
        q, k, v = (split(y, layer.num_heads) for y in (q, k, v))
        out = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return project(f"{name}.to_out.0", layer.to_out[0], out.transpose(1, 2).flatten(2))

    kept = {}
    h = model.inward(z.flatten(2).transpose(1, 2)) + 0.001 * t
    for i, (block, cross) in enumerate(zip(model.blocks, model.cross, strict=True)):
        h = h + attend(f"blocks.{i}", block, h, h, i in layers)
        h = h + attend(f"cross.{i}", cross, h, text, False)
    return model.outward(h).transpose(1, 2).unflatten(2, z.shape[-2:]), kept


def setting(model):
    g = torch.Generator().manual_seed(5)
    z, source = torch.randn(2, 2, 4, 4, 4, generator=g, dtype=torch.float64)
    empty, negative, *prompts = torch.randn(4, 1, 5, 12, generator=g, dtype=torch.float64)
    loras = []
    for seed in range(2):
        lora = new_low_rank(model, 2, generator=torch.Generator().manual_seed(seed))
        g2 = torch.Generator().manual_seed(10 + seed)
        loras.append(
            {
                name: LowRank(p.down, torch.randn(p.up.shape, generator=g2, dtype=torch.float64))
                for name, p in lora.items()
            }
        )
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :3], masks[1, 2:, 1:] = True, True
    return z, source, Texts(empty, negative, prompts), loras, masks


@torch.no_grad()
@pytest.mark.parametrize("mode", ["base", "self"])
@pytest.mark.parametrize("number", [0, 26, 40])
def test_fused_noise_equals_the_method_by_hand(text_denoiser, mode, number):
    model = text_denoiser.double()
    z, source, texts, loras, masks = setting(model)
    label = 981 - 20 * number
    options = DiffStylerOptions(source=mode, lora_scale=0.3, base_attention=0.6)
    injection = options.injection(number, 50, label)
    rate = min(1.0, label / 500)
    layers = range(3, 8)

    def text(*parts):
        return torch.cat([p.expand(2, -1, -1) for p in parts])

    thirds = torch.cat([source, z, z])
    base, kept = by_hand(
        model,
        thirds,
        label,
        text(texts.empty, texts.negative, texts.empty),
        rate=rate if number < 30 else None,
        third=2,
        layers=layers,
    )
    expected = base[2:]
    for prompt, lora, mask in zip(texts.prompts, loras, masks, strict=True):
        common = {"lora": lora, "scale": 0.3, "layers": layers}
        common["rate"] = rate if number < 25 else None
        if mode == "base":
            stored = {name: (q[:2], k[:2]) for name, (q, k) in kept.items()}
            own, _ = by_hand(
                model, thirds[2:], label, text(texts.negative, prompt), source=stored, **common
            )
        else:
            whole = text(texts.empty, texts.negative, prompt)
            own = by_hand(model, thirds, label, whole, third=2, **common)[0][2:]
        expected = torch.where(mask, own, expected)
    sizes = []

    def predict(x, t, c):
        sizes.append(len(x))
        return model(x, t, c)

    before = {n: list(m.__dict__) for n, m in model.named_modules()}
    with DiffStyler(model, loras, layers=layers, options=options) as styler:
        assert styler.layers == tuple(f"blocks.{i}" for i in layers)
        arguments = {"texts": texts, "injection": injection, "masks": masks}
        out = styler.fused_noise(predict, z, source, label, **arguments)
        again = styler.fused_noise(predict, z, source, label, **arguments)
        torch.testing.assert_close(model(z, 1), by_hand(model, z, 1, model.empty)[0])
    torch.testing.assert_close(out, expected)
    assert torch.equal(out, again)
    assert sizes[:3] == ([6, 4, 4] if mode == "base" else [6, 6, 6])
    assert {n: list(m.__dict__) for n, m in model.named_modules()} == before


ALPHAS = torch.linspace(0.9999, 0.05, 1000, dtype=torch.float64)


@torch.no_grad()
def test_whole_method_and_no_style_at_all(text_denoiser):
    model = text_denoiser.double()
    content, _, texts, loras, _ = setting(model)
    labels = [1 + 250 * i for i in range(4)]
    sources = invert(
        model, content, texts.empty, alphas_cumprod=ALPHAS, labels=labels, num_steps=999
    )
    assert sorted(sources) == labels
    x = content
    for t in range(1, 252):
        a, b = ALPHAS[t - 1], ALPHAS[t]
        e = model(x, t, texts.empty)
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    torch.testing.assert_close(sources[251], x)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    arguments = {"alphas_cumprod": ALPHAS, "num_steps": 4, "guidance": 2.0}
    options = DiffStylerOptions(lora_scale=0.1)
    with DiffStyler(model, loras[:1], options=options) as styler:
        one = texts._replace(prompts=texts.prompts[:1])
        outs = [
            stylize(styler, model, sources, texts=one, masks=[mask], **arguments) for _ in range(2)
        ]
        with pytest.raises(KeyError, match=r"time label 667; there are \[1, 251, 501, 751\]"):
            stylize(
                styler, model, sources, texts=one, masks=[mask], alphas_cumprod=ALPHAS, num_steps=3
            )
    assert torch.equal(*outs)
    assert outs[0].isfinite().all()
    with DiffStyler(model) as styler:
        none = stylize(styler, model, sources, texts=texts._replace(prompts=()), **arguments)
    assert not torch.allclose(none, outs[0], atol=1e-3)
    # The same by hand, for the base alone.
    x = sources[751]
    for number, t in enumerate(reversed(labels)):
        thirds = torch.cat([sources[t], x, x])
        text = torch.cat([p.expand(2, -1, -1) for p in (texts.empty, texts.negative, texts.empty)])
        e, _ = by_hand(model, thirds, t, text, rate=min(1, t / 500), third=2, layers=range(8))
        u, c = e[2:4], e[4:]
        e = u + 2.0 * (c - u)
        a, b = ALPHAS[t], ALPHAS[max(0, t - 250)]
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
        assert number < 4
    torch.testing.assert_close(none, x, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"does not pass \[3\]"):
        invert(model, content, texts.empty, alphas_cumprod=ALPHAS, labels=[3], num_steps=4)


@torch.no_grad()
def test_refusals_of_the_driver(text_denoiser, denoiser):
    z, source, texts, loras, masks = setting(text_denoiser)
    z, source = z.float(), source.float()
    texts = Texts(texts.empty.float(), texts.negative.float(), [p.float() for p in texts.prompts])
    with pytest.raises(ValueError, match="features: no module 'conv'"):
        DiffStyler(text_denoiser, features=["conv"])
    with pytest.raises(TypeError, match="features: expected a sequence"):
        DiffStyler(text_denoiser, features="conv")
    with pytest.raises(ValueError, match=r"adapters\[0\]: no layer 'x'"):
        DiffStyler(text_denoiser, [{"x": pair(4, 4)}])
    with pytest.raises(ValueError, match="no self-attention layer matches 'cros'"):
        DiffStyler(text_denoiser, loras, layers=["cros"])
    assert not any(m._forward_hooks for m in text_denoiser.modules())
    styler = DiffStyler(text_denoiser, loras[:1])
    injection = styler.options.injection(0, 50, 981)
    base = {"texts": texts._replace(prompts=texts.prompts[:1]), "injection": injection}
    base["masks"] = masks[:1]

    for change, run, match in (
        ({"masks": masks}, text_denoiser, r"masks: expected 1 \(one for each LoRA\), got 2"),
        ({"texts": texts}, text_denoiser, r"texts.prompts: expected 1"),
        ({"masks": masks[:1, :3]}, text_denoiser, "the latent's size"),
        (
            {},
            lambda x, t, c: text_denoiser(x[:4], t, c[:4]),
            r"layer 'blocks.0': .*three thirds.* 4 rows",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            styler.fused_noise(run, z, source, 981, **{**base, **change})
        assert styler.current is None
        assert styler.adapters.current is None
    with pytest.raises(ValueError, match="source: expected the shape of latent"):
        styler.fused_noise(text_denoiser, z, source[:1], 981, **base)
    # Two methods on the same layers: apart they work, at once they are refused.
    with StyleInjector(text_denoiser) as injector:
        styler.fused_noise(text_denoiser, z, source, 981, **base)
        with (
            injector.capture("style"),
            pytest.raises(RuntimeError, match="_InjectionLayer and, below it, _StyledLayer"),
        ):
            styler.fused_noise(text_denoiser, z, source, 981, **base)
    styler.remove()
    with pytest.raises(RuntimeError, match="has been removed"):
        styler.fused_noise(text_denoiser, z, source, 981, **base)


def test_options_and_schedule():
    options = DiffStylerOptions()
    counts = [0, 0, 0, 0]
    for number in range(50):
        step = options.injection(number, 50, 981 - 20 * number)
        counts[0] += step.base_rate is not None
        counts[1] += step.base_features
        counts[2] += step.style_rate is not None
        counts[3] += step.style_features
    assert counts == [50, 50, 25, 30]
    assert options.rho(301) == pytest.approx(0.602)
    assert DiffStylerOptions(rate="hard").rho(1) == 1.0
    for change in (
        {"source": "lora"},
        {"rate": "soft"},
        {"overlap": "sum"},
        {"base_attention": 1.5},
        {"style_features": -0.1},
        {"lora_scale": math.inf},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            DiffStylerOptions(**change)
