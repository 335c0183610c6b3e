"""What the token merging ops promise beyond the contract of every op."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import transfuse
from transfuse.ops import (
    KV,
    MergePlan,
    attend,
    compose_plans,
    match_tokens,
    merge_tokens,
    nearest_tokens,
    push_tokens,
    unmerge_tokens,
)
from transfuse.ops._token_merging_call import random_of_cells
from transfuse.testing import golden
from transfuse.testing.specs import find_spec

SPEC = find_spec("match_tokens")
BACKENDS = ["reference", "cpu"]
GOLDEN = golden.load("ops_token_merging")


@pytest.fixture(params=BACKENDS)
def backend(request, device_for) -> str:
    """Each backend of the CPU; skips where it is not built."""
    device_for(SPEC, request.param, torch.float32)
    return request.param


@pytest.fixture
def cpu(device_for) -> str:
    """The name of the native backend; skips where it is not built."""
    device_for(SPEC, "cpu", torch.float32)
    return "cpu"


def equal_plans(one: MergePlan, other: MergePlan) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_plan(plan: MergePlan, tokens: int, merged: int) -> None:
    """A plan is a partition of the tokens, in the order that its definition says."""
    batch = plan.rows.shape[0]
    assert plan.token_count == tokens
    assert plan.row_count == tokens - merged
    assert torch.equal(plan.order.sort(1).values, torch.arange(tokens).expand(batch, -1))
    assert plan.start[:, 0].eq(0).all()
    assert plan.start[:, -1].eq(tokens).all()
    assert plan.sizes.ge(1).all()
    for b in range(batch):
        for r in range(plan.row_count):
            members = plan.order[b, plan.start[b, r] : plan.start[b, r + 1]]
            assert plan.rows[b, members].eq(r).all()
            assert members[1:].diff().gt(0).all()


# -- official implementations ---------------------------------------------------------------------


@pytest.mark.parametrize("case", ["grid", "rand_odd", "clamp"])
def test_tomesd(backend, case):
    data, want, params = GOLDEN.inputs(case), GOLDEN.outputs(case), GOLDEN.params(case)
    size, stride = (params["h"], params["w"]), (params["sy"], params["sx"])
    rows, columns = size[0] // stride[0], size[1] // stride[1]
    cell_y, cell_x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y = cell_y * stride[0] + data["rand"] // stride[1]
    x = cell_x * stride[1] + data["rand"] % stride[1]
    destination = (y * size[1] + x).flatten()
    options = {"destination": destination, "backend": backend}
    if params["no_rand"]:
        options = {"size": size, "stride": stride, "backend": backend}
        assert torch.equal(destination.sort().values, want["dst_tokens"])
    metric = data["metric"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if case == "clamp" else "error")
        plan = match_tokens(metric, params["r_requested"], **options)
    check_plan(plan, metric.shape[1], params["r_effective"])
    # Rows as the recording has them: unmerged sources in its order, then destinations.
    batch = metric.shape[0]
    order = torch.cat([want["unm_tokens"], want["dst_tokens"].expand(batch, -1)], dim=1)
    order = plan.rows.gather(1, order)
    assert torch.equal(order.sort(1).values, torch.arange(plan.row_count).expand(batch, -1))
    merged, target = want["merged_tokens"], want["dst_of_merged"]
    assert torch.equal(plan.rows.gather(1, merged), plan.rows.gather(1, target))
    for mode in params["modes"]:
        y = merge_tokens(data["x"], plan, mode=mode, backend=backend)
        in_order = y.gather(1, order[..., None].expand_as(y))
        GOLDEN.check(in_order, f"merge_{mode}", case)
    y = merge_tokens(data["x"], plan, mode=params["modes"][0], backend=backend)
    GOLDEN.check(unmerge_tokens(y, plan, backend=backend), "unmerge", case)


@pytest.mark.parametrize("case", ["vit_cls", "vit_plain", "vit_cls_dist"])
def test_tome(backend, case):
    data, want, params = GOLDEN.inputs(case), GOLDEN.outputs(case), GOLDEN.params(case)
    protect = [0] * params["class_token"] + [1] * params["distill_token"]
    plan = match_tokens(data["metric"], params["r_requested"], protect=protect, backend=backend)
    check_plan(plan, params["T"], params["r_effective"])
    x, size = data["x"], data["size"][..., 0]
    source = want["source"].bool()
    # The row of the recording's k-th row: that of any token in it.
    order = plan.rows.gather(1, source.to(torch.int8).argmax(2))
    members = plan.rows[:, None, :] == torch.arange(plan.row_count)[None, :, None]
    assert torch.equal(members.gather(1, order[..., None].expand_as(source)), source)
    if params["class_token"]:  # then the official order of rows is ours
        assert torch.equal(order, torch.arange(plan.row_count).expand_as(order))

    def ordered(y):
        return y.gather(1, order[..., None].expand(-1, -1, y.shape[2]))

    y = merge_tokens(x, plan, weight=size, backend=backend)
    GOLDEN.check(ordered(y), "merge_wavg", case)
    new = merge_tokens(data["size"], plan, mode="sum", backend=backend)
    GOLDEN.check(ordered(new), "new_size", case)
    GOLDEN.check(ordered(merge_tokens(x, plan, backend=backend)), "merge_mean", case)
    if "unmerge" in want:  # the official one cannot unmerge with a distillation token
        GOLDEN.check(unmerge_tokens(y, plan, backend=backend), "unmerge", case)


@pytest.mark.parametrize("case", ["vit_cls", "vit_plain", "vit_cls_dist"])
def test_every_kth(backend, case):
    data, params = GOLDEN.inputs(case), GOLDEN.params(case)
    k, tokens = params["k"], params["T"] // params["k"] * params["k"]
    metric, x = data["metric"][:, :tokens], data["x"][:, :tokens]
    destination = torch.arange(k - 1, tokens, k)
    plan = match_tokens(
        metric, tokens - destination.numel(), destination=destination, backend=backend
    )
    y = merge_tokens(x, plan, backend=backend)
    GOLDEN.check(y, "kth_merge_mean", case)
    GOLDEN.check(unmerge_tokens(y, plan, backend=backend), "kth_unmerge", case)


# -- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "merged", "options"),
    [
        (63, 20, {"size": (7, 9)}),
        (63, 40, {"size": (9, 7), "stride": (3, 2), "protect": (0, 62, 31)}),
        (17, 8, {}),
        (17, 8, {"protect": [0]}),
        (17, 7, {"protect": [4, 0]}),
        (20, 15, {"destination": torch.tensor([3, 19, 2], dtype=torch.int32)}),
        (20, 10, {"destination": torch.tensor([3, 19, 2]), "protect": (3, 5)}),
        (1, 0, {}),
    ],
)
def test_plans_are_partitions_and_backends_agree(cpu, tokens, merged, options):
    metric = torch.randn(3, tokens, 12)
    plan = match_tokens(metric, merged, backend=cpu, **options)
    check_plan(plan, tokens, merged)
    assert equal_plans(plan, match_tokens(metric, merged, backend="reference", **options))
    protect = sorted(options.get("protect", ()))
    kept = len(protect) if merged else 0
    assert plan.survivors[:, :kept].tolist() == [protect[:kept]] * 3
    assert plan.sizes[:, :kept].eq(1).all()


def test_ties_go_to_the_lowest(backend):
    metric = torch.ones(2, 12, 5)
    plan = match_tokens(metric, 3, backend=backend)
    # Sources 0, 2, 4 are merged, all into destination 1, which comes after 6, 8 and 10.
    assert plan.rows[0].tolist() == [3, 3, 3, 4, 3, 5, 0, 6, 1, 7, 2, 8]
    assert plan.order[0].tolist() == [6, 8, 10, 1, 0, 2, 4, 3, 5, 7, 9, 11]
    found = nearest_tokens(metric, metric, exclude_self=True, backend=backend)
    assert found.index.tolist() == [[1] + [0] * 11] * 2


def test_repeated_tokens_tie_wherever_they_are(cpu):
    """Columns of one tile, of its tail and of another tile score the same bits."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(1, 7, 83).to(dtype).repeat(1, 43, 1)
        index = nearest_tokens(x, x, backend=cpu).index
        assert torch.equal(index, torch.arange(7).repeat(43)[None])


def test_nan_loses_and_stays_visible(backend):
    x = torch.randn(2, 9, 6)
    x[0, 3, 2] = float("nan")
    x[1, 4] = float("inf")
    found = nearest_tokens(x, x, exclude_self=True, backend=backend)
    assert found.similarity.isnan().nonzero().tolist() == [[0, 3], [1, 4]]
    assert found.index[0, 3] == 0
    assert found.index[0].ne(3)[[0, 1, 2, 4, 5, 6, 7, 8]].all()
    nothing = torch.full((1, 3, 4), float("nan"))
    found = nearest_tokens(nothing, nothing, exclude_self=True, backend=backend)
    assert found.similarity.isnan().all()
    assert found.index.tolist() == [[1, 0, 0]]
    plan = match_tokens(x, 2, backend=backend)
    assert plan.sizes[0, plan.rows[0, 3]] == 1  # merged last
    check_plan(match_tokens(torch.full((1, 8, 3), float("nan")), 4, backend=backend), 8, 4)


def test_zero_vectors_and_nothing_allowed(backend):
    x = torch.randn(1, 4, 5)
    x[0, 1] = 0.0
    found = nearest_tokens(x, -x[:, :1], backend=backend)
    assert found.similarity[0, 1] == 0.0
    found = nearest_tokens(x, x, mask=torch.zeros(4, dtype=torch.bool), backend=backend)
    assert found.similarity.eq(-torch.inf).all()
    assert found.index.eq(-1).all()
    same = push_tokens(
        x, x, alpha=1.0, threshold=-1.0, mask=torch.zeros(4, dtype=torch.bool), backend=backend
    )
    assert torch.equal(same, x)


def test_what_cannot_be_merged_is_clamped_with_a_warning(backend):
    metric = torch.randn(1, 16, 4)
    for merged, options, limit in (
        (13, {"size": (4, 4)}, 12),
        (9, {}, 8),
        (8, {"protect": (0,)}, 7),
        (2, {"size": (4, 4), "stride": (5, 5)}, 0),
        (1, {"protect": tuple(range(1, 16, 2))}, 0),
    ):
        with pytest.warns(UserWarning, match=f"between 0 and {limit} can be merged"):
            plan = match_tokens(metric, merged, backend=backend, **options)
        assert plan.row_count == 16 - limit
    with pytest.warns(UserWarning, match="-3 of 16 tokens asked for, between 0 and 8"):
        plan = match_tokens(metric, -3, backend=backend)
    # Nothing merged: every token where it was.
    assert plan.rows.tolist() == [list(range(16))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match_tokens(metric, 12, size=(4, 4), backend=backend)


def test_random_destinations_come_from_the_generator_alone(backend):
    metric = torch.randn(2, 35, 4)
    state = torch.get_rng_state()
    plans = [
        match_tokens(
            metric, 9, size=(5, 7), generator=torch.Generator().manual_seed(seed), backend=backend
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert equal_plans(plans[0], plans[1])
    assert not equal_plans(plans[0], plans[2])
    chosen = random_of_cells(5, 7, (2, 3), torch.Generator().manual_seed(4))
    cells = {(t // 7 // 2, t % 7 // 3) for t in chosen.tolist()}
    assert cells == {(y, x) for y in range(2) for x in range(2)}


def test_one_plan_many_times(backend):
    metric = torch.randn(1, 24, 8)
    plan = match_tokens(metric, 10, backend=backend)
    kept = [t.clone() for t in plan]
    for shape, dtype in (((3, 24, 5), torch.float64), ((2, 24, 130), torch.bfloat16)):
        x = torch.randn(shape).to(dtype)
        y = merge_tokens(x, plan, backend=backend)
        wide = MergePlan(*(t.expand(shape[0], -1).contiguous() for t in plan))
        assert torch.equal(y, merge_tokens(x, wide, backend=backend))
        again = unmerge_tokens(y, plan, backend=backend)
        torch.testing.assert_close(merge_tokens(again, plan, backend=backend), y)
    assert equal_plans(plan, MergePlan(*kept))


@pytest.mark.parametrize("batches", [(2, 2), (1, 2), (2, 1)])
def test_composition(backend, batches):
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    first = match_tokens(x[: batches[0]], 15, protect=(0,), backend=backend)
    y = merge_tokens(x, first, mode="sum", backend=backend)
    second = match_tokens(y[: batches[1]], 9, protect=(0,), backend=backend)
    both = compose_plans(first, second)
    check_plan(both, 40, 24)
    for mode in ("sum", "amax", "prune"):
        twice = merge_tokens(
            merge_tokens(x, first, mode=mode, backend=backend), second, mode=mode, backend=backend
        )
        torch.testing.assert_close(merge_tokens(x, both, mode=mode, backend=backend), twice)
    z = torch.randn(2, 16, 3)
    assert torch.equal(
        unmerge_tokens(z, both, backend=backend),
        unmerge_tokens(unmerge_tokens(z, second, backend=backend), first, backend=backend),
    )
    # A mean of means with the sizes as weights is the mean of all.
    mean = merge_tokens(x, first, backend=backend)
    sizes = first.sizes.expand(2, -1).double()
    mean = merge_tokens(mean, second, weight=sizes, backend=backend)
    torch.testing.assert_close(merge_tokens(x, both, backend=backend), mean)


def test_plans_that_do_not_compose():
    plan = match_tokens(torch.randn(2, 8, 3), 2)
    with pytest.raises(TypeError, match="first: expected a MergePlan"):
        compose_plans(None, plan)
    with pytest.raises(ValueError, match="second: expected a plan for 6 tokens"):
        compose_plans(plan, plan)
    other = match_tokens(torch.randn(3, 6, 3), 2)
    with pytest.raises(ValueError, match="first: expected batch 3 or 1, got 2"):
        compose_plans(plan, other)


# -- use in attention -----------------------------------------------------------------------------


def test_proportional_attention_is_attention_to_all(backend):
    """Merging equal tokens and adding the logarithm of their number changes nothing."""
    distinct = torch.randn(1, 6, 16, dtype=torch.float64)
    x = distinct.repeat_interleave(2, dim=1)
    plan = match_tokens(x, 6, backend=backend)
    y = merge_tokens(x, plan, backend=backend)
    bias = plan.sizes.double().log()[:, None, None, :]
    query = torch.randn(1, 2, 5, 8, dtype=torch.float64)

    def heads(t):
        return t.unflatten(2, (2, 8)).transpose(1, 2)

    full = attend(query, KV(heads(x), heads(x)))
    merged = attend(query, KV(heads(y), heads(y), bias=bias))
    torch.testing.assert_close(merged, full)


def test_weights_of_zero(backend):
    x = torch.randn(1, 8, 3, requires_grad=True)
    plan = match_tokens(x, 4, backend=backend)
    y = merge_tokens(x, plan, weight=torch.zeros(1, 8), backend=backend)
    assert y.eq(0).all()
    assert merge_tokens(x.detach(), plan, weight=torch.zeros(1, 8), backend=backend).eq(0).all()
    assert torch.autograd.grad(y.sum(), x)[0].eq(0).all()


def test_weighted_means_agree_with_and_without_gradients(backend):
    x, weight = torch.randn(2, 30, 7), torch.rand(2, 30) + 0.1
    plan = match_tokens(x, 14, backend=backend)
    plain = merge_tokens(x, plan, weight=weight, backend=backend)
    watched = merge_tokens(x.requires_grad_(), plan, weight=weight, backend=backend)
    torch.testing.assert_close(plain, watched)
    alone = plan.sizes == 1
    assert torch.equal(plain[alone], x.gather(1, plan.survivors[..., None].expand_as(plain))[alone])


def test_amax_gives_its_gradient_to_the_lowest_token(backend):
    # One row of all four tokens, whose survivor is token 3.
    plan = match_tokens(torch.ones(1, 4, 2), 3, destination=torch.tensor([3]), backend=backend)
    assert plan.order.tolist() == [[3, 0, 1, 2]]
    x = torch.tensor([[[1.0, 0.0], [2.0, 5.0], [2.0, 1.0], [2.0, 5.0]]], requires_grad=True)
    y = merge_tokens(x, plan, mode="amax", backend=backend)
    assert y.tolist() == [[[2.0, 5.0]]]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[[0, 0], [1, 1], [0, 0], [0, 0]]]
    bad = x.detach().clone()
    bad[0, 2, 0] = float("nan")
    y = merge_tokens(bad, plan, mode="amax", backend=backend)
    assert y[0, 0, 0].isnan()
    assert y[0, 0, 1] == 5.0


def test_push_moves_by_alpha_and_leaves_the_rest_alone(backend):
    x, reference = torch.randn(2, 50, 8), torch.randn(1, 30, 8)
    similarity, index = nearest_tokens(x, reference, backend=backend)
    y = push_tokens(x, reference, alpha=0.9, threshold=0.6, backend=backend)
    moved = similarity > 0.6
    assert 0 < moved.sum() < moved.numel()
    assert torch.equal(y[~moved], x[~moved])
    target = reference[0][index]
    before, after = ((t - target).norm(dim=-1)[moved] for t in (x, y))
    torch.testing.assert_close(after, 1.9 * before, rtol=1e-5, atol=1e-6)


# -- compile, determinism, memory, levels ---------------------------------------------------------


def test_the_whole_chain_compiles_in_one_graph(cpu):
    def chain(x, destination):
        plan = match_tokens(x, 12, destination=destination, protect=(0,))
        y = merge_tokens(x, plan, weight=x.square().sum(-1))
        y = push_tokens(y, y[:, :5], alpha=0.5, threshold=0.2)
        return unmerge_tokens(y, plan) + merge_tokens(x, plan, mode="amax").sum()

    x, destination = torch.randn(2, 31, 8, requires_grad=True), torch.arange(2, 31, 4)
    expected = chain(x, destination)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    result = compiled(x, destination)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result.square().sum(), x)[0], grad)


def test_raw_op_has_the_gradient_of_a_shared_reference(cpu):
    """torch.compile calls raw ops, and with a reference that nobody expanded to the batch of x."""
    x, reference = torch.randn(2, 9, 4).requires_grad_(), torch.randn(1, 7, 4).requires_grad_()
    raw, _ = torch.ops.transfuse.nearest_tokens(x, reference, None, False)
    expected = nearest_tokens(x, reference, backend=cpu).similarity
    found, want = (torch.autograd.grad(s.sum(), (x, reference)) for s in (raw, expected))
    torch.testing.assert_close(found, want)


def test_threads_do_not_change_a_bit(cpu):
    x = torch.randn(2, 1200, 96, requires_grad=True)

    def run(threads):
        torch.set_num_threads(threads)
        plan = match_tokens(x, 600, size=(30, 40))
        y = merge_tokens(x, plan, weight=x.detach().square().mean(-1))
        z = unmerge_tokens(y, plan)
        found = nearest_tokens(x, x, exclude_self=True)
        total = (z.square().sum() + found.similarity.sum(), x)
        return *plan, y, z, *found, *torch.autograd.grad(*total)

    one = run(1)
    for threads in (2, 3, 2):
        assert all(torch.equal(a, b) for a, b in zip(one, run(threads), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_score_matrix(device_for, backend):
    """A process that may only grow by a small part of what the scores would take."""
    device_for(SPEC, backend, torch.float32)
    script = (
        "import resource, sys, torch\n"
        "from transfuse.ops import nearest_tokens\n"
        "x = torch.randn(1, 12000, 16)\n"
        "nearest_tokens(x[:, :64], x, backend=sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "nearest_tokens(x, x, exclude_self=True, backend=sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, backend], capture_output=True, text=True, check=True
    )
    assert int(child.stdout) * 1024 < 12000 * 12000 * 4 // 20


# -- refusals -------------------------------------------------------------------------------------


def test_a_plan_that_is_no_plan_reads_nothing_outside(cpu):
    x = torch.randn(2, 8, 4)
    plan = match_tokens(x, 3)
    y = merge_tokens(x, plan)
    for field in plan._fields:
        for value in (-1, 9, 2**40):
            broken = getattr(plan, field).clone()
            broken[1, 2] = value
            bad = plan._replace(**{field: broken})
            use, tensor = (unmerge_tokens, y) if field == "rows" else (merge_tokens, x)
            with pytest.raises(RuntimeError, match="names a token or row that does not exist"):
                use(tensor, bad)


def test_raw_ops_refuse_what_would_read_out_of_bounds(cpu):
    ops = torch.ops.transfuse
    x = torch.zeros(2, 6, 4)
    plan = match_tokens(torch.randn(2, 6, 4), 2)
    for op, args, match in (
        (ops.nearest_tokens, (x[0], x, None, False), "x must have 3 axes"),
        (ops.nearest_tokens, (x, x.double(), None, False), "reference must have the dtype"),
        (ops.nearest_tokens, (x, x[:, :, :3], None, False), "reference must have the channels"),
        (ops.nearest_tokens, (x, x[:, :3], None, True), "exclude_self needs"),
        (ops.nearest_tokens, (x, x, torch.ones(2, 5) > 0, False), "mask must have shape"),
        (ops.match_tokens, (x, torch.tensor([6]), [], 0), r"token numbers in \[0, 6\)"),
        (ops.match_tokens, (x, torch.tensor([1, 1]), [], 0), "must hold different tokens"),
        (ops.match_tokens, (x, None, [-1], 0), r"token numbers in \[0, 6\)"),
        (ops.match_tokens, (x, None, [0], 3), r"merged must be in \[0, 2\], got 3"),
        (ops.match_tokens, (x, None, [1, 3, 5], 1), r"merged must be in \[0, 0\], got 1"),
        (ops.merge_segments, (x[:, :5], None, *plan, 0), "x must have the plan's 6 tokens"),
        (ops.merge_segments, (x, x[..., 0].double(), *plan, 0), "scale must be"),
        (ops.merge_segments, (x, None, *plan, 4), "weighting must be"),
        (ops.merge_gather, (x[:, :4], None, *plan, 3), "weighting must be"),
        (ops.merge_gather, (x, None, *plan, 0), "y must have the plan's 4 rows"),
        (ops.push_tokens, (x, x, x[..., 0], plan.rows[:, :5], 1.0, 0.5), "index must have shape"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op(*args)
    with pytest.raises(RuntimeError, match="does not exist"):
        ops.push_tokens(x, x, torch.ones(2, 6), torch.full((2, 6), 7), 1.0, 0.5)


def test_explain():
    text = transfuse.explain("match_tokens", torch.zeros(1, 2, 3))
    assert "Triton kernels need a CUDA device" in text or "triton" in text
