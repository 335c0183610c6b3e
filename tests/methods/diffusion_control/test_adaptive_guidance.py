"""Adaptive guidance: the community's state machine, per-sample switching, and what is refused."""

from __future__ import annotations

import pytest
import torch

from transfuse.methods.diffusion_control._linear_guidance import History
from transfuse.methods.diffusion_control.adaptive_guidance import AdaptiveGuidance, LinearGuidance
from transfuse.testing import golden

GOLDEN = golden.load("adaptive_guidance")


def constant(tensor):
    """A network that answers with its part of a given prediction."""
    return lambda x, at: tensor if at is None else tensor.index_select(0, at)


@pytest.mark.parametrize("case", ["ag", "never", "late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_machine_of_the_community_code(case, dtype):
    x, out, params = GOLDEN.inputs(case, dtype), GOLDEN.outputs(case), GOLDEN.params(case)
    steps, late = params["steps"], params["cfg_start_sigma"]
    unguided = 0 if late is None else int((x["sigma"] > late).sum())
    guidance = AdaptiveGuidance(
        scale=params["guidance"],
        threshold=params["threshold"],
        space="prediction",
        reduce="batch",
        start=unguided / steps,
        num_steps=steps,
    )
    results, evaluations, before = [], [], 0
    for i in range(steps):
        sample = torch.zeros_like(x["cond"][i])
        results.append(guidance.step(i, constant(x["cond"][i]), constant(x["uncond"][i]), sample))
        evaluations.append(int(guidance.nfe[0]) - before)
        before = int(guidance.nfe[0])
        if evaluations[-1] == 2:
            assert abs(guidance.cosine[0].item() - out["cosine"][i].item()) < 1e-6
    GOLDEN.check(torch.stack(results), "guided", case)
    assert evaluations == out["evaluations"].tolist()
    assert sum(evaluations) == params["total_evaluations"] <= params["cfg_total"]
    assert len(set(guidance.nfe.tolist())) == 1


def test_each_sample_switches_for_itself_and_for_good():
    seen = []

    def network(cosines):
        """Predictions whose cosines are given; notes what is evaluated."""

        def uncond(x, at):
            angles = torch.tensor(cosines, dtype=x.dtype).acos()
            rows = torch.stack([angles.cos(), angles.sin()], dim=1)
            seen.append(None if at is None else at.tolist())
            return rows if at is None else rows[at]

        return uncond

    def cond(x, at):
        return torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)

    guidance = AdaptiveGuidance(scale=3.0, threshold=0.9, space="prediction")
    x = torch.zeros(3, 2, dtype=torch.float64)
    table = [(0.5, 0.95, 0.5), (0.2, 0.1, 0.91), (0.2, 0.1, 0.1), (0.92, 0.0, 0.0), (0.0, 0.0, 0.0)]
    steps = [guidance.step(i, cond, network(c), x) for i, c in enumerate(table)]
    assert seen == [None, [0, 2], [0], [0]]
    assert guidance.switched_at.tolist() == [3, 0, 1]
    assert guidance.nfe.tolist() == [5 + 4, 5 + 1, 5 + 2]
    plain = cond(None, None)
    assert torch.equal(steps[1][1], plain[1])
    assert not torch.equal(steps[1][2], plain[2]), "the step that reaches it stays guided"
    assert torch.equal(steps[2][1:], plain[1:])
    assert torch.equal(steps[4], plain)
    guidance.reset()
    with pytest.raises(RuntimeError, match="no step was taken"):
        _ = guidance.nfe


def test_scale_one_never_evaluates_the_unconditional_network():
    def never(x, at):
        raise AssertionError

    guidance = AdaptiveGuidance(scale=1.0)
    x = torch.randn(2, 3)
    assert torch.equal(guidance.step(0, lambda x, at: x, never, x), x)
    assert guidance.nfe.tolist() == [1, 1]


def test_clean_latents_are_compared_by_default():
    """Predictions that agree (high noise) may stand for clean latents that do not."""
    x = torch.randn(1, 4096, dtype=torch.float64)
    gap = 0.02 * torch.randn_like(x)
    networks = (constant(x), constant(x + gap))
    for space, switched in (("prediction", 0), ("original", -1)):
        guidance = AdaptiveGuidance(scale=3.0, threshold=0.99, space=space)
        guidance.step(0, *networks, x, alpha=1e-4)
        assert guidance.switched_at.tolist() == [switched]


def test_options_that_wait():
    same = constant(torch.ones(2, 3))
    guidance = AdaptiveGuidance(scale=2.0, space="prediction", min_guided_steps=2)
    for i in range(4):
        guidance.step(i, same, same, torch.zeros(2, 3))
    assert guidance.switched_at.tolist() == [2, 2]
    # Two evaluations of one step, as in Heun's method: one decision.
    guidance = AdaptiveGuidance(scale=2.0, space="prediction", min_guided_steps=1)
    for i in (0, 0, 1, 1):
        guidance.step(i, same, same, torch.zeros(2, 3))
    assert guidance.switched_at.tolist() == [1, 1]


@pytest.mark.parametrize("reduce", ["sample", "batch"])
def test_rescaling_while_guided(reduce):
    from transfuse.ops import Predict, cfg_step

    c, u = torch.randn(2, 2, 5, 7).unbind(0)
    guidance = AdaptiveGuidance(scale=4.0, rescale=0.7, space="prediction", reduce=reduce)
    got = guidance.step(0, constant(c), constant(u), torch.zeros_like(c))
    torch.testing.assert_close(got, cfg_step(None, c, u, Predict(), scale=4.0, rescale=0.7))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"threshold": 0.0}, ValueError, r"threshold: expected a number in \(0, 1\]"),
        ({"threshold": 1.1}, ValueError, "threshold"),
        ({"space": "x0"}, ValueError, "space: expected one of original, prediction"),
        ({"reduce": "mean"}, ValueError, "reduce"),
        ({"prediction": "noise"}, ValueError, "prediction"),
        ({"start": 0.5}, ValueError, "num_steps: expected the number of steps"),
        ({"start": 1.5, "num_steps": 4}, ValueError, "start"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"min_guided_steps": -1}, ValueError, "min_guided_steps"),
        ({"rescale": 2.0}, ValueError, "rescale"),
        ({"scale": "7"}, TypeError, "scale"),
    ],
)
def test_refused_options(options, error, match):
    with pytest.raises(error, match=match):
        AdaptiveGuidance(**options)


def test_refused_calls():
    c = torch.randn(2, 3)
    guidance = AdaptiveGuidance(space="prediction")
    guidance.step(3, constant(c), constant(-c), c)
    with pytest.raises(ValueError, match="i: expected an integer of at least 3"):
        guidance.step(2, constant(c), constant(-c), c)
    with pytest.raises(ValueError, match="x: expected batch 2"):
        guidance.step(4, constant(c[:1]), constant(c[:1]), c[:1])
    with pytest.raises(ValueError, match="uncond: expected shape"):
        guidance.step(4, constant(c), constant(c[:, :2]), c)
    with pytest.raises(ValueError, match=r"update\.alpha: expected a number"):
        AdaptiveGuidance().step(0, constant(c), constant(-c), c)


# -- LinearAG -------------------------------------------------------------------------------------


def trajectories(count=3, steps=4, size=50, seed=0):
    """Histories, and u that are exact combinations of them. (What the histories hold as u is
    something else: regressors that depend on each other have no one solution.)"""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        history = History(steps, torch.empty(1, size, dtype=torch.float64))
        evaluated = {}
        for i in range(steps):
            history.add_cond(torch.randn(1, size, generator=generator, dtype=torch.float64))
            rows = history.regressors(i)
            weights = torch.linspace(-1.0, 1.0, rows.shape[0], dtype=torch.float64)
            evaluated[i] = torch.einsum("r,rbn->bn", weights, rows)
            history.add_uncond(torch.randn(1, size, generator=generator, dtype=torch.float64))
        yield history, evaluated


@pytest.mark.parametrize("ridge", [0.0, 1e-12])
def test_least_squares_finds_the_combination(ridge):
    linear = LinearGuidance(steps=(9, 6, 3, 0), scale=2.0, skipped=(1, 3), ridge=ridge)
    linear.fit(lambda fitted: trajectories())
    assert linear.fitted
    for i in (1, 3):
        want = torch.linspace(-1.0, 1.0, 2 * i + 1, dtype=torch.float64)
        torch.testing.assert_close(linear.coefficients[i], want, rtol=1e-6, atol=1e-6)
    ((history, evaluated),) = trajectories(count=1, seed=7)
    torch.testing.assert_close(linear.predict(history, 3), evaluated[3], rtol=1e-6, atol=1e-6)
    other = LinearGuidance(steps=(9, 6, 3, 0), scale=2.0, skipped=(1, 3))
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.predict(history, 3), linear.predict(history, 3))


def test_refused_linear_guidance():
    linear = LinearGuidance(steps=(2, 1, 0), scale=2.0, skipped=(1,))
    history = History(3, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="i: expected a fitted step"):
        linear.predict(history, 1)
    with pytest.raises(ValueError, match="needs 2 c and 1 u"):
        history.regressors(1)
    with pytest.raises(ValueError, match="c and u in turn"):
        history.add_uncond(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="expected shape"):
        history.add_cond(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="at least one trajectory"):
        linear.fit(lambda fitted: ())
    for steps, scale in (((2, 1, 1.5), 2.0), ((2, 1, 0), 3.0)):
        with pytest.raises(ValueError, match="coefficients belong to"):
            linear.check_grid(steps, scale)
    for changes, match in (
        ({"steps": (1,)}, "at least two different"),
        ({"skipped": (3,)}, r"numbers in \[0, 3\)"),
        ({"skipped": (1, 1)}, "different numbers"),
        ({"ridge": -1.0}, "ridge"),
    ):
        with pytest.raises(ValueError, match=match):
            LinearGuidance(**{"steps": (2, 1, 0), "scale": 2.0, "skipped": (1,), **changes})
