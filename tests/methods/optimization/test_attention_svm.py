"""Attention as a support vector machine: golden arrays, optimality, dynamics, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.optimization._least_distance import least_distance
from transfuse.methods.optimization.attention_svm import (
    AttentionProbe,
    alignment,
    att_svm,
    head_weights,
    normalized_gd,
    selection_report,
    several_tokens,
    stable_gradient,
)
from transfuse.testing import golden

GOLDEN = golden.load("attention_svm")


def sequences(n, tokens, d, instances=(), seed=0):
    """Unit tokens, unit queries and selections."""
    generator = torch.Generator().manual_seed(seed)
    x, z = (
        F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
        for shape in ((*instances, n, tokens, d), (*instances, n, d))
    )
    return x, z, torch.randint(0, tokens, (*instances, n), generator=generator)


# -- the support vector machine -------------------------------------------------------------------


def test_golden_solutions():
    given, want = GOLDEN.inputs("svm"), GOLDEN.outputs("svm")
    found = att_svm(given["x"], given["z"], given["opt_index"])
    GOLDEN.check(found.weight, "w_fro", "svm")
    torch.testing.assert_close(found.norm, want["fro_norm"], rtol=1e-5, atol=0)
    own = att_svm(given["x"], int(given["attn_idx"]), given["opt_index"])
    GOLDEN.check(own.weight, "w_fro_self", "svm")
    nuclear = att_svm(given["x"], given["z"], given["opt_index"], norm="nuc")
    GOLDEN.check(nuclear.norm, "nuclear_norm", "svm")
    torch.testing.assert_close(nuclear.norm, want["nuclear_norm"], rtol=1e-5, atol=0)


def separable(x, z, alpha):
    """Whether a linear programme finds any W with margins of 1."""
    from scipy.optimize import linprog

    rows = [
        torch.outer(x[s, alpha[s]] - x[s, t], z[s]).flatten()
        for s in range(x.shape[0])
        for t in range(x.shape[1])
        if t != int(alpha[s])
    ]
    a = torch.stack(rows).numpy()
    zeros, ones = torch.zeros(a.shape[1]).numpy(), torch.ones(a.shape[0]).numpy()
    return linprog(zeros, A_ub=-a, b_ub=-ones, bounds=(None, None)).status == 0


@pytest.mark.parametrize(
    ("n", "tokens", "d"), [(4, 5, 10), (1, 2, 3), (6, 6, 12), (3, 4, 2), (2, 1, 3)]
)
def test_solutions_are_optimal(n, tokens, d):
    """W is a positive combination of the rows on the margin: necessary and sufficient."""
    x, z, alpha = sequences(n, tokens, d, (10,), seed=n)
    refused = 0
    for i in range(10):
        try:
            found = att_svm(x[i], z[i], alpha[i])
        except ValueError:
            assert not separable(x[i], z[i], alpha[i])
            refused += 1
            continue
        assert found.margins.min() >= 1 - 1e-8
        rows = [
            torch.outer(x[i, s, alpha[i, s]] - x[i, s, t], z[i, s]).flatten()
            for s, t in found.support.nonzero().tolist()
        ]
        w = found.weight.flatten()
        if tokens == 1:
            assert not rows
            assert (w == 0).all()
            continue
        from scipy.optimize import nnls

        mu, residual = nnls(torch.stack(rows).T.numpy(), w.numpy())
        assert residual < 1e-7 * w.norm()
        # Strong duality: |W|^2 is the sum of the multipliers.
        torch.testing.assert_close(w.square().sum().item(), mu.sum(), rtol=1e-6, atol=1e-9)
    assert (refused > 0) == (d == 2), "many dimensions separate everything"


def test_instances_do_not_meet():
    x, z, alpha = sequences(3, 4, 8, (20,))
    together = att_svm(x, z, alpha)
    for i in (0, 7, 19):
        alone = att_svm(x[i], z[i], alpha[i])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b)
    moved = att_svm(x.flip(0), z.flip(0), alpha.flip(0)).weight.flip(0)
    torch.testing.assert_close(moved, together.weight)


def test_smallest_nuclear_norms():
    x, z, alpha = sequences(3, 4, 6, (4,), seed=2)
    nuclear, fro = (att_svm(x, z, alpha, norm=norm) for norm in ("nuc", "fro"))
    assert (nuclear.margins >= 1 - 1e-7).all()
    for found, order in ((nuclear, "nuc"), (fro, "fro")):
        torch.testing.assert_close(
            found.norm, torch.linalg.matrix_norm(found.weight, ord=order), rtol=1e-9, atol=0
        )
    assert (nuclear.norm < torch.linalg.matrix_norm(fro.weight, ord="nuc")).all()
    assert (torch.linalg.matrix_norm(nuclear.weight) > fro.norm).all()
    # No direction at the solution leads to a smaller norm that keeps the margins.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        step = nuclear.weight + 0.05 * torch.randn(4, 6, 6, generator=generator).double()
        top = x.gather(-2, alpha[..., None, None].expand(-1, -1, 1, 6))
        margins = torch.einsum("istd,ide,ise->ist", top - x, step, z)
        margins.scatter_(-1, alpha[..., None], torch.inf)
        scaled = step / margins.amin((-2, -1))[:, None, None]
        worse = torch.linalg.matrix_norm(scaled, ord="nuc")
        assert ((worse > nuclear.norm) | (margins.amin((-2, -1)) <= 0)).all()


def test_what_nothing_separates():
    x, z, alpha = sequences(2, 3, 4)
    for change, match in (
        (lambda: z[1].zero_(), "query: expected one that is not 0, sequence 1"),
        (lambda: x[0, (alpha[0] + 1) % 3].copy_(x[0, alpha[0]]), "equals the selected one, seq"),
    ):
        kept = x.clone(), z.clone()
        change()
        with pytest.raises(ValueError, match=match):
            att_svm(x, z, alpha)
        x.copy_(kept[0]), z.copy_(kept[1])
    # The selected token lies between two others: no direction has it outermost.
    line = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]])
    with pytest.raises(ValueError, match="no W satisfies all constraints"):
        att_svm(line, torch.ones(1, 2), torch.tensor([1]))
    both = torch.stack([line, torch.randn(1, 3, 2)])
    with pytest.raises(ValueError, match="in 1 instances, the first 0"):
        att_svm(both, torch.ones(2, 1, 2), torch.tensor([[1], [0]]))
    # Two sequences that want opposite things of one query.
    pair = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="no W"):
        att_svm(torch.stack([pair, pair]), torch.ones(2, 2), torch.tensor([0, 1]))
    # Equal tokens that are not selected are one constraint.
    again = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    once = att_svm(again[:, :2], torch.ones(1, 2), torch.tensor([0]))
    twice = att_svm(again, torch.ones(1, 2), torch.tensor([0]))
    torch.testing.assert_close(twice.weight, once.weight)
    assert twice.support.tolist() == [[False, True, True]]


def test_scale_of_the_data_does_not_matter():
    x, z, alpha = sequences(3, 4, 6)
    w = att_svm(x, z, alpha).weight
    for factor in (1e-6, 1e5):
        other = att_svm(factor * x, z / 3, alpha).weight
        torch.testing.assert_close(other * factor / 3, w)


def test_least_distance_against_a_general_solver():
    """Few dimensions and many rows, most of them of negative right-hand side too."""
    from scipy.optimize import minimize

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 15, 4, generator=generator, dtype=torch.float64)
    inside = torch.randn(6, 4, 1, generator=generator, dtype=torch.float64)
    slack = 0.3 * torch.rand(6, 15, generator=generator, dtype=torch.float64)
    b = (a @ inside)[..., 0] - slack
    rows = torch.ones(6, 15, dtype=torch.bool)
    found = least_distance(a @ a.mT, b, rows)
    assert found.feasible.all()
    w = (a.mT @ found.multipliers[..., None])[..., 0]
    assert ((a @ w[..., None])[..., 0] - b).min() > -1e-9
    for i in range(6):
        rule = {"type": "ineq", "fun": lambda w, i=i: a[i].numpy() @ w - b[i].numpy()}
        want = minimize(lambda w: w @ w, inside[i, :, 0].numpy(), constraints=[rule], tol=1e-12)
        torch.testing.assert_close(w[i], torch.from_numpy(want.x), rtol=1e-5, atol=1e-6)
        near = least_distance(a @ a.mT, b, rows, start=1.1 * found.multipliers)
        torch.testing.assert_close(near.multipliers, found.multipliers)


# -- training -------------------------------------------------------------------------------------


def golden_probe(case="gd"):
    given = GOLDEN.inputs("svm")
    probe = AttentionProbe(6, 6 if case == "kq" else None, v=given["v"])
    start = GOLDEN.inputs("gd")
    if case == "kq":
        probe.load(key=start["k0"], query=start["q0"], linear=True)
    else:
        probe.load(start["w0"], linear=True)
    return probe, (given["x"], given["z"], given["y"])


@pytest.mark.parametrize("gradient", ["stable", "naive"])
def test_golden_descent(gradient):
    probe, data = golden_probe()
    torch.testing.assert_close(probe(*data[:2]), GOLDEN.outputs("gd")["f0"], rtol=1e-9, atol=1e-12)
    s = probe.log_attention(*data[:2]).exp()
    GOLDEN.check(s, "softmax0", "gd")
    ran = normalized_gd(probe, *data, steps=40, gradient=gradient, record=(1, 2, 5, 40))
    GOLDEN.check(ran.weights.mT, "w_steps", "gd")
    GOLDEN.check(ran.losses, "loss", "gd")
    assert ran.recorded == (1, 2, 5, 40)


@pytest.mark.parametrize("gradient", ["stable", "naive"])
def test_golden_descent_of_factors(gradient):
    want = GOLDEN.outputs("gd")
    probe, data = golden_probe("kq")
    losses = []
    for at, steps in enumerate((1, 1, 3, 20)):
        ran = normalized_gd(probe, *data, steps=steps, gradient=gradient)
        losses.append(ran.losses)
        close = GOLDEN.tolerance("gd")
        torch.testing.assert_close(probe.key.detach().mT, want["k_steps"][at], **close)
        torch.testing.assert_close(probe.query.detach().mT, want["q_steps"][at], **close)
    GOLDEN.check(torch.cat(losses), "loss_kq", "gd")


def test_golden_heads():
    given = GOLDEN.inputs("svm")
    for case, query in (("relu", given["x"][:, 1]), ("lambda", given["z"])):
        own = GOLDEN.inputs(case)
        options = {"head": "relu", "values": own["value"]} if case == "relu" else {}
        if case == "lambda":
            options = {"head": "quadratic", "lam": float(own["lbd"])}
        probe = AttentionProbe(6, v=own["v"], **options).load(own["w"], linear=True)
        GOLDEN.check(probe(given["x"], query), "f", case)


HEADS = {
    "linear": {},
    "relu": {"head": "relu"},
    "quadratic": {"head": "quadratic", "lam": 0.3},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", ["logistic", "exponential", "linear"])
def test_stable_gradient_is_the_gradient(head, loss):
    x, z, _ = sequences(4, 5, 6, (3,))
    y = torch.tensor([1.0, -1.0, 1.0, 1.0]).double().expand(3, 4)
    options = dict(HEADS[head])
    v = torch.randn(3, 7 if head == "relu" else 6).double()
    if head == "relu":
        options["values"] = torch.randn(3, 7, 6).double()
    probe = AttentionProbe(6, v=v, **options).load(torch.randn(3, 6, 6).double())
    found = stable_gradient(probe, x, z, y, loss)
    margins = y * probe(x, z)
    each = {"logistic": F.softplus(-margins), "exponential": (-margins).exp(), "linear": -margins}
    (want,) = torch.autograd.grad(each[loss].mean(-1).sum(), probe.weight)
    torch.testing.assert_close(found.gradient * found.log_scale.exp()[:, None, None], want)
    torch.testing.assert_close(found.margins, margins.detach())


def test_stable_gradient_of_a_saturated_softmax():
    """At W so large that every other probability is far below the smallest number."""
    x, z, _ = sequences(3, 4, 6)
    probe = AttentionProbe(6, v=torch.randn(6)).load(1e6 * torch.randn(6, 6).double())
    assert int((probe.log_attention(x, z).exp() > 0).sum()) == 3
    found = stable_gradient(probe, x, z, torch.ones(3))
    assert found.log_scale < -1e3
    assert found.gradient.isfinite().all()
    assert found.gradient.norm() > 1e-6
    before = probe.w.clone()
    normalized_gd(probe, x, z, torch.ones(3), steps=1)
    torch.testing.assert_close((probe.w - before).norm().item(), 0.1, rtol=1e-6, atol=0)
    tied = AttentionProbe(6, 2, v=torch.randn(6), generator=torch.Generator().manual_seed(0))
    tied.load(key=1e3 * tied.key.detach(), query=1e3 * tied.query.detach())
    normalized_gd(tied, x, z, torch.ones(3), steps=3, ridge=1e-9)
    assert tied.w.isfinite().all()


def test_nothing_to_select_moves_nothing():
    x, z, _ = sequences(3, 1, 6)
    probe = AttentionProbe(6, v=torch.randn(6))
    normalized_gd(probe, x, z, torch.ones(3), steps=3)
    assert (probe.w == 0).all()
    same = x.expand(3, 4, 6)
    normalized_gd(probe, same, z, torch.ones(3), steps=3)
    assert (probe.w == 0).all()


def test_instances_train_as_if_alone():
    x, z, _ = sequences(3, 4, 6, (5,))
    y = torch.ones(5, 3)
    v = torch.randn(5, 6).double()
    together = AttentionProbe(6, 3, v=v, generator=torch.Generator().manual_seed(0))
    alone = AttentionProbe(6, 3, v=v[2])
    alone.load(key=together.key[2].detach(), query=together.query[2].detach())
    ran = normalized_gd(together, x, z, y, steps=30)
    single = normalized_gd(alone, x[2], z[2], y[2], steps=30)
    torch.testing.assert_close(ran.losses[:, 2], single.losses)
    torch.testing.assert_close(together.w[2], alone.w)


# -- several tokens -------------------------------------------------------------------------------


def test_several_tokens_recover_a_constructed_layer():
    """Two tokens of each sequence share the attention in a given ratio."""
    x, z, _ = sequences(3, 5, 12, seed=4)
    log_s = torch.full((3, 5), -torch.inf).double()
    log_s[:, 1], log_s[:, 3] = torch.tensor(0.7).log(), torch.tensor(0.3).log()
    found = several_tokens(x, z, log_s)
    assert found.kept.tolist() == [[False, True, False, True, False]] * 3
    assert found.ratio is None
    for scale in (0.0, 30.0, 100.0):
        logits = torch.einsum("std,de,se->st", x, found.finite + scale * found.direction, z)
        torch.testing.assert_close(
            logits[:, 1] - logits[:, 3], torch.full((3,), 0.7 / 0.3).log().double()
        )
    s = logits.softmax(-1)
    torch.testing.assert_close(s[:, 1], torch.full((3,), 0.7).double(), rtol=1e-5, atol=0)
    # Both are the smallest: orthogonal to all that changes no constraint.
    apart = torch.einsum("std,de,se->st", x[:, 1:2] - x, found.direction, z)[:, [0, 2, 4]]
    assert apart.min() >= 1 - 1e-8
    assert (found.finite.norm(), found.direction.norm()) > (0, 0)
    fitted = several_tokens(x, z, log_s, trained=found.finite + 17.0 * found.direction)
    torch.testing.assert_close(fitted.ratio.item(), 17.0, rtol=1e-9, atol=0)
    torch.testing.assert_close(fitted.correlation.item(), 1.0, rtol=1e-12, atol=0)
    nuclear = several_tokens(x, z, log_s, norm="nuc", tol=1e-4)
    for mine, other in ((nuclear.finite, found.finite), (nuclear.direction, found.direction)):
        assert torch.linalg.matrix_norm(mine, ord="nuc") < torch.linalg.matrix_norm(
            other, ord="nuc"
        )


def test_one_token_is_the_support_vector_machine():
    x, z, alpha = sequences(3, 4, 8)
    log_s = torch.full((3, 4), -1e4).double().scatter(-1, alpha[:, None], 0.0)
    found = several_tokens(x, z, log_s)
    torch.testing.assert_close(found.direction, att_svm(x, z, alpha).weight)
    assert (found.finite == 0).all()
    everything = several_tokens(x, z, torch.randn(3, 4).double().log_softmax(-1))
    assert (everything.direction == 0).all()


# -- real layers ----------------------------------------------------------------------------------


def test_weights_of_real_heads():
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double()
    x = torch.randn(2, 5, 12).double()
    _, probs = layer(x, x, x, average_attn_weights=False)
    wq, wk, _ = layer.in_proj_weight.chunk(3)
    w = head_weights(wq, wk, 3)
    mine = torch.einsum("bmd,hde,bne->bhnm", x, w, x).softmax(-1)
    torch.testing.assert_close(mine, probs)
    report = selection_report(probs)
    assert torch.equal(report.token, probs.argmax(-1))
    torch.testing.assert_close(report.entropy, -(probs * probs.log()).sum(-1))
    assert (report.kept >= 1).all()
    assert report.saturation.shape == (3,)
    # Each head against the support vector machine of what it selects: two sequences, one query.
    for h in range(3):
        found = att_svm(x, x[:, 0], report.token[:, h, 0])
        assert alignment(w[h], found.weight) > 0, "a head prefers what it selects"


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": None}, TypeError, "x: expected a floating tensor"),
        ({"x": torch.zeros(2, 3)}, ValueError, r"x: expected tokens \(n, T, d\)"),
        ({"x": torch.zeros(2, 0, 4)}, ValueError, "none of them 0"),
        ({"x": torch.full((2, 3, 4), torch.nan)}, ValueError, "x: expected finite"),
        ({"query": torch.zeros(2, 3)}, ValueError, r"query: expected shape \(2, 4\), got \(2, 3\)"),
        ({"query": torch.full((2, 4), torch.inf)}, ValueError, "query: expected finite"),
        ({"query": 3}, ValueError, "query: expected a token of 3, got 3"),
        ({"query": 1.0}, TypeError, "query: expected a tensor or the number"),
        ({"selected": torch.zeros(2)}, TypeError, "selected: expected integers"),
        ({"selected": torch.zeros(3).long()}, ValueError, r"selected: expected shape \(2,\)"),
        ({"selected": torch.tensor([0, 3])}, ValueError, r"selected: expected tokens in \[0, 3\)"),
        ({"norm": "l2"}, ValueError, "norm: expected fro or nuc"),
        ({"tol": 0.0}, ValueError, "tol"),
    ],
)
def test_refused_problems(change, error, match):
    x, z, alpha = sequences(2, 3, 4)
    arguments = {"x": x, "query": z, "selected": alpha, **change}
    with pytest.raises(error, match=match):
        att_svm(**arguments)


def test_other_refusals():
    v = torch.ones(4)
    for options, match in (
        ({"head": "mlp"}, "head: expected one of linear"),
        ({"head": "relu"}, "values: expected V for relu"),
        ({"values": torch.ones(3, 4)}, "values: expected V for relu"),
        ({"head": "relu", "values": torch.ones(3, 4)}, "v: expected 3 numbers"),
        ({"v": torch.ones(5)}, "v: expected 4 numbers"),
        ({"v": torch.ones(2, 3, 4)}, r"v: expected shape \(d,\)"),
        ({"head": "relu", "v": torch.ones(3), "values": torch.ones(2, 3, 4)}, "instances of v"),
    ):
        with pytest.raises(ValueError, match=match):
            AttentionProbe(4, **{"v": v, **options})
    probe = AttentionProbe(4, v=v)
    with pytest.raises(ValueError, match="load: expected exactly weight"):
        probe.load(key=torch.ones(4, 4), query=torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"weight: expected shape \(4, 4\)"):
        probe.load(torch.ones(3, 4))
    x, z, y = torch.ones(2, 3, 4), torch.ones(2, 4), torch.ones(2)
    for change, match in (
        ({"x": torch.ones(2, 3, 5)}, r"x: expected shape \(n, T, 4\)"),
        ({"z": torch.ones(3, 4)}, r"z: expected shape \(2, 4\)"),
        # The official module returns (n, 1), which would broadcast against labels (n,).
        ({"y": torch.ones(2, 1)}, r"y: expected shape \(2,\), got \(2, 1\)"),
        ({"steps": 0}, "steps"),
        ({"eta": 0.0}, "eta"),
        ({"loss": "hinge"}, "loss: expected one of logistic"),
        ({"gradient": "exact"}, "gradient: expected stable or naive"),
        ({"record": (9,)}, "record: expected steps of at most 5"),
    ):
        with pytest.raises(ValueError, match=match):
            normalized_gd(probe, **{"x": x, "z": z, "y": y, "steps": 5, **change})
    with pytest.raises(ValueError, match="expected matrices of one shape"):
        alignment(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match="rows that are probabilities"):
        selection_report(torch.ones(1, 1, 2, 3))
    with pytest.raises(ValueError, match="attention_probs: expected 4 dimensions"):
        selection_report(torch.ones(2, 3))
    with pytest.raises(ValueError, match="rows divisible by 3"):
        head_weights(torch.ones(4, 4), torch.ones(4, 4), 3)
    with pytest.raises(ValueError, match="log_probs: expected shape"):
        several_tokens(x, z, torch.zeros(2, 4))
    for value in (0.5, torch.nan):
        with pytest.raises(ValueError, match="log_probs: expected logarithms of probabilities"):
            several_tokens(x, z, torch.full((2, 3), value))
    xs, zs, _ = sequences(2, 3, 8)
    log_s = torch.zeros(2, 3).double().log_softmax(-1)
    with pytest.raises(ValueError, match="trained: expected shape"):
        several_tokens(xs, zs, log_s, trained=torch.eye(4))
