"""Relation rectification: official outputs, graph attention by hand, the loss, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from transfuse.methods import _hetero_gat
from transfuse.methods.diffusion_control.relation_rectification import (
    EDGES,
    TRAINING_PAIRS,
    HeteroGAT,
    HeteroGATLayer,
    RelationRectifier,
    eot_positions,
    rectification_loss,
    rectify,
    relation_graph,
    sample_timesteps,
    timestep_probabilities,
    word_features,
)
from transfuse.testing import golden

GOLDEN = golden.load("relation_rectification")


def force(form, monkeypatch):
    """Make every relation take one of the two forms."""
    if form == "edges":
        monkeypatch.setattr(_hetero_gat, "_dense_pays", lambda entries, edges: False)
        monkeypatch.setattr(HeteroGATLayer, "_dense", None)
    else:
        monkeypatch.setattr(HeteroGATLayer, "_edge_by_edge", None)


KEYS = {name: f"{source}__{name}__{end}" for source, name, end in EDGES}


def load_official(network, x):
    names = {"fc_weight": "weight", "attn_l": "attn_l", "attn_r": "attn_r", "bias": "bias"}
    state = {}
    for key, value in x.items():
        if key.startswith("conv"):
            conv, rest = key.split("_", 1)
            relation = "_".join(rest.split("_")[:2])
            part = names[rest.removeprefix(relation + "_")]
            value = value[0] if part.startswith("attn") else value
            state[
                f"{ {'conv1': 'first', 'conv2': 'second'}[conv] }.weights.{KEYS[relation]}.{part}"
            ] = value
    network.load_state_dict(state)


# --- against the official implementation ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["dense", "edges"])
def test_network_and_gradients_match_the_official_code(form, dtype, monkeypatch):
    force(form, monkeypatch)
    x, params = GOLDEN.inputs("hgat", dtype), GOLDEN.params("hgat")
    network = HeteroGAT(
        params["in_feats"], params["hid_feats"], params["out_feats"], EDGES, heads=(2, 2)
    ).to(dtype)
    load_official(network, x)
    out = network({name: x[name] for name in ("object", "relation", "eot")})
    for name in ("object", "relation", "eot"):
        GOLDEN.check(out[name], name, "hgat")
    (out["eot"] * x["grad_eot"]).sum().backward()
    for layer, conv in ((network.first, "conv1"), (network.second, "conv2")):
        for relation in ("link_oe", "link_re"):
            grad = layer.weights[KEYS[relation]].weight.grad
            GOLDEN.check(grad, f"grad_{conv}_{relation}_fc", "hgat")


def test_rectifier_reads_the_two_eot_nodes():
    x, params = GOLDEN.inputs("hgat"), GOLDEN.params("hgat")
    rectifier = RelationRectifier(params["in_feats"], hidden=params["hid_feats"])
    load_official(rectifier.network, x)
    graph = relation_graph(
        x["object"][0], x["relation"][0], x["object"][1], x["eot"][0], x["eot"][1]
    )
    eot = torch.stack([rectifier.delta(graph, prompt="object"), rectifier(graph)])
    GOLDEN.check(eot, "eot", "hgat")


def test_timestep_probabilities_match_the_official_code():
    x = GOLDEN.inputs("timestep")
    steps, alpha = x["T_alpha"].tolist()
    GOLDEN.check(timestep_probabilities(int(steps), alpha), "prob", "timestep")


# --- graph attention -----------------------------------------------------------------------------


def by_hand(layer, nodes, edges):
    """The formula with loops over nodes, heads and edges, independent of the library."""
    out = {}
    for relation in layer.relations:
        source, name, end = relation
        if relation not in edges or len(edges[relation]) == 0:
            continue
        w = layer.weights[f"{source}__{name}__{end}"]
        f = {t: (nodes[t] @ w.weight.T).view(-1, layer.heads, layer.out) for t in (source, end)}
        y = w.bias.view(1, layer.heads, layer.out).repeat(len(nodes[end]), 1, 1)
        for v in range(len(nodes[end])):
            arriving = [u for u, to in edges[relation] if to == v]
            for h in range(layer.heads):
                if arriving:
                    e = torch.stack(
                        [
                            w.attn_l[h] @ f[source][u, h] + w.attn_r[h] @ f[end][v, h]
                            for u in arriving
                        ]
                    )
                    p = F.leaky_relu(e, layer.negative_slope).softmax(0)
                    y[v, h] = y[v, h] + sum(p[i] * f[source][u, h] for i, u in enumerate(arriving))
        out[end] = y if end not in out else out[end] + y
    if layer.merge == "mean":
        return {t: y.mean(1) for t, y in out.items()}
    return {t: y.flatten(1) for t, y in out.items()}


EDGE_CASES = {
    ("a", "self", "a"): [(0, 0), (1, 1), (0, 1), (0, 1), (2, 1)],  # one edge twice
    ("a", "to", "b"): [(2, 3)],  # most of b: no edge
    ("b", "to", "a"): [(0, 2), (1, 2), (3, 2), (1, 0)],
    ("b", "none", "b"): [],
}


@pytest.mark.parametrize("out", [1, 6, 256, 300])
@pytest.mark.parametrize("merge", ["concat", "mean"])
@pytest.mark.parametrize("form", ["dense", "edges"])
def test_layer_equals_loops(out, merge, form, monkeypatch):
    layer = HeteroGATLayer(4, out, list(EDGE_CASES), heads=2, merge=merge).double()
    for w in layer.weights.values():
        torch.nn.init.normal_(w.bias)
    g = torch.Generator().manual_seed(0)
    nodes = {"a": torch.randn(3, 4, generator=g), "b": torch.randn(4, 4, generator=g)}
    nodes = {t: x.double() for t, x in nodes.items()}
    index = {r: _hetero_gat.read_edges("e", e) for r, e in EDGE_CASES.items()}
    force(form, monkeypatch)
    result = layer({t: torch.stack([x, 2 * x]) for t, x in nodes.items()}, index)
    expected = by_hand(layer, nodes, EDGE_CASES)
    assert result.keys() == expected.keys()
    for t, y in expected.items():
        torch.testing.assert_close(result[t][0], y)
    doubled = by_hand(layer, {t: 2 * x for t, x in nodes.items()}, EDGE_CASES)
    for t, y in doubled.items():
        torch.testing.assert_close(result[t][1], y)


def test_a_large_graph_goes_edge_by_edge_and_parts_are_independent():
    g = torch.Generator().manual_seed(0)
    pairs = torch.stack([torch.randint(0, 300, (900,), generator=g) for _ in range(2)])
    relation = ("n", "e", "n")
    network = HeteroGAT(8, 5, 7, {relation: pairs}, generator=g)
    x = torch.randn(300, 8, generator=g)
    called = []
    layer, original = network.first, HeteroGATLayer._edge_by_edge
    layer._edge_by_edge = lambda *a: called.append(1) or original(layer, *a)
    whole = network({"n": x})["n"]
    assert called
    # As PyG batches graphs: one graph of two parts.
    both = torch.cat([pairs, pairs + 300], 1)
    parts = network({"n": torch.cat([x, 2 * x])}, {relation: both})["n"]
    torch.testing.assert_close(parts[:300], whole)
    torch.testing.assert_close(parts[300:], network({"n": 2 * x})["n"])


def test_types_and_edges_that_are_absent():
    network = HeteroGAT(4, 3, 5, EDGES)
    nodes = {"object": torch.randn(2, 4), "eot": torch.randn(2, 4)}
    out = network(nodes)  # no relation node: its edges drop out
    assert set(out) == {"object", "eot"}
    out = network(nodes, {("object", "link_oo", "object"): [(0, 0)]})
    assert set(out) == {"object"}
    assert out["object"].isfinite().all()
    for edges, error, match in (
        ({("a", "b"): []}, TypeError, "edges: expected keys"),
        ({("a", "e", "a"): torch.zeros(3, 2)}, ValueError, r"expected \(2, E\)"),
        ({("a", "e", "a"): torch.zeros(2, 2)}, TypeError, "expected integers"),
        ({("a", "e", "a"): [(0, 1, 2)]}, ValueError, "expected pairs"),
        ({("a", "e", "a"): [(0, -1)]}, ValueError, "entries from 0, got -1"),
        ({}, ValueError, "relations: expected distinct ones"),
    ):
        with pytest.raises(error, match=match):
            HeteroGAT(4, 3, 5, edges)
    for given, edges, match in (
        ({"object": torch.zeros(2, 3)}, None, r"nodes\['object'\]: expected \(N, 4\)"),
        ({"object": torch.zeros(1, 4)}, None, "edges 'link_oo': expected sources below 1"),
        (nodes, {("x", "y", "z"): []}, "unknown relations"),
        ({**nodes, "eot": torch.zeros(2, 2, 4)}, None, "one batch size"),
    ):
        with pytest.raises(ValueError, match=match):
            network(given, edges)


def test_compiles_without_a_break_and_to_second_order():
    rectifier = RelationRectifier(8, hidden=4).double()
    g = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)

    def delta(g):
        return rectifier(relation_graph(*g))

    assert torch.autograd.gradcheck(delta, (g,))
    assert torch.autograd.gradgradcheck(delta, (g,))
    graph = relation_graph(*g.detach())
    compiled = torch.compile(rectifier, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(graph), rectifier(graph))


def test_half_precision_logits_are_float32():
    layer = HeteroGATLayer(8, 4, [("a", "e", "a")], heads=2).to(torch.bfloat16)
    x = torch.randn(1, 5, 8, dtype=torch.bfloat16)
    index = {("a", "e", "a"): _hetero_gat.read_edges("e", [(i, 4) for i in range(4)])}
    out = layer({"a": x}, index)["a"]
    assert out.dtype == torch.bfloat16
    exact = layer.double()({"a": x.double()}, index)["a"]
    torch.testing.assert_close(out.double(), exact, rtol=3e-2, atol=3e-2)


# --- prompts -------------------------------------------------------------------------------------


def test_default_network_is_of_the_size_of_the_paper():
    rectifier = RelationRectifier()
    count = sum(p.numel() for p in rectifier.parameters())
    # Per relation: 1024 x 1024 and 2048 x 1024 weights, two attention vectors and a bias each.
    assert count == 5 * (1024 * 1024 + 3 * 1024 + 2048 * 1024 + 3 * 2048) == 15_774_720


def test_batched_graphs_equal_single_ones_and_direction_matters():
    rectifier = RelationRectifier(8, hidden=4)
    a, r, b, o_a, o = torch.randn(5, 3, 8)
    batch = rectifier(relation_graph(a, r, b, o_a, o))
    for i in range(3):
        one = rectifier(relation_graph(a[i], r[i], b[i], o_a[i], o[i]))
        torch.testing.assert_close(batch[i], one)
    swapped = rectifier(relation_graph(b, r, a, o_a, o))
    assert not torch.allclose(batch, swapped, atol=1e-3)


def test_object_prompts_take_noise_in_training():
    rectifier = RelationRectifier(8, hidden=4)
    graph = relation_graph(*torch.randn(5, 8))
    clean = rectifier.delta(graph, prompt="object")
    noisy = [
        rectifier.delta(
            graph, prompt="object", noise=0.05, generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    ]
    assert torch.equal(*noisy)
    assert 0.01 < (noisy[0] - clean).std() < 0.12
    assert len(TRAINING_PAIRS) == 5
    for change in ({"prompt": "both"}, {"noise": -1.0}, {"noise": math.nan}):
        with pytest.raises(ValueError, match=next(iter(change))):
            rectifier.delta(graph, **change)


def test_graph_and_words_refuse_and_warn():
    x = torch.randn(5, 8)
    with pytest.warns(UserWarning, match="same features"):
        relation_graph(x[0], x[1], x[0], x[2], x[3])
    with pytest.raises(ValueError, match=r"o: expected .* got \(7,\)"):
        relation_graph(*x[:4], torch.zeros(7))
    with pytest.raises(ValueError, match=r"nodes\['object'\]: expected \(N, 9\)"):
        RelationRectifier(9, hidden=4)(relation_graph(*x))
    table = torch.arange(12.0).view(4, 3)
    assert torch.equal(word_features(table, [2, 1]), table[2])
    assert torch.equal(word_features(table, [2, 1], mode="mean"), table[1:3].mean(0))
    for tokens, options, match in (
        ([], {}, "at least one sub-word"),
        ([4], {}, r"ids in \[0, 4\), got 4"),
        ([1], {"mode": "last"}, "mode: expected first or mean"),
    ):
        with pytest.raises(ValueError, match=match):
            word_features(table, tokens, **options)


def test_end_of_text_is_the_first_of_them():
    ids = torch.tensor([[1, 5, 6, 9, 9], [1, 9, 0, 0, 0]])
    assert eot_positions(ids, 9).tolist() == [3, 1]
    with pytest.raises(ValueError, match="row 0 has no end-of-text token 7"):
        eot_positions(ids, 7)
    with pytest.raises(ValueError, match="row 0 fills all 4 places"):
        eot_positions(ids, 9, max_length=4)


def test_rectify_changes_one_position_and_carries_gradients():
    z = torch.randn(2, 6, 4, requires_grad=True)
    delta = torch.randn(2, 4, requires_grad=True)
    before = z.detach().clone()
    out = rectify(z, torch.tensor([3, 5]), delta, weight=0.5)
    expected = before.clone()
    expected[0, 3] += 0.5 * delta[0].detach()
    expected[1, 5] += 0.5 * delta[1].detach()
    torch.testing.assert_close(out.detach(), expected)
    assert torch.equal(z.detach(), before)
    out.sum().backward()
    assert torch.equal(delta.grad, torch.full((2, 4), 0.5))
    assert torch.equal(z.grad, torch.ones(2, 6, 4))
    poison = torch.full((4,), math.nan)
    assert torch.equal(rectify(z, 3, poison, weight=0.0), z)
    half = rectify(z.detach().bfloat16(), 2, delta[0].detach())
    assert half.dtype == torch.bfloat16
    for arguments, options, error, match in (
        ((z, 6, delta), {}, ValueError, r"eot_index: expected positions in \[0, 6\)"),
        ((z, -1, delta), {}, ValueError, "eot_index"),
        ((z, 1.5, delta), {}, TypeError, "eot_index: expected integers"),
        ((z, 1, delta[:, :3]), {}, ValueError, r"delta: expected \(4,\) or \(2, 4\)"),
        ((z, 1, delta), {"weight": math.inf}, ValueError, "weight"),
        ((z[0, 0], 1, delta), {}, ValueError, "prompt_embeds"),
    ):
        with pytest.raises(error, match=match):
            rectify(*arguments, **options)


# --- training ------------------------------------------------------------------------------------


def test_timesteps_follow_the_probabilities():
    p = timestep_probabilities(5, 0.5)
    assert p.sum() == pytest.approx(1.0)
    assert (p.diff() > 0).all()
    draws = sample_timesteps(5, 0.5, 200_000, generator=torch.Generator().manual_seed(0))
    frequency = draws.bincount(minlength=5).double() / len(draws)
    assert (frequency - p).abs().max() < 0.005
    again = sample_timesteps(5, 0.5, 200_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    assert timestep_probabilities(1, 1.0).tolist() == [1.0]
    for arguments in ((0, 0.5), (5, 1.5), (5, math.nan)):
        with pytest.raises(ValueError, match=r"num_train_steps|alpha"):
            timestep_probabilities(*arguments)


def test_loss_is_that_of_two_separate_calls():
    g = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 3, 4, 2, 2, generator=g, dtype=torch.float64)
    noise = torch.randn(2, 3, 4, 2, 2, generator=g, dtype=torch.float64)
    p1, p2 = torch.randn(2, 1, 5, 6, generator=g, dtype=torch.float64)
    p1.requires_grad_()
    w = torch.randn(6, 4, generator=g, dtype=torch.float64)
    alphas = torch.linspace(0.99, 0.1, 10, dtype=torch.float64)
    t = torch.tensor([2, 5, 9])
    calls = []

    def eps(x, t, p):
        calls.append(len(x))
        return 0.7 * x + (p.mean(1) @ w)[..., None, None] + 0.01 * t[:, None, None, None]

    def noised(z, e):
        a = alphas[t].view(-1, 1, 1, 1)
        return a.sqrt() * z + (1 - a).sqrt() * e

    def one(first, second):
        x = torch.cat([noised(first, noise[0]), noised(second, noise[1])])
        p = torch.cat([p1.expand(3, -1, -1), p2.expand(3, -1, -1)])
        return F.mse_loss(eps(x, t.repeat(2), p), torch.cat([*noise]))

    positive, negative = one(z1, z2), one(z2, z1)
    calls.clear()
    result = rectification_loss(eps, z1, z2, p1, p2, t, noise, alphas_cumprod=alphas)
    assert calls == [12]
    torch.testing.assert_close(result.positive, positive)
    torch.testing.assert_close(result.negative, negative)
    torch.testing.assert_close(result.loss, 10 * positive - 2 * negative)
    (expected,) = torch.autograd.grad(10 * positive - 2 * negative, p1)
    (gradient,) = torch.autograd.grad(result.loss, p1)
    torch.testing.assert_close(gradient, expected)
    small = rectification_loss(eps, z1, z2, p1, p2, t, noise, alphas_cumprod=alphas, limit=1e-3)
    torch.testing.assert_close(small.loss, (10 - 2e-3) * positive)
    for change, match in (
        ({"z2": z2[:2]}, "z1 and z2"),
        ({"noise": noise[:1]}, "noise: expected"),
        ({"t": 10}, r"t: expected labels in \[0, 10\)"),
        ({"t": torch.tensor([1, 2])}, "t: expected an integer label or"),
        ({"t": 0.5}, "t: expected"),
        ({"p1": p1[0]}, "p1: expected 3 dimensions"),
        ({"p2": p2.expand(2, -1, -1)}, "p2: expected batch 1 or 3"),
        ({"neg": math.nan}, "neg"),
        ({"limit": 0.0}, "limit"),
        ({"eps_fn": lambda x, t, p: x[:1]}, "eps_fn: expected a result"),
    ):
        arguments = {"eps_fn": eps, "z1": z1, "z2": z2, "p1": p1, "p2": p2, "t": t, "noise": noise}
        with pytest.raises(ValueError, match=match):
            rectification_loss(**{**arguments, "alphas_cumprod": alphas, **change})
