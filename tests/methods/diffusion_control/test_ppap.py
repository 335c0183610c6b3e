"""PPAP: official adapters, routing and guidance rules, experts of a network, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.diffusion_control.ppap import (
    ExpertGuide,
    condition_mean,
    condition_mean_normalised,
    condition_score,
    distillation_loss,
    guidance_gradient,
    kl_loss,
    train_experts,
)
from transfuse.ops import DDPM, cfg_step, lora_conv2d, lora_linear
from transfuse.testing import golden

GOLDEN = golden.load("ppap")


# -- against the official code --------------------------------------------------------------------


def test_adapters_match_the_official_code():
    x, params = GOLDEN.inputs("lora"), GOLDEN.params("lora")
    conv = lora_conv2d(
        x["conv_x"], x["conv_w"], x["conv_b"], x["conv_A"][None], x["conv_B"][None],
        scale=params["scaling"], stride=params["stride"], padding=params["padding"],
    )  # fmt: skip
    GOLDEN.check(conv, "conv_y", "lora")
    linear = [x[f"lin_{name}"] for name in "xwb"]
    low = [x["lin_A"][None], x["lin_B"][None]]
    GOLDEN.check(lora_linear(*linear, *low, scale=params["scaling"]), "lin_y_merged", "lora")
    # The released training forward forgets alpha / r.
    GOLDEN.check(lora_linear(*linear, *low, scale=1.0), "lin_y_unmerged", "lora")


def test_routing_matches_the_official_code():
    params, t = GOLDEN.params("route"), GOLDEN.inputs("route")["t"]
    guide = experts(params["n_experts"], num_timesteps=params["num_timesteps"], r=2)
    assert guide.bounds == params["bounds"]
    official = experts(
        params["n_experts"],
        num_timesteps=params["num_timesteps"],
        r=2,
        official_bounds=True,
    )
    want = GOLDEN.outputs("route")["expert"]
    assert torch.equal(official.expert_index(t), want)
    inside = t < params["num_timesteps"]
    differ = guide.expert_index(t[inside]) != want[inside]
    on_bounds = torch.isin(t[inside], torch.tensor(params["bounds"][1:-1]))
    assert torch.equal(differ, on_bounds), "only inner bounds move, to the upper expert"


def test_guidance_rules_match_the_official_code():
    x, params = GOLDEN.inputs("guide"), GOLDEN.params("guide")
    gradient = params["scale"] * x["grad"]
    GOLDEN.check(condition_mean(x["mean"], x["var"], gradient), "mean_ddpm", "guide")
    normalised = condition_mean_normalised(
        x["mean"], x["var"], x["grad"], scale=params["scale"], official=True
    )
    GOLDEN.check(normalised, "mean_normalised", "guide")
    alpha, before = x["alpha_bar_t_prev"].tolist()
    epsilon, original = condition_score(x["x"], x["x0"], gradient, alpha=alpha)
    GOLDEN.check(original, "x0_ddim", "guide")
    # The posterior mean is a DDPM step without its noise.
    update = DDPM(alpha=alpha, alpha_next=before)
    quiet = torch.zeros_like(x["x"])
    for prediction, output in (("sample", original), ("epsilon", epsilon)):
        mean = cfg_step(x["x"], output, None, update, scale=1.0, prediction=prediction, noise=quiet)
        GOLDEN.check(mean, "mean_ddim", "guide")


def test_distillation_loss_matches_the_official_code():
    x, params = GOLDEN.inputs("kd"), GOLDEN.params("kd")
    got = kl_loss(x["student_logits"], x["teacher_logits"], tau=params["teacher_temperature"])
    GOLDEN.check(got, "loss_per_sample", "kd")


# -- experts of a network -------------------------------------------------------------------------


def network(norm=False, seed=0):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    ]
    return nn.Sequential(*layers)


def experts(count=3, *, norm=False, num_timesteps=30, r=4, **options):
    generator = torch.Generator().manual_seed(1)
    return ExpertGuide(
        network(norm), count, num_timesteps=num_timesteps, r=r, generator=generator, **options
    )


def shake(guide):
    """Experts that differ."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in guide.network.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator)


def images(batch=6):
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def test_new_experts_are_the_network_which_stays_as_it_is():
    plain = network(norm=True).eval()
    before = {n: v.clone() for n, v in plain.state_dict().items()}
    guide = ExpertGuide(plain, 3, num_timesteps=30, r=2).eval()
    x, t = images(), torch.tensor([0, 10, 20, 29, 9, 11])
    torch.testing.assert_close(guide(x, t), plain(x))
    assert all(p.requires_grad for p in plain.parameters())
    shake(guide)
    guide.merge(1)
    assert all(torch.equal(v, before[n]) for n, v in plain.state_dict().items())
    shared = {p.data_ptr() for p in plain.parameters()}
    guide.unmerge()
    own = [p for p in guide.network.parameters() if not p.requires_grad]
    assert own
    assert all(p.data_ptr() in shared for p in own), "weights are shared, not copied"


@pytest.mark.parametrize("norm", [False, True])
def test_mixed_times_are_routed_sample_by_sample(norm):
    guide = experts(norm=norm).eval()
    shake(guide)
    x, t = images(), torch.tensor([25, 0, 10, 29, 9, 11])
    got = guide(x, t)
    each = torch.cat([guide(x[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(got, each, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guide(x, torch.full((6,), 5)), got)
    loss = got.square().sum()
    loss.backward()
    for name, p in guide.network.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_merging_changes_cost_and_not_results():
    guide = experts().eval()
    shake(guide)
    x = images()
    want = guide.by_expert(x, 2)
    guide.merge(2)
    torch.testing.assert_close(guide(x, torch.full((6,), 20)), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="while expert 2 is merged"):
        guide(x, torch.zeros(6, dtype=torch.int64))
    guide.merge(0)
    guide.unmerge()
    assert torch.equal(guide.by_expert(x, 2), want)


def test_state_of_the_experts_alone():
    guide, other = experts(norm=True), experts(norm=True)
    shake(guide)
    guide.train()
    guide(images(), torch.tensor([1, 1, 1, 12, 12, 12]))  # statistics of two experts move
    state = guide.adapter_state_dict()
    assert not any(n.endswith("layer.weight") for n in state)
    other.load_adapter_state_dict(state)
    guide.eval(), other.eval()
    t = torch.tensor([0, 10, 20, 29, 9, 11])
    assert torch.equal(guide(images(), t), other(images(), t))
    running = [n for n in state if "running_mean" in n]
    assert len(running) == 3
    assert len({tuple(state[n].tolist()) for n in running}) == 3
    state.popitem()
    with pytest.raises(ValueError, match="state: expected"):
        other.load_adapter_state_dict(state)


def test_targets():
    guide = experts(targets=("0", "6"))
    names = {n.rsplit(".", 1)[0] for n, _ in guide.network.named_parameters() if n.endswith("down")}
    assert names == {"0", "6"}
    # The second convolution still has a bias of each expert, the last layer none.
    shapes = {n: tuple(p.shape) for n, p in guide.network.named_parameters() if p.requires_grad}
    assert shapes["3.bias"] == (3, 8)
    assert not any(n.startswith("8.") for n in shapes)
    shake(guide)
    t = torch.tensor([25, 0, 10, 29, 9, 11])
    each = torch.cat([guide(images()[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(guide(images(), t), each, rtol=1e-4, atol=1e-5)


def test_gradients_of_guidance():
    guide = experts().eval().double()
    shake(guide)
    x, t, y = images(2).double(), torch.tensor([0, 15]), torch.tensor([3, 7])
    got = guidance_gradient(guide, x, t, y, scale=2.0)
    eps, direction = 1e-6, torch.randn(x.shape, dtype=torch.float64)

    def value(x):
        return F.log_softmax(guide(x, t), 1).gather(1, y[:, None]).sum()

    slope = (value(x + eps * direction) - value(x - eps * direction)) / (2 * eps)
    torch.testing.assert_close((got * direction).sum(), 2.0 * slope, rtol=1e-6, atol=1e-8)
    task = guidance_gradient(guide, x, t, lambda out: F.cross_entropy(out, y, reduction="none"))
    torch.testing.assert_close(task, 7.5 / 2.0 * got)
    half = guidance_gradient(guide.bfloat16(), x.bfloat16(), t, y)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="target: expected entries"):
        guidance_gradient(guide.double(), x, t, torch.tensor([3, 10]))


def test_no_gradient_is_no_guidance():
    mean, variance = torch.randn(2, 2, 3, 4, 4).unbind(0)
    gradient = torch.randn_like(mean)
    gradient[0] = 0.0
    for official in (False, True):
        got = condition_mean_normalised(mean, variance, gradient, scale=3.0, official=official)
        assert torch.equal(got[0], mean[0])
    own = condition_mean_normalised(mean, torch.ones_like(mean), gradient, scale=3.0)
    torch.testing.assert_close((own - mean)[1].norm(), 3.0 * mean[1].norm())


# -- the ops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_bias", [False, True])
def test_linear_experts_are_the_formula(own_bias):
    x = torch.randn(5, 3, 7, dtype=torch.float64, requires_grad=True)
    tensors = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 7), (3, 4) if own_bias else (4,), (3, 2, 7), (3, 4, 2), (3,))
    ]
    index = torch.tensor([2, 0, 2, 1, 0])

    def ours(x, weight, bias, down, up, scale):
        return lora_linear(x, weight, bias, down, up, scale=scale, expert=index)

    def dense(x, weight, bias, down, up, scale):
        full = weight + scale[index, None, None] * (up @ down)[index]
        shift = bias[index][:, None] if own_bias else bias
        return torch.einsum("boi,bni->bno", full, x) + shift

    torch.testing.assert_close(ours(x, *tensors), dense(x, *tensors))
    assert torch.autograd.gradcheck(ours, (x, *tensors), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, (x, *tensors))


def test_convolution_experts_are_the_formula():
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    tensors = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 2, 3, 3), (3,), (2, 2, 6), (2, 9, 2))
    ]
    index = torch.tensor([1, 0, 0, 1])

    def ours(x, weight, bias, down, up):
        return lora_conv2d(x, weight, bias, down, up, scale=0.5, expert=index, stride=2, padding=1)

    weight, bias, down, up = tensors
    for i, e in enumerate(index.tolist()):
        full = weight + 0.5 * (up[e] @ down[e]).view(3, 2, 3, 3)
        want = F.conv2d(x[i : i + 1], full, bias, 2, 1)
        torch.testing.assert_close(ours(x, *tensors)[i : i + 1], want)
    assert torch.autograd.gradcheck(ours, (x, *tensors), check_forward_ad=True)


def test_experts_nobody_uses_cost_nothing():
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    down, up = torch.full((3, 1, 4), torch.nan), torch.full((3, 3, 1), torch.nan)
    down[1], up[1] = 1.0, 1.0
    got = lora_linear(x, weight, None, down, up, expert=torch.tensor([1, 1]))
    assert got.isfinite().all()
    assert lora_linear(x[:0], weight, None, down, up, expert=torch.zeros(0).long()).shape == (0, 3)


def _linear(**changes):
    arguments = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "bias": None,
        "down": torch.zeros(2, 1, 4),
        "up": torch.zeros(2, 3, 1),
        "expert": 0,
        **changes,
    }
    leading = [arguments.pop(n) for n in ("x", "weight", "bias", "down", "up")]
    return lora_linear(*leading, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": None}, TypeError, "x: expected a tensor"),
        ({"x": torch.zeros(4)}, ValueError, "x: expected shape"),
        ({"x": torch.zeros(2, 5)}, ValueError, "x: expected 4"),
        ({"weight": torch.zeros(3, 4).double()}, TypeError, "weight: expected dtype"),
        ({"bias": torch.zeros(4)}, ValueError, "bias: expected"),
        ({"down": torch.zeros(1, 4)}, ValueError, "down: expected 3 dimensions"),
        ({"down": torch.zeros(2, 1, 5)}, ValueError, "down: expected shape"),
        ({"up": torch.zeros(2, 3, 2)}, ValueError, "up: expected shape"),
        ({"expert": 2}, ValueError, r"expert: expected a number in \[0, 2\)"),
        ({"expert": None}, ValueError, "expert: expected a number or int64"),
        ({"expert": torch.tensor([0, 2])}, ValueError, "expert: expected entries"),
        ({"scale": torch.ones(3)}, ValueError, "scale: expected shape"),
        ({"scale": "1"}, TypeError, "scale: expected a Python number"),
    ],
)
def test_refused_layers(changes, error, match):
    with pytest.raises(error, match=match):
        _linear(**changes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"count": 0}, "n_experts"),
        ({"count": 31}, "n_experts: expected at most 30"),
        ({"r": 0}, "r: expected a positive"),
        ({"r": 11}, r"r: expected at most min\(in, out\) = 10"),
        ({"alpha": 0.0}, "alpha"),
        ({"targets": ("none",)}, "targets: expected a Linear or Conv2d"),
    ],
)
def test_refused_experts(options, match):
    with pytest.raises(ValueError, match=match):
        experts(**options)


def test_refused_convolutions_and_times():
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, (1, 3))):
        with pytest.raises(ValueError, match="expected a square kernel and one group"):
            ExpertGuide(nn.Sequential(layer), 2, r=1)
    with pytest.raises(ValueError, match="holds layers, got a single layer"):
        ExpertGuide(nn.Linear(3, 3), 2, r=1)
    guide = experts()
    for t in (torch.tensor([30]), torch.tensor([-1]), torch.tensor([0.5]), torch.tensor(3)):
        with pytest.raises(ValueError, match="t: expected"):
            guide(images(1), t)


# -- learning -------------------------------------------------------------------------------------


def alphas(count=30):
    return (1 - torch.linspace(1e-4, 0.3, count)).cumprod(0)


def test_each_expert_learns_its_own_range_and_leaves_the_others():
    guide = experts(2, norm=True).train()
    teacher = network(norm=True).eval()
    seen = []

    def sample(batch, generator):
        return torch.randn(batch, 1, 8, 8, generator=generator)

    def loss(student, target):
        seen.append(guide.routing.expert)
        return F.mse_loss(student, target)

    start = {n: v.clone() for n, v in guide.adapter_state_dict().items()}
    options = {"alphas_cumprod": alphas(), "steps": 3, "batch": 8, "lr": 0.05}
    history = train_experts(
        guide, teacher, sample, loss=loss, generator=torch.Generator().manual_seed(0), **options
    )
    assert seen == [0, 0, 0, 1, 1, 1]
    assert [len(h) for h in history] == [3, 3]
    end = guide.adapter_state_dict()
    stacked = [n for n in end if ".experts." not in n]
    for n in stacked:
        assert not torch.equal(end[n][0], start[n][0]), n
        assert not torch.equal(end[n][1], start[n][1]), n
    # Training only the first expert again leaves the second to the bit.
    guide.bounds, guide.n_experts = guide.bounds[:2], 1
    train_experts(
        guide, teacher, sample, loss="kl", generator=torch.Generator().manual_seed(1), **options
    )
    again = guide.adapter_state_dict()
    for n in stacked:
        assert torch.equal(again[n][1], end[n][1]), n


def test_a_warm_start_goes_on_from_the_expert_before():
    guide = experts(2)
    options = {
        "alphas_cumprod": alphas(), "steps": 2, "batch": 4, "lr": 1e-12, "weight_decay": 0.0
    }  # fmt: skip
    shake(guide)
    train_experts(
        guide,
        network(),
        lambda batch, g: torch.randn(batch, 1, 8, 8, generator=g),
        warm_start=True,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    for adapter in (guide.network[0], guide.network[6]):
        torch.testing.assert_close(adapter.up[0], adapter.up[1])


def test_refused_losses():
    guide = experts()
    arguments = {"alphas_cumprod": alphas(), "noise": images()}
    for changes in ({"loss": "l1"}, {"tau": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            distillation_loss(
                guide, network(), images(), torch.zeros(6).long(), **arguments, **changes
            )


@pytest.mark.claim
def test_experts_learn_noise_without_labels():
    """Digits in [-1, 1], t in [0, 400) of 1000: mean noisy accuracy rises by three points."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    y = torch.tensor(data.target)
    train, test = slice(0, 1300), slice(1300, None)
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(400):
        at = torch.randint(0, 1300, (128,))
        loss = F.cross_entropy(net(x[train][at]), y[train][at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    assert (net(x[test]).argmax(1) == y[test]).float().mean() > 0.9
    table = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)

    @torch.no_grad()
    def accuracy(answer):
        generator = torch.Generator().manual_seed(1)
        found = []
        for t in range(0, 400, 20):
            noise = torch.randn(x[test].shape, generator=generator)
            noisy = table[t].sqrt() * x[test] + (1 - table[t]).sqrt() * noise
            times = torch.full((len(noisy),), t)
            found.append((answer(noisy, times).argmax(1) == y[test]).float().mean())
        return 100 * torch.stack(found).mean().item()

    def distilled(teacher, **options):
        guide = ExpertGuide(
            net, 5, num_timesteps=400, r=4, generator=torch.Generator().manual_seed(2)
        )
        train_experts(
            guide,
            teacher,
            lambda batch, g: x[train][torch.randint(0, 1300, (batch,), generator=g)],
            alphas_cumprod=table[:400],
            steps=200,
            batch=128,
            lr=3e-3,
            generator=torch.Generator().manual_seed(3),
            **options,
        )
        return accuracy(guide)

    plain = accuracy(lambda noisy, t: net(noisy))
    assert distilled(net) >= plain + 3.0
    # A teacher that knows nothing must fail the claim.
    assert distilled(lambda x0: torch.zeros(len(x0), 10)) < plain + 3.0
