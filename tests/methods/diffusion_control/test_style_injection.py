"""Style injection: official outputs, its formulas and schedules, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from dense_attention import dense, split

import transfuse.ops
from transfuse.methods.diffusion_control import style_injection
from transfuse.methods.diffusion_control.style_injection import (
    Transition,
    adain_latent,
    ddim_invert_step,
    ddim_reverse_step,
    inject,
    inversion_schedule,
    reverse_schedule,
)
from transfuse.testing import golden

GOLDEN = golden.load("style_injection")


# --- against the official implementation ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["attn", "attn_odd"])
@pytest.mark.parametrize("array", ["y", "y_kv_only", "y_plain"])
def test_attention_matches_the_official_code(case, array, dtype):
    x, params = GOLDEN.inputs(case, dtype), GOLDEN.params(case)
    q, k, v = (split(x["x"] @ x[f"w{name}"].T, params["heads"]) for name in "qkv")
    features = {}
    if array != "y_plain":
        features = {"key_style": x["k_style"][None], "value_style": x["v_style"][None]}
    if array == "y":
        features["query_content"] = x["q_content"][None]
    options = {"gamma": params["gamma"], "temperature": params["T"]}
    out = inject(q, k, v, **features, **options)
    y = out.transpose(1, 2).flatten(2) @ x["wo"].T + x["bo"]
    GOLDEN.check(y, array, case)


@pytest.mark.parametrize(("array", "statistics"), [("ldm", "batch"), ("diffusers", "sample")])
def test_adain_matches_both_official_versions(array, statistics):
    x = GOLDEN.inputs("adain")
    out = adain_latent(x["content"], x["style"], statistics=statistics)
    GOLDEN.check(out, array, "adain")


def test_inversion_step_matches_the_official_code():
    x = GOLDEN.inputs("inversion")
    start, end = x["alphas_cumprod"]
    step = ddim_invert_step(x["x"], x["eps"], alpha=start, alpha_next=end)
    GOLDEN.check(step.sample, "x_next", "inversion")
    GOLDEN.check(step.predicted_original, "x0", "inversion")


# --- the functional form -------------------------------------------------------------------------


def qkv(batch=2, heads=3, n=7, m=5, d=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, d), (1, heads, n, d), (1, heads, m, d), (1, heads, m, d + 1)]
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("shared", [True, False])
def test_inject_is_the_formula(gamma, shared):
    q, content, k, v = qkv()
    if not shared:
        content, k, v = (torch.cat([x, 2 * x]) for x in (content, k, v))
    out = inject(q, query_content=content, key_style=k, value_style=v, gamma=gamma, temperature=1.5)
    expected = dense(q, k, v, content=content, gamma=gamma, temperature=1.5)
    torch.testing.assert_close(out, expected)


def test_blend_endpoints_use_one_source_bit_for_bit():
    q, content, k, v = qkv(dtype=torch.bfloat16)
    style = {"key_style": k, "value_style": v}
    poison = torch.full_like(content, math.nan)
    own = inject(q, **style)
    assert torch.equal(inject(q, query_content=poison, gamma=0.0, **style), own)
    full = inject(content.expand_as(q).contiguous(), **style)
    nan_query = torch.full_like(q, math.nan)
    assert torch.equal(inject(nan_query, query_content=content, gamma=1.0, **style), full)


def test_temperature_applies_whenever_something_is_injected_and_only_then():
    q, content, k, v = qkv()
    q1 = q[:1]
    hot = {"temperature": 3.0}
    torch.testing.assert_close(inject(q1, k, v, **hot), dense(q1, k, v))
    torch.testing.assert_close(
        inject(q1, key_style=k, value_style=v, **hot), dense(q1, k, v, temperature=3.0)
    )
    torch.testing.assert_close(
        inject(q1, k, v, query_content=content, gamma=0.5, **hot),
        dense(q1, k, v, content=content, gamma=0.5, temperature=3.0),
    )


def test_large_temperature_in_half_precision_does_not_overflow():
    q = torch.full((1, 1, 4, 160), 40.0, dtype=torch.float16)
    v = torch.arange(4.0, dtype=torch.float16).reshape(1, 1, 4, 1)
    out = inject(q, key_style=q, value_style=v, temperature=3.0)  # T q k = 768000 > 65504
    torch.testing.assert_close(out, torch.full_like(out, 1.5))


def test_own_mask_counts_for_own_keys_only():
    q, _, k, v = qkv()
    mask = torch.tensor([True, False, True, True, False])
    expected = dense(q, k[:, :, mask], v[:, :, mask])
    k, v = (x.expand(2, -1, -1, -1) for x in (k, v))
    torch.testing.assert_close(inject(q, k, v, mask=mask), expected)
    bias = torch.zeros(5, dtype=q.dtype).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(inject(q, k, v, mask=bias), expected)
    with pytest.raises(ValueError, match="mask: describes the own keys"):
        inject(q, key_style=k, value_style=v, mask=mask)


def test_one_call_of_attend_without_repeats(monkeypatch):
    calls = []

    def spy(query, sources, **options):
        calls.append((sources, options["blend"]))
        return transfuse.ops.attend(query, sources, **options)

    monkeypatch.setattr(style_injection, "attend", spy)
    q, content, k, v = qkv(batch=4)
    inject(q, query_content=content, key_style=k, value_style=v)
    ((source, blend),) = calls
    assert source.key is k
    assert source.value is v
    assert source.temperature == 1.5
    assert blend.other is content
    assert blend.weight == 0.75


def test_gradients_reach_every_input():
    tensors = [x.requires_grad_() for x in qkv()]
    q, content, k, v = tensors
    inject(q, query_content=content, key_style=k, value_style=v).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gamma": -0.1}, r"gamma: expected a number in \[0, 1\], got -0.1"),
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"gamma": True}, "gamma"),
        ({"gamma": "0.3"}, "gamma"),
        ({"temperature": 0}, "temperature: expected a finite number > 0, got 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"value_style": None}, "expected both or neither"),
        ({"key_style": None, "value_style": None}, "key and value: needed"),
        ({"query_content": torch.zeros(1, 3, 6, 8)}, r"\(2, 3, 7, 8\), got \(1, 3, 6, 8\)"),
        ({"query_content": torch.zeros(3, 3, 7, 8)}, "query_content"),
        ({"key_style": torch.zeros(1, 2, 5, 8)}, r"key_style: expected .* got \(1, 2, 5, 8\)"),
        ({"key_style": torch.zeros(1, 3, 5, 6)}, "key_style"),
        ({"value_style": torch.zeros(1, 3, 5)}, "value_style"),
    ],
)
def test_bad_arguments_are_refused(change, match):
    q, content, k, v = qkv(dtype=torch.float32)
    arguments = {"query_content": content, "key_style": k, "value_style": v, **change}
    with pytest.raises(ValueError, match=match):
        inject(q, **arguments)


# --- latents and time ----------------------------------------------------------------------------


def test_adain_statistics_and_broadcast_style():
    g = torch.Generator().manual_seed(0)
    content = torch.randn(3, 4, 8, 8, generator=g)
    style = torch.randn(1, 4, 6, 10, generator=g) * 3 + 1
    out = adain_latent(content, style, eps=0.0)
    torch.testing.assert_close(out.mean((2, 3)), style.mean((2, 3)).expand(3, -1))
    torch.testing.assert_close(out.std((2, 3)), style.std((2, 3)).expand(3, -1))
    pooled = adain_latent(content, style, statistics="batch")
    torch.testing.assert_close(pooled.std((0, 2, 3)), style.std((0, 2, 3)))


@pytest.mark.parametrize("statistics", ["sample", "batch"])
def test_adain_of_a_constant_channel_is_the_mean_of_the_style(statistics):
    content, style = torch.ones(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    out = adain_latent(content, style, statistics=statistics)
    torch.testing.assert_close(out, style.mean((2, 3), keepdim=True).expand_as(content))


@pytest.mark.parametrize(
    ("content", "style", "options", "match"),
    [
        ((1, 4, 8, 8), (1, 3, 8, 8), {}, "content and style"),
        ((4, 8, 8), (4, 8, 8), {}, "content and style"),
        ((3, 4, 8, 8), (2, 4, 8, 8), {}, "batch 1 or 3, got 2"),
        ((1, 4, 8, 8), (1, 4, 8, 8), {"statistics": "channel"}, "statistics"),
    ],
)
def test_adain_refuses(content, style, options, match):
    with pytest.raises(ValueError, match=match):
        adain_latent(torch.zeros(content), torch.zeros(style), **options)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_reverse_step_undoes_an_inversion_step(prediction, dtype):
    g = torch.Generator().manual_seed(0)
    original, noise = (torch.randn(2, 4, 5, 5, generator=g, dtype=torch.float64) for _ in "ab")
    a, b = 0.8, 0.3

    def at(alpha):
        return math.sqrt(alpha) * original + math.sqrt(1 - alpha) * noise

    def output(alpha):
        if prediction == "epsilon":
            return noise
        return math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * original

    up = ddim_invert_step(
        at(a).to(dtype), output(a).to(dtype), alpha=a, alpha_next=b, prediction=prediction
    )
    down = ddim_reverse_step(
        up.sample, output(b).to(dtype), alpha=b, alpha_next=a, prediction=prediction
    )
    tolerance = {} if dtype == torch.float64 else {"atol": 1e-2, "rtol": 1e-2}
    assert up.sample.dtype == dtype
    torch.testing.assert_close(up.sample, at(b).to(dtype), **tolerance)
    torch.testing.assert_close(up.predicted_original, original.to(dtype), **tolerance)
    torch.testing.assert_close(down.sample, at(a).to(dtype), **tolerance)


def test_v_prediction_reaches_zero_terminal_signal():
    x = torch.randn(1, 4, 2, 2)
    step = ddim_reverse_step(x, x, alpha=0.0, alpha_next=0.5, prediction="v_prediction")
    assert step.sample.isfinite().all()
    with pytest.raises(ValueError, match="alpha > 0"):
        ddim_reverse_step(x, x, alpha=0.0, alpha_next=0.5)


def test_alphas_per_sample():
    x, e = torch.randn(2, 3, 1, 4, 4).unbind()
    a, b = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.5, 0.4, 0.3])
    together = ddim_invert_step(x, e, alpha=a, alpha_next=b).sample
    for i in range(3):
        alone = ddim_invert_step(x[i], e[i], alpha=a[i], alpha_next=b[i]).sample
        torch.testing.assert_close(together[i], alone)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alpha": 1.2}, r"alpha: expected cumulative alphas in \[0, 1\]"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha_next": 0.9}, "alpha_next: expected at most alpha"),
        ({"alpha": torch.full((3,), 0.5)}, r"alpha: expected a number or shape \(2,\)"),
        ({"prediction": "sample"}, "prediction must be one of epsilon, v_prediction"),
        ({"model_output": torch.zeros(2, 4, 3, 3)}, "model_output: expected the shape"),
    ],
)
def test_steps_refuse(change, match):
    arguments = {"model_output": torch.zeros(2, 4, 2, 2), "alpha": 0.5, "alpha_next": 0.1, **change}
    with pytest.raises(ValueError, match=match):
        ddim_invert_step(torch.zeros(2, 4, 2, 2), **arguments)
    with pytest.raises(ValueError, match="at least alpha"):
        ddim_reverse_step(torch.zeros(1), torch.zeros(1), alpha=0.5, alpha_next=0.1)


def test_schedules_of_both_official_versions():
    ldm = inversion_schedule(50)
    assert [step.label for step in ldm] == list(range(1, 982, 20))
    assert ldm[0] == Transition(1, 1, 21)
    assert ldm[-1] == Transition(981, 981, 999)
    other = inversion_schedule(20, variant="diffusers")
    assert [step.label for step in other] == list(range(1, 952, 50))
    assert other[0] == Transition(1, 0, 1)
    assert other[-1] == Transition(951, 901, 951)
    down = reverse_schedule(50)
    assert [step.label for step in down] == list(range(981, 0, -20))
    assert down[-1] == Transition(1, 1, 0)
    with pytest.raises(ValueError, match="variant"):
        inversion_schedule(50, variant="paper")
    for steps in (0, 1000, 2000, 2.5, True):
        with pytest.raises(ValueError, match="num_steps"):
            inversion_schedule(steps)
