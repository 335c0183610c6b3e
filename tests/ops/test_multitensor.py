"""What the contract does not cover of the ops on lists of tensors."""

from __future__ import annotations

import pytest
import torch

from transfuse.ops import (
    lincomb,
    multi_dot,
    multi_gram,
    multi_norm,
    ratio_merge,
    sam_perturb_,
    sam_restore_,
    ties_merge,
    trim_largest,
)
from transfuse.ops._multitensor_reference import hashed_ids, multi_dot_reference
from transfuse.ops.ties import trim_largest_reference
from transfuse.testing.specs import _multitensor_errors as errors

BACKENDS = ["cpu", "reference"]
SHAPES = ((40, 1000), (3,), (), (0, 2))


def lists(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(count)]


# ---- lincomb -------------------------------------------------------------------------------------


def test_many_half_terms_are_rounded_once():
    """21 half-precision lists: eager sums in half are a thousand times further off."""
    deltas, table = lists(21, torch.float16), torch.full((21,), 0.3)
    found = lincomb(deltas, table, base=lists(1, seed=1)[0])
    for j, y in enumerate(found):
        exact = lists(1, seed=1)[0][j].double() + 0.3 * sum(d[j].double() for d in deltas)
        torch.testing.assert_close(y.double(), exact, rtol=2e-7, atol=2e-6)


def test_dtypes_of_results_and_of_sums():
    base = [t.bfloat16() for t in lists(1)[0]]
    assert {t.dtype for t in lincomb(lists(1, torch.float16), torch.ones(1), base=base)} == {
        torch.bfloat16
    }
    assert {t.dtype for t in lincomb(lists(1, torch.float16), torch.ones(1))} == {torch.float16}
    # A float64 list makes the sum float64: what float32 would lose is still there.
    big, small = [torch.tensor([1e9])], [torch.tensor([1.0], dtype=torch.float64)]
    one = lincomb([small, big, big], torch.tensor([1.0, 1.0, -1.0]))
    assert one[0].dtype == torch.float64
    assert one[0] == 1.0


def test_coefficients_that_are_not_finite_show():
    found = lincomb([[torch.ones(3)]], torch.tensor([float("nan")]))
    assert found[0].isnan().all()


def test_gradients_reach_whatever_requires_them_and_nothing_else():
    base, *deltas = lists(3)
    table = torch.randn(2, 4).requires_grad_()
    deltas[1][0].requires_grad_()
    made = lincomb(deltas, table, base=base)
    (made[0].sum() + made[1].sum()).backward()
    assert deltas[0][0].grad is None
    torch.testing.assert_close(
        deltas[1][0].grad, table.detach()[1, 0].expand(40, 1000).contiguous()
    )
    torch.testing.assert_close(table.grad[0, 0], deltas[0][0].sum(), rtol=1e-5, atol=1e-3)
    # Results that did not matter.
    assert torch.equal(table.grad[:, 2:], torch.zeros(2, 2))


@pytest.mark.parametrize("mode", ["ids", "hash"])
def test_same_bits_for_every_number_of_threads(mode):
    """Blocks over several chunks, through the gradient of the coefficients."""
    deltas = lists(3)
    partition = 5
    if mode == "ids":
        partition = [torch.randint(0, 9, s, dtype=torch.uint8) for s in SHAPES]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        table = torch.arange(3.0 * 4 * 8).reshape(3, 4, 8).requires_grad_()
        made = lincomb(deltas, table, partition=partition)
        made[0].square().sum().backward()
        results.append((made[0].detach(), table.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_hash_spreads_evenly_and_depends_on_seed_and_tensor():
    counts = torch.bincount(hashed_ids(200_000, 12345, 10, torch.device("cpu")), minlength=10)
    assert (counts / 20_000 - 1).abs().max() < 0.03
    one = [[torch.ones(1000), torch.ones(1000)]]
    table = torch.arange(4.0).expand(1, 2, 4)
    first, second = lincomb(one, table, partition=7)
    other = lincomb(one, table, partition=8)[0]
    assert 0.1 < (first == second).float().mean() < 0.4
    assert 0.1 < (first == other).float().mean() < 0.4
    # Elements beyond 2^32 have numbers of their own: the high half enters the hash.
    near = hashed_ids(64, 3, 100, torch.device("cpu"))
    assert near.unique().numel() > 30


def test_views_of_one_tensor_and_channels_last():
    flat = torch.randn(24)
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    found = lincomb([[flat[::2], x], [flat[1::2], x]], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found[0], flat[::2] + 2 * flat[1::2])
    torch.testing.assert_close(found[1], 3 * x)
    assert found[1].is_contiguous()


# ---- norms and products --------------------------------------------------------------------------


def test_norms_neither_overflow_nor_vanish():
    for size in (1e-30, 1e30):
        x = [torch.full((3,), size), torch.full((1,), size)]
        torch.testing.assert_close(multi_norm(x), torch.tensor(2 * size))
    assert multi_norm([torch.zeros(0)]) == 0
    assert multi_norm([torch.tensor([1.0, float("nan")])], ord=float("inf")).isnan()


def test_norm_of_zeros_has_gradient_zero():
    x = torch.zeros(3, requires_grad=True)
    multi_norm([x]).backward()
    assert torch.equal(x.grad, torch.zeros(3))


def test_products_agree_with_each_other():
    one, two = lists(2)
    gram = multi_gram([one, two])
    torch.testing.assert_close(gram[0, 1], multi_dot(one, two), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(gram.diagonal().sqrt()[0], multi_norm(one))
    assert torch.equal(gram, gram.T)
    absent = multi_gram([[None, *one[1:]], two])
    torch.testing.assert_close(absent[0, 0], multi_norm(one[1:]) ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inner_product(dtype):
    xs, ys = lists(2, dtype)
    found = multi_dot(xs, ys, backend="cpu")
    exact = multi_dot_reference([x.double() for x in xs], [y.double() for y in ys])
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
    assert found.dtype == multi_dot_reference(xs, ys).dtype


def test_inner_product_has_derivatives_of_any_order():
    xs, ys = ([torch.randn(s, dtype=torch.float64) for s in ((2, 3), ())] for _ in range(2))
    inputs = [t.requires_grad_() for t in (*xs, *ys)]

    def call(*tensors):
        return multi_dot(tensors[:2], tensors[2:], backend="cpu") ** 2

    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("bad", errors.DOT, ids=lambda bad: bad.name)
def test_refused_products(bad):
    for op in (multi_dot, multi_dot_reference):
        with pytest.raises(bad.error, match=bad.match):
            bad.call(op)


# ---- weighted means ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_denominator_of_zero_gives_the_target(backend):
    thetas = [[torch.tensor([1.0, 2.0])], [torch.tensor([5.0, 6.0])]]
    fishers = [[torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 0.0])]]
    options = {"floor": 0.0, "backend": backend}
    table = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    first, second = ratio_merge(thetas, fishers, table, **options)
    assert first[0].tolist() == [3.0, 2.0]
    assert second[0].tolist() == [5.0, 2.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_weights_do_not_vanish(backend):
    thetas = [[torch.tensor([1.0, 0.0])], [torch.tensor([2.0, 0.0])]]
    fishers = [[torch.tensor([1e-20, 1e2])], [torch.tensor([3e-20, 1e2])]]
    found = ratio_merge(thetas, fishers, torch.ones(2), floor=0.0, backend=backend)
    torch.testing.assert_close(found[0][0], torch.tensor(1.75))


def test_a_model_without_a_coefficient_is_not_read():
    thetas = [[torch.ones(2)], [torch.full((2,), float("nan"))]]
    fishers = [[torch.ones(2)], [torch.ones(2)]]
    found = ratio_merge(thetas, fishers, torch.tensor([1.0, 0.0]))
    assert torch.equal(found[0], torch.ones(2))


# ---- perturbation --------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_perturb_and_restore(dtype, adaptive):
    params, grads = lists(2, dtype)
    for p in params:
        p.requires_grad_()
    before = [p.detach().clone() for p in params]
    versions = [p._version for p in params]
    step = sam_perturb_(params, grads, torch.tensor(0.5), adaptive=adaptive)
    wide = [(p.double(), g.double()) for p, g in zip(before, grads, strict=True)]
    terms = torch.cat([(p * g if adaptive else g).flatten() for p, g in wide])
    norm = torch.linalg.vector_norm(terms)
    torch.testing.assert_close(step.norm.double(), norm, rtol=1e-6, atol=0)
    for p, (x, g), version in zip(params, wide, versions, strict=True):
        moved = x + 0.5 / norm * (x * x * g if adaptive else g)
        torch.testing.assert_close(
            p.detach(), moved.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7
        )
        assert p._version > version
    sam_restore_(params, step.backup)
    assert all(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
    again = sam_perturb_(params, grads, 0.5, adaptive=adaptive, backup=step.backup)
    assert all(a is b for a, b in zip(again.backup, step.backup, strict=True))


def test_perturb_backends_agree_and_strided_parameters_are_moved():
    results = []
    for backend in (None, "reference"):
        params, grads = lists(2)
        params[0] = params[0].mT
        grads[0] = grads[0].mT
        step = sam_perturb_(params, grads, 0.1, adaptive=True, backend=backend)
        results.append([p.clone() for p in params])
        sam_restore_(params, step.backup, backend=backend)
        assert torch.equal(params[0].mT, lists(1)[0][0])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_refused_perturbations():
    params, grads = lists(2)
    with pytest.raises(ValueError, match=r"grads: expected 4 tensors \(as params\), got 1"):
        sam_perturb_(params, grads[:1], 0.1)
    with pytest.raises(ValueError, match="radius: expected one number"):
        sam_perturb_(params, grads, torch.zeros(2))
    with pytest.raises(ValueError, match=r"backup\[0\]: expected memory of its own"):
        sam_perturb_(params, grads, 0.1, backup=params)
    with pytest.raises(TypeError, match=r"backup\[0\]: expected dtype float32"):
        sam_restore_(params, [p.double() for p in params])
    with pytest.raises(RuntimeError, match="a tensor is not contiguous"):
        sam_restore_([params[0].mT], [params[0].mT.clone()], backend="cpu")
    with pytest.raises(NotImplementedError, match=r"torch.func does not see"):
        torch.func.grad(lambda g: sam_perturb_([torch.zeros(3)], [g], 0.1).norm)(torch.ones(3))
    assert all(torch.equal(a, b) for a, b in zip(params, lists(1)[0], strict=True))


# ---- trimming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [1e-9, 0.2, 0.999, 1.0])
def test_threshold_is_exact(dtype, density):
    (x,) = lists(1, dtype)
    found = trim_largest(x, density)
    flat = torch.cat([t.flatten() for t in x])
    count = max(1, -int(-density * flat.numel() // 1))
    least = flat.abs().sort(descending=True).values[count - 1]
    kept = torch.cat([t.flatten() for t in found])
    assert torch.equal(kept, torch.where(flat.abs() >= least, flat, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_trimming_of_equal_and_odd_numbers(backend):
    same = torch.full((5000,), -2.0)
    assert torch.equal(trim_largest([same], 0.1, backend=backend)[0], same)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, -1.0])
    found = trim_largest([odd], 0.5, backend=backend)[0]
    assert found[2] == float("inf")
    assert found[3].isnan()
    assert found[[0, 1, 4]].tolist() == [0.0, 0.0, 0.0]
    assert trim_largest([torch.zeros(0)], 0.5, backend=backend)[0].shape == (0,)
    # NaN counts as largest: beside as many as are kept, nothing else is.
    few = trim_largest([torch.tensor([float("nan"), 1.0, 2.0, 3.0])], 0.25, backend=backend)[0]
    assert few[0].isnan()
    assert few[1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", errors.TRIM, ids=lambda bad: bad.name)
def test_refused_trimming(bad):
    for op in (trim_largest, trim_largest_reference):
        with pytest.raises(bad.error, match=bad.match):
            bad.call(op)
    with pytest.raises(NotImplementedError, match="trim_largest: has no derivative"):
        trim_largest([torch.ones(3, requires_grad=True)], 0.5)


def test_ties_as_its_algorithm_is_written():
    deltas = lists(4)
    flat = torch.stack([torch.cat([t.flatten() for t in d]) for d in deltas])
    n = flat.shape[1]
    least = flat.abs().kthvalue(n - -(-n * 3 // 10) + 1, dim=1, keepdim=True).values
    flat = torch.where(flat.abs() >= least, flat, 0)
    sign = flat.sum(0).sign()
    agrees = (flat.sign() == sign) & (flat != 0)
    mean = torch.where(agrees, flat, 0).sum(0) / agrees.sum(0).clamp_min(1)
    base = lists(1, seed=3)[0]
    found = ties_merge(deltas, base=base, density=0.3, scale=0.4)
    start = torch.cat([t.flatten() for t in base])
    torch.testing.assert_close(torch.cat([t.flatten() for t in found]), start + 0.4 * mean)
