"""The small claim of adaptive guidance: exact scores of 8 Gaussians in 16 dimensions, 20 steps."""

from __future__ import annotations

import pytest
import torch
from gaussian_mixture import Mixture, schedule

from transfuse.methods.diffusion_control._linear_guidance import History
from transfuse.methods.diffusion_control.adaptive_guidance import AdaptiveGuidance, LinearGuidance
from transfuse.ops import DDIM, cfg_step

STEPS, SCALE, COUNT = 20, 3.0, 256
ALPHAS = schedule(STEPS)
MODEL = Mixture()
SKIPPED = (1, 3, 5, 7, 9)


def start(seed=1, count=COUNT):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 8, (count,), generator=generator)


def move(x, prediction, i):
    update = DDIM(alpha=ALPHAS[i], alpha_next=ALPHAS[i + 1])
    return cfg_step(x, prediction, None, update, scale=1.0)


def sample(guidance):
    """Latents at the end of adaptive guidance."""
    x, label = start()
    for i, alpha in enumerate(ALPHAS[:-1]):
        prediction = guidance.step(
            i,
            lambda x, at, alpha=alpha: MODEL.cond(x, alpha, label),
            lambda x, at, alpha=alpha: MODEL.uncond(x, alpha),
            x,
            alpha=alpha,
        )
        x = move(x, prediction, i)
    return x


@pytest.fixture(scope="module")
def full():
    guidance = AdaptiveGuidance(scale=SCALE, threshold=1.0)
    result = sample(guidance)
    assert set(guidance.nfe.tolist()) == {2 * STEPS}
    return result


def error(result, full):
    return ((result - full).norm() / full.norm()).item()


@pytest.mark.claim
def test_a_sixth_of_the_evaluations_at_two_per_cent_of_error(full):
    guidance = AdaptiveGuidance(scale=SCALE, threshold=0.99)
    result = sample(guidance)
    evaluations = guidance.nfe.double().mean().item()
    assert evaluations <= 34.5
    assert error(result, full) <= 0.02
    assert error(sample(AdaptiveGuidance(scale=1.0)), full) > 0.1, "guidance must matter"
    wrong = AdaptiveGuidance(scale=-SCALE, threshold=0.99)
    assert error(sample(wrong), full) > 0.1, "the sign must matter"


@pytest.mark.claim
def test_one_cosine_for_the_batch_is_worse_for_some(full):
    """Samples that still need guidance lose it, or samples that do not keep it."""
    each, batch = (
        AdaptiveGuidance(scale=SCALE, threshold=0.99, reduce=reduce)
        for reduce in ("sample", "batch")
    )
    errors = [(sample(g) - full).norm(dim=1).max().item() for g in (each, batch)]
    costs = [g.nfe.double().mean().item() for g in (each, batch)]
    assert errors[1] > errors[0] or costs[1] > costs[0]
    assert batch.switched_at.unique().numel() == 1
    assert each.switched_at.unique().numel() > 2


@pytest.mark.claim
def test_noise_predictions_are_alike_at_the_start_too(full):
    guidance = AdaptiveGuidance(scale=SCALE, threshold=0.99, space="prediction")
    result = sample(guidance)
    assert guidance.nfe.double().mean() < 23
    assert error(result, full) > 0.1
    waiting = AdaptiveGuidance(
        scale=SCALE, threshold=0.99, space="prediction", min_guided_steps=STEPS // 2
    )
    assert error(sample(waiting), full) < 0.02


def roll_out(linear, x, label, *, replace=None):
    """Guided by estimates at fitted steps; conditional in the second half. The trajectory ends
    there, so histories and evaluated u cover the first half."""
    history, evaluated = History(STEPS, x), {}
    for i, alpha in enumerate(ALPHAS[:-1]):
        cond = MODEL.cond(x, alpha, label)
        if i >= STEPS // 2:
            x = move(x, cond, i)
            continue
        history.add_cond(cond)
        if replace is not None and i in SKIPPED:
            uncond = replace(i, cond, history)
        elif linear is not None and i in linear.coefficients:
            uncond = linear.predict(history, i)
        else:
            uncond = MODEL.uncond(x, alpha)
            evaluated[i] = uncond
        history.add_uncond(uncond)
        x = cfg_step(x, cond, uncond, DDIM(alpha=alpha, alpha_next=ALPHAS[i + 1]), scale=SCALE)
    return x, history, evaluated


@pytest.mark.claim
def test_linear_estimates_beat_what_costs_the_same(full):
    linear = LinearGuidance(steps=range(STEPS), scale=SCALE, skipped=SKIPPED, ridge=0.0)

    def run(fitted):
        yield roll_out(fitted, *start(seed=5))[1:]

    linear.fit(run)
    x, label = start()
    estimated = error(roll_out(linear, x, label)[0], full)
    by_cond = error(roll_out(None, x, label, replace=lambda i, cond, h: cond)[0], full)
    last = error(
        roll_out(None, x, label, replace=lambda i, cond, h: h.regressors(i)[2 * i - 1])[0], full
    )
    assert estimated <= 0.8 * by_cond
    assert estimated < last


def test_the_picture_is_drawn(tmp_path):
    gallery = pytest.importorskip("transfuse.bench.gallery.adaptive_guidance", exc_type=ImportError)
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert gallery.main(["--out", str(path), "--samples", "4"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        gallery.main(["--out", str(path), "--samples", "1"])
