"""Fisher merging: golden arrays, the definition by autograd, files, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.model_merging.fisher_merging import (
    coefficient_candidates,
    diagonal_fisher,
    fisher_merge,
    search,
)
from transfuse.testing import golden

GOLDEN = golden.load("fisher_merging")
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def flipped(j, array):
    """Weights are stored input first by the official code."""
    return array.mT.contiguous() if j % 2 == 0 else array


def model_of(k):
    given = GOLDEN.inputs("m")
    din, h = given[f"theta{k}_0"].shape
    model = nn.Sequential(nn.Linear(din, h), nn.Tanh(), nn.Linear(h, given[f"theta{k}_2"].shape[1]))
    state = {n: flipped(j, given[f"theta{k}_{j}"]) for j, n in enumerate(NAMES)}
    model.load_state_dict(state)
    return model, given[f"x{k}"]


def fishers_of():
    outputs = GOLDEN.outputs("fisher")
    return [{n: flipped(j, outputs[f"diag{k}_{j}"]) for j, n in enumerate(NAMES)} for k in range(2)]


@pytest.mark.parametrize("k", [0, 1])
def test_golden_fisher(k):
    model, x = model_of(k)
    found = diagonal_fisher(model, x.split(4))
    for j, name in enumerate(NAMES):
        GOLDEN.check(flipped(j, found[name]), f"diag{k}_{j}", "fisher")


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("default", {}),
        ("nofavor", {"floor": 1e-3, "favor_target": False}),
        ("unnormalised", {"normalize": False}),
        ("isotropic", None),
    ],
)
def test_golden_merge(case, options):
    states = [model_of(k)[0].state_dict() for k in range(2)]
    rows = []
    for row in GOLDEN.inputs("m")["coefficients"]:
        fishers, given = (None, {}) if options is None else (fishers_of(), options)
        merged = fisher_merge(states, fishers, row, **given)
        rows.append(torch.cat([flipped(j, merged[n]).flatten() for j, n in enumerate(NAMES)]))
    GOLDEN.check(torch.stack(rows), case, "merge")


def test_golden_grid():
    GOLDEN.check(coefficient_candidates(2, 5), "pairwise5", "grid")


class Everything(nn.Module):
    """Sequences, an embedding, a norm, a convolution, a layer used twice, one not by its call."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.twice, self.once = nn.Linear(4, 4), nn.Linear(4, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)
        self.unseen, self.head = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        self.idle = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        x = self.once(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        x = self.drop(self.conv(x.mT).mT)
        return self.head(torch.tanh(F.linear(x, self.unseen.weight)).mean(1))


def by_definition(model, x, weights):
    """Sum over classes and examples, one backward pass each."""
    model.eval()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(x)):
        log_p = model(x[i : i + 1]).log_softmax(-1)[0]
        for c, w in enumerate(weights(i, log_p)):
            grads = torch.autograd.grad(
                log_p[c], list(model.parameters()), retain_graph=True, allow_unused=True
            )
            for name, g in zip(total, grads, strict=True):
                if g is not None:
                    total[name] += float(w) * g.square() / len(x)
    return total


@pytest.mark.parametrize("mode", ["exact", "empirical"])
def test_fisher_of_any_module(mode):
    torch.manual_seed(0)
    model, x = Everything().double(), torch.randint(7, (6, 5))
    y = torch.arange(6) % 3
    if mode == "exact":
        expected = by_definition(model, x, lambda i, log_p: log_p.exp().tolist())
    else:
        expected = by_definition(model, x, lambda i, log_p: F.one_hot(y[i], 3).tolist())
    model.train()
    for p in model.twice.parameters():
        p.requires_grad_(False)
    before = torch.random.get_rng_state()
    found = diagonal_fisher(model, [(x[:4], y[:4]), (x[4:], y[4:])], mode=mode)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, n=name: f"{n}: {text}")


def test_frozen_model_and_number_of_examples():
    model, x = model_of(0)
    expected = diagonal_fisher(model, [x[:5]])
    for p in model.parameters():
        p.requires_grad_(False)
    seen = []
    found = diagonal_fisher(
        model, x.split(2), n=5, progress=lambda task, done, total: seen.append((done, total))
    )
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_sampled_labels_are_seeded_and_unbiased():
    model, x = model_of(0)
    exact = diagonal_fisher(model, [x])
    draws = [diagonal_fisher(model, [x], mode="sample", seed=s)["2.weight"] for s in range(200)]
    again = diagonal_fisher(model, [x], mode="sample", seed=0)["2.weight"]
    assert torch.equal(again, draws[0])
    mean = torch.stack(draws).mean(0)
    assert (mean - exact["2.weight"]).abs().max() < 0.15 * exact["2.weight"].max()


def test_half_precision_model():
    model, x = model_of(0)
    exact = diagonal_fisher(model, [x])["0.weight"]
    found = diagonal_fisher(model.bfloat16(), [x.bfloat16()])["0.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05 * float(exact.max()))


def two_states():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, generator=generator)
    states = [
        {
            "w": start + 0.1 * torch.randn(3, 2, generator=generator),
            "norm.running_mean": torch.full((2,), float(k)),
            "norm.num_batches_tracked": torch.tensor(3 + k),
            "head": torch.full((2 + k,), float(k)),
        }
        for k in range(2)
    ]
    fishers = [{"w": torch.rand(3, 2, generator=generator)} for _ in range(2)]
    return states, fishers


def test_what_is_not_weighted():
    states, fishers = two_states()
    merged = fisher_merge(states, fishers, [1.0, 3.0], keep={"head"})
    assert list(merged) == list(states[0])
    assert merged["norm.num_batches_tracked"] == 3
    torch.testing.assert_close(merged["norm.running_mean"], torch.full((2,), 0.75))
    assert torch.equal(merged["head"], states[0]["head"])
    assert merged["head"].data_ptr() != states[0]["head"].data_ptr()


def test_no_certainty_anywhere_keeps_the_target():
    states, fishers = two_states()
    fishers[0]["w"][0] = fishers[1]["w"][0] = 0.0
    merged = fisher_merge(states, fishers, [0.0, 1.0], keep={"head"}, floor=0.0)
    torch.testing.assert_close(merged["w"][0], states[0]["w"][0])
    torch.testing.assert_close(merged["w"][1:], states[1]["w"][1:])


def test_one_model_is_itself_and_dtypes_are_the_targets():
    states, fishers = two_states()
    alone = fisher_merge(states[:1], fishers[:1])
    torch.testing.assert_close(alone["w"], states[0]["w"])
    states[0]["w"] = states[0]["w"].bfloat16()
    assert fisher_merge(states, fishers, keep={"head"})["w"].dtype == torch.bfloat16


def test_tied_weights_stay_tied():
    w = torch.randn(4, 4)
    states = [{"a": x, "b": x} for x in (w, w + 0.1)]
    fishers = [{"a": torch.rand(4, 4)} for _ in range(2)]
    fishers = [{**f, "b": f["a"]} for f in fishers]
    merged = fisher_merge(states, fishers)
    assert merged["a"].data_ptr() == merged["b"].data_ptr()
    assert torch.equal(merged["a"], fisher_merge([{"a": s["a"]} for s in states], [
        {"a": f["a"]} for f in fishers])["a"])  # fmt: skip


def test_search():
    states, fishers = two_states()
    options = {"points": 5, "keep": {"head"}}
    plain = list(search(states, fishers, **options))
    grouped = list(
        search(states, fishers, at_once=2, score=lambda s: float(s["w"].sum()), **options)
    )
    assert [c.coefficients.tolist() for c in plain] == coefficient_candidates(2, 5).tolist()
    for one, two in zip(plain, grouped, strict=True):
        assert torch.equal(one.merged["w"], two.merged["w"])
        direct = fisher_merge(states, fishers, one.coefficients, keep={"head"})
        assert torch.equal(one.merged["w"], direct["w"])
        assert two.score == float(two.merged["w"].sum())
    draws = coefficient_candidates(3, 400, seed=1)
    torch.testing.assert_close(draws.sum(1), torch.ones(400, dtype=torch.float64))
    assert (draws.mean(0) - 1 / 3).abs().max() < 0.05


def test_models_too_far_apart_are_warned_of():
    with pytest.warns(UserWarning, match="other initialisations do not merge"):
        fisher_merge([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher_merge([{"w": torch.tensor([1.0, 0.2])}, {"w": torch.tensor([1.0, 0.0])}])


def _refusals():
    w = torch.ones(2, 2)
    fisher = [{"w": w}, {"w": w}]
    return {
        "missing": ([{"w": w}, {}], None, {}, r"w is missing in states\[1\]"),
        "extra": ([{"w": w}, {"w": w, "v": w}], None, {}, r"v is in states\[1\] and not"),
        "shape": ([{"w": w}, {"w": w[0]}], None, {}, r"w in states\[1\] has shape \(2,\)"),
        "kind": ([{"w": w}, {"w": w.long()}], None, {}, "is int64, in"),
        "quantised": ([{"w": w.to(torch.int8)}] * 2, None, {}, "matrix of int8, so quantised"),
        "float8": ([{"w": w.to(torch.float8_e4m3fn)}] * 2, None, {}, "float8_e4m3fn; convert"),
        "zero": ([{"w": w}] * 2, [{"w": 0 * w}] * 2, {}, r"fishers\[0\]: .* positive, finite norm"),
        "nan": ([{"w": w}] * 2, [{"w": w / 0}] * 2, {}, "positive, finite norm"),
        "negative": ([{"w": w}] * 2, [{"w": -w}] * 2, {}, "finite numbers of at least 0"),
        "fishers": ([{"w": w}] * 2, fisher[:1], {}, "fishers: expected 2 mappings"),
        "names": ([{"w": w}] * 2, [{"w": w}, {}], {}, r"w is missing in fishers\[1\]"),
        "unknown": ([{"w": w}] * 2, [{"w": w, "x": w}, {"w": w}], {}, r"x is in fishers\[0\]"),
        "coefficients": ([{"w": w}] * 2, fisher, {"coefficients": [1.0]}, r"shape \(2,\)"),
        "not finite": (
            [{"w": w}] * 2,
            fisher,
            {"coefficients": [1.0, float("inf")]},
            "coefficients: expected finite",
        ),
        "none": ([{"w": w.long()}] * 2, None, {}, "at least one tensor to merge"),
    }


@pytest.mark.parametrize("name", list(_refusals()))
def test_refused(name):
    states, fishers, options, match = _refusals()[name]
    with pytest.raises(ValueError, match=match):
        fisher_merge(states, fishers, **options)


def test_refused_examples():
    model, x = model_of(0)
    with pytest.raises(ValueError, match="at least one example"):
        diagonal_fisher(model, [])
    with pytest.raises(ValueError, match="mode: expected one of"):
        diagonal_fisher(model, [x], mode="all")
    with pytest.raises(TypeError, match="tuples of inputs and labels"):
        diagonal_fisher(model, [x], mode="empirical")
    with pytest.raises(ValueError, match=r"logits: expected \(B, C\)"):
        diagonal_fisher(nn.Flatten(0), [x])
