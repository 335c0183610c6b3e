"""Style injection as a patch, on a hand-written model whose injected forward is known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dense_attention import dense, split
from torch import nn

from transfuse.methods.diffusion_control.style_injection import (
    StyleInjectionOptions,
    StyleInjector,
    stylize,
)

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
