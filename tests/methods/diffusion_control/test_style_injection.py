"""Style injection: official outputs, the driver on a hand-written model, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import transfuse.ops
from transfuse.methods.diffusion_control import style_injection
from transfuse.methods.diffusion_control.style_injection import (
    FeatureStore,
    StyleInjectionOptions,
    StyleInjector,
    Transition,
    adain_latent,
    ddim_invert_step,
    ddim_reverse_step,
    inject,
    inversion_schedule,
    reverse_schedule,
    stylize,
)
from transfuse.testing import golden

GOLDEN = golden.load("style_injection")


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def dense(query, key, value, *, content=None, gamma=0.0, temperature=1.0):
    """The method written out, independent of the library: explicit map, explicit repeats."""
    batch = query.shape[0]
    if content is not None:
        query = gamma * content.expand_as(query) + (1 - gamma) * query
    key, value = (x.expand(batch, *x.shape[1:]) for x in (key, value))
    logits = temperature * torch.einsum("bhnd,bhmd->bhnm", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhnm,bhmv->bhnv", logits.softmax(-1), value)


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


# --- the feature store ---------------------------------------------------------------------------


def filled_store(**options):
    store = FeatureStore(**options)
    g = torch.Generator().manual_seed(0)
    for label in (1, 21):
        for layer in ("a.attn1", "b/c.attn1"):
            q, k, v = torch.randn(3, 1, 2, 6, 4, generator=g).unbind()
            store.put("content", label, layer, query=q, key=k, value=v)
            store.put("style", label, layer, query=q, key=k, value=v)
    return store


def test_store_keeps_only_what_each_role_contributes():
    store = filled_store()
    size = 2 * 2 * (1 * 2 * 6 * 4) * 4
    assert store.memory() == (size, 2 * size, 0)
    assert store.memory().total == 3 * size
    assert {name.rsplit("/")[-1] for name in store.state_dict()} == {"query", "key", "value"}
    assert not [name for name in store.state_dict() if "content" in name and "key" in name]
    assert store.labels("content") == (1, 21)
    assert len(store) == 8
    store.clear("content")
    assert store.labels("content") == ()
    assert store.labels("style") == (1, 21)
    store.clear()
    assert len(store) == 0
    assert store.memory().total == 0


def test_store_dtype_and_device():
    store, full = filled_store(dtype=torch.float16, device="cpu", pin_memory=True), filled_store()
    assert store.memory().total * 2 == full.memory().total
    q = torch.zeros(1, 2, 6, 4, dtype=torch.float64)
    features = store.get(1, "a.attn1", like=q)
    assert all(x.dtype == torch.float64 for x in features)
    reference = full.get(1, "a.attn1", like=q)
    for mine, exact in zip(features, reference, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-3, rtol=1e-3)
    assert store.get(2, "a.attn1", like=q) == (None, None, None)


def test_store_state_round_trip(tmp_path):
    store = filled_store()
    torch.save(store.state_dict(), tmp_path / "features.pt")
    again = FeatureStore()
    again.load_state_dict(torch.load(tmp_path / "features.pt", weights_only=True))
    before, after = store.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert repr(again) == repr(store)


def test_store_refuses():
    store = FeatureStore()
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="role: expected 'content' or 'style', got 'noise'"):
        store.put("noise", 1, "a", query=q)
    with pytest.raises(ValueError, match="style features need key and value"):
        store.put("style", 1, "a", key=q)
    for name in ("content/x/a/query", "content/1/a/key", "query", "content/1/query"):
        with pytest.raises(ValueError, match="role/label/layer/part"):
            store.load_state_dict({name: q})
    with pytest.raises(ValueError, match="dtype"):
        FeatureStore(dtype=torch.int32)


# --- the driver on a hand-written model ----------------------------------------------------------

X = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).unbind()


@torch.no_grad()
def capture_both(injector, model, *, labels=(1, 21)):
    for role, x in (("content", X[0][:1]), ("style", X[1][:1])):
        with injector.capture(role):
            for label in labels:
                model(x, label)


def dense_forward(model, x, t, *, layers=(), tape=None, features=None, gamma=0.75, temperature=1.5):
    """The denoiser of conftest by hand: records (q, k, v) on a tape, or injects features."""
    h = model.inward(x.flatten(2).transpose(1, 2)) + 0.001 * t
    for i, block in enumerate(model.blocks):
        q, k, v = (split(f(h), block.num_heads) for f in (block.to_q, block.to_k, block.to_v))
        if tape is not None:
            tape[i] = (q, k, v)
        if features is not None and i in layers:
            (content, _, _), (_, key, value) = features[0][i], features[1][i]
            out = dense(q, key, value, content=content, gamma=gamma, temperature=temperature)
        else:
            out = dense(q, k, v)
        h = h + block.to_out(out.transpose(1, 2).flatten(2))
    return model.outward(h).transpose(1, 2).unflatten(2, x.shape[-2:])


@torch.no_grad()
@pytest.mark.parametrize("storage", ["features", "recompute"])
def test_capture_and_inject_equal_the_method_by_hand(denoiser, storage):
    model = denoiser.double()
    content, style, x = (y.double() for y in X)
    expected = {}
    for t in (1, 21):
        tapes = {}, {}
        dense_forward(model, content[:1], t, tape=tapes[0])
        dense_forward(model, style[:1], t, tape=tapes[1])
        expected[t] = dense_forward(model, x, t, layers=range(2, 8), features=tapes)
    with StyleInjector(model, options=StyleInjectionOptions(storage=storage)) as injector:
        assert injector.layers == tuple(f"blocks.{i}" for i in range(2, 8))
        for role, image in (("content", content), ("style", style)):
            with injector.capture(role):
                for t in (1, 21):
                    captured = model(image[:1], t)
                    torch.testing.assert_close(captured, dense_forward(model, image[:1], t))
        with injector.inject():
            for t in (21, 1):
                torch.testing.assert_close(model(x, timestep=torch.tensor([t, t])), expected[t])
        torch.testing.assert_close(model(x, 1), dense_forward(model, x, 1))


@torch.no_grad()
def test_recompute_keeps_inputs_and_not_features(denoiser):
    few, many = tuple(range(1, 82, 20)), tuple(range(1, 982, 20))
    sizes = {}
    for storage in ("features", "recompute"):
        for labels in (few, many):
            options = StyleInjectionOptions(storage=storage)
            with StyleInjector(denoiser, options=options) as injector:
                capture_both(injector, denoiser, labels=labels)
                with injector.inject():
                    for label in labels[:2]:
                        denoiser(X[2], label)
                sizes[storage, len(labels)] = injector.memory()
    assert sizes["features", 50].style == 10 * sizes["features", 5].style
    assert sizes["features", 50].content * 2 == sizes["features", 50].style
    assert sizes["features", 5].recorded == 0
    assert sizes["recompute", 50].style == sizes["recompute", 5].style
    # The same latent at every label is recorded once.
    assert sizes["recompute", 50].recorded == 2 * X[0][:1].nbytes


@torch.no_grad()
def test_recompute_is_not_fooled_by_a_reused_buffer(denoiser):
    buffer = X[0][:1].clone()
    with StyleInjector(denoiser, options=StyleInjectionOptions(storage="recompute")) as injector:
        results = {}
        for overwrite in (False, True):
            injector.clear()
            for role, x in (("content", X[0]), ("style", X[1])):
                with injector.capture(role):
                    denoiser(buffer.copy_(x[:1]), 1)
                    if overwrite:
                        buffer.fill_(9.0)
            with injector.inject():
                results[overwrite] = denoiser(X[2], 1)
    assert torch.equal(results[False], results[True])


@torch.no_grad()
def test_half_precision_store_changes_little(denoiser):
    outputs = []
    for dtype in (None, torch.float16):
        options = StyleInjectionOptions(store_dtype=dtype, store_device="cpu", pin_memory=True)
        with StyleInjector(denoiser, options=options) as injector:
            capture_both(injector, denoiser)
            with injector.inject():
                outputs.append(denoiser(X[2], 1))
    assert not torch.equal(*outputs)
    torch.testing.assert_close(*outputs, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_idle_injector_leaves_the_model_bit_for_bit(denoiser):
    expected = denoiser(X[2], 1)
    injector = StyleInjector(denoiser)
    assert torch.equal(denoiser(X[2], 1), expected)
    capture_both(injector, denoiser)
    assert torch.equal(denoiser(X[2], 1), expected)
    injector.remove()
    assert torch.equal(denoiser(X[2], 1), expected)
    assert injector.memory().total > 0, "features outlive the patch"
    with pytest.raises(RuntimeError, match="has been removed"):
        injector.capture("content").__enter__()


@torch.no_grad()
def test_steps_without_features(denoiser):
    with StyleInjector(denoiser) as injector:
        plain, plain_21 = denoiser(X[2], 41), denoiser(X[2], 21)
        nothing = pytest.raises(ValueError, match=r"'blocks.2'.*no content or style features")
        with injector.inject(), nothing:
            denoiser(X[2], 41)
        capture_both(injector, denoiser)
        other = pytest.raises(
            ValueError, match=r"query \(2, 2, 16, 8\).*time label 41; captured labels: .*\[1, 21\]"
        )
        with injector.inject(), other:
            denoiser(X[2], 41)
        with injector.inject(steps=[1]):
            torch.testing.assert_close(denoiser(X[2], 41), plain)
            torch.testing.assert_close(denoiser(X[2], 21), plain_21)
            assert not torch.allclose(denoiser(X[2], 1), plain, atol=1e-3)
    options = StyleInjectionOptions(missing="plain")
    with StyleInjector(denoiser, options=options) as injector, injector.inject():
        torch.testing.assert_close(denoiser(X[2], 41), plain)


@torch.no_grad()
def test_style_alone_injects_keys_and_values_with_temperature(denoiser):
    tape = {}
    dense_forward(denoiser, X[1][:1], 1, tape=tape)
    expected = dense_forward(denoiser, X[2], 1, layers=range(2, 8), features=(tape, tape), gamma=0)
    with StyleInjector(denoiser) as injector:
        with injector.capture("style"):
            denoiser(X[1][:1], 1)
        with injector.inject():
            torch.testing.assert_close(denoiser(X[2], 1), expected)


@torch.no_grad()
def test_half_missing_role_is_refused(denoiser):
    with StyleInjector(denoiser) as injector:
        with injector.capture("content"):
            denoiser(X[0][:1], 1)
        with injector.capture("style"):
            denoiser(X[1][:1], 21)
        with (
            injector.inject(),
            pytest.raises(ValueError, match="no style features at time label 1"),
        ):
            denoiser(X[2], 1)


@torch.no_grad()
def test_content_of_another_size_is_refused_with_layer_and_shapes(denoiser):
    with StyleInjector(denoiser) as injector:
        with injector.capture("content"):
            denoiser(torch.randn(1, 4, 3, 3), 1)
        with injector.capture("style"):
            denoiser(torch.randn(1, 4, 5, 7), 1)
        with (
            injector.inject(),
            pytest.raises(
                ValueError,
                match=r"'blocks.2' at time label 1: query_content.*\(2, 2, 16, 8\).*\(1, 2, 9, 8\)",
            ),
        ):
            denoiser(X[2], 1)
        with injector.capture("content"):
            denoiser(X[0][:1], 1)
        with injector.inject():
            denoiser(X[2], 1)  # a style image of another size is legal


def test_modes_do_not_nest_and_end_with_exceptions(denoiser):
    injector = StyleInjector(denoiser)
    with injector.capture("content"):
        assert injector.mode == "content"
        with pytest.raises(RuntimeError, match="cannot enter 'inject': mode 'content' is active"):
            injector.inject().__enter__()
    assert injector.mode is None
    with pytest.raises(ZeroDivisionError), injector.capture("style"):
        raise ZeroDivisionError
    assert injector.mode is None
    with pytest.raises(ValueError, match="role"):
        injector.capture("noise")
    with pytest.raises(ZeroDivisionError), injector:
        raise ZeroDivisionError
    assert not injector.installed


@torch.no_grad()
def test_time_labels(denoiser, plain_attention):
    with StyleInjector(denoiser) as injector, injector.capture("content"):
        denoiser(X[0], torch.tensor(7))
        denoiser(X[0], 9.0)
        assert injector.store.labels("content") == (7, 9)
        for label, error in (
            (torch.tensor([1, 2]), ValueError),
            (1.5, ValueError),
            (math.nan, ValueError),
            ("1", TypeError),
            (True, TypeError),
        ):
            with pytest.raises(error, match="timestep"):
                denoiser(X[0], label)
    timeless = nn.Sequential(plain_attention(16, 2))
    x = torch.randn(1, 5, 16)
    with StyleInjector(timeless) as injector:
        with injector.capture("content"), pytest.raises(RuntimeError, match=r"at\(label\)"):
            timeless(x)
        with injector.at(3).capture("content"):
            timeless(x)
        assert injector.store.labels("content") == (3,)


# --- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ([0, 3], (0, 3)),
        (["blocks.5", 1], (1, 5)),
        (["blocks"], tuple(range(8))),
        ([7, 7], (7,)),
    ],
)
def test_layer_choice(denoiser, layers, chosen):
    with StyleInjector(denoiser, layers=layers) as injector:
        assert injector.layers == tuple(f"blocks.{i}" for i in chosen)


@pytest.mark.parametrize(
    ("layers", "error", "match"),
    [
        (["block.5"], ValueError, r"'block.5'; did you mean 'blocks.5'"),
        ([8], ValueError, r"matches 8; numbers with self-attention: \[0, 1, 2, 3, 4, 5, 6, 7\]"),
        ([-1], ValueError, "matches -1"),
        ([], ValueError, "layers is empty"),
        ("blocks.5", TypeError, "sequence of names or numbers"),
        ([1.0], TypeError, "expected names or numbers, got 1.0"),
        ([True], TypeError, "expected names or numbers"),
    ],
)
def test_bad_layer_choice(denoiser, layers, error, match):
    with pytest.raises(error, match=match):
        StyleInjector(denoiser, layers=layers)
    assert "forward" not in denoiser.blocks[5].__dict__, "a refused patch leaves nothing behind"


def test_model_with_few_layers_uses_all_of_them(plain_attention):
    model = nn.Sequential(plain_attention(8, 2), plain_attention(8, 2))
    with StyleInjector(model) as injector:
        assert injector.layers == ("0", "1")


def test_decoder_blocks_of_latent_diffusion_code_are_counted(plain_attention):
    model = nn.ModuleDict(
        {
            "input_blocks": nn.ModuleList([nn.Sequential(plain_attention(8, 2))]),
            "output_blocks": nn.ModuleList(
                [nn.Sequential(nn.Identity(), plain_attention(8, 2)) for _ in range(12)]
            ),
        }
    )
    with StyleInjector(model) as injector:
        assert injector.layers == tuple(f"output_blocks.{i}.1" for i in range(6, 12))
    with StyleInjector(model, layers=range(7, 12)) as injector:
        assert injector.layers == tuple(f"output_blocks.{i}.1" for i in range(7, 12))


@torch.no_grad()
def test_cross_attention_is_left_out_or_refused(plain_attention):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.text = plain_attention(8, 2), plain_attention(8, 2)
            self.wide = plain_attention(8, 2)
            self.wide.to_k = nn.Linear(12, 8)

        def forward(self, x, timestep, context):
            return self.own(x) + self.text(x, context=context)

    model = Both()
    x = torch.randn(1, 5, 8)
    with StyleInjector(model) as injector:
        assert injector.layers == ("own", "text")  # equal widths cannot be told apart
        model(x, 1, x)
        with (
            injector.capture("style"),
            pytest.raises(ValueError, match="'text' received a context"),
        ):
            model(x, 1, x)
    with StyleInjector(model, layers=["own"]) as injector, injector.capture("style"):
        model(x, 1, x)


# --- several patches on one model ----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_injectors_come_off_in_any_order(denoiser, order):
    expected = denoiser(X[2], 1)
    pair = [StyleInjector(denoiser), StyleInjector(denoiser, layers=[0, 5])]
    with pair[0].capture("style"):
        denoiser(X[1][:1], 1)
    assert pair[0].store.labels("style") == (1,)
    assert len(pair[1].store) == 0
    with pair[0].inject():
        injected = denoiser(X[2], 1)
    assert not torch.allclose(injected, expected, atol=1e-3)
    pair[order[0]].remove()
    if order[0] == 1:
        with pair[0].inject():
            assert torch.equal(denoiser(X[2], 1), injected)
    assert torch.equal(denoiser(X[2], 1), expected)
    pair[order[1]].remove()
    assert torch.equal(denoiser(X[2], 1), expected)
    assert not any("forward" in block.__dict__ for block in denoiser.blocks)


def test_foreign_forward_put_on_top_is_left_alone_with_a_warning(denoiser):
    injector = StyleInjector(denoiser, layers=[0, 1])

    def mine(x):
        return x

    denoiser.blocks[0].forward = mine
    with pytest.warns(UserWarning, match=r"replaced by someone else.*: blocks\.0$"):
        injector.remove()
    assert denoiser.blocks[0].forward is mine
    assert "forward" not in denoiser.blocks[1].__dict__


def test_foreign_forward_underneath_comes_back(denoiser):
    block = denoiser.blocks[0]
    own = copy.copy(block.forward)
    block.forward = own
    StyleInjector(denoiser, layers=[0]).remove()
    assert block.__dict__["forward"] is own


# --- options, whole method -----------------------------------------------------------------------


def test_options_are_frozen_keyword_only_and_checked():
    options = StyleInjectionOptions()
    assert (options.gamma, options.temperature) == (0.75, 1.5)
    with pytest.raises(AttributeError):
        options.gamma = 0.5
    with pytest.raises(TypeError):
        StyleInjectionOptions(0.5)
    for change, match in (
        ({"gamma": 2}, "gamma"),
        ({"temperature": 0}, "temperature"),
        ({"missing": "ignore"}, "missing: expected one of refuse, plain"),
        ({"storage": "disk"}, "storage: expected one of features, recompute"),
        ({"store_dtype": torch.int8}, "dtype"),
        ({"store_device": "nowhere"}, "nowhere"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=match):
            StyleInjectionOptions(**change)


ALPHAS = torch.linspace(0.9999, 0.05, 1000, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["ldm", "diffusers"])
def test_stylize_is_the_whole_method(denoiser, variant):
    model = denoiser.double()
    content, style = X[0][:1].double(), X[1][:1].double()
    steps = 5
    labels = [1 + 200 * i for i in range(steps)]

    def move(x, e, a, b):
        return b**0.5 * (x - (1 - a) ** 0.5 * e) / a**0.5 + (1 - b) ** 0.5 * e

    tapes, ends = {}, {}
    for role, x in (("content", content), ("style", style)):
        for i, t in enumerate(labels):
            tape = tapes[role, t] = {}
            e = dense_forward(model, x, t, tape=tape)
            if variant == "ldm":
                a, b = ALPHAS[t], ALPHAS[labels[i + 1] if i + 1 < steps else 999]
            else:
                a, b = ALPHAS[max(0, t - 200)], ALPHAS[t]
            x = move(x, e, a, b)
        ends[role] = x
    c, s = ends["content"], ends["style"]
    mean, std = (lambda z: z.mean((2, 3), keepdim=True)), (lambda z: z.std((2, 3), keepdim=True))
    x = (c - mean(c)) / (std(c) + 1e-4) * std(s) + mean(s)
    for t in reversed(labels):
        features = tapes["content", t], tapes["style", t]
        e = dense_forward(model, x, t, layers=range(2, 8), features=features)
        x = move(x, e, ALPHAS[t], ALPHAS[max(0, t - 200)])

    with StyleInjector(model) as injector:
        arguments = {"alphas_cumprod": ALPHAS, "num_steps": steps, "variant": variant}
        first = stylize(injector, model, content, style, **arguments)
        second = stylize(injector, model, content, style, **arguments)
        skipped = stylize(injector, model, content, style, **arguments, skip=1)
        with pytest.raises(ValueError, match=r"skip: expected an integer in \[0, 5\)"):
            stylize(injector, model, content, style, **arguments, skip=5)
    torch.testing.assert_close(first, x, atol=1e-9, rtol=1e-9)
    assert torch.equal(first, second)
    assert not torch.allclose(first, skipped)
