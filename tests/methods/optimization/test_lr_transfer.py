"""lr_transfer: recorded curvature and multipliers, invariants of the parametrisation, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.optimization import lr_transfer as lt
from transfuse.ops import HessianOperator, lanczos
from transfuse.testing.golden import load

DTYPE = torch.float64
GOLDEN = load("lr_transfer")


def recorded(mode: str) -> tuple[lt.MeanFieldNet, list]:
    """The recorded network and its data."""
    arrays, p = GOLDEN.inputs("net"), GOLDEN.params()
    options = lt.MeanFieldOptions(mode=mode, alpha=p["alpha"], tau=p["tau"])
    net = lt.MeanFieldNet(6, 2, width=p["N"], depth=p["L"], options=options).double()
    with torch.no_grad():
        net.first.copy_(arrays["W0"])
        net.readout.copy_(arrays["V"])
        for weight, value in zip(net.hidden, arrays["W"], strict=True):
            weight.copy_(value)
    return net, [(arrays["x"], arrays["y"])]


def in_recorded_order(net: lt.MeanFieldNet) -> list[nn.Parameter]:
    """W0, then the read-out, then the hidden weights."""
    return [net.first, net.readout, *net.hidden]


@pytest.mark.parametrize("mode", ["ntp", "mup"])
class TestCurvatureRecordings:
    def test_network(self, mode):
        net, data = recorded(mode)
        assert net.gamma == pytest.approx(GOLDEN.inputs(mode)["gamma"].item())
        GOLDEN.check(net(data[0][0]), "f", mode)
        GOLDEN.check(F.mse_loss(net(data[0][0]), data[0][1]), "loss", mode)

    def test_sharpness(self, mode):
        net, data = recorded(mode)
        out = GOLDEN.outputs(mode)
        exact = out["exact_extreme_eigs"]
        for solver, slack in (("lanczos", 1e-9), ("power", 1e-5)):
            found = lt.sharpness(net, F.mse_loss, data, iters=1000, tol=1e-9, solver=solver)
            assert found.scale == pytest.approx(net.gamma**2)
            assert found.converged.all()
            assert found.values[0] / net.gamma**2 == pytest.approx(exact[1].item(), rel=slack)
        # PyHessian's own value is low by its epsilon.
        torch.testing.assert_close(
            found.values[0] / net.gamma**2,
            out["sharpness"],
            rtol=GOLDEN.meta["tolerances"]["sharpness"]["rtol"],
            atol=1e-7,
        )

    def test_trace(self, mode):
        net, data = recorded(mode)
        out = GOLDEN.outputs(mode)
        operator = HessianOperator.from_module(net, F.mse_loss, data, params=in_recorded_order(net))
        probes = GOLDEN.inputs(mode)["trace_probes"].double()
        torch.testing.assert_close(
            operator.quadratic_forms(probes.mT), out["trace_quadforms"], rtol=1e-5, atol=1e-8
        )
        estimate = lt.hessian_trace(net, F.mse_loss, data, 400)
        assert abs(estimate.mean - out["exact_trace"]) < 4 * estimate.stderr
        assert estimate.probes == 400

    def test_density(self, mode):
        net, data = recorded(mode)
        arrays, out = GOLDEN.inputs(mode), GOLDEN.outputs(mode)
        operator = HessianOperator.from_module(net, F.mse_loss, data, params=in_recorded_order(net))
        result = lanczos(
            operator, GOLDEN.params()["lanczos_steps"], start=arrays["slq_probe"].double()
        )
        t = torch.diag(result.alpha) + torch.diag(result.beta, 1) + torch.diag(result.beta, -1)
        nodes, vectors = torch.linalg.eigh(t)
        slack = GOLDEN.meta["tolerances"]["slq"]
        torch.testing.assert_close(nodes, out["slq_nodes"], **slack)
        torch.testing.assert_close(vectors[0].square(), out["slq_weights"], **slack)
        density = lt.spectral_density(net, F.mse_loss, data, steps=10, runs=30)
        traces = (density.weights * density.nodes).sum(1) * operator.shape[0]
        assert abs(traces.mean() - out["exact_trace"]) < 4 * traces.std() / math.sqrt(30)

    def test_ntk_and_split(self, mode):
        net, data = recorded(mode)
        out = GOLDEN.outputs(mode)
        torch.testing.assert_close(
            lt.ntk_top(net, data, 16, tol=1e-9), out["ntk_eigs"], rtol=1e-7, atol=1e-12
        )
        split = lt.curvature_split(net, F.mse_loss, data, tol=1e-9)
        assert split.hessian == pytest.approx(out["exact_extreme_eigs"][1].item(), rel=1e-7)
        assert split.gauss_newton == pytest.approx(out["ntk_eigs"][0].item(), rel=1e-7)
        size = sum(p.numel() for p in net.parameters())
        eye = torch.eye(size, dtype=DTYPE)
        from transfuse.ops import GGNOperator

        rest = HessianOperator.from_module(net, F.mse_loss, data) @ eye
        rest = rest - GGNOperator.from_module(net, "mse", data) @ eye
        assert split.residual == pytest.approx(torch.linalg.eigvalsh(rest)[-1].item(), rel=1e-6)


class Package(nn.Module):
    """The recorded package net: widths w, 2 w, w."""

    def __init__(self, width: int, inputs: int = 5, outputs: int = 3):
        super().__init__()
        self.a = nn.Linear(inputs, width)
        self.b = nn.Linear(width, 2 * width)
        self.c = nn.Linear(2 * width, width, bias=False)
        self.o = lt.MuReadout(width, outputs, output_mult=GOLDEN.params()["output_mult"])


def package() -> tuple[Package, list[torch.Tensor]]:
    model = Package(24).double()
    before = [p.detach().clone() for p in model.parameters()]
    lt.parametrise(model, Package(8), Package(16))
    return model, before


class TestPackageRecordings:
    def test_shapes_are_those_recorded(self):
        shapes = [tuple(int(n) for n in row if n > 0) for row in GOLDEN.inputs("mupkg")["shapes"]]
        assert [tuple(p.shape) for p in Package(24).parameters()] == shapes

    def test_rescaling(self):
        model, before = package()
        factors = [(p / b).mean() for p, b in zip(model.parameters(), before, strict=True)]
        GOLDEN.check(torch.stack(factors), "rescale", "mupkg")

    @pytest.mark.parametrize(
        ("optimizer", "array"),
        [("sgd", "sgd_lr_wd"), ("adam", "adam_lr_wd"), ("adamw", "adam_decoupled_lr_wd")],
    )
    def test_rates_and_decays(self, optimizer, array):
        model, _ = package()
        groups = lt.mu_param_groups(model.parameters(), 1.0, 1.0, optimizer=optimizer)
        rates = {
            id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
        }
        found = torch.tensor([rates[id(p)] for p in model.parameters()], dtype=DTYPE)
        GOLDEN.check(found, array, "mupkg")
        torch.optim.AdamW(groups)

    def test_normal_initialisation(self):
        model, _ = package()
        reference = []
        for name in ("a", "b", "c", "o"):
            weight = getattr(model, name).weight
            lt.mu_normal_(weight, 2.0, generator=torch.Generator().manual_seed(1))
            plain = torch.empty_like(weight).normal_(
                0.0, 2.0, generator=torch.Generator().manual_seed(1)
            )
            reference.append((weight / plain).mean())
        GOLDEN.check(torch.stack(reference), "normal_init_scale", "mupkg")

    def test_readout(self):
        model, _ = package()
        arrays = GOLDEN.inputs("mupkg")
        with torch.no_grad():
            model.o.weight.copy_(arrays["readout_weight"])
            model.o.bias.copy_(arrays["readout_bias"])
        GOLDEN.check(model.o(arrays["h"]), "readout", "mupkg")
        assert "m=3.0" in repr(model.o)


class TestParametrise:
    def test_twice_is_refused_and_leaves_the_weights(self):
        model, _ = package()
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="a second call would scale its weights again"):
            lt.parametrise(model, Package(8), Package(16))
        assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())

    def test_copies_lose_their_marks_aloud(self):
        model, _ = package()
        with pytest.raises(ValueError, match="without its mark"):
            lt.mu_param_groups(copy.deepcopy(model).parameters(), 1.0, optimizer="adam")
        model.float().to("cpu")  # keeps them
        lt.mu_param_groups(model.parameters(), 1.0, optimizer="adam")

    def test_standard_mode_changes_nothing(self):
        model = Package(24)
        before = copy.deepcopy(model.state_dict())
        lt.parametrise(model, Package(8), Package(16), "standard")
        assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
        assert model.o.width_mult == 1.0
        (group,) = lt.mu_param_groups(model.parameters(), 0.3, 0.1, optimizer="sgd")
        assert (group["lr"], group["weight_decay"]) == (0.3, 0.1)
        weight = lt.mu_normal_(model.b.weight, 1.0, generator=torch.Generator().manual_seed(0))
        assert weight.std().item() == pytest.approx(1.0, rel=0.1)

    def test_checkpoints_are_not_rescaled(self):
        model = Package(24)
        before = copy.deepcopy(model.state_dict())
        lt.parametrise(model, Package(8), Package(16), rescale=False)
        assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
        assert model.o.width_mult == 3.0

    def test_layer_norm_gains_are_vectors_and_tied_weights_are_left_alone(self):
        class Tied(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.embedding = nn.Embedding(7, width)
                self.norm = nn.LayerNorm(width)
                self.readout = lt.MuReadout(width, 7)
                self.readout.weight = self.embedding.weight

        model = Tied(32)
        before = copy.deepcopy(model.state_dict())
        lt.parametrise(model, Tied(8), Tied(16))
        state = model.state_dict()
        assert torch.equal(state["embedding.weight"], before["embedding.weight"])
        torch.testing.assert_close(state["readout.bias"], 2 * before["readout.bias"])
        assert model.readout.width_mult == 4
        for parameter in (model.norm.weight, model.norm.bias, model.embedding.weight):
            assert lt.mu_shape(parameter).infinite == 1
        groups = lt.mu_param_groups(model.parameters(), 1.0, optimizer="adam")
        assert [group["lr"] for group in groups] == [1.0]

    def test_base_on_the_meta_device(self):
        with torch.device("meta"):
            base, delta = Package(8), Package(16)
        assert lt.parametrise(Package(24), base, delta).o.width_mult == 3.0

    def test_networks_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"a.weight: expected base and delta to differ in dim"):
            lt.parametrise(Package(24), Package(8), Package(8))
        with pytest.raises(ValueError, match="base: expected the parameters of model"):
            lt.parametrise(Package(24), nn.Linear(2, 2), Package(8))
        plain = [nn.Sequential(nn.Linear(4, w), nn.ReLU(), nn.Linear(w, 2)) for w in (32, 8, 16)]
        with pytest.raises(ValueError, match="expected a MuReadout at 2"):
            lt.parametrise(*plain)
        with pytest.raises(ValueError, match="no transposed convolution that grows"):
            lt.parametrise(*(nn.Sequential(nn.ConvTranspose2d(3, w, 2)) for w in (32, 8, 16)))
        with pytest.raises(ValueError, match="mode: expected"):
            lt.parametrise(Package(24), Package(8), Package(16), "ntk")
        with pytest.raises(TypeError, match=r"base: expected an nn\.Module"):
            lt.parametrise(Package(24), None, Package(16))
        with pytest.raises(ValueError, match="optimizer: expected one of"):
            lt.mu_param_groups([], 1.0, optimizer="lion")


class TestMeanField:
    def test_updates_of_the_outputs_do_not_grow_with_the_width(self):
        """After one step the change of f stays put under muP, and that of NTP's hidden features
        vanishes as N^-1/2."""

        def changes(mode, optimizer, width):
            options = lt.MeanFieldOptions(mode=mode)
            net = lt.MeanFieldNet(6, 2, width=width, depth=3, options=options).double()
            x = torch.randn(8, 6, dtype=DTYPE, generator=torch.Generator().manual_seed(3))
            features = []
            net_features = lambda: F.linear(x, net.first) * 6**-0.5  # noqa: E731
            before, features = net(x), net_features()
            kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
            step = kind(net.param_groups(0.01, optimizer=optimizer))
            lt.half_squared_error(before, torch.ones_like(before)).backward()
            step.step()
            return (
                (net(x) - before).square().mean().sqrt().item(),
                (net_features() - features).square().mean().sqrt().item(),
            )

        for optimizer in ("sgd", "adam"):
            narrow, wide = (changes("depth_mup", optimizer, n) for n in (64, 1024))
            assert wide[0] / narrow[0] == pytest.approx(1, abs=0.35)
            assert wide[1] / narrow[1] == pytest.approx(1, abs=0.5)
        narrow, wide = (changes("ntp", "sgd", n) for n in (64, 1024))
        assert wide[1] / narrow[1] < 0.4  # 1/4 by the theory

    def test_options(self):
        assert lt.MeanFieldOptions().depth_exponent == 0.5
        assert lt.MeanFieldOptions(mode="mup").depth_exponent == 0
        assert lt.MeanFieldOptions(mode="ntp", alpha=0.25).depth_exponent == 0.25
        for wrong in (dict(mode="sp"), dict(tau=-1.0), dict(gamma0=0.0), dict(alpha=math.nan)):
            with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
                lt.MeanFieldOptions(**wrong)
        with pytest.raises(ValueError, match="width: expected"):
            lt.MeanFieldNet(2, 2, width=0, depth=1)
        net = lt.MeanFieldNet(2, 2, width=4, depth=1, options=lt.MeanFieldOptions(mode="ntp"))
        with pytest.raises(ValueError, match="expected 'sgd' for mode 'ntp'"):
            net.param_groups(0.1, optimizer="adam")
        with pytest.raises(ValueError, match="solver: expected"):
            lt.sharpness(net, F.mse_loss, [(torch.ones(2, 2), torch.ones(2, 2))], solver="qr")

    def test_report(self):
        x = torch.linspace(-1, 1, 8, dtype=DTYPE)[:, None]
        report = lt.transfer_report(
            x, x.square(), widths=[8, 32], depths=[1, 2], lrs=[0.05, 0.2], steps=6, every=4
        )
        assert len(report.runs) == 8
        assert set(report.best_lr()) == {(8, 1), (8, 2), (32, 1), (32, 2)}
        assert set(report.best_lr().values()) <= {0.05, 0.2}
        run = report.runs[0]
        assert run.steps == (0, 4, 6)
        assert run.sharpness.shape == (3,)
        assert (run.losses[1:] < run.losses[:-1]).all()
        assert 0 <= report.drift() <= 2
        endless = lt.transfer_report(
            x, x, widths=[4], depths=[1], lrs=[0.1], steps=3, loss=lambda o, t: o.sum() * math.inf
        )
        assert endless.runs[0].losses.tolist() == [math.inf] * 4
        assert endless.runs[0].steps == ()
        for wrong in (dict(widths=[]), dict(steps=0), dict(every=-1)):
            given = dict(widths=[4], depths=[1], lrs=[0.1]) | wrong
            with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
                lt.transfer_report(x, x, **given)
