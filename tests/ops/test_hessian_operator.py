"""HessianOperator and GGNOperator: dense matrices, forms of vectors, layers, graphs, refusals."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.ops import KV, GGNOperator, HessianOperator, attend, window_attention

DTYPE = torch.float64


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
    return module.to(DTYPE).eval()


def classifier() -> tuple[nn.Module, list, torch.Tensor]:
    """A small classifier, 11 samples in batches of 4, 4 and 3, and its dense Hessian."""
    model = seeded(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    x, y = rand(11, 4, seed=1), torch.arange(11) % 3
    batches = list(zip(x.split(4), y.split(4), strict=True))
    names = [name for name, _ in model.named_parameters()]

    def full(*values):
        point = dict(zip(names, values, strict=True))
        return F.cross_entropy(torch.func.functional_call(model, point, (x,)), y)

    return model, batches, dense(full, [p.detach() for p in model.parameters()])


def dense(function, values) -> torch.Tensor:
    """The Hessian by torch.autograd.functional, in the order of the values."""
    blocks = torch.autograd.functional.hessian(function, tuple(values))
    sizes = [v.numel() for v in values]
    rows = [
        torch.cat([b.reshape(m, n) for b, n in zip(row, sizes, strict=True)], 1)
        for row, m in zip(blocks, sizes, strict=True)
    ]
    return torch.cat(rows)


def matrix(operator) -> torch.Tensor:
    return operator @ torch.eye(operator.shape[0], dtype=DTYPE)


def check_against_double_backward(loss, params: dict, batch, *, rtol: float = 1e-12) -> None:
    """Products and quadratic forms against gradients of gradients by torch alone."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    gradients = torch.autograd.grad(loss(leaves, batch), list(leaves.values()), create_graph=True)
    vectors = [rand(*p.shape, 3, seed=5) for p in params.values()]
    expected = []
    for k in range(3):
        inner = sum((g * v[..., k]).sum() for g, v in zip(gradients, vectors, strict=True))
        expected.append(torch.autograd.grad(inner, list(leaves.values()), retain_graph=True))
    operator = HessianOperator(loss, params, [batch])
    got = operator @ vectors
    scale = max(float(e.abs().max()) for row in expected for e in row)
    for i, piece in enumerate(got):
        for k in range(3):
            torch.testing.assert_close(piece[..., k], expected[k][i], rtol=rtol, atol=rtol * scale)
    forms = [
        sum(float((v[..., k] * e).sum()) for v, e in zip(vectors, expected[k], strict=True))
        for k in range(3)
    ]
    torch.testing.assert_close(
        operator.quadratic_forms(vectors),
        torch.tensor(forms, dtype=DTYPE),
        rtol=1e-10,
        atol=rtol * scale,
    )


class TestAgainstDense:
    def test_unequal_batches_are_weighted_by_their_sizes(self):
        model, batches, expected = classifier()
        operator = HessianOperator.from_module(model, nn.CrossEntropyLoss(), batches)
        torch.testing.assert_close(matrix(operator), expected, rtol=1e-12, atol=1e-14)
        average = sum(
            matrix(HessianOperator.from_module(model, nn.CrossEntropyLoss(), [b])) for b in batches
        ) / len(batches)
        assert (average - expected).abs().max() > 1e-4, "weighting would not be seen"

    def test_every_form_of_vectors_comes_back_as_it_is_given(self):
        model, batches, expected = classifier()
        operator = HessianOperator.from_module(model, nn.CrossEntropyLoss(), batches)
        names = [name for name, _ in model.named_parameters()]
        shapes = [p.shape for p in model.parameters()]
        flat = rand(operator.shape[0], 2, seed=3)
        product = expected @ flat
        parts = flat.split([s.numel() for s in shapes])
        several = [part.view(*s, 2) for part, s in zip(parts, shapes, strict=True)]
        one = [part[:, 0].view(s) for part, s in zip(parts, shapes, strict=True)]
        close = dict(rtol=1e-12, atol=1e-14)

        torch.testing.assert_close(operator @ flat, product, **close)
        torch.testing.assert_close(operator @ flat.mT.contiguous().mT[:, 1], product[:, 1], **close)
        got = operator @ several
        assert isinstance(got, list)
        assert [g.shape for g in got] == [s.shape for s in several]
        torch.testing.assert_close(torch.cat([g.reshape(-1, 2) for g in got]), product, **close)
        got = operator @ tuple(one)
        assert isinstance(got, tuple)
        torch.testing.assert_close(torch.cat([g.reshape(-1) for g in got]), product[:, 0], **close)
        got = operator @ dict(reversed(list(zip(names, one, strict=True))))
        assert list(got) == names
        torch.testing.assert_close(
            torch.cat([g.reshape(-1) for g in got.values()]), product[:, 0], **close
        )
        assert (operator @ flat[:, :0]).shape == (operator.shape[0], 0)
        torch.testing.assert_close(
            operator.quadratic_forms(one), flat[:, 0] @ product[:, 0], **close
        )
        assert operator.T is operator
        assert operator.H is operator

    def test_scipy_sees_the_same_matrix(self):
        linalg = pytest.importorskip("scipy.sparse.linalg")
        model, batches, expected = classifier()
        operator = HessianOperator.from_module(model, nn.CrossEntropyLoss(), batches).to_scipy()
        values = linalg.eigsh(operator, k=3, which="LA", return_eigenvectors=False)
        torch.testing.assert_close(
            torch.from_numpy(values), torch.linalg.eigvalsh(expected)[-3:], rtol=1e-9, atol=1e-12
        )
        assert operator.rmatmat(expected.numpy()).shape == expected.shape

    def test_some_parameters_of_a_module(self):
        model, batches, expected = classifier()
        operator = HessianOperator.from_module(
            model, nn.CrossEntropyLoss(), batches, params=[model[2].weight, model[0].bias]
        )
        order = torch.cat([torch.arange(30, 48), torch.arange(24, 30)])
        torch.testing.assert_close(
            matrix(operator), expected[order][:, order], rtol=1e-12, atol=1e-14
        )

    def test_data_loader_in_another_order_each_time(self):
        model, batches, expected = classifier()
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y),
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )
        operator = HessianOperator.from_module(model, nn.CrossEntropyLoss(), loader, memory=0)
        for _ in range(2):
            torch.testing.assert_close(matrix(operator), expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lower_precision_stays_near(self, dtype):
        model, batches, expected = classifier()
        model = model.to(dtype)
        batches = [(x.to(dtype), y) for x, y in batches]
        operator = HessianOperator.from_module(model, nn.CrossEntropyLoss(), batches)
        vector = rand(operator.shape[0], seed=4)
        got = operator @ vector
        assert got.dtype == DTYPE
        assert operator.dtype == dtype
        error = (got - expected @ vector).norm() / (expected @ vector).norm()
        assert error < 30 * torch.finfo(dtype).eps
        form = operator.quadratic_forms(vector)
        exact = vector @ expected @ vector
        assert abs(form - exact) < 30 * torch.finfo(dtype).eps * (
            vector.abs() @ expected.abs() @ vector.abs()
        )


class TestLayers:
    """Layers with a second derivative of their own, in nets that use them in awkward ways."""

    def test_convolutions_normalisation_shared_and_reparametrised_weights(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
                self.grouped = nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding=2, bias=False)
                self.norm = nn.BatchNorm2d(8)
                self.shared = nn.Conv2d(8, 8, 1)
                self.linear = nn.Linear(8, 8)
                self.head = nn.Linear(8, 5)
                self.gain = nn.Parameter(torch.zeros(8))

            def forward(self, x):
                h = F.gelu(self.first(x))
                h = h + F.relu6(self.norm(self.grouped(h)), inplace=True) * self.gain[:, None, None]
                h = h + torch.tanh(self.shared(torch.tanh(self.shared(h))))
                h = h.mean((2, 3))
                weight = F.normalize(self.linear.weight, dim=1)
                h = h + torch.sigmoid(F.linear(h, weight, self.linear.bias))
                h = torch.addmm(self.linear.bias, h @ weight, self.linear.weight)
                return self.head(torch.tanh(h)) + (h.mT @ h).sum() * 1e-2

        model = seeded(Net())
        with torch.no_grad():
            model.norm.running_mean.copy_(rand(8, seed=6))
            model.norm.running_var.copy_(rand(8, seed=7).exp())
        labels = torch.arange(4)

        def loss(params, x):
            return F.cross_entropy(torch.func.functional_call(model, params, (x,)), labels)

        params = {name: p.detach() for name, p in model.named_parameters()}
        check_against_double_backward(loss, params, rand(4, 3, 9, 9, seed=8))

    @pytest.mark.parametrize("kind", ["attend", "window"])
    def test_through_attention(self, kind):
        def attention(q, k, v):
            if kind == "attend":
                return attend(q, KV(k, v))
            return window_attention(q, k, v, size=(3, 4), window=(2, 2))

        def loss(params, x):
            h = F.layer_norm(x, (6,), params["gain"], params["shift"])
            q, k, v = (h @ params["qkv"]).view(2, 12, 3, 2, 3).permute(2, 0, 3, 1, 4)
            mixed = attention(q, k, v).transpose(1, 2).reshape(2, 12, 6)
            return F.gelu(x + mixed @ params["out"]).square().mean()

        params = {
            "gain": 1 + rand(6, seed=1),
            "shift": rand(6, seed=2),
            "qkv": rand(6, 18, seed=3),
            "out": rand(6, 6, seed=4),
        }
        check_against_double_backward(loss, params, rand(2, 12, 6, seed=5), rtol=1e-10)

    @pytest.mark.parametrize("kind", ["checkpoint", "vmap", "inner gradient"])
    def test_losses_that_transform_themselves(self, kind):
        from torch.utils.checkpoint import checkpoint

        def model(x, first, second):
            return F.linear(torch.tanh(F.linear(x, first)), second)

        def loss(params, x):
            weights = (params["first"], params["second"])
            if kind == "checkpoint":
                return checkpoint(model, x, *weights, use_reentrant=False).square().mean()
            if kind == "vmap":
                return torch.vmap(lambda row: model(row, *weights))(x).square().mean()
            energy = lambda row: model(row, *weights).square().sum()  # noqa: E731
            return torch.func.grad(energy)(x).square().sum()

        params = {"first": rand(6, 4, seed=1), "second": rand(3, 6, seed=2)}
        check_against_double_backward(loss, params, rand(5, 4, seed=3))

    def test_under_autocast_torch_keeps_its_own_layers(self):
        weight, x = rand(3, 4).float(), rand(5, 4, seed=1).float()

        def loss(params, batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.linear(batch, params["w"]).float().square().mean()

        got = matrix_of_float(HessianOperator(loss, {"w": weight}, [x]))
        exact = torch.kron(torch.eye(3), x.T @ x) * (2 / 15)
        assert (got - exact).abs().max() < 0.02 * exact.abs().max()


def matrix_of_float(operator) -> torch.Tensor:
    return operator @ torch.eye(operator.shape[0])


class TestGaussNewton:
    LOSSES = (
        ("ce", lambda o, y: F.cross_entropy(o, y.argmax(1))),
        ("mse", F.mse_loss),
        ("bce", lambda o, y: F.binary_cross_entropy_with_logits(o, y.sigmoid())),
    )

    @pytest.mark.parametrize(("name", "loss"), LOSSES, ids=[name for name, _ in LOSSES])
    def test_closed_forms_and_any_loss(self, name, loss):
        model = seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
        x, y = rand(7, 4, seed=1), rand(7, 3, seed=2)
        params = {n: p.detach() for n, p in model.named_parameters()}

        def outputs(point, batch):
            return torch.func.functional_call(model, point, (batch[0],))

        jacobian = torch.cat(
            [
                j.reshape(21, -1)
                for j in torch.func.jacrev(lambda p: outputs(p, (x,)))(params).values()
            ],
            dim=1,
        )
        inner = dense(lambda o: loss(o.view(7, 3), y), [outputs(params, (x,)).detach().view(-1)])
        expected = jacobian.T @ inner @ jacobian
        batches = list(zip(x.split(3), y.split(3), strict=True))
        for given in (name, lambda o, batch: loss(o, batch[1])):
            operator = GGNOperator(outputs, params, batches, given)
            torch.testing.assert_close(matrix(operator), expected, rtol=1e-11, atol=1e-14)
            vector = rand(operator.shape[0], seed=3)
            torch.testing.assert_close(
                operator.quadratic_forms(vector), vector @ expected @ vector, rtol=1e-11, atol=0
            )

    def test_loss_modules_and_ignored_targets(self):
        model, batches, _ = classifier()
        targets = torch.tensor([0, -100, 2, 1])
        batch = [(batches[0][0], targets)]
        module = nn.CrossEntropyLoss()
        got = matrix(GGNOperator.from_module(model, module, batch))
        kept = targets >= 0
        expected = GGNOperator.from_module(model, "ce", [(batch[0][0][kept], targets[kept])])
        torch.testing.assert_close(got, matrix(expected), rtol=1e-12, atol=1e-15)
        whole = matrix(GGNOperator.from_module(model, "ce", batches))
        torch.testing.assert_close(
            matrix(GGNOperator.from_module(model, module, batches)), whole, rtol=0, atol=0
        )
        torch.testing.assert_close(
            matrix(GGNOperator.from_module(model, lambda o, t: module(o, t), batches)),
            whole,
            rtol=1e-12,
            atol=1e-15,
        )

    def test_unknown_loss(self):
        with pytest.raises(ValueError, match=r"loss: expected one of 'ce', 'mse', 'bce'"):
            GGNOperator(lambda p, x: x, {"w": rand(2)}, [rand(3)], "hinge")


def quadratic(params, batch):
    return (batch @ params["w"]).square().mean()


class TestKeptGraphs:
    def operator(self, weight, **options):
        calls = []

        def loss(params, batch):
            calls.append(torch.is_grad_enabled())
            return (batch @ params["w"]).pow(4).mean()

        batches = list(rand(9, 3, seed=1).split(4))
        return HessianOperator(loss, {"w": weight}, batches, **options), calls, batches

    def exact(self, weight, batches):
        x = torch.cat(batches)
        return 12 * (x * (x @ weight).square()[:, None]).T @ x / 9

    def test_each_batch_is_differentiated_once_until_a_parameter_moves(self):
        weight = rand(3).requires_grad_()
        operator, calls, batches = self.operator(weight)
        for _ in range(3):
            torch.testing.assert_close(matrix(operator), self.exact(weight.detach(), batches))
        assert sum(calls) == 3
        optimiser = torch.optim.SGD([weight], lr=0.1)
        weight.grad = torch.ones_like(weight)
        optimiser.step()
        torch.testing.assert_close(matrix(operator), self.exact(weight.detach(), batches))
        weight.data.mul_(2.0)  # does not count as a version of the tensor
        torch.testing.assert_close(matrix(operator), self.exact(weight.detach(), batches))
        assert sum(calls) == 9

    def test_without_memory_every_product_differentiates_anew(self):
        weight = rand(3)
        operator, calls, batches = self.operator(weight, memory=0)
        for _ in range(2):
            torch.testing.assert_close(matrix(operator), self.exact(weight, batches))
        assert sum(calls) == 6

    def test_release(self):
        operator, calls, _ = self.operator(rand(3))
        matrix(operator)
        operator.release()
        matrix(operator)
        assert sum(calls) == 6

    def test_progress(self, capsys):
        seen = []
        operator, _, _ = self.operator(rand(3), progress=lambda *step: seen.append(step))
        matrix(operator)
        assert seen[-1] == ("HessianOperator", 9, 9)
        assert len(seen) == 9
        operator, _, _ = self.operator(rand(3), progress=True)
        matrix(operator)
        assert "HessianOperator 9/9\n" in capsys.readouterr().err


class TestRefusals:
    def product(self, loss, *, weight=None, batches=None, **options):
        weight = rand(3, 2) if weight is None else weight
        batches = [rand(4, 3, seed=1)] if batches is None else batches
        return HessianOperator(loss, {"w": weight}, batches, **options) @ torch.ones(6, dtype=DTYPE)

    def test_dropout_is_refused_and_the_generator_left_alone(self):
        before = torch.random.get_rng_state()
        noisy = lambda p, x: F.dropout(x @ p["w"], 0.5).square().mean()  # noqa: E731
        with pytest.raises(ValueError, match="draws random numbers"):
            self.product(noisy)
        assert torch.equal(torch.random.get_rng_state(), before)
        with torch.random.fork_rng():
            self.product(noisy, check=False)

    def test_noise_of_another_generator_is_refused(self):
        generator = torch.Generator().manual_seed(0)
        noisy = lambda p, x: (x @ p["w"] * torch.rand(2, generator=generator)).square().mean()  # noqa: E731
        with pytest.raises(ValueError, match="for the same evaluated twice"):
            self.product(noisy)

    def test_data_that_change_between_products_are_refused(self):
        class Growing:
            scale = 1.0

            def __iter__(self):
                self.scale *= 1.5
                yield self.scale * rand(4, 3, seed=1)

        operator = HessianOperator(quadratic, {"w": rand(3, 2)}, Growing(), memory=0)
        vector = torch.ones(6, dtype=DTYPE)
        operator @ vector
        with pytest.raises(ValueError, match="in two products"):
            operator @ vector

    def test_modules_in_training_mode(self):
        loss, batches = nn.MSELoss(), [(rand(4, 3), rand(4, 2, seed=1))]
        dropout = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)).to(DTYPE)
        with pytest.raises(ValueError, match=r"active dropout at 1 \(Dropout\); call model.eval"):
            HessianOperator.from_module(dropout, loss, batches)
        HessianOperator.from_module(dropout.eval(), loss, batches)
        norm = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(DTYPE)
        with pytest.raises(ValueError, match=r"batch statistics.*at 1 \(BatchNorm1d\)"):
            HessianOperator.from_module(norm, loss, batches)
        assert norm.training

    def test_fused_attention_of_torch_names_the_way_out(self):
        def loss(params, x):
            q = (x @ params["w"])[None, None]
            return F.scaled_dot_product_attention(q, q, q).square().mean()

        with pytest.raises(NotImplementedError, match=r"call transfuse\.ops\.attend in its place"):
            self.product(loss)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            self.product(loss)

    def test_losses_that_are_none(self):
        for loss, message in (
            (lambda p, x: (x @ p["w"]).square(), "expected a floating 0-dim tensor"),
            (lambda p, x: 1.0, "expected a floating 0-dim tensor .* got 1.0"),
            (lambda p, x: x.square().mean(), "expected a loss that depends on params"),
            (lambda p, x: (x @ p["w"]).mean() * math.nan, r"batches\[0\]: expected a finite loss"),
        ):
            with pytest.raises(ValueError, match=message):
                self.product(loss)

    def test_derivatives_that_are_not_finite(self):
        with pytest.raises(FloatingPointError, match="infinity or NaN"):
            self.product(lambda p, x: (p["w"] * 0).abs().sqrt().sum())

    def test_unused_and_linear_parameters_have_zero_rows(self):
        params = {"w": rand(3, 2), "unused": rand(2), "linear": rand(4)}
        loss = lambda p, x: quadratic(p, x) + p["linear"].sum()  # noqa: E731
        got = matrix(HessianOperator(loss, params, [rand(4, 3, seed=1)]))
        assert got[:6, :6].abs().min() >= 0
        assert got[:6].abs().sum() > 0
        assert got[6:].abs().sum() == got[:, 6:].abs().sum() == 0
        operator = HessianOperator(lambda p, x: p["w"].sum(), params, [rand(4, 3)])
        assert matrix(operator).abs().sum() == 0
        assert operator.quadratic_forms(torch.ones(12, dtype=DTYPE)) == 0

    @pytest.mark.parametrize(
        ("vectors", "error", "message"),
        [
            (torch.ones(5), ValueError, r"expected shape \(6,\) or \(6, K\), got \(5,\)"),
            (torch.ones(6, 1, 1), ValueError, r"got \(6, 1, 1\)"),
            (torch.ones(6, dtype=torch.long), TypeError, "got int64"),
            (torch.full((6,), math.nan), ValueError, "expected finite numbers"),
            ([torch.ones(2, 3)], ValueError, r"vectors\[0\]: expected shape \(3, 2\)"),
            ([torch.ones(3, 2)] * 2, ValueError, "expected 1 tensors, one for each"),
            ({"v": torch.ones(3, 2)}, ValueError, r"none for \['w'\] and unknown ones \['v'\]"),
            ("abc", TypeError, "got 'abc'"),
        ],
    )
    def test_vectors(self, vectors, error, message):
        with pytest.raises(error, match=message):
            HessianOperator(quadratic, {"w": rand(3, 2)}, [rand(4, 3)]) @ vectors

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (dict(loss_fn=3), TypeError, "loss_fn: expected a callable, got 3"),
            (dict(params=[rand(2)]), TypeError, "params: expected a dict"),
            (dict(params={}), ValueError, "params: expected at least one"),
            (dict(params={"a": torch.ones(2, dtype=torch.long)}), TypeError, r"params\['a'\]"),
            (
                dict(params={"a": rand(2), "b": rand(2).float()}),
                TypeError,
                "expected dtype float64",
            ),
            (dict(batches=iter([rand(2)])), TypeError, "iterated again for every product"),
            (dict(batches=rand(4, 3)), TypeError, "expected an iterable of batches"),
            (dict(memory=-1), ValueError, "memory: expected bytes"),
            (dict(size_of=3), TypeError, "size_of: expected a callable"),
            (dict(progress="yes"), TypeError, "progress: expected a bool or a callable"),
        ],
    )
    def test_arguments(self, change, error, message):
        given = dict(loss_fn=quadratic, params={"w": rand(3, 2)}, batches=[rand(4, 3)])
        with pytest.raises(error, match=message):
            HessianOperator(**(given | change))

    def test_sizes_of_batches(self):
        vector = torch.ones(6, dtype=DTYPE)
        with pytest.raises(TypeError, match="pass size_of"):
            HessianOperator(lambda p, b: p["w"].square().mean(), {"w": rand(3, 2)}, [3]) @ vector
        with pytest.raises(ValueError, match="at least one sample"):
            HessianOperator(quadratic, {"w": rand(3, 2)}, [rand(0, 3)]) @ vector
        with pytest.raises(ValueError, match="size_of: expected an integer"):
            self.product(quadratic, size_of=lambda batch: -1)
        batches = [rand(4, 3), rand(2, 3, seed=1)]
        tripled = HessianOperator(
            quadratic, {"w": rand(3, 2)}, batches, size_of=lambda b: 3 * b.shape[0]
        )
        plain = HessianOperator(quadratic, {"w": rand(3, 2)}, [*batches, rand(0, 3)])
        torch.testing.assert_close(tripled @ vector, plain @ vector)

    def test_parameters_of_a_module(self):
        model, batches, _ = classifier()
        for params, message in (
            ([rand(3)], "which is none of them"),
            ([model[0].weight] * 2, "got one of them twice"),
        ):
            with pytest.raises(ValueError, match=message):
                HessianOperator.from_module(model, nn.CrossEntropyLoss(), batches, params=params)
        operator = HessianOperator.from_module(model, nn.CrossEntropyLoss(), [rand(3, 4)])
        with pytest.raises(TypeError, match=re.escape("expected pairs (inputs, targets)")):
            operator @ torch.ones(operator.shape[0], dtype=DTYPE)
