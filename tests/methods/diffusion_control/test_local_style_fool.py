"""LocalStyleFool: the official estimate, regions, boxes, budgets, and what is refused."""

from __future__ import annotations

import pytest
import torch

from transfuse.methods.diffusion_control import _clip_style, local_style_fool
from transfuse.methods.diffusion_control.local_style_fool import (
    LocalStyleAttack,
    LocalStyleOptions,
    composite,
    estimate_gradient,
    rank_styles,
    region_scores,
    sample_weights,
    select_regions,
    stylize_clip,
)
from transfuse.testing import golden

GOLDEN = golden.load("local_style_fool")


# -- the estimate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["target_rank", "untarget_rank", "plain"])
def test_estimate_matches_the_official_code(case, monkeypatch):
    """With the recorded noise in place of the counter's."""
    x, params = GOLDEN.inputs(case), GOLDEN.params(case)
    out = GOLDEN.outputs(case)
    recorded = x["half_noise"].flatten(0, 1)
    used = []

    def perturb(clip, count, *, sigma, seed, start, mask, backend):
        used.append((seed, start))
        step = sigma * recorded[start : start + count]
        return torch.cat([clip + step, clip - step])

    def gradient(weights, like, *, seed, mask, backend):
        assert {s for s, _ in used} == {seed}
        return torch.einsum("n,n...->...", weights.float(), recorded)

    monkeypatch.setattr(local_style_fool, "nes_perturb", perturb)
    monkeypatch.setattr(local_style_fool, "nes_gradient", gradient)
    goal = "label" if params["untargeted"] else "target"
    found = estimate_gradient(
        lambda batch: batch.flatten(1) @ x["W"].T + x["b"],
        x["vid"],
        n=params["n"],
        chunk=params["sub"],
        sigma=params["sigma"],
        rank=params["rank_transform"],
        top_k=params["top_k"],
        **{goal: int(x["target"])},
    )
    GOLDEN.check(found.gradient, "grad", case)
    assert found.valid == int(out["valid_count"]) == params["valid"]
    assert found.queries == params["n"]
    if "mean_loss" in out:
        # The base code divides the mean by the number of valid samples once more.
        assert abs(found.loss / found.valid - out["mean_loss"].item()) < 1e-5


def linear(shape=(2, 3, 6, 6), classes=4, seed=0):
    """A linear classifier of clips and a clip it puts in class 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(classes, torch.Size(shape).numel(), generator=generator)
    clip = torch.rand(shape, generator=generator) * 0.6 + 0.2
    bias = -(weights @ clip.flatten())
    bias[0] += 0.3
    return (lambda batch: batch.flatten(1) @ weights.T + bias), clip, weights


def test_top_values_are_enough():
    query, clip, _ = linear()
    options = {"n": 24, "chunk": 6, "sigma": 0.01, "generator": torch.Generator()}

    def top(batch):
        return tuple(query(batch).topk(4, dim=1))

    for goal in ({"label": 0}, {"target": 0}):
        options["generator"].manual_seed(1)
        one = estimate_gradient(query, clip, **goal, **options)
        options["generator"].manual_seed(1)
        other = estimate_gradient(top, clip, **goal, **options)
        torch.testing.assert_close(one.gradient, other.gradient)


def test_chunks_change_nothing_but_memory():
    query, clip, _ = linear()
    found = [
        estimate_gradient(query, clip, target=0, n=24, chunk=chunk, sigma=0.01).gradient
        for chunk in (2, 4, 24)
    ]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


def test_ranks():
    losses = torch.tensor([3.0, 1.0, 2.0, 9.0, 7.0], dtype=torch.float64)
    valid = torch.tensor([True, True, True, False, False])
    want = torch.tensor([2.0, 0.0, 1.0, 3.5, 3.5], dtype=torch.float64) / 4
    torch.testing.assert_close(sample_weights(losses, valid), want)
    # A true loss above 1000 still ranks before a sample that does not count.
    losses[0] = 5000.0
    torch.testing.assert_close(sample_weights(losses, valid), want)
    plain = sample_weights(losses, valid, rank=False)
    assert plain.tolist() == [5000.0, 1.0, 2.0, 0.0, 0.0]


def test_no_valid_sample_is_retried_and_then_zero():
    query, clip, _ = linear()
    found = estimate_gradient(query, clip, target=1, n=4, chunk=2, retries=2)
    assert found.valid == 0
    assert found.queries == 12
    assert not found.gradient.any()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n": 7}, "n: expected a positive even"),
        ({"chunk": 3}, "chunk: expected a positive even"),
        ({"chunk": 10}, "chunk: expected a divisor"),
        ({"sigma": 5e-7}, "sigma: expected at least 8 steps"),
        ({"label": None}, "expected one of the two"),
        ({"target": 1}, "expected one of the two"),
        ({"label": -1}, "class number"),
        ({"label": 99}, "label: expected a class of logits"),
        ({"top_k": 0}, "top_k"),
        ({"mask": torch.zeros(2, 1, 6, 6, dtype=torch.bool)}, "mask: expected at least one True"),
    ],
)
def test_refused_estimates(changes, match):
    query, clip, _ = linear()
    arguments = {"label": 0, "n": 24, "chunk": 6, "sigma": 0.01, **changes}
    with pytest.raises(ValueError, match=match):
        estimate_gradient(query, clip, **arguments)


def test_nan_logits_are_refused():
    _, clip, _ = linear()
    with pytest.raises(ValueError, match="NaN logits"):
        estimate_gradient(lambda b: torch.full((len(b), 3), torch.nan), clip, label=0)


# -- regions --------------------------------------------------------------------------------------


def regions():
    """Four regions of an 8 x 8 frame: a half, a quarter, a pixel, nothing."""
    masks = torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    masks[0, :, :4], masks[1, :, 4:, :4], masks[2, :, 7, 7] = True, True, True
    return masks


def test_regions_weigh_gradient_and_area():
    grad = torch.ones(1, 3, 8, 8)
    grad[:, :, 4:, :4] = -4.0
    scores, share = region_scores(grad, regions())
    assert share.tolist() == [0.5, 0.25, 1 / 64, 0.0]
    want = [0.25**0.5, 0.5**0.5, (0.25 / 32) ** 0.5, 0.0]
    torch.testing.assert_close(scores, torch.tensor(want, dtype=torch.float64))
    assert select_regions(grad, regions()) == [1, 0, 2]
    assert select_regions(grad, regions(), lam=0.0) == [0, 1, 2]
    assert select_regions(grad, regions(), lam=1.0, max_regions=1) == [1]
    assert select_regions(grad, regions(), min_area=0.1) == [1, 0]
    # Without a gradient, and without anything to choose by, the lower number wins.
    assert select_regions(torch.zeros(1, 3, 8, 8), regions()[:1].repeat(2, 1, 1, 1)) == [0, 1]
    with pytest.raises(ValueError, match="expected a region of at least"):
        select_regions(grad, regions()[2:], min_area=0.5)
    with pytest.raises(ValueError, match="masks: expected"):
        select_regions(grad, regions()[:, :, :4])


def test_a_composite_is_exact_and_a_union():
    clip, stylised = torch.rand(2, 1, 3, 8, 8).unbind(0)
    masks = regions()[[0, 1]]
    masks[1, :, :2] = True  # overlaps region 0
    got = composite(clip, stylised, masks)
    inside = masks.any(0)[:, None].expand_as(clip)
    assert torch.equal(got[inside], stylised[inside])
    assert torch.equal(got[~inside], clip[~inside])


# -- the attack -----------------------------------------------------------------------------------


def attack_on(query, **options):
    return LocalStyleAttack(query, options=LocalStyleOptions(n=24, chunk=12, sigma=0.01, **options))


def half(clip):
    masks = torch.zeros(1, clip.shape[0], *clip.shape[2:], dtype=torch.bool)
    masks[..., : clip.shape[-1] // 2] = True
    return masks


def test_an_untargeted_attack_keeps_to_its_mask_box_and_budget():
    query, clip, _ = linear()
    counted = []

    def counting(batch):
        counted.append(len(batch))
        return query(batch)

    stylised = (clip + 0.001).clamp(0, 1)
    masks = half(clip)
    attack = attack_on(counting, budget=4000)
    result = attack.attack(clip, masks, label=0, stylised=stylised)
    assert result.success
    assert query(result.clip[None]).argmax() != 0
    assert result.queries == sum(counted) <= 4000
    outside = ~result.mask[:, None].expand_as(clip)
    assert torch.equal(result.clip[outside], clip[outside])
    centre = composite(clip, stylised, masks)
    assert (result.clip - centre).abs().max() <= 0.05 + 0.5 / 255 + 1e-6
    assert result.clip.min() >= 0
    assert result.clip.max() <= 1
    inside = ~outside
    levels = result.clip[inside] * 255
    moved = result.clip[inside] != clip[inside]
    torch.testing.assert_close(levels[moved], levels[moved].round(), rtol=0, atol=1e-4)
    again = attack_on(query, budget=4000).attack(clip, masks, label=0, stylised=stylised)
    assert torch.equal(again.clip, result.clip), "reproducible without a generator"


def test_a_budget_ends_an_attack():
    query, clip, _ = linear()
    result = attack_on(query, budget=60, eps=0.001).attack(clip, half(clip), label=0, stylised=clip)
    assert not result.success
    assert result.queries <= 60
    result = attack_on(query, give_up=3, eps=1e-5).attack(clip, half(clip), label=0, stylised=clip)
    assert not result.success
    assert result.queries < 1000


def test_a_targeted_attack_shrinks_its_box():
    query, clip, weights = linear(classes=3)
    direction = (weights[1] - weights[0]).view(clip.shape).sign()
    stylised = (clip + 0.3 * direction).clamp(0, 1)
    assert query(stylised[None]).argmax() == 1
    masks = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    result = attack_on(query, box="clean", budget=20000, quantise=False).attack(
        clip, masks, label=0, target=1, stylised=stylised
    )
    assert result.success
    assert (result.clip - clip).abs().max() <= 0.05 + 1e-6
    assert query(result.clip[None]).argmax() == 1
    lost = attack_on(query).attack(clip, masks, label=0, target=2, stylised=clip)
    assert not lost.success


def test_regions_are_taken_until_the_prediction_changes():
    query, clip, weights = linear()
    masks = torch.zeros(3, 2, 6, 6, dtype=torch.bool)
    masks[0, :, :2], masks[1, :, 2:4], masks[2, :, 4:] = True, True, True
    direction = (weights[1] - weights[0]).view(clip.shape).sign()
    stylised = (clip + 0.3 * direction).clamp(0, 1)
    attack = LocalStyleAttack(query, surrogate=query, style_fn=lambda clip: stylised)
    result = attack.attack(clip, masks, label=0)
    assert result.success
    assert len(result.regions) == 1
    assert result.queries == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"masks": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "masks: expected"),
        ({"masks": torch.zeros(1, 2, 6, 6, dtype=torch.bool)}, "expected a region of at least"),
        ({"stylised": None}, "stylised: expected a clip"),
        ({"stylised": torch.zeros(1, 3, 6, 6)}, "stylised: expected shape"),
        ({"target": 0}, "target: expected another class"),
        ({"clip": torch.full((2, 3, 6, 6), 1.5)}, r"clip: expected values in \[0, 1\]"),
    ],
)
def test_refused_attacks(changes, match):
    query, clip, _ = linear()
    arguments = {
        "clip": clip,
        "masks": half(clip),
        "label": 0,
        "stylised": clip,
        **changes,
    }
    with pytest.raises(ValueError, match=match):
        attack_on(query).attack(arguments.pop("clip"), arguments.pop("masks"), **arguments)


@pytest.mark.parametrize(
    "changes",
    [{"eps": 0.0}, {"budget": 0}, {"box": "none"}, {"min_step": 1.0}, {"top_k": 0}, {"shrink": -1}],
)
def test_refused_options(changes):
    with pytest.raises(ValueError, match="expected"):
        LocalStyleOptions(**changes)


# -- style ----------------------------------------------------------------------------------------


def flat(*rgb):
    return torch.tensor(rgb).view(3, 1, 1).expand(3, 4, 4).clone()


def test_styles_rank_by_colour():
    clip = flat(0.9, 0.1, 0.1).expand(2, 3, 4, 4)
    pool = [flat(0.1, 0.1, 0.9), flat(0.8, 0.2, 0.1), flat(0.1, 0.9, 0.1)]
    assert rank_styles(clip, pool)[0] == 1
    assert rank_styles(clip, pool, confidences=[0.9, 1e-3, 1e-3])[0] == 0
    with pytest.raises(ValueError, match="confidences"):
        rank_styles(clip, pool, confidences=[1.0])
    # The fullest box counts, not the mean.
    image = flat(0.9, 0.1, 0.1)
    image[:, 0] = torch.tensor([0.1, 0.1, 0.9])[:, None]
    torch.testing.assert_close(
        _clip_style.dominant_color(image), torch.tensor([0.9, 0.1, 0.1]).double()
    )


def test_cone_of_colours():
    black, white = _clip_style.cone_point(torch.zeros(3)), _clip_style.cone_point(torch.ones(3))
    assert black.tolist() == [0.0, 0.0, _clip_style.CONE_HEIGHT]
    assert white.tolist() == [0.0, 0.0, 0.0]
    red, green, blue = (_clip_style.cone_point(c) for c in torch.eye(3))
    assert red.tolist() == [50.0, 0.0, 0.0]
    for a, b in ((red, green), (green, blue), (blue, red)):
        torch.testing.assert_close((a - b).norm().item(), 50.0 * 3**0.5)


def test_a_clip_takes_the_style_and_keeps_still():
    torch.manual_seed(0)
    first = torch.nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    second = torch.nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)

    def features(x):
        a = first(x).tanh()
        return {"a": a, "b": second(a).tanh()}

    clip = torch.rand(1, 3, 10, 10).repeat(3, 1, 1, 1)
    style = torch.rand(3, 12, 9) * torch.tensor([1.0, 0.2, 0.2]).view(3, 1, 1)
    layers = {"content_layers": ("b",), "style_layers": ("a", "b"), "iterations": (60, 30)}

    def distance(x):
        return sum(
            (_clip_style.gram(features(x[:1])[n]) - _clip_style.gram(features(style[None])[n]))
            .square()
            .sum()
            .item()
            for n in ("a", "b")
        )

    weights = {"content": 0.01, "style": 100.0, "temporal": 0.0, "variation": 0.0}
    got = stylize_clip(clip, style, features, weights=weights, **layers)
    assert got.shape == clip.shape
    assert distance(got) < 0.2 * distance(clip)
    torch.testing.assert_close(
        got, stylize_clip(clip, style, features, weights=weights, **layers), rtol=0, atol=0
    )
    weights["temporal"] = 1e4
    still = stylize_clip(clip, style, features, weights=weights, **layers)
    assert (still[1] - still[0]).abs().mean() <= (got[1] - got[0]).abs().mean() + 1e-6
    with pytest.raises(ValueError, match="weights: expected"):
        stylize_clip(clip, style, features, weights={"content": 1.0}, **layers)


# -- the claim ------------------------------------------------------------------------------------


@pytest.mark.claim
def test_a_quarter_of_the_clip_gives_a_better_gradient():
    """Random 3-D network on an 8 x 24 x 24 clip: cosine with the true gradient, 20 seeds."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(3, 8, 3, stride=2, padding=1),
        torch.nn.Tanh(),
        torch.nn.Conv3d(8, 16, 3, stride=2, padding=1),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 2 * 6 * 6, 5),
    ).requires_grad_(False)

    def query(batch):
        return network(batch.transpose(1, 2))

    clip = torch.rand(8, 3, 24, 24)
    label = int(query(clip[None]).argmax())
    x = clip.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(query(x[None]), torch.tensor([label]))
    (true,) = torch.autograd.grad(loss, x)
    mask = torch.zeros(8, 1, 24, 24, dtype=torch.bool)
    mask[:, :, 6:18, 6:18] = True

    def cosine(mask, noisy=None):
        generator = torch.Generator().manual_seed(3)
        found = []
        for _ in range(20):
            estimate = estimate_gradient(
                query, clip, target=label, mask=noisy, n=48, chunk=12, generator=generator
            ).gradient
            inside = torch.ones_like(clip, dtype=torch.bool) if mask is None else mask
            inside = inside.expand_as(clip)
            found.append(torch.cosine_similarity(estimate[inside], true[inside], dim=0))
        return torch.stack(found).mean().item()

    whole, local = cosine(None), cosine(mask, mask)
    assert local >= 1.6 * whole
    assert cosine(mask, None) < 1.6 * whole, "unmasked noise must fail the claim"


def test_the_picture_is_drawn(tmp_path):
    gallery = pytest.importorskip("transfuse.bench.gallery.local_style_fool", exc_type=ImportError)
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    if gallery.main(["--out", str(path), "--size", "16", "24", "--iterations", "3"]) == 2:
        pytest.skip("no photographs")
    assert path.read_bytes().startswith(b"\x89PNG")
