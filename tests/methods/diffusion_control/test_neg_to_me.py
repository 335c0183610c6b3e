"""Negative token merging against the official recordings, its definition, and its refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from transfuse.methods.diffusion_control.neg_to_me import (
    NegToMe,
    NegToMeOptions,
    mask_on_grid,
    place_reference,
    push_all_pairs,
    push_from_first,
    push_from_mean,
    push_from_reference,
)
from transfuse.testing import golden

GOLDEN = golden.load("neg_to_me")


def by_definition(x, reference, alpha, threshold, mask=None):
    """The paper's equations, token by token."""
    y = x.clone()
    for f in range(x.shape[0]):
        for i in range(x.shape[1]):
            score = F.cosine_similarity(x[f, i][None], reference, dim=-1)
            if mask is not None:
                score = torch.where(mask, score, -torch.inf)
            j = score.argmax()
            if score[j] > threshold:
                y[f, i] = (1 + alpha) * x[f, i] - alpha * reference[j]
    return y


# -- official code --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "masked", "single"])
def test_official_variant(case):
    data, params = GOLDEN.inputs(case), GOLDEN.params(case)
    mask = data["ref_mask"].bool() if "ref_mask" in data else None
    y = push_from_first(
        data["x"],
        alpha=params["alpha"],
        threshold=params["threshold"],
        mask=mask,
        variant="official",
    )
    GOLDEN.check(y, "y", case)
    assert torch.equal(y[0], data["x"][0])


def test_the_recording_tells_the_variants_apart():
    data, params = GOLDEN.inputs("plain"), GOLDEN.params("plain")
    y = push_from_first(data["x"], alpha=params["alpha"], threshold=params["threshold"])
    assert not torch.allclose(y, GOLDEN.outputs("plain")["y"], atol=1e-2)


# -- the paper's equations ------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.65])
def test_paper_variant(masked, threshold):
    x, reference = torch.randn(2, 15, 6).double(), torch.randn(11, 6).double()
    mask = torch.rand(11) < 0.5 if masked else None
    y = push_from_reference(x, reference, alpha=0.9, threshold=threshold, mask=mask)
    torch.testing.assert_close(y, by_definition(x, reference, 0.9, threshold, mask))
    similar = F.cosine_similarity(x[:, :, None], reference, dim=-1)
    similar = similar if mask is None else similar.masked_fill(~mask, -torch.inf)
    still = similar.amax(-1) <= threshold
    assert torch.equal(y[still], x[still])


def test_image_0_pushes_the_others():
    x = torch.randn(3, 15, 6)
    y = push_from_first(x, alpha=0.5, threshold=0.3)
    assert torch.equal(y[0], x[0])
    expected = by_definition(x[1:], x[0], 0.5, 0.3)
    torch.testing.assert_close(y[1:], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(push_from_first(x[:1], alpha=0.5, threshold=-1.0), x[:1])


def test_all_pairs():
    x = torch.randn(3, 9, 5)
    y = push_all_pairs(x, alpha=0.5, threshold=0.3)
    for f in range(3):
        others = torch.cat([x[:f], x[f + 1 :]]).flatten(0, 1)
        expected = by_definition(x[f : f + 1], others, 0.5, 0.3)
        torch.testing.assert_close(y[f : f + 1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(push_all_pairs(x[:1], alpha=0.5, threshold=-1.0), x[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_from_the_mean_of_the_others(dtype):
    x = torch.randn(4, 9, 5).to(dtype)
    y = push_from_mean(x, alpha=0.5, threshold=0.2)
    assert y.dtype == dtype
    for f in range(4):
        mean = torch.stack([x[g].double() for g in range(4) if g != f]).mean(0).to(dtype)
        expected = push_from_reference(x[f : f + 1], mean, alpha=0.5, threshold=0.2)
        torch.testing.assert_close(y[f : f + 1], expected)
    assert not torch.equal(y, x)
    assert torch.equal(push_from_mean(x[:1], alpha=0.5, threshold=-1.0), x[:1])
    two = push_from_mean(x[:2], alpha=0.5, threshold=0.2)
    torch.testing.assert_close(two, push_all_pairs(x[:2], alpha=0.5, threshold=0.2))


@pytest.mark.parametrize("against", ["all", "mean"])
def test_every_image_is_pushed_from_the_others(denoiser, against):
    seen = []
    hook = denoiser.blocks[2].register_forward_hook(lambda m, args, out: seen.append(out))
    plain = run(denoiser)
    hook.remove()
    with NegToMe(denoiser, NegToMeOptions(against=against, **ALWAYS), layers=["blocks.2"]):
        hook = denoiser.blocks[2].register_forward_hook(lambda m, args, out: seen.append(out))
        out = run(denoiser)
        hook.remove()
    push = push_all_pairs if against == "all" else push_from_mean
    assert torch.equal(seen[1], push(seen[0], alpha=0.9, threshold=0.1))
    assert (out - plain).abs().amax((1, 2, 3)).min() > 1e-4, "image 0 as well"
    with pytest.raises(ValueError, match="mask: a mask is of image 0"):
        NegToMe(denoiser, NegToMeOptions(against=against), mask=torch.ones(4, 4, dtype=torch.bool))


def test_a_reference_takes_the_place_of_image_0():
    x, own, noise = torch.randn(4, 3, 2, 2), torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    kept = x.clone()
    level = {"noise": noise, "alpha": 0.8, "sigma": 0.6}
    out = place_reference(x, own, **level)
    torch.testing.assert_close(out[0], 0.8 * own + 0.6 * noise)
    assert torch.equal(out[1:], x[1:])
    assert torch.equal(x, kept)
    halves = place_reference(x, own, guidance=True, **level)
    assert torch.equal(halves[[0, 2]], out[[0, 0]])
    assert torch.equal(halves[[1, 3]], x[[1, 3]])
    assert torch.equal(place_reference(x, own)[0], own), "clean, as released"
    for changes, match in (
        ({"reference": own[:1]}, "reference: expected a tensor of shape"),
        ({"noise": noise[None]}, "noise: expected a tensor of shape"),
        ({"latent": x[:3], "guidance": True}, "latent: expected two halves"),
        ({"latent": x[:0]}, "latent: expected"),
    ):
        arguments = {"latent": x, "reference": own, **changes}
        with pytest.raises(ValueError, match=match):
            place_reference(arguments.pop("latent"), arguments.pop("reference"), **arguments)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_gradients(variant):
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    options = {"alpha": 0.9, "threshold": -1.0, "variant": variant}
    y = push_from_reference(x, reference, **options)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 1.9))
    y = push_from_reference(x, reference, detach=False, **options)
    _, to_reference = torch.autograd.grad(y.sum(), (x, reference))
    torch.testing.assert_close(to_reference.sum(), torch.tensor(-0.9 * x.numel()).double())


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nothing_allowed_and_zero_tokens(variant, dtype):
    x = torch.randn(3, 8, 4).to(dtype)
    x[1, 2] = 0.0
    none = torch.zeros(8, dtype=torch.bool)
    y = push_from_first(x, alpha=0.9, threshold=-1.0, mask=none, variant=variant)
    assert torch.equal(y, x)
    assert push_from_first(x, alpha=0.9, threshold=0.3, variant=variant).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"alpha": -0.1}, ValueError, "alpha: expected a number of at least 0, got -0.1"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number"),
        ({"threshold": 1.5}, ValueError, r"threshold: expected a cosine in \[-1, 1\], got 1.5"),
        ({"threshold": 1.5, "variant": "official"}, ValueError, "threshold: expected a cosine"),
        ({"variant": "code"}, ValueError, "variant: expected one of"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask: expected a shape"),
        (
            {"mask": torch.ones(5, dtype=torch.bool), "variant": "official"},
            ValueError,
            r"mask: expected a bool tensor of shape \(6,\)",
        ),
        ({"reference": torch.ones(5, 4), "variant": "official"}, ValueError, "expected 6 tokens"),
        ({"reference": torch.ones(6, 3)}, ValueError, "reference: expected 4 in dimension 2"),
    ],
)
def test_refusals(changes, error, match):
    options = {"reference": torch.ones(6, 4), "alpha": 0.9, "threshold": 0.5, **changes}
    with pytest.raises(error, match=match):
        push_from_reference(torch.ones(2, 6, 4), options.pop("reference"), **options)


# -- in a model -----------------------------------------------------------------------------------


ALWAYS = {"end": 0.0, "min_side": 0, "threshold": 0.1}


def run(model, batch=3, time=500):
    x = torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(x, time)


def test_what_it_does_to_a_layer(denoiser):
    seen = []
    hook = denoiser.blocks[2].register_forward_hook(lambda m, args, out: seen.append(out))
    run(denoiser)
    with NegToMe(denoiser, NegToMeOptions(**ALWAYS), layers=["blocks.2"]) as patch:
        assert patch.layers == ("blocks.2",)
        later = []
        second = denoiser.blocks[2].register_forward_hook(lambda m, args, out: later.append(out))
        run(denoiser)
        second.remove()
    hook.remove()
    expected = push_from_first(seen[0], alpha=0.9, threshold=0.1)
    assert not torch.equal(expected, seen[0])
    assert torch.equal(later[0], expected)


def test_only_the_first_steps(denoiser):
    plain = {t: run(denoiser, time=t) for t in (1000, 800, 799, 1)}
    with NegToMe(denoiser, NegToMeOptions(min_side=0, threshold=0.1)):
        changed = {t: not torch.equal(run(denoiser, time=t), plain[t]) for t in plain}
    assert changed == {1000: True, 800: True, 799: False, 1: False}


def test_image_0_and_single_images_are_untouched(denoiser):
    plain, single = run(denoiser), run(denoiser, batch=1)
    with NegToMe(denoiser, NegToMeOptions(**ALWAYS)):
        out = run(denoiser)
        assert torch.equal(run(denoiser, batch=1), single)
    torch.testing.assert_close(out[0], plain[0])
    assert not torch.allclose(out[1:], plain[1:], atol=1e-4)


def test_guidance_treats_halves_apart(denoiser):
    plain = run(denoiser, batch=4)
    with NegToMe(denoiser, NegToMeOptions(guidance=True, **ALWAYS)):
        out = run(denoiser, batch=4)
        with pytest.raises(ValueError, match="expects an even batch"):
            run(denoiser, batch=3)
    torch.testing.assert_close(out[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(out[[1, 3]], plain[[1, 3]], atol=1e-4)


def test_dropout_from_a_private_generator(denoiser):
    state = torch.get_rng_state()
    plain, outs = run(denoiser), []
    for dropout, seed in ((0.0, 0), (0.5, 0), (0.5, 0), (0.5, 1), (1.0, 0)):
        with NegToMe(denoiser, NegToMeOptions(dropout=dropout, seed=seed, **ALWAYS)):
            outs.append(run(denoiser))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outs[1], outs[2])
    assert not torch.equal(outs[1], outs[0])
    assert not torch.equal(outs[1], outs[3])
    assert torch.equal(outs[4], plain)


def test_masks_follow_the_grid(denoiser):
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, :8] = True
    small = mask_on_grid(mask, 32)
    assert small.view(4, 8)[:, :4].all()
    assert not small.view(4, 8)[:, 4:].any()
    with pytest.raises(ValueError, match="the aspect of a grid of 33 tokens"):
        mask_on_grid(mask, 33)
    plain = run(denoiser)
    with NegToMe(denoiser, NegToMeOptions(**ALWAYS), mask=torch.zeros(8, 8, dtype=torch.bool)):
        assert torch.equal(run(denoiser), plain)
    with pytest.raises(ValueError, match="mask: expected a bool tensor"):
        NegToMe(denoiser, mask=torch.ones(8, 8))


def test_models_and_options_that_are_refused(denoiser):
    with pytest.raises(ValueError, match="has no self-attention"):
        NegToMe(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no place to push matches 'block'"):
        NegToMe(denoiser, layers=["block"])
    for options, match in (
        ({"alpha": -1.0}, "alpha: expected"),
        ({"threshold": 2.0}, "threshold: expected"),
        ({"variant": "x"}, "variant: expected"),
        ({"dropout": 1.5}, "dropout: expected a probability"),
        ({"against": "last"}, "against: expected one of first, all, mean"),
        ({"against": "mean", "variant": "official"}, "against: expected 'first'"),
    ):
        with pytest.raises(ValueError, match=match):
            NegToMeOptions(**options)

    class NoTime(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = denoiser.blocks[0]

        def forward(self, x):
            return self.block(x)

    model = NoTime()
    with NegToMe(model), pytest.raises(ValueError, match="called with a timestep"):
        model(torch.zeros(2, 4, 16))
