"""aTLAS: golden arrays, the composition against its formula, objectives, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.model_merging.atlas import (
    Atlas,
    LowRankPair,
    LowRankTaskVector,
    TaskVector,
    adapter_task_vector,
    addition_loss,
    coefficient_penalty,
    few_shot_vectors,
    fit,
    negation_loss,
    select_by_gradient,
    select_by_similarity,
    trusted_samples,
    ufm_loss,
)
from transfuse.testing import golden

GOLDEN = golden.load("atlas")
TASKS = 3


class Net(nn.Module):
    def __init__(self, given):
        super().__init__()
        h, d = given["theta0_0"].shape
        self.inner = nn.Linear(d, h)
        self.norm = nn.LayerNorm(h)
        self.head = nn.Linear(h, given["theta0_4"].shape[0], bias=False)
        with torch.no_grad():
            for j, p in enumerate(self.parameters()):
                p.copy_(given[f"theta0_{j}"])

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.inner(x))))


@pytest.fixture
def net():
    return Net(GOLDEN.inputs("net"))


def vectors_of(net, dtype=None):
    given = GOLDEN.inputs("net")
    return [
        TaskVector.of(
            {
                name: given[f"tau{i}_{j}"] if dtype is None else given[f"tau{i}_{j}"].to(dtype)
                for j, (name, _) in enumerate(net.named_parameters())
            },
            name=f"task {i}",
        )
        for i in range(TASKS)
    ]


def set_coefficients(composed, value):
    with torch.no_grad():
        composed.coef.copy_(value)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("blockwise", {}),
        ("global", {"granularity": "task"}),
        ("lin", {"linearised": True}),
        ("part", {"granularity": 2, "rank2_only": True}),
    ],
)
def test_golden(net, case, options):
    given, data = GOLDEN.inputs(case), GOLDEN.inputs("net")
    if case == "part":
        names = ("inner.weight", "head.weight")
        masks = (given["mask0"], given["mask4"])
        options["partition"] = {n: m.to(torch.uint8) for n, m in zip(names, masks, strict=True)}
    composed = Atlas(net, vectors_of(net, torch.float16 if case == "part" else None), **options)
    mark = "_" if case == "global" else ""  # as recorded
    set_coefficients(composed, given[f"{mark}coef"])
    logits = composed(data["x"])
    loss = F.cross_entropy(logits, data["y"])
    loss.backward()
    GOLDEN.check(logits, f"{mark}logits", case)
    GOLDEN.check(composed.coef.grad, f"{mark}dcoef", case)
    if f"{mark}loss" in GOLDEN.outputs(case):
        GOLDEN.check(loss, f"{mark}loss", case)
    assert all(p.grad is None for p in net.parameters())


def test_golden_penalty_and_ufm():
    coefficients = GOLDEN.inputs("lin")["coef"]
    GOLDEN.check(coefficient_penalty(coefficients, 1), "p1", "lp_reg")
    GOLDEN.check(coefficient_penalty(coefficients, 2), "p2", "lp_reg")
    given = GOLDEN.inputs("ufm")
    strong = given["strong_logits"].requires_grad_()
    labels = given["targets"].argmax(1)
    loss = ufm_loss(given["weak_logits"], strong, targets=labels, trusted=given["trusted"])
    loss.backward()
    GOLDEN.check(loss, "loss", "ufm")
    GOLDEN.check(strong.grad, "dstrong", "ufm")


def test_starts_at_the_model_and_is_written_once(net):
    x = GOLDEN.inputs("net")["x"]
    before = copy.deepcopy(net.state_dict())
    composed = Atlas(net, vectors_of(net))
    torch.testing.assert_close(composed(x), net(x))
    set_coefficients(composed, torch.randn(composed.coef.shape))
    state = composed.materialize()
    assert list(state) == list(net.state_dict())
    other = copy.deepcopy(net)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), composed(x))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert [n for n, _ in composed.named_parameters()] == ["coef"]


def test_half_vectors_lose_nothing_in_the_sum(net):
    """Against float64 sums of the rounded vectors: one rounding, to float32."""
    vectors = vectors_of(net, torch.float16)
    composed = Atlas(net, vectors)
    set_coefficients(composed, torch.randn(composed.coef.shape))
    for j, (name, p) in enumerate(net.named_parameters()):
        total = p.double() + sum(
            composed.coef[i, j].double() * v[name].double() for i, v in enumerate(vectors)
        )
        torch.testing.assert_close(
            composed.parameters_at()[name].double(), total, rtol=1e-6, atol=1e-7
        )


def test_low_rank_vectors_are_those_expanded(net):
    generator = torch.Generator().manual_seed(0)
    names = {"inner.weight": net.inner.weight, "head.weight": net.head.weight}
    low = [
        LowRankTaskVector(
            {
                n: LowRankPair(
                    torch.randn(2, p.shape[1], generator=generator),
                    torch.randn(p.shape[0], 2, generator=generator),
                    0.5,
                )
                for n, p in names.items()
            }
        )
        for _ in range(2)
    ]
    value = torch.randn(2, 2, generator=generator)
    x, y = GOLDEN.inputs("net")["x"], GOLDEN.inputs("net")["y"]
    results = []
    for vectors in (low, [v.expand() for v in low]):
        composed = Atlas(net, vectors)
        set_coefficients(composed, value)
        F.cross_entropy(composed(x), y).backward()
        results.append((composed.materialize()["inner.weight"], composed.coef.grad))
    torch.testing.assert_close(*(r[0] for r in results))
    torch.testing.assert_close(*(r[1] for r in results))
    with pytest.raises(ValueError, match="expand them for partitions"):
        Atlas(net, low, granularity=3)


def test_adapters_of_peft_are_read():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"])
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    vector = adapter_task_vector(peft.get_peft_model_state_dict(adapted), alpha=6)
    composed = Atlas(plain, [vector], granularity="task")
    set_coefficients(composed, torch.ones(1))
    x = torch.randn(7, 5)
    torch.testing.assert_close(composed(x), adapted(x))


def test_hashed_partitions(net):
    composed = Atlas(net, vectors_of(net), granularity=4, seed=3)
    assert composed.coef.shape == (TASKS, 5, 4)
    set_coefficients(composed, torch.arange(4.0).expand(TASKS, 5, 4))
    change = composed.change()["inner.weight"]
    total = sum(v["inner.weight"] for v in composed.vectors)
    factors = (change / total).round().unique()
    assert set(factors.tolist()) == {0.0, 1.0, 2.0, 3.0}
    again = Atlas(net, vectors_of(net), granularity=4, seed=3)
    set_coefficients(again, composed.coef)
    assert torch.equal(again.change()["inner.weight"], change)


def test_tied_parameters_have_one_coefficient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            return self.b(self.a(x))

    pre, fine = Tied(), Tied()
    vector = TaskVector(pre.state_dict(), fine.state_dict())
    composed = Atlas(pre, [vector])
    assert composed.coef.shape == (1, 1)
    set_coefficients(composed, torch.ones(1, 1))
    x = torch.randn(2, 3)
    torch.testing.assert_close(composed(x), fine(x))
    state = composed.materialize()
    assert torch.equal(state["a.weight"], state["b.weight"])
    pre.load_state_dict(state)
    torch.testing.assert_close(pre(x), fine(x))


def test_arithmetic_of_task_vectors():
    one, two = (TaskVector.of({"w": torch.randn(3), "v": torch.randn(2, 2)}) for _ in range(2))
    three = one + 2.0 * two - one
    for name in one:
        torch.testing.assert_close(three[name], 2 * two[name])
    flat = [torch.cat([t.flatten() for t in v.values()]) for v in (one, two)]
    torch.testing.assert_close(one.dot(two), flat[0] @ flat[1])
    torch.testing.assert_close((-one).norm(), flat[0].norm())
    assert "2 tensors, 7 numbers" in repr(one)


def test_objectives():
    torch.manual_seed(0)
    logits, y = torch.randn(6, 4), torch.arange(6) % 4
    parts = addition_loss([logits[:2], logits[2:]], [y[:2], y[2:]])
    expected = F.cross_entropy(logits[:2], y[:2]) + F.cross_entropy(logits[2:], y[2:])
    torch.testing.assert_close(parts, expected)
    loss = negation_loss(100 * logits, (y + 1) % 4, logits, y, cap=2.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, y) - 2.0)
    unsure = torch.zeros(3, 4, requires_grad=True)
    nothing = ufm_loss(torch.zeros(3, 4), unsure)
    nothing.backward()
    assert nothing == 0
    assert torch.equal(unsure.grad, torch.zeros(3, 4))
    p = torch.softmax(torch.randn(50, 4), -1)
    trusted, labels = trusted_samples(p)
    assert trusted.sum() <= 4
    assert all(p[i, labels[i]] == p[:, labels[i]].max() for i in trusted.nonzero()[:, 0])
    assert trusted_samples(p, form="official")[0].all()
    mask = select_by_gradient(torch.randn(5, 3, 2), 2)
    assert mask.sum(0).tolist() == [2, 2, 2]
    assert select_by_similarity(torch.eye(3), torch.tensor([0.0, 1.0, 0.5]), 2).tolist() == [
        False,
        True,
        True,
    ]


def test_budget_freezes_the_others(net):
    composed = Atlas(net, vectors_of(net))
    data = GOLDEN.inputs("net")
    F.cross_entropy(composed(data["x"]), data["y"]).backward()
    composed.active.copy_(select_by_gradient(composed.coef.grad, 1))
    losses = fit(
        composed, lambda step: F.cross_entropy(composed(data["x"]), data["y"]), steps=5, lr=0.1
    )
    assert losses[-1] < losses[0]
    assert ((composed.coefficients() != 0).sum(0) == 1).all()


def test_fit_keeps_the_best(net):
    composed = Atlas(net, vectors_of(net), granularity="task")
    data, scores = GOLDEN.inputs("net"), iter([1.0, 5.0, 2.0])
    kept = []

    def score():
        kept.append(composed.coef.detach().clone())
        return next(scores)

    def loss(step):
        return F.cross_entropy(composed(data["x"]), data["y"])

    fit(composed, loss, steps=3, lr=0.1, score=score)
    assert torch.equal(composed.coef, kept[1])
    with pytest.raises(ValueError, match="loss: expected a finite number"):
        fit(composed, lambda step: composed.coef.sum() * float("nan"), steps=1)


def test_bfloat16_model_and_dtype(net):
    vectors = vectors_of(net, torch.float16)
    x = GOLDEN.inputs("net")["x"]
    composed = Atlas(net, vectors, dtype=torch.bfloat16)
    set_coefficients(composed, torch.full(composed.coef.shape, 0.1))
    out = composed(x.bfloat16())
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert composed.coef.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"granularity": 0}, "granularity: expected an integer of at least 1"),
        ({"granularity": "layer"}, "granularity: expected 'block', 'task' or a number"),
        ({"partition": {}}, "partition: expected None unless"),
        ({"granularity": 2, "partition": {}}, "partition: expected every tensor"),
    ],
)
def test_refused_options(net, options, match):
    with pytest.raises(ValueError, match=match):
        Atlas(net, vectors_of(net), **options)


def test_refused_vectors(net):
    vectors = vectors_of(net)
    with pytest.raises(ValueError, match="at least one task vector"):
        Atlas(net, [])
    less = TaskVector.of({"inner.weight": vectors[0]["inner.weight"]})
    with pytest.raises(ValueError, match=r"inner.bias is missing in vector 1"):
        Atlas(net, [vectors[0], less])
    with pytest.raises(ValueError, match="other is no parameter of the model"):
        Atlas(net, [TaskVector.of({"other": torch.zeros(2)})])
    wrong = TaskVector.of({"inner.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"inner.bias has shape \(3,\) in the vectors"):
        Atlas(net, [wrong])
    with pytest.raises(ValueError, match="quantised"):
        TaskVector({"w": torch.zeros(2, 2, dtype=torch.int8)}, {"w": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"w is missing in states\[1\]"):
        TaskVector({"w": torch.zeros(2)}, {})
    composed = Atlas(net, vectors)
    set_coefficients(composed, float("nan"))
    with pytest.raises(ValueError, match="coef: expected finite"):
        composed.materialize()
    assert [v.name for v in few_shot_vectors(vectors, "task 1")] == ["task 0", "task 2"]
    with pytest.raises(ValueError, match="expected one of another task"):
        few_shot_vectors(vectors[:1], "task 0")
    with pytest.raises(ValueError, match="expected pairs of lora_A"):
        adapter_task_vector({"conv.lora_A.weight": torch.zeros(2, 3, 1, 1)}, alpha=1)
