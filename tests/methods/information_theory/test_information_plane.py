"""Information plane: official numbers, known answers, recording, the bound, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from transfuse.methods.information_theory.information_plane import (
    InformationPlane,
    binned_mi,
    information_bound,
)
from transfuse.testing import golden

GOLDEN = golden.load("information_plane")


@pytest.mark.parametrize("layer", range(4))
def test_official(layer):
    given = GOLDEN.inputs("ip")
    found = binned_mi(
        given[f"layer{layer}"], given["x"], given["label"], bins=int(given["bins"]), wrap=True
    )
    GOLDEN.check(torch.tensor(found.input), f"ixt{layer}", "ip")
    GOLDEN.check(torch.tensor(found.label), f"ity{layer}", "ip")


def slow(t, x, y, edges, wrap):
    """Group by group, as the definition says."""

    def entropy(rows):
        counts = torch.unique(rows, dim=0, return_counts=True)[1].double()
        p = counts / counts.sum()
        return float(-(p * p.log2()).sum())

    cells = (t.float()[..., None] >= edges).sum(-1) - 1
    cells = torch.where(cells < 0, len(edges) - 1 if wrap else 0, cells)
    results = []
    for ids in (x, y):
        given = sum(
            float((ids == i).double().mean()) * entropy(cells[ids == i]) for i in ids.unique()
        )
        results.append(entropy(cells) - given)
    return results


@pytest.mark.parametrize("wrap", [False, True])
def test_conditional_entropies_where_inputs_repeat(wrap):
    generator = torch.Generator().manual_seed(0)
    t = 0.8 * torch.randn(120, 2, generator=generator)
    x = torch.randint(0, 30, (120,), generator=generator)
    y = torch.randint(0, 3, (120,), generator=generator)
    for bins, low, high in ((30, -1.0, 1.0), (4, -0.5, 2.0)):
        found = binned_mi(t, x, y, bins=bins, range=(low, high), wrap=wrap)
        want = slow(t, x, y, torch.linspace(low, high, bins), wrap)
        assert found.input == pytest.approx(want[0], abs=1e-12)
        assert found.label == pytest.approx(want[1], abs=1e-12)
        assert found.label <= found.entropy + 1e-12
        assert found.outside == pytest.approx(float((t < low).double().mean()))


def test_known_answers():
    n = 64
    t = torch.linspace(-0.99, 0.99, n)[:, None]
    x, y = torch.arange(n), torch.arange(n) % 2
    fine = binned_mi(t, x, y, bins=1000)
    assert fine.input == math.log2(n)
    assert fine.label == pytest.approx(1.0, abs=1e-12)
    assert fine.singletons == 1.0
    constant = binned_mi(torch.zeros(n, 3), x, y)
    assert constant.input == constant.label == constant.entropy == 0.0
    rows = torch.nn.functional.one_hot(y)
    assert binned_mi(t, t, rows) == binned_mi(t, x, y) == binned_mi(t, t.double(), rows.float())


def test_ranges():
    t = torch.linspace(0, 40, 80)[:, None]
    x, y = torch.arange(80), torch.arange(80) // 40
    assert binned_mi(t, x, y).input < 0.5
    assert binned_mi(t, x, y, range="minmax").input > 4
    assert binned_mi(t**4, x, y, bins=9, range="quantile").entropy == pytest.approx(3, abs=0.1)
    assert binned_mi(t.sign(), x, y, range="quantile").input < 0.2
    assert binned_mi(t, x, y, range=(0, 41)).outside == 0


def test_miller_madow():
    t = torch.tensor([[-0.5], [0.5], [0.5], [0.5]])
    x, y = torch.arange(4), torch.tensor([0, 1, 1, 1])
    plain = binned_mi(t, x, y)
    found = binned_mi(t, x, y, correction="miller-madow")
    assert found.entropy == pytest.approx(plain.entropy + 1 / (8 * math.log(2)))
    assert found.label == pytest.approx(plain.label + 1 / (8 * math.log(2)))


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *extra, nn.Linear(4, 2), nn.Tanh())


def data(n=40):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long()


@pytest.mark.filterwarnings("ignore:layer")
class TestRecorder:
    def test_records_what_the_functional_form_gives(self):
        net, (x, y) = network(), data()
        with InformationPlane(net, ["1", "3"], x, y, batch_size=7) as plane:
            with pytest.warns(UserWarning, match="of the occupied cells hold one sample"):
                found = plane.record(3)
            with torch.no_grad():
                for number, t in enumerate((net[:2](x), net(x))):
                    assert found[number] == binned_mi(t, x, y)
            plane.record(9)
        result = plane.result()
        assert result.epochs == [3, 9]
        assert result.layers == ("1", "3")
        assert result.information.shape == (2, 2, 2)
        assert torch.equal(result.information[0], result.information[1])
        assert result.information[0, 1, 1] == found[1].label
        assert result.gradients.isnan().all()
        assert not plane.installed
        assert all(len(m._forward_hooks) == 0 for m in net.modules())
        with pytest.raises(RuntimeError, match="hooks have been removed"):
            plane.record(10)

    def test_modes_and_gradients_are_left_alone(self):
        net, (x, y) = network(nn.Dropout(0.5)), data()
        net[2].eval()
        plane = InformationPlane(net, ["1", "4"], x, y, bins=5)
        assert plane.record(0) == plane.record(1)
        assert net.training
        assert not net[2].training
        assert net[0].weight.grad is None
        assert net(x).requires_grad
        assert "2 records, installed" in repr(plane)
        plane.remove()
        plane.remove()

    def test_gradients(self):
        net, (x, y) = network(), data()
        plane = InformationPlane(net, ["0", "3"], x, y, bins=5)
        grads = []
        for part in x.split(8):
            net.zero_grad()
            net(part).square().sum().backward()
            plane.add_gradients()
            grads.append(net[0].weight.grad.double())
        grads = torch.stack(grads)
        plane.record(0)
        plane.record(1)
        result = plane.result()
        norm = net[0].weight.detach().double().norm()
        want = [grads.mean(0).norm() / norm, grads.std(0, correction=0).norm() / norm]
        torch.testing.assert_close(result.gradients[0, 0], torch.stack(want))
        assert result.gradients[0, 1].isnan().all()
        assert result.gradients[1].isnan().all()
        plane.remove()

    def test_noise_hides_and_repeats(self):
        net, (x, y) = network(), data()
        still = InformationPlane(net, ["3"], x, y, bins=8).record(0)[0]
        noisy = [
            InformationPlane(net, ["3"], x, y, bins=8, noise=0.5, copies=30).record(0)[0]
            for _ in range(2)
        ]
        assert noisy[0] == noisy[1]
        assert noisy[0].input < still.input
        assert noisy[0].entropy > noisy[0].input + 0.5

    def test_convolutions(self):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh())
        x, y = torch.randn(10, 1, 5, 5), torch.arange(10) % 2
        with pytest.raises(ValueError, match="choose spatial='flatten' or spatial='mean'"):
            InformationPlane(net, ["1"], x, y).record(0)
        for spatial, t in (
            ("flatten", net(x).flatten(1)),
            ("mean", net(x).mean((2, 3))),
        ):
            plane = InformationPlane(net, ["1"], x, y, bins=3, spatial=spatial)
            assert plane.record(0)[0].entropy == binned_mi(t.detach(), x, y, bins=3).entropy

    def test_layers_that_do_not_run_once(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()

            def forward(self, x):
                return self.c(self.a(self.a(x)))

        x, y = data()
        for layer, words in (("a", "ran 2 times"), ("b", "did not run")):
            plane = InformationPlane(Odd(), [layer], x, y)
            with pytest.raises(RuntimeError, match=f"layer '{layer}' {words}"):
                plane.record(0)
            assert plane._seen is None
            assert plane.result().information.shape == (0, 1, 2)

    def test_nan_is_refused(self):
        net, (x, y) = network(), data()
        with torch.no_grad():
            net[0].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="layer '1': x: expected numbers, got 40 NaN"):
            InformationPlane(net, ["1"], x, y).record(0)


class TestBound:
    def test_ends_and_order(self):
        x = torch.arange(8)
        y = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
        bound = information_bound(x, y, [0.5, 1000.0, 5.0])
        h = -sum(p * math.log2(p) for p in (3 / 8, 3 / 8, 2 / 8))
        assert bound.label[1] == pytest.approx(h, abs=1e-6)
        assert bound.input[1] == pytest.approx(h, abs=1e-6)
        assert bound.input[0] == pytest.approx(0, abs=1e-4)
        assert (bound.label <= bound.input + 1e-9).all()

    def test_binary_symmetric_channel(self):
        """Known curve: I(T; Y) = 1 - h(a * b) for I(X; T) = 1 - h(b), a the channel's error."""

        def h(p):
            return -p * math.log2(p) - (1 - p) * math.log2(1 - p)

        x = torch.arange(2).repeat_interleave(10)
        y = torch.tensor([0] * 9 + [1] + [1] * 9 + [0])
        bound = information_bound(x, y, [3.0], clusters=2, iterations=3000, tol=1e-13)
        low, high = 0.0, 0.5
        for _ in range(60):
            b = (low + high) / 2
            low, high = (b, high) if 1 - h(b) > float(bound.input) else (low, b)
        error = 0.1 * (1 - b) + 0.9 * b
        assert 0.05 < float(bound.input) < 1
        assert float(bound.label) == pytest.approx(1 - h(error), abs=1e-6)

    def test_refused(self):
        with pytest.raises(ValueError, match=r"betas\[0\]: expected a number greater than 0"):
            information_bound(torch.arange(3), torch.arange(3), [0.0])
        with pytest.raises(ValueError, match="labels: expected 3 rows"):
            information_bound(torch.arange(3), torch.arange(4), [1.0])


X, Y = torch.zeros(4, 3), torch.arange(4)
REFUSED = {
    "bins": (lambda: binned_mi(X, X, Y, bins=1), ValueError, "bins: expected at least 2 edges"),
    "range": (lambda: binned_mi(X, X, Y, range=(1, 0)), ValueError, "range: expected ascending"),
    "rule": (lambda: binned_mi(X, X, Y, range="all"), ValueError, "range: expected one of"),
    "three": (lambda: binned_mi(X, X, Y, range=(1, 2, 3)), TypeError, "range: expected two"),
    "counts": (lambda: binned_mi(X, X[:3], Y), ValueError, "x: expected 4 rows"),
    "labels": (lambda: binned_mi(X, X, Y[:3]), ValueError, "y: expected 4 rows"),
    "one axis": (lambda: binned_mi(Y.float(), X, Y), ValueError, r"t: expected 2 dim"),
    "correction": (lambda: binned_mi(X, X, Y, correction="x"), ValueError, "correction: expected"),
    "empty": (lambda: binned_mi(X[:0], X[:0], Y[:0]), ValueError, "at least one row"),
    "model": (lambda: InformationPlane(3, ["0"], X, Y), TypeError, "model: expected a module"),
    "layer": (lambda: InformationPlane(network(), ["5"], X, Y), ValueError, "no module matches"),
    "string": (lambda: InformationPlane(network(), "0", X, Y), TypeError, "layers: expected a seq"),
    "no layer": (lambda: InformationPlane(network(), [], X, Y), ValueError, "at least one name"),
    "noise": (lambda: InformationPlane(network(), ["0"], X, Y, noise=-1.0), ValueError, "noise: "),
    "nan": (lambda: InformationPlane(network(), ["0"], X / 0, Y), ValueError, "inputs: x: exp"),
    "one": (lambda: InformationPlane(network(), ["0"], X[:1], Y[:1]), ValueError, "at least 2"),
    "no gradient": (
        lambda: InformationPlane(network(), ["0"], X, Y).add_gradients(),
        RuntimeError,
        "no recorded layer has a weight with a gradient",
    ),
    "epoch": (lambda: InformationPlane(network(), ["0"], X, Y).record(0.5), TypeError, "epoch: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        call()
