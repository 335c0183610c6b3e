"""Pareto domain adaptation: the official code's numbers, its bookkeeping, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from transfuse.methods.domain_adaptation.pareto_da import (
    ClasswiseDiscriminator,
    ConditionalAlignment,
    DomainAdversarialAlignment,
    MarginDisparityAlignment,
    ParetoDALoss,
    ParetoWeights,
    TargetMimicLoss,
    _gradient_gram,
    classwise_domain_loss,
    frozen_statistics,
    refine_predictions,
)
from transfuse.testing import golden

GOLDEN = golden.load("pareto_da")


# -- the official code --------------------------------------------------------------------------


def test_weights_of_the_official_programme():
    x = GOLDEN.inputs("lp")
    guided = ParetoWeights()
    found = []
    for g, guide, active in zip(x["G"], x["g_val"], x["guidance_active"], strict=True):
        # Parameters in two pieces, and a guidance loss that switches as recorded.
        split = lambda row: list(row.split([10, 13]))  # noqa: E731
        loss = torch.tensor(1.0 if active else 0.0)
        step = guided.step([split(row) for row in g], split(guide), loss)
        assert bool(step.guided) == bool(active)
        found.append(step.weights)
        if active:
            objective = step.weights @ (g @ guide)
        else:
            objective = (g @ g.T @ step.weights).sum()
        expected = GOLDEN.outputs("lp")["objective"][len(found) - 1]
        torch.testing.assert_close(objective, expected, **GOLDEN.tolerance())
    GOLDEN.check(torch.stack(found), "alpha", "lp")
    assert guided.infeasible == 0


def test_surrogate_of_the_official_code():
    logits = GOLDEN.inputs("tcm")["logits"].requires_grad_()
    loss = TargetMimicLoss()(logits)
    GOLDEN.check(-loss, "value", "tcm")
    (grad,) = torch.autograd.grad(-loss, logits)
    GOLDEN.check(grad, "dlogits", "tcm")


def test_refinement_of_the_official_code():
    logits = GOLDEN.inputs("tcm")["logits"]
    domain_logits = GOLDEN.inputs("rho")["cls_domain_logits"]
    GOLDEN.check(refine_predictions(logits, domain_logits, form="official"), "released", "rho")
    GOLDEN.check(refine_predictions(logits, domain_logits), "bayes", "rho")
    loss = TargetMimicLoss(form="official")(logits, domain_logits)
    GOLDEN.check(-loss, "tcm_of_released", "rho")


def test_classwise_loss_of_the_official_code():
    x, rho = GOLDEN.inputs("cd"), GOLDEN.outputs("rho")
    target = GOLDEN.inputs("rho")["cls_domain_logits"]
    released = classwise_domain_loss(
        x["source_logits"], x["labels"], target, rho["released"], form="official"
    )
    GOLDEN.check(released, "released", "cd")
    paper = classwise_domain_loss(x["source_logits"], x["labels"], target, rho["bayes"])
    GOLDEN.check(paper, "paper", "cd")


# -- the surrogate ------------------------------------------------------------------------------


def test_surrogate_is_minus_mutual_information():
    confident = 40.0 * torch.eye(4).repeat(3, 1)
    assert abs(TargetMimicLoss()(confident).item() + math.log(4)) < 1e-4
    assert abs(TargetMimicLoss()(torch.zeros(5, 4)).item()) < 1e-5
    assert abs(TargetMimicLoss()(40.0 * torch.eye(4)[[2, 2, 2]]).item()) < 1e-5
    logits = torch.randn(9, 4, dtype=torch.float64)
    p = logits.softmax(1)
    entropy = -(p.mean(0) * p.mean(0).log()).sum() + (p * p.log()).sum(1).mean()
    torch.testing.assert_close(TargetMimicLoss(eps=0.0)(logits), -entropy)


def test_surrogate_survives_probabilities_of_zero():
    logits = torch.tensor([[1000.0, -1000.0, 0.0], [-1000.0, 0.0, 1000.0]], requires_grad=True)
    loss = TargetMimicLoss()(logits, torch.randn(2, 3, 2))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    with pytest.warns(UserWarning, match="batch of one sample is 0"):
        assert TargetMimicLoss()(logits[:1]).abs() < 1e-5


def test_refinement_holds_the_discriminators_fixed():
    logits = torch.randn(5, 3, requires_grad=True)
    domain_logits = torch.randn(5, 3, 2, requires_grad=True)
    rho = refine_predictions(logits, domain_logits)
    torch.testing.assert_close(rho.sum(1), torch.ones(5))
    rho[:, 0].sum().backward()
    assert domain_logits.grad is None
    assert logits.grad.abs().sum() > 0
    flat = refine_predictions(logits, torch.zeros(5, 3, 2))
    torch.testing.assert_close(flat, logits.softmax(1))


def test_classwise_discriminators_are_separate_networks():
    torch.manual_seed(0)
    d = ClasswiseDiscriminator(6, 3, hidden=5, batch_norm=False)
    x = torch.randn(4, 6, requires_grad=True)
    out = d(x)
    assert not any(p.grad is not None for p in d.parameters())
    for k in range(3):
        h = x
        for i in range(3):
            h = h @ d.weights[i][k] + d.biases[i][k, 0]
            h = h.relu() if i < 2 else h
        torch.testing.assert_close(out[:, k], h)
    out.sum().backward()
    assert x.grad is None
    first, second = (
        ClasswiseDiscriminator(6, 3, hidden=5, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(first(x), second(x))


# -- alignment ----------------------------------------------------------------------------------


def _logits(n=7, k=3):
    return torch.randn(n, k)


def test_reversed_gradients_grow_with_the_steps():
    align = DomainAdversarialAlignment(nn.Linear(4, 1), ramp=10)
    source, target = (torch.randn(7, 4, requires_grad=True) for _ in range(2))
    for step in range(3):
        loss = align(source, _logits(), target, _logits())
        expected = 0.5 * (
            nn.functional.softplus(-align.discriminator(source)).mean()
            + nn.functional.softplus(align.discriminator(target)).mean()
        )
        torch.testing.assert_close(loss, expected)
        (plain,) = torch.autograd.grad(expected, source)
        (reversed_,) = torch.autograd.grad(loss, source)
        coefficient = 2.0 / (1.0 + math.exp(-step / 10)) - 1.0
        torch.testing.assert_close(reversed_, -coefficient * plain)
    align.eval()
    align(source, _logits(), target, _logits())
    assert align.step == 3


def test_conditional_alignment_sees_products():
    align = ConditionalAlignment(nn.Linear(12, 1))
    seen = []
    align.discriminator.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    source, logits = torch.randn(7, 4, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    align.step += 500
    align(source, logits, torch.randn(7, 4), _logits()).backward()
    torch.testing.assert_close(
        seen[0], torch.einsum("nk,nd->nkd", logits.softmax(1), source).flatten(1)
    )
    assert logits.grad is None
    assert source.grad.abs().sum() > 0


def test_margin_disparity_is_that_of_the_paper():
    align = MarginDisparityAlignment(nn.Linear(4, 3), margin=2.0)
    source, target, ys, yt = torch.randn(7, 4), torch.randn(6, 4), _logits(), _logits(6)
    p, q = align.discriminator(source).softmax(1), align.discriminator(target).softmax(1)
    agree = -p.gather(1, ys.argmax(1, keepdim=True)).log().mean()
    differ = -(1 - q.gather(1, yt.argmax(1, keepdim=True))).log().mean()
    torch.testing.assert_close(align(source, ys, target, yt), 2.0 * agree + differ)
    with torch.no_grad():
        align.discriminator.weight.mul_(1e4)
    assert align(source, ys, target, yt).isfinite()


# -- weights ------------------------------------------------------------------------------------


def test_gram_of_lists_with_missing_gradients():
    lists = [[torch.randn(3, 2), None, torch.randn(4)], [None, None, torch.randn(4)]]
    dense = torch.stack(
        [torch.cat([torch.zeros(6) if a is None else a.flatten(), b]) for a, _, b in lists]
    )
    torch.testing.assert_close(_gradient_gram(lists), (dense @ dense.T).double())


def test_guidance_ends_at_the_floor():
    g = [[torch.tensor([1.0, 0.0])], [torch.tensor([-0.3, 1.0])]]
    guide = [torch.tensor([0.2, 1.0])]
    chosen = ParetoWeights(num_tasks=2, floor=-math.log(3), eps=0.01)
    for loss, guided in ((0.0, True), (-1.0, True), (-math.log(3) + 0.009, False)):
        assert bool(chosen.step(g, guide, torch.tensor(loss)).guided) is guided
    official = ParetoWeights(num_tasks=2, floor=-math.log(3), form="official")
    assert not bool(official.step(g, guide, 0.0).guided)


def test_infeasible_programmes_are_counted():
    g = [[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 0.01])]]
    guide = [torch.tensor([-1.0, -300.0])]
    chosen = ParetoWeights(num_tasks=2)
    assert torch.equal(chosen(g, guide, 0.0), torch.tensor([0.5, 0.5]))
    assert chosen.infeasible == 1
    official = ParetoWeights(num_tasks=2, form="official")
    assert torch.equal(official(g, guide, 0.0), torch.tensor([1.0, 1.0]))
    other = ParetoWeights(num_tasks=2)
    other.load_state_dict(chosen.state_dict())
    assert other.infeasible == 1


def test_a_task_without_gradient_is_harmless():
    g = [[torch.tensor([1.0, 0.0])], [None], [torch.tensor([0.5, 1.0])]]
    for loss in (0.0, 1.0):
        step = ParetoWeights().step(g, [torch.tensor([0.0, 1.0])], loss)
        assert step.status == 0
        assert ((step.gramian @ step.weights.double()) >= -1e-6).all()


# -- the whole step -----------------------------------------------------------------------------


def _setup(align=None, form="paper", norm=False):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.Identity(), nn.ReLU())
    align = DomainAdversarialAlignment(nn.Linear(5, 1)) if align is None else align
    discriminators = ClasswiseDiscriminator(5, 3, hidden=7, batch_norm=norm)
    loss = ParetoDALoss(nn.Linear(5, 3), align, discriminators, form=form)
    with torch.no_grad():
        align.step += 400
    batch = torch.randn(8, 6), torch.arange(8) % 3, torch.randn(9, 6), torch.randn(4, 6)
    return body, loss, batch


ALIGNMENTS = {
    "dann": lambda: DomainAdversarialAlignment(nn.Linear(5, 1)),
    "cdan": lambda: ConditionalAlignment(nn.Linear(15, 1)),
    "mdd": lambda: MarginDisparityAlignment(nn.Linear(5, 3)),
}


@pytest.mark.parametrize("form", ["paper", "official"])
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_step_gives_every_parameter_its_gradient(align, form):
    body, loss, (source, labels, target, held_out) = _setup(ALIGNMENTS[align](), form)
    shared, own = list(body.parameters()), list(loss.parameters())
    losses = loss(body(source), labels, body(target), body(held_out))
    kept = dict(retain_graph=True, allow_unused=True)
    tasks = [torch.autograd.grad(x, shared, **kept) for x in losses[:3]]
    plain = torch.autograd.grad(losses.source + losses.alignment + losses.classwise, own, **kept)
    step = loss.backward(losses, body.parameters())
    assert step.status == 0
    for i, p in enumerate(shared):
        expected = sum(3 * w * g[i] for w, g in zip(step.weights, tasks, strict=True))
        torch.testing.assert_close(p.grad, expected)
    for p, expected in zip(own, plain, strict=True):
        torch.testing.assert_close(p.grad, expected)
    assert bool(step.guided) is (form == "paper")
    # A second step adds, as backward() does.
    before = shared[0].grad.clone()
    loss.backward(loss(body(source), labels, body(target), body(held_out)), body.parameters())
    assert not torch.equal(shared[0].grad, before)


def test_held_out_batch_leaves_no_trace():
    body, loss, (source, labels, target, held_out) = _setup(norm=True)
    with frozen_statistics(body):
        features = body(held_out)
    assert body[1].num_batches_tracked == 0
    assert torch.equal(body[1].running_mean, torch.zeros(5))
    assert body[1].momentum == 0.1
    losses = loss(body(source), labels, body(target), features)
    assert body[1].num_batches_tracked == 2
    assert all(norm.num_batches_tracked == 2 for norm in loss.discriminators.norms)
    loss.backward(losses, body.parameters())
    # The held-out batch chooses the weights and is in no gradient.
    other, again, _ = _setup(norm=True)
    with frozen_statistics(other):
        features = other(held_out + 1.0)
    losses = again(other(source), labels, other(target), features)
    step = again.backward(losses, other.parameters())
    for p, q in zip(loss.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert step.weights.isfinite().all()


def test_own_alignment_module():
    class Distance(nn.Module):
        def forward(self, source, source_logits, target, target_logits):
            return (source.mean(0) - target.mean(0)).square().sum()

    body, loss, (source, labels, target, held_out) = _setup()
    loss = ParetoDALoss(loss.classifier, Distance(), loss.discriminators)
    losses = loss(body(source), labels, body(target), body(held_out))
    assert loss.backward(losses, body.parameters()).weights.sum() == pytest.approx(1.0)


# -- refusals -----------------------------------------------------------------------------------


def test_refusals_of_weights():
    g, guide = [[torch.ones(2)]] * 3, [torch.ones(2)]
    weights = ParetoWeights()
    for error, match, call in (
        (ValueError, "expected 3 lists, got 2", lambda: weights(g[:2], guide, 0.0)),
        (ValueError, r"gradients\[1\]: expected 1 entries", lambda: weights(
            [g[0], [*g[1], None], g[2]], guide, 0.0)),
        (ValueError, "guidance_gradient: expected 1 entries", lambda: weights(g, [], 0.0)),
        (ValueError, r"gradients\[2\]\[0\]: expected shape \(2,\)", lambda: weights(
            [g[0], g[1], [torch.ones(3)]], guide, 0.0)),
        (TypeError, r"gradients\[0\]\[0\]: expected a tensor or None", lambda: weights(
            [[1.0], g[1], g[2]], guide, 0.0)),
        (ValueError, "got none at all", lambda: weights([[None]] * 3, [None], 0.0)),
        (ValueError, "guidance_loss: expected a scalar", lambda: weights(g, guide, torch.ones(2))),
        (ValueError, "expected finite numbers", lambda: weights(g, guide, torch.nan)),
        (ValueError, "expected finite numbers", lambda: weights(
            g, [torch.tensor([torch.inf, 0.0])], 0.0)),
        (ValueError, "num_tasks: expected at most 6", lambda: ParetoWeights(num_tasks=7)),
        (ValueError, "eps: expected a number of at least 0", lambda: ParetoWeights(eps=-1.0)),
        (ValueError, "form: expected one of", lambda: ParetoWeights(form="code")),
        (ValueError, "floor: expected a finite", lambda: ParetoWeights(floor=-math.inf)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    assert weights.infeasible == 0


def test_refusals_of_the_surrogate():
    logits, domains = torch.zeros(4, 3), torch.zeros(4, 3, 2)
    labels = torch.zeros(4, dtype=torch.int64)
    for error, match, call in (
        (ValueError, "logits: expected at least 2 classes",
         lambda: TargetMimicLoss()(logits[:, :1])),
        (ValueError, "logits: expected at least one sample", lambda: TargetMimicLoss()(logits[:0])),
        (TypeError, "logits: expected float32", lambda: TargetMimicLoss()(logits.long())),
        (ValueError, r"domain_logits: expected shape \(4, 3, 2\)",
         lambda: refine_predictions(logits, domains[:, :2])),
        (ValueError, "form: expected one of",
         lambda: refine_predictions(logits, domains, form="x")),
        (ValueError, "eps: expected", lambda: TargetMimicLoss(eps=-1.0)),
        (ValueError, "num_classes: expected at least 2", lambda: ClasswiseDiscriminator(4, 1)),
        (ValueError, "features: expected 4 in dimension 1",
         lambda: ClasswiseDiscriminator(4, 2, hidden=3)(logits)),
        (ValueError, "labels: expected entries in",
         lambda: classwise_domain_loss(domains, labels + 3, domains, logits)),
        (ValueError, "source_logits: expected shape",
         lambda: classwise_domain_loss(domains[:0], labels[:0], domains, logits)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_refusals_of_the_step():
    body, loss, (source, labels, target, held_out) = _setup()
    f, t, h = body(source), body(target), body(held_out)
    losses = loss(f, labels, t, h)
    parameters = list(body.parameters())
    for error, match, call in (
        (ValueError, "held_out: expected at least one sample", lambda: loss(f, labels, t, h[:0])),
        (ValueError, "shared: expected parameters, got none", lambda: loss.backward(losses, [])),
        (ValueError, "shared: .* some do not",
         lambda: loss.backward(losses, [*parameters, torch.ones(2)])),
        (ValueError, "shared: expected each parameter once",
         lambda: loss.backward(losses, parameters * 2)),
        (ValueError, "none of classifier",
         lambda: loss.backward(losses, [*parameters, *loss.classifier.parameters()])),
        (ValueError, "losses: expected finite numbers",
         lambda: loss.backward(losses._replace(source=losses.source * torch.inf), parameters)),
        (TypeError, "alignment: expected a module",
         lambda: ParetoDALoss(loss.classifier, min, loss.discriminators)),
        (TypeError, "discriminator: expected a module", lambda: DomainAdversarialAlignment(None)),
        (ValueError, r"discriminator: expected logits of shape \(N, 1\)",
         lambda: DomainAdversarialAlignment(nn.Linear(5, 2))(f, _logits(8), t, _logits(9))),
        (ValueError, "margin: expected",
         lambda: MarginDisparityAlignment(nn.Linear(5, 3), margin=0)),
        (ValueError, "ramp: expected", lambda: ConditionalAlignment(nn.Linear(5, 1), ramp=0)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    assert all(p.grad is None for p in parameters)
