"""Curvature of linear heads: against dense Hessians of autograd, and what the contract leaves."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transfuse import ops
from transfuse.ops import _head_call, _head_distance, _head_hutchinson
from transfuse.ops._rademacher import rademacher
from transfuse.testing.specs import find_spec

SPEC = find_spec("head_hessian_diagonal")
BOUNDS = [0, 9, 10, 17]


@pytest.fixture
def cpu(device_for) -> str:
    """The name of the native backend; skips where it is not built."""
    device_for(SPEC, "cpu", torch.float32)
    return "cpu"


def batch(classes, columns=6, bias=True, samples=17, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    head = (normal(samples, columns), normal(classes, columns), normal(classes) if bias else None)
    return head, torch.randint(0, max(classes, 2), (samples,), generator=generator)


def dense(head, labels, first, last):
    """Gradient (P,) and Hessian (P, P) of a domain's loss by autograd, and rows (C, D) of (P,)."""
    features, weight, bias = head
    x, y = features[first:last], labels[first:last]

    def loss(flat):
        rows = flat.view(weight.shape[0], -1)
        logits = x @ rows[:, : weight.shape[1]].T
        logits = logits if bias is None else logits + rows[:, -1]
        if weight.shape[0] == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0], y.to(x.dtype))
        return F.cross_entropy(logits, y)

    joined = weight if bias is None else torch.cat((weight, bias[:, None]), 1)
    flat = joined.flatten()
    return torch.func.grad(loss)(flat), torch.func.hessian(loss)(flat), joined.shape


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_dense_hessians(classes, bias):
    head, labels = batch(classes, bias=bias)
    found = [dense(head, labels, a, b) for a, b in itertools.pairwise(BOUNDS)]
    g = torch.stack([f[0] for f in found])
    hessians = torch.stack([f[1] for f in found])
    shape = (-1, *found[0][2])
    v = torch.randn(3, 2, *found[0][2], dtype=torch.float64)
    expected = {
        "head_gradient": ((labels,), g.view(shape)),
        "head_hessian_diagonal": ((), hessians.diagonal(dim1=1, dim2=2).view(shape)),
        "head_hessian_trace": ((), hessians.diagonal(dim1=1, dim2=2).sum(1)),
        "head_hgp": ((labels,), (hessians @ g[..., None]).view(shape)),
        "head_hessian_distance": (
            (),
            (hessians[:, None] - hessians[None]).square().sum((2, 3)),
        ),
    }
    for name, (more, truth) in expected.items():
        result = getattr(ops, name)(*head, *more, segments=BOUNDS)
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-12, msg=name)
    for vectors in (v[0, 0], v[0], v):
        result = ops.head_hessian_product(*head, vectors, segments=BOUNDS)
        wide = vectors.expand(3, *([1] * (3 - min(vectors.dim(), 3))), *vectors.shape[-3:])
        wide = wide.reshape(3, -1, g.shape[1]).expand(3, -1, -1)
        truth = torch.einsum("epq,erq->erp", hessians, wide).reshape(result.shape)
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 4])
def test_one_domain_is_a_call_without_segments(classes):
    head, labels = batch(classes)
    for name in ("head_gradient", "head_hessian_diagonal", "head_hessian_trace", "head_hgp"):
        more = (labels,) if name in ("head_gradient", "head_hgp") else ()
        op = getattr(ops, name)
        alone, one = op(*head, *more), op(*head, *more, segments=[0, 17])
        assert torch.equal(one, alone[None])
        apart = op(*head, *more, segments=BOUNDS)
        assert torch.equal(apart, op(*head, *more, segments=torch.tensor(BOUNDS)))
        for e, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
            part = op(head[0][a:b], *head[1:], *(m[a:b] for m in more))
            torch.testing.assert_close(apart[e], part, rtol=1e-12, atol=1e-14)


def test_binary_labels_of_any_kind():
    head, labels = batch(1)
    expected = ops.head_gradient(*head, labels)
    for other in (labels.int(), labels.double(), labels.float()[:, None]):
        torch.testing.assert_close(ops.head_gradient(*head, other), expected)
    soft = ops.head_gradient(*head, torch.full((17,), 0.25))
    weight = head[1].clone().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(
        F.linear(head[0], weight, head[2])[:, 0], torch.full((17,), 0.25, dtype=torch.float64)
    )
    torch.testing.assert_close(soft[:, :-1], torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_saturated_softmax_keeps_its_digits(device_for, classes, backend):
    """Entries of 1e-20, where 1 - p rounded in float32 is 0 or 6e-8."""
    device_for(SPEC, backend, torch.float32)
    x = torch.ones(2, 1)
    weight = torch.tensor([[46.0], [3.0], [0.0]])[:classes]
    result = ops.head_hessian_diagonal(x, weight, None, backend=backend)
    truth = ops.head_hessian_diagonal(x.double(), weight.double(), None, backend="reference")
    assert 0 < truth.max() < 1e-15
    torch.testing.assert_close(result, truth.float(), rtol=1e-4, atol=0)


def test_nan_stays_in_its_domain():
    head, labels = batch(3)
    head[0][12, 1] = torch.nan
    for name in ("head_gradient", "head_hessian_diagonal", "head_hessian_trace", "head_hgp"):
        more = (labels,) if name in ("head_gradient", "head_hgp") else ()
        result = getattr(ops, name)(*head, *more, segments=BOUNDS).reshape(3, -1)
        assert result[:2].isfinite().all(), name
        assert result[2].isnan().any(), name
    distance = ops.head_hessian_distance(*head, segments=BOUNDS)
    assert distance[:2, :2].isfinite().all()
    assert distance[2, :2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32(dtype):
    """For half features, for a float32 head on half features, and under autocast."""
    head, labels = batch(4, columns=40, dtype=dtype)
    wide = [t.float() for t in head]
    for name in ("head_gradient", "head_hessian_diagonal", "head_hgp", "head_hessian_distance"):
        more = (labels,) if name in ("head_gradient", "head_hgp") else ()
        op = getattr(ops, name)
        expected = op(*wide, *more, segments=BOUNDS)
        assert expected.dtype == torch.float32
        assert torch.equal(op(*head, *more, segments=BOUNDS), expected)
        assert torch.equal(op(head[0], *wide[1:], *more, segments=BOUNDS), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(op(*wide, *more, segments=BOUNDS), expected)
    features = head[0].clone().requires_grad_()
    ops.head_hessian_diagonal(features, *wide[1:], segments=BOUNDS).sum().backward()
    assert features.grad.dtype == dtype
    assert features.grad.abs().sum() > 0


class _Largest(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **({} if kwargs is None else kwargs))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize(
    "name",
    [
        "head_gradient",
        "head_hessian_diagonal",
        "head_hessian_trace",
        "head_hgp",
        "head_hessian_distance",
        "head_hutchinson_diagonal",
    ],
)
def test_nothing_large_is_formed(name, monkeypatch):
    """Neither N x C x d nor a Hessian nor a matrix of all probes, forward or backward."""
    monkeypatch.setattr(_head_hutchinson, "CHUNK", 2000)
    monkeypatch.setattr(_head_distance, "BLOCK", 1000)
    samples, columns, classes = 60, 100, 12
    head, labels = batch(classes, columns, samples=samples)
    more = {"head_gradient": (labels,), "head_hgp": (labels,), "head_hutchinson_diagonal": (50,)}
    leaves = [t.requires_grad_() for t in head]
    with _Largest() as mode:
        op = getattr(ops, name)
        op(*leaves, *more.get(name, ()), segments=[0, 20, 50, 60]).square().sum().backward()
    assert mode.numel < samples * classes * columns / 8
    assert all(t.grad is not None for t in leaves)


# -- distance and Hutchinson: the paths with their own derivative -------------------------------


@pytest.mark.parametrize("block", [1 << 20, 40])
def test_distance_in_blocks(monkeypatch, block):
    monkeypatch.setattr(_head_distance, "BLOCK", block)
    for classes, bias in ((3, True), (1, False)):
        head, _ = batch(classes, columns=4, bias=bias)
        leaves = [t.requires_grad_() for t in head if t is not None]

        def of(*tensors, bias=bias, backend=None):
            given = tensors if bias else (*tensors, None)
            return ops.head_hessian_distance(*given, segments=BOUNDS, backend=backend)

        torch.testing.assert_close(of(*leaves), of(*leaves, backend="reference"))
        assert torch.autograd.gradcheck(of, leaves)


def test_distance_of_a_domain_to_itself_and_to_its_copy():
    head, _ = batch(5, columns=30, dtype=torch.float32)
    features = torch.cat((head[0][:8], head[0][:8], head[0][8:]))
    distance = ops.head_hessian_distance(features, *head[1:], segments=[0, 8, 16, 25])
    assert torch.equal(distance, distance.T)
    assert distance.diagonal().abs().max() == 0
    assert distance[0, 1] < 1e-12 * distance[0, 2]


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("chunk", [1 << 20, 30])
def test_hutchinson(monkeypatch, chunk, independent):
    """Chunks change nothing, drawn probes are given ones, and the derivative is right."""
    monkeypatch.setattr(_head_hutchinson, "CHUNK", chunk)
    for classes in (1, 3):
        head, _ = batch(classes, columns=4)
        leaves, fast = [t.requires_grad_() for t in head], {"fast_mode": classes == 3}
        options = {"segments": BOUNDS, "independent": independent, "seed": -3}

        def of(*tensors, options=options, **more):
            return ops.head_hutchinson_diagonal(*tensors, 7, **options, **more)

        torch.testing.assert_close(of(*leaves), of(*leaves, backend="reference"))
        assert torch.autograd.gradcheck(of, leaves, **fast)
        z = rademacher(-3, 0, 21, classes * 5, torch.float64, torch.device("cpu"))
        z = z.view(3, 7, classes, 5) if independent else z[:7].view(7, classes, 5)
        given = ops.head_hutchinson_diagonal(*leaves, z, segments=BOUNDS)
        torch.testing.assert_close(of(*leaves), given)
        product = ops.head_hessian_product(*head, z, segments=BOUNDS)
        torch.testing.assert_close(given, (product * z).mean(1))


def test_hutchinson_has_the_variance_of_the_theory():
    """Var of entry i over R probes is sum over j != i of H_ij^2, divided by R."""
    head, labels = batch(3, columns=4)
    _, hessian, _ = dense(head, labels, 0, 17)
    exact = ops.head_hessian_diagonal(*head).flatten()
    runs = torch.stack(
        [ops.head_hutchinson_diagonal(*head, 20, seed=s).flatten() for s in range(400)]
    )
    variance = (hessian.square().sum(1) - exact.square()) / 20
    deviation = (runs.mean(0) - exact) / (variance / 400).sqrt()
    assert deviation.abs().max() < 4.5
    assert (runs.var(0) / variance - 1).abs().max() < 0.35


def test_second_derivatives_are_refused_or_right(monkeypatch):
    monkeypatch.setattr(_head_distance, "BLOCK", 100)  # else a call as small as this is composed
    head, labels = batch(3, columns=4)
    leaves = [t.requires_grad_() for t in head]

    def twice(op, *more, **options):
        result = op(*leaves, *more, segments=BOUNDS, **options).square().sum()
        (first,) = torch.autograd.grad(result, leaves[:1], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves[:1])[0]

    for op, more in ((ops.head_hessian_distance, ()), (ops.head_hutchinson_diagonal, (5,))):
        with pytest.raises(NotImplementedError, match='backend="reference"'):
            twice(op, *more)
        assert twice(op, *more, backend="reference").abs().max() > 0
    for op, more in ((ops.head_hessian_diagonal, ()), (ops.head_gradient, (labels,))):
        torch.testing.assert_close(twice(op, *more), twice(op, *more, backend="reference"))


def test_third_derivatives_are_refused(cpu):
    head, _ = batch(3, columns=4)
    x = head[0].requires_grad_()
    result = ops.head_hessian_diagonal(x, *head[1:], backend=cpu).square().sum()
    (first,) = torch.autograd.grad(result, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="not implemented"):
        torch.autograd.grad(second.sum(), x)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((0,), {}, ValueError, "probes: expected an integer of at least 1"),
        ((2.0,), {}, TypeError, "probes: expected an integer"),
        ((torch.ones(3, 5),), {}, ValueError, r"probes: expected shape \(R, C, D\)"),
        ((torch.ones(0, 3, 5),), {}, ValueError, "probes: expected at least one"),
        ((torch.ones(2, 3, 4),), {}, ValueError, r"probes: expected \(C, D\) = \(3, 5\)"),
        ((torch.ones(2, 1, 3, 5),), {}, ValueError, "probes: expected at most 3 dim"),
        ((4,), {"seed": 2**64}, ValueError, "seed: expected a 64-bit integer"),
        ((4,), {"seed": 0.5}, TypeError, "seed: expected an integer"),
        ((4,), {"independent": 1}, TypeError, "independent: expected a bool"),
    ],
)
def test_hutchinson_refuses(arguments, options, error, match):
    head, _ = batch(3, columns=4)
    with pytest.raises(error, match=match):
        ops.head_hutchinson_diagonal(*head, *arguments, **options)


def test_distance_needs_domains():
    head, _ = batch(3)
    with pytest.raises(TypeError, match="segments: expected offsets of the domains, got None"):
        ops.head_hessian_distance(*head, segments=None)


# -- probes ---------------------------------------------------------------------------------------


def naive_word(seed, sample, block, word):
    """One word of Philox 4x32-10, by Python's integers."""
    low = 0xFFFFFFFF
    c = [block & low, block >> 32, sample & low, sample >> 32]
    k = [seed & low, seed >> 32]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second & low, (first >> 32) ^ c[3] ^ k[1], first & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c[word]


def test_signs_are_bits_of_the_counter():
    seed, start, size = 12345678901234567890, 2**33 + 5, 300
    signs = rademacher(seed, start, 3, size, torch.float32, torch.device("cpu"))
    assert signs.shape == (3, size)
    for probe, e in ((0, 0), (1, 31), (1, 127), (2, 128), (0, 161), (2, 299)):
        word = naive_word(seed, start + probe, e // 128, e % 128 // 32)
        assert signs[probe, e] == (1.0 if word >> e % 32 & 1 else -1.0)
    again = rademacher(seed, start + 1, 1, size, torch.float64, torch.device("cpu"))
    assert torch.equal(again[0], signs[1].double())
    many = rademacher(0, 0, 64, 4096, torch.float32, torch.device("cpu"))
    assert many.abs().min() == 1
    assert (many @ many.T - 4096 * torch.eye(64)).abs().max() < 5.5 * 64


# -- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gradient", "diagonal", "hgp"])
def test_threads_do_not_change_a_bit(cpu, kind):
    head, labels = batch(9, columns=700, samples=96, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in head]

    def run(threads):
        torch.set_num_threads(threads)
        more = () if kind == "diagonal" else (labels,)
        op = ops.head_hessian_diagonal if kind == "diagonal" else getattr(ops, f"head_{kind}")
        out = op(*leaves, *more, segments=[0, 32, 33, 96], backend=cpu)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    one = run(1)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(one, run(threads), strict=True))


def test_raw_ops_refuse_what_would_read_out_of_bounds(cpu):
    raw = torch.ops.transfuse
    x, w, b = torch.zeros(6, 3), torch.zeros(2, 3), torch.zeros(2)
    for args, match in (
        ((x, w[:, :2], b, None, None, [0, 6]), "weight must have shape"),
        ((x, w, b[:1], None, None, [0, 6]), "bias must have shape"),
        ((x, w, b, None, None, [0, 5]), "offsets must go from 0 to 6"),
        ((x, w, b, None, None, [0, 3, 3, 6]), "domain 1 is empty"),
        ((x, w, b, None, None, []), "at least one domain"),
        ((x, w, b, b, None, [0, 6]), "targets must have shape"),
        ((x.half(), w, b, None, None, [0, 6]), "float32 or float64"),
        ((x, w.double(), b, None, None, [0, 6]), "of the dtype of x"),
        ((x.T.contiguous().T, w, b, None, None, [0, 6]), "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=match):
            raw.head_forward(*args)
    for vectors, match in ((w, "three axes"), (w[None], "vectors must have shape")):
        with pytest.raises(RuntimeError, match=match):
            raw.head_forward(x, w, b, None, vectors, [0, 6])
    p = torch.zeros(6, 2)
    with pytest.raises(RuntimeError, match="grad must have shape"):
        raw.head_backward(x, p, p, p[:0], x, w, b, None, None, [0, 6], True, True, True)


def test_cuda_classes():
    """Larger heads are torch's: the CUDA kernels say so, and take the others."""
    x = torch.zeros(2, 3)
    assert _head_call.cuda_limit(x, torch.zeros(128, 3)) is None
    reason = _head_call.cuda_limit(x, torch.zeros(129, 3))
    assert reason is not None
    assert "129 classes are more than 128" in reason
