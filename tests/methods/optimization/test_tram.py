"""TRAM and SAM: golden arrays, identities, every target and option, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from transfuse.methods.optimization import _tram_divergence
from transfuse.methods.optimization.tram import (
    SAM,
    TRAM,
    Ema,
    Fisher,
    Frozen,
    InputNoise,
    PreviousStep,
    divergence,
    frozen_statistics,
)
from transfuse.testing import golden

GOLDEN = golden.load("tram")


def sgd(lr=0.1, momentum=0.0):
    return lambda groups: torch.optim.SGD(groups, lr=lr, momentum=momentum)


# -- divergences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl_forward", "kl_reverse", "kl_symmetric"])
@pytest.mark.parametrize("tail", ["", "_seq"])
@pytest.mark.parametrize("chunk", [1, 7, 2**22])
def test_golden_kl(kind, tail, chunk, monkeypatch):
    monkeypatch.setattr(_tram_divergence, "CHUNK", chunk)
    given = GOLDEN.inputs("div")
    d = divergence(
        given["target_logits" + tail], given["logits" + tail], kind=kind, official_scale=True
    )
    torch.testing.assert_close(
        d, GOLDEN.outputs("div")[kind + tail], **GOLDEN.tolerance("kl"), check_dtype=False
    )


@pytest.mark.parametrize("kind", ["mmd_imq", "mmd_imq2", "mmd_imq3", "mmd_rbf"])
def test_golden_mmd(kind):
    given = GOLDEN.inputs("div")
    d = divergence(given["target_logits"], given["logits"], kind=kind, official_scale=True)
    torch.testing.assert_close(
        d, GOLDEN.outputs("div")[kind], **GOLDEN.tolerance("mmd"), check_dtype=False
    )
    plain = divergence(given["target_logits"], given["logits"], kind=kind)
    torch.testing.assert_close(plain, d * 7)
    assert divergence(given["logits"], given["logits"], kind=kind) == 0


def test_divergences_by_definition():
    target, logits = torch.randn(2, 3, 4, 5).double().unbind(0)
    p, q = target.softmax(-1), logits.softmax(-1)
    rows = {
        "kl_forward": (p * (p / q).log()).sum(-1),
        "kl_reverse": (q * (q / p).log()).sum(-1),
        "l2": (target - logits).square().sum(-1).sqrt(),
    }
    for kind, each in rows.items():
        torch.testing.assert_close(divergence(target, logits, kind=kind), each.mean())
    torch.testing.assert_close(
        divergence(target, logits, kind="l2", official_scale=True), rows["l2"].mean() / 3
    )
    half = divergence(target.bfloat16(), logits.bfloat16())
    assert half.dtype == torch.float32
    rounded = divergence(target.bfloat16().double(), logits.bfloat16().double())
    torch.testing.assert_close(half.double(), rounded, rtol=1e-5, atol=1e-6)


def test_ruled_out_classes_and_equal_predictions():
    logits = torch.randn(3, 5)
    masked = torch.where(torch.tensor([True, False, False, True, False]), -torch.inf, logits)
    d = divergence(masked, masked + torch.randn(3, 1))
    assert 0 <= d < 1e-6
    torch.testing.assert_close(
        divergence(masked, masked * 2), divergence(logits[:, [1, 2, 4]], 2 * logits[:, [1, 2, 4]])
    )
    # What the model rules out and the target does not is infinitely far.
    assert divergence(logits, masked) == torch.inf
    assert divergence(torch.full((2, 3), torch.nan), torch.zeros(2, 3)).isnan()


@pytest.mark.parametrize(
    ("target", "logits", "options", "error", "match"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), {}, ValueError, r"one shape .* \(2, 3\) and \(2, 4"),
        (torch.zeros(3), torch.zeros(3), {}, ValueError, "one shape"),
        (torch.zeros(0, 3), torch.zeros(0, 3), {}, ValueError, "at least one number"),
        (torch.zeros(2, 3), None, {}, TypeError, "logits: expected floating logits, got None"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), {}, TypeError, "target: expected floating"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"kind": "kl"}, ValueError, "kind: expected one of"),
        (*torch.zeros(2, 2, 3, 4), {"kind": "mmd_rbf"}, ValueError, r"expected \(B, C\) for mmd"),
    ],
)
def test_refused_divergences(target, logits, options, error, match):
    with pytest.raises(error, match=match):
        divergence(target, logits, **options)


# -- steps against the recording ------------------------------------------------------------------


class Net(nn.Module):
    """The recorded network."""

    def __init__(self, given):
        super().__init__()
        self.p = nn.ParameterList(nn.Parameter(given[f"p{i}"].clone()) for i in range(4))

    def forward(self, x):
        p = self.p
        return torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3]


def flat(params):
    return torch.cat([p.detach().flatten() for p in params])


RUNS = {
    "prev_asam_sgd": (lambda g: torch.optim.SGD(g, lr=0.3, momentum=0.9), PreviousStep, True),
    "x_asam_adamw": (lambda g: torch.optim.AdamW(g, lr=0.02, weight_decay=0.01), None, True),
    "init_sam_sgd": (lambda g: torch.optim.SGD(g, lr=0.2), Frozen, False),
}


@pytest.mark.parametrize("run", RUNS)
def test_golden_steps(run):
    given, want = GOLDEN.inputs("run"), GOLDEN.outputs(run)
    base, target, adaptive = RUNS[run]
    net = Net(given)
    optimizer = TRAM(
        net.parameters(),
        base,
        # The recorded noise is added by hand below.
        target=InputNoise(net) if target is None else target(),
        adaptive=adaptive,
        scale=20.0 / 35 if run == "init_sam_sgd" else 1.0,
    )
    close = {**GOLDEN.tolerance("run"), "check_dtype": False}
    for t in range(4):
        x, y = given["x"][t], given["y"][t]

        def loss():
            return nn.functional.cross_entropy(net(x), y)  # noqa: B023

        before = [p.detach().clone() for p in net.parameters()]
        logits = net(x)
        loss().backward()
        with torch.no_grad(), optimizer.target_weights():
            other = net(x + given["noise"][t]) if target is None else net(x)
        size = optimizer.ascend(divergence(other, logits))
        torch.testing.assert_close(size, want["gradnorm"][t], **close)
        # Recorded before the factors of the two runs: official x B C, official x 20.
        torch.testing.assert_close(optimizer.radius, want["divergence"][t], **close)
        torch.testing.assert_close(flat(net.parameters()) - flat(before), want["eps"][t], **close)
        loss().backward()
        optimizer.descend()
        torch.testing.assert_close(flat(net.parameters()), want["params"][t], **close)


@pytest.mark.parametrize("adaptive", [True, False])
def test_golden_released_ascent(adaptive):
    given, want = GOLDEN.inputs("run"), GOLDEN.outputs("released")
    net = Net(given)
    optimizer = TRAM(net.parameters(), sgd(), adaptive=adaptive, ascent="released")
    before = flat(net.parameters())
    nn.functional.cross_entropy(net(given["x"][0]), given["y"][0]).backward()
    size = optimizer.ascend(0.25)
    close = {**GOLDEN.tolerance("run"), "check_dtype": False}
    torch.testing.assert_close(size, want[f"gradnorm_adaptive{int(adaptive)}"], **close)
    moved = flat(net.parameters()) - before
    torch.testing.assert_close(moved, want[f"eps_adaptive{int(adaptive)}"], **close)


# -- the form with a closure ----------------------------------------------------------------------


def problem(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)
    x, y = torch.randn(12, 6).to(dtype), torch.arange(12) % 4

    def closure():
        logits = net(x)
        return nn.functional.cross_entropy(logits, y), logits

    return net, x, closure


@pytest.mark.parametrize("target", [PreviousStep, Frozen, lambda: Ema(0.5)])
def test_a_step_is_what_the_two_calls_are(target):
    nets = []
    for by_hand in (False, True):
        net, x, closure = problem()
        optimizer = TRAM(net.parameters(), sgd(0.3, 0.9), target=target())
        for _ in range(4):
            if not by_hand:
                optimizer.step(closure)
                continue
            loss, logits = closure()
            loss.backward()
            with torch.no_grad(), optimizer.target_weights():
                other = net(x)
            optimizer.ascend(divergence(other, logits))
            closure()[0].backward()
            optimizer.descend()
        nets.append(flat(net.parameters()))
    torch.testing.assert_close(*nets)


def test_what_the_targets_are():
    """Parameters before each step, and what three targets make of them."""
    seen = []
    net, _, closure = problem()
    optimizers = {
        "previous": TRAM(net.parameters(), sgd(), target=PreviousStep()),
        "frozen": TRAM(net.parameters(), sgd(), target=Frozen()),
        "ema": TRAM(net.parameters(), sgd(), target=Ema(0.75)),
    }
    for _ in range(3):
        seen.append(flat(net.parameters()))
        for optimizer in optimizers.values():
            # The same parameters for all; only the last one's step counts.
            with torch.no_grad():
                nn.utils.vector_to_parameters(seen[-1].clone(), net.parameters())
            optimizer.step(closure)
    found = {name: flat(o.target.weights) for name, o in optimizers.items()}
    assert torch.equal(found["previous"], seen[2])
    assert torch.equal(found["frozen"], seen[0])
    mean = seen[0]
    for weights in seen:
        mean = 0.75 * mean + 0.25 * weights
    torch.testing.assert_close(found["ema"], mean)
    assert not torch.equal(seen[1], seen[2])


def test_the_first_step_is_plain_descent():
    net, _, closure = problem()
    theta = flat(net.parameters())
    g = flat(torch.autograd.grad(closure()[0], list(net.parameters())))
    TRAM(net.parameters(), sgd(0.1)).step(closure)
    torch.testing.assert_close(flat(net.parameters()), theta - 0.1 * g)


def test_noise_keeps_dropout_masks():
    net = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 4)).double()
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 4
    masks = []
    net[1].register_forward_hook(lambda m, i, o: masks.append(o == 0))

    def closure():
        logits = net(x)
        return nn.functional.cross_entropy(logits, y), logits

    optimizer = TRAM(net.parameters(), sgd(), target=InputNoise(net, 0.1))
    state = torch.get_rng_state()
    optimizer.step(closure)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert optimizer.radius > 0
    # The noisy pass leaves no trace: two ordinary forwards would give the same.
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    net(x), net(x)
    assert torch.equal(torch.get_rng_state(), after)


def test_noise_on_embeddings_and_inputs():
    net = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(15, 4))
    ids = torch.randint(0, 7, (8, 3))

    def closure():
        logits = net(ids)
        return nn.functional.cross_entropy(logits, torch.arange(8) % 4), logits

    optimizer = TRAM(net.parameters(), sgd(), target=InputNoise(net[0], 0.2))
    optimizer.step(closure)
    assert optimizer.radius > 0
    assert not net[0]._forward_hooks
    with pytest.raises(TypeError, match=r"expected a floating input .* give the embedding"):
        TRAM(net.parameters(), sgd(), target=InputNoise(net)).step(closure)
    assert not net._forward_pre_hooks
    noise = InputNoise(nn.Identity(), 0.5, generator=torch.Generator().manual_seed(1))
    with noise.noise():
        z = noise.module(input=torch.zeros(20000))
    assert abs(z.std() - 0.5) < 0.02
    assert torch.equal(noise.module(torch.ones(2)), torch.ones(2))


def test_fisher():
    net, x, closure = problem()
    noise = InputNoise(net, 0.1, generator=torch.Generator().manual_seed(3))
    optimizer = TRAM(net.parameters(), sgd(), target=Fisher(noise, gamma=0.2, eta=0.3))
    params = list(net.parameters())
    g = flat(torch.autograd.grad(closure()[0], params))
    z = torch.randn(12, 6, generator=torch.Generator().manual_seed(3)).double()
    noisy = nn.functional.cross_entropy(net(x + 0.1 * z), torch.arange(12) % 4)
    metric = flat(torch.autograd.grad(noisy, params)).square() + 0.3
    move = 0.2 * (g / metric) / (g.square() / metric).sum().sqrt()
    start = flat(params)
    seen = []

    def recording():
        seen.append(flat(params))
        return closure()

    optimizer.step(recording)
    assert torch.equal(seen[0], start)
    torch.testing.assert_close(seen[-1], start + move)
    torch.testing.assert_close((metric * move.square()).sum().sqrt(), torch.tensor(0.2).double())


def test_statistics_are_recorded_once():
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)
    )
    net.append(nn.Flatten()).append(nn.Linear(16, 3))
    x = torch.randn(8, 2, 6)

    def closure():
        logits = net(x)
        return nn.functional.cross_entropy(logits, torch.arange(8) % 3), logits

    plain = copy.deepcopy(net)
    optimizer = TRAM(net.parameters(), sgd(), target=Frozen(), model=net)
    for _ in range(2):
        plain.load_state_dict(net.state_dict())
        plain(x)
        optimizer.step(closure)
        for name, buffer in plain.named_buffers():
            assert torch.equal(dict(net.named_buffers())[name], buffer), name
    assert net[1].num_batches_tracked == 2
    net.eval()
    with frozen_statistics(net):
        recorded = net(x)
    assert torch.equal(recorded, net(x))
    assert net[1].track_running_stats
    assert net[2].momentum == 0.1


# -- SAM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [True, False])
def test_sam_by_its_formula(adaptive):
    net, _, closure = problem()
    params = list(net.parameters())
    theta = flat(params)
    g = flat(torch.autograd.grad(closure()[0], params))
    moved = g * theta**2 / (g * theta).norm() if adaptive else g / g.norm()
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta + 0.3 * moved, params)
    uphill = flat(torch.autograd.grad(closure()[0], params))
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta.clone(), params)
    optimizer = SAM(params, sgd(0.5), rho=0.3, adaptive=adaptive)
    loss = optimizer.step(lambda: closure()[0])
    torch.testing.assert_close(flat(params), theta - 0.5 * uphill)
    assert not loss.requires_grad


def test_groups_have_one_norm_and_their_own_rule():
    a, b = (nn.Parameter(torch.randn(4).double()) for _ in range(2))
    optimizer = SAM(
        [{"params": [a], "adaptive": True}, {"params": [b], "lr": 0.0}],
        sgd(0.1),
        rho=2.0,
    )
    before = [p.detach().clone() for p in (a, b)]
    ga, gb = torch.randn(2, 4).double()
    a.grad, b.grad = ga.clone(), gb.clone()
    size = optimizer.ascend()
    norm = ((before[0] * ga).square().sum() + gb.square().sum()).sqrt()
    torch.testing.assert_close(size, norm)
    torch.testing.assert_close(a.detach(), before[0] + 2 * before[0] ** 2 * ga / norm)
    torch.testing.assert_close(b.detach(), before[1] + 2 * gb / norm)
    a.grad, b.grad = torch.ones(2, 4).double().unbind(0)
    optimizer.descend()
    torch.testing.assert_close(a.detach(), before[0] - 0.1)
    assert torch.equal(b.detach(), before[1]), "a group's learning rate reaches the base optimiser"


def test_the_parameters_come_back_exactly():
    """Also those far larger than their perturbation, and those without a gradient at first."""
    big, late = (nn.Parameter(torch.full((3,), value)) for value in (1e8, 2.0))
    shared = nn.Parameter(torch.tensor([1.0]))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = SAM([big, late, shared, shared], sgd(0.0), rho=0.7)
    before = [p.detach().clone() for p in (big, late, shared)]
    big.grad, shared.grad = torch.full((3,), 1e-3), torch.ones(1)
    optimizer.ascend()
    assert torch.equal(late.detach(), before[1])
    torch.testing.assert_close(shared.detach(), before[2] + 0.7), "perturbed once"
    late.grad = torch.ones(3)
    assert optimizer.ascended
    optimizer.descend()
    for p, old in zip((big, late, shared), before, strict=True):
        assert torch.equal(p.detach(), old)


def test_no_gradient_moves_nothing():
    p = nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = TRAM([p], sgd(0.1), target=Frozen())
    p.grad = torch.zeros(2)
    optimizer.ascend(0.5)
    assert torch.equal(p.detach(), torch.tensor([1.0, 0.0]))
    optimizer.descend()
    p.grad = torch.ones(2)
    optimizer.ascend(0.5)
    torch.testing.assert_close(p.detach(), torch.tensor([1.5, 0.0])), "0 stays 0"


def test_max_radius_and_scale():
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = TRAM([p], sgd(), target=Frozen(), adaptive=False, scale=4.0, max_radius=1.5)
    for d, want in ((0.25, 1.0), (10.0, 1.5)):
        p.grad = torch.ones(1)
        optimizer.ascend(torch.tensor(d))
        assert float(optimizer.radius) == want
        torch.testing.assert_close(p.detach(), torch.tensor([3.0 + want]))
        optimizer.descend()


# -- scalers, clipping, states --------------------------------------------------------------------


def scaled_steps(overflow):
    """Parameters and scale after three steps with a scaler; passes that overflow are given."""
    net, _, closure = problem(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    optimizer = TRAM(net.parameters(), sgd(0.3), target=Frozen())
    calls = []

    def poisoned():
        loss, logits = closure()
        if torch.is_grad_enabled():
            calls.append(len(calls))
            if calls[-1] in overflow:
                loss = loss * torch.inf
        return loss, logits

    history = []
    for _ in range(3):
        optimizer.step(poisoned, scaler=scaler)
        scaler.update()
        history.append((flat(net.parameters()), scaler.get_scale(), optimizer.ascended))
    return history


def test_scaler_changes_nothing_but_the_scale():
    net, _, closure = problem(torch.float32)
    optimizer = TRAM(net.parameters(), sgd(0.3), target=Frozen())
    for scaled, scale, ascended in scaled_steps(overflow=()):
        optimizer.step(closure)
        torch.testing.assert_close(scaled, flat(net.parameters()), rtol=1e-5, atol=1e-6)
        assert scale == 2.0**10
        assert not ascended


@pytest.mark.parametrize("call", [2, 3], ids=["first pass", "second pass"])
def test_a_step_that_overflows_is_skipped_as_a_whole(call):
    clean, skipped = scaled_steps(overflow=()), scaled_steps(overflow=(call,))
    assert torch.equal(skipped[0][0], clean[0][0])
    assert torch.equal(skipped[1][0], skipped[0][0]), "restored, and no step taken"
    assert skipped[1][1] == 2.0**9
    torch.testing.assert_close(skipped[2][0], clean[1][0], rtol=1e-5, atol=1e-6)
    assert skipped[2][0].isfinite().all()


def test_clipping_sees_the_second_gradient_alone():
    net, _, closure = problem()
    theta = flat(net.parameters())
    TRAM(net.parameters(), sgd(1.0), target=Frozen()).step(closure, clip_norm=1e-3)
    torch.testing.assert_close(
        (flat(net.parameters()) - theta).norm().item(), 1e-3, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("target", [PreviousStep, Frozen, lambda: Ema(0.9)])
def test_interrupted_training_goes_on_the_same(target):
    def build():
        net, _, closure = problem()
        make = lambda groups: torch.optim.AdamW(groups, lr=0.02)  # noqa: E731
        return net, closure, TRAM(net.parameters(), make, target=target())

    net, closure, optimizer = build()
    for _ in range(3):
        optimizer.step(closure)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    for _ in range(2):
        optimizer.step(closure)
    other, again, resumed = build()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(2):
        resumed.step(again)
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))


def test_a_state_of_another_model_is_refused():
    optimizers = []
    for width in (2, 3):
        p = nn.Parameter(torch.ones(width))
        optimizers.append(TRAM([p], sgd(), target=Frozen()))
    with pytest.raises(ValueError, match="expected target weights of these 1 parameters"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())


def test_schedulers_take_either_optimiser():
    net, _, closure = problem()
    base = torch.optim.SGD(net.parameters(), lr=0.4)
    optimizer = TRAM(net.parameters(), base)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step(closure)
    scheduler.step()
    assert base.param_groups[0]["lr"] == 0.2


def test_an_error_in_the_closure_leaves_the_parameters():
    net, _, closure = problem()
    optimizer = TRAM(net.parameters(), sgd(), target=Frozen())
    optimizer.step(closure)
    before, calls = flat(net.parameters()), []

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert torch.equal(flat(net.parameters()), before)
    optimizer.step(closure)


# -- warnings and refusals ------------------------------------------------------------------------


def test_a_target_that_moves_with_the_model_is_warned_of():
    net, _, closure = problem()
    optimizer = TRAM(net.parameters(), sgd(), target=Frozen())

    def nothing():
        closure()[0].backward()
        optimizer.ascend(0.0)
        closure()[0].backward()
        optimizer.descend()

    nothing()
    with pytest.warns(UserWarning, match="the divergence was 0 in two steps"):
        nothing()


def test_half_precision_parameters_are_warned_of():
    with pytest.warns(UserWarning, match="half precision"):
        optimizer = SAM([nn.Parameter(torch.ones(3).bfloat16())], sgd(), rho=1.0)
    (p,) = optimizer._params
    p.grad = torch.ones(3).bfloat16()
    torch.testing.assert_close(optimizer.ascend(), torch.tensor(3.0).sqrt())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"target": "previous"}, TypeError, "target: expected a target or None"),
        ({"kind": "kl"}, ValueError, "kind: expected one of kl_forward"),
        ({"ascent": "paper"}, ValueError, "ascent: expected gradient or released"),
        ({"scale": 0}, ValueError, "scale"),
        ({"max_radius": -1.0}, ValueError, "max_radius"),
        ({"adaptive": 1}, TypeError, "adaptive: expected a bool"),
        ({"official_scale": None}, TypeError, "official_scale"),
        ({"model": torch.zeros(1)}, TypeError, "model: expected a module or None"),
        ({"base_optimizer": lambda groups: None}, TypeError, "base_optimizer: expected an optim"),
    ],
)
def test_refused_options(options, error, match):
    with pytest.raises(error, match=match):
        TRAM([nn.Parameter(torch.ones(2))], **{"base_optimizer": sgd(), **options})


def test_refusals():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match="expected one of the same 1 parameters, got 2"):
        SAM([p], torch.optim.SGD([p, q], lr=0.1))
    with pytest.raises(
        TypeError, match="params: expected real floating parameters, got a complex64"
    ):
        SAM([nn.Parameter(torch.ones(2, dtype=torch.complex64))], sgd())
    for value, error in ((-0.1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="rho"):
            SAM([p], sgd(), rho=value)
    for decay in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="decay"):
            Ema(decay)
    for make in (lambda: InputNoise(None), lambda: Fisher(None)):
        with pytest.raises(TypeError, match=r"module|noise"):
            make()
    with pytest.raises(ValueError, match="where: expected input"):
        InputNoise(nn.Linear(1, 1), where="inside")
    optimizer = TRAM([p], sgd(), target=Frozen())
    with pytest.raises(RuntimeError, match="call ascend first"):
        optimizer.descend()
    for d in (
        torch.tensor(-1e-3),
        torch.tensor(torch.nan),
        torch.tensor(torch.inf),
        torch.ones(2),
        -1.0,
    ):
        with pytest.raises(ValueError, match="divergence: expected"):
            optimizer.ascend(d)
    assert not optimizer.ascended
    optimizer.ascend(0.1)
    with pytest.raises(RuntimeError, match="perturbed already"):
        optimizer.ascend(0.1)
    with pytest.raises(RuntimeError, match="state_dict: the parameters are perturbed"):
        optimizer.state_dict()
    optimizer.descend()
    with pytest.raises(RuntimeError, match="add_param_group"):
        optimizer.add_param_group({"params": [q]})
    with pytest.raises(TypeError, match="closure: expected a function"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"closure: expected a pair \(loss, logits\)"):
        optimizer.step(lambda: p.sum())
    with pytest.raises(TypeError, match="target: expected Fisher, got Frozen"):
        optimizer.ascend_fisher([None])
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(TypeError, match="gradients: expected dense ones"):
        SAM([p], sgd()).ascend()
