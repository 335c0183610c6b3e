"""Towards Practical Plug-and-Play Diffusion Models (PPAP).

Hyojun Go, Yunsung Lee, Jin-Young Kim, Seunghyun Lee, Myeongho Jeong, Hyun Seung Lee, Seungtaek
Choi; CVPR 2023; arXiv 2212.05973; official code riiid/PPAP.

A network f that knows clean images only guides a diffusion model at every noise level by N experts:
f with frozen weights, and low-rank deltas, biases and normalisations of expert n, which owns the
times [n T / N, (n + 1) T / N). Experts learn from f alone, on images x_0 that the diffusion model
made, without labels:

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise,   L = mean p (log p - log q),
    p = softmax(f(x_0) / tau), q = softmax(f_n(x_t)).

Guidance is g = s grad_x log softmax(f_n(x_t))_y; DDPM: mean + variance g; DDIM:
eps - sqrt(1 - abar_t) g.

Deviations, all deliberate:

- Times on an inner bound belong to the upper expert, as in training; every sample is routed by its
  own time. The released sampler counts both bounds, gives them to the lower expert, and reads the
  first time of the batch (``official_bounds=True`` for the bounds).
- Deltas of linear layers are always multiplied by alpha / r; the released training forward forgets
  it, the merged one does not.
- Experts are trained independently; the released loop goes on from expert to expert
  (``warm_start=True``).
- The normalised rule takes norms per sample; the released one takes that of the whole batch and of
  the first mean (``official=True``).
- The teacher's input normalisation is the caller's: ``teacher`` is a function of x_0 in [-1, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.diffusion_control._lora_layers import Routing, adapters, wrap
from transfuse.ops import noise_mix

__all__ = [
    "ExpertGuide",
    "condition_mean",
    "condition_mean_normalised",
    "condition_score",
    "distillation_loss",
    "guidance_gradient",
    "kl_loss",
    "train_experts",
]

Loss = Callable[[Tensor, Tensor], Tensor]


@register(
    title="Towards Practical Plug-and-Play Diffusion Models",
    authors=(
        "Hyojun Go",
        "Yunsung Lee",
        "Jin-Young Kim",
        "Seunghyun Lee",
        "Myeongho Jeong",
        "Hyun Seung Lee",
        "Seungtaek Choi",
    ),
    year=2023,
    venue="CVPR",
    arxiv="2212.05973",
    repository="https://github.com/riiid/PPAP",
    kind="guidance",
    ops=("lora_linear", "lora_conv2d", "noise_mix"),
)
class ExpertGuide(nn.Module):
    """A network as N experts for noise ranges, which share its weights.

    Args:
        network: knows clean images; any module of Linear and Conv2d layers. It is left as it is;
            its weights are shared, not copied.
        n_experts: N, from 1 to the number of times.
        num_timesteps: T.
        r: rank of the deltas (r k for k x k convolutions).
        alpha: deltas are multiplied by alpha / r.
        targets: layers with deltas: names or ends of names, or a function (name, layer); None: all
            Linear and Conv2d. Published: ResNet stem, ``conv1`` and ``conv2``; DeiT ``qkv`` and
            ``proj``.
        last: name of the last classifier layer, whose bias is not trained; None: the last Linear.
        official_bounds: route as the released sampler does.
        generator: for the deltas.

    Raises:
        ValueError, TypeError: an option outside its range, nothing to adapt, grouped or non-square
            convolutions.

    Notes:
        A forward takes one pass of the shared layers' products and, for each expert that a sample
        needs, its own deltas: samples are grouped by expert. Convolution deltas are formed once per
        expert in use and forward; :meth:`merge` forms them once.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> guide = ExpertGuide(network, 5, num_timesteps=1000, r=2)
        >>> x, t = torch.randn(4, 3, 2, 2), torch.tensor([0, 199, 200, 999])
        >>> guide.expert_index(t).tolist(), torch.equal(guide(x, t), network(x))
        ([0, 0, 1, 4], True)
    """

    def __init__(
        self,
        network: nn.Module,
        n_experts: int,
        *,
        num_timesteps: int = 1000,
        r: int = 16,
        alpha: float = 8.0,
        targets: Callable[[str, nn.Module], bool] | Sequence[str] | None = None,
        last: str | None = None,
        official_bounds: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_timesteps", num_timesteps), ("n_experts", n_experts), ("r", r)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if n_experts > num_timesteps:
            raise ValueError(f"n_experts: expected at most {num_timesteps}, got {n_experts}")
        alpha = _checks.number("alpha", alpha, positive=True)
        self.n_experts, self.num_timesteps = n_experts, num_timesteps
        self.bounds = [n * num_timesteps // n_experts for n in range(n_experts + 1)]
        self.official_bounds = official_bounds
        # The same memory in parameters of our own: freezing them leaves the network's alone.
        shared = {id(p): nn.Parameter(p.detach(), False) for p in network.parameters()}
        self.network = copy.deepcopy(network, shared)
        if last is None:
            linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
            last = linear[-1] if linear else ""
        self.routing: Routing = wrap(
            self.network,
            n_experts,
            r=r,
            alpha=alpha,
            targets=targets,
            frozen_biases=(last,),
            generator=generator,
        )

    def expert_index(self, t: Tensor) -> Tensor:
        """The expert of each time, int64 (B,).

        Raises:
            ValueError: a time outside [0, T) ([0, T] with ``official_bounds``).
        """
        if not isinstance(t, Tensor) or t.is_floating_point() or t.dim() != 1:
            raise ValueError(f"t: expected integer times (B,), got {_checks.describe(t)}")
        end = self.num_timesteps + int(self.official_bounds)
        if t.numel() > 0 and not 0 <= int(t.min()) <= int(t.max()) < end:
            raise ValueError(f"t: expected times in [0, {end}), got {t.tolist()}")
        inner = torch.tensor(self.bounds[1:-1], dtype=torch.int64, device=t.device)
        return torch.bucketize(t.to(torch.int64), inner, right=not self.official_bounds)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's output for noisy images, each by the expert of its time.

        Args:
            x: (B, ...).
            t: integer times (B,), or (1,) for all.
        """
        expert = self.expert_index(t)
        used = expert.unique()
        if used.numel() == 1:
            return self.by_expert(x, int(used))
        return self.by_expert(x, expert)

    def by_expert(self, x: Tensor, expert: int | Tensor) -> Tensor:
        """The output of given experts: a number, or int64 (B,)."""
        self.routing.expert = expert
        return self.network(x)

    def merge(self, expert: int) -> None:
        """Fold one expert into the weights: forwards cost what the network costs. Another expert
        may not be asked for until :meth:`unmerge`."""
        if not 0 <= expert < self.n_experts:
            raise ValueError(f"expert: expected a number in [0, {self.n_experts}), got {expert}")
        for adapter in adapters(self.network):
            adapter.merge(expert)

    def unmerge(self) -> None:
        """The shared weights again, bit for bit."""
        for adapter in adapters(self.network):
            adapter.unmerge()

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """What the experts have of their own: deltas, biases, normalisations with statistics."""
        own = {n for n, p in self.network.named_parameters() if p.requires_grad}
        state = self.network.state_dict()
        return {n: v for n, v in state.items() if n in own or ".experts." in n}

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what :meth:`adapter_state_dict` gave (ValueError for another network)."""
        want = self.adapter_state_dict()
        if set(state) != set(want):
            raise ValueError(f"state: expected {sorted(want)}, got {sorted(state)}")
        self.network.load_state_dict(state, strict=False)

    def extra_repr(self) -> str:
        return f"{self.n_experts} experts of {self.num_timesteps} times"


# -- learning from the network alone --------------------------------------------------------------


def kl_loss(student: Tensor, teacher: Tensor, *, tau: float = 0.25) -> Tensor:
    """KL(softmax(teacher / tau) || softmax(student)), averaged over classes, (B,).

    Args:
        student: logits (B, K).
        teacher: logits (B, K), sharpened by tau < 1.
    """
    # In float32 at least: probabilities of confident classes round to 1 in half precision.
    work = torch.promote_types(student.dtype, torch.float32)
    log_p = F.log_softmax(teacher.to(work) / tau, dim=1)
    log_q = F.log_softmax(student.to(work), dim=1)
    return (log_p.exp() * (log_p - log_q)).mean(1)


def distillation_loss(
    guide: ExpertGuide,
    teacher: Callable[[Tensor], Tensor],
    x0: Tensor,
    t: Tensor,
    *,
    alphas_cumprod: Tensor,
    noise: Tensor,
    loss: str | Loss = "kl",
    tau: float = 0.25,
) -> Tensor:
    """Loss of one batch: the experts on noisy images against the network on clean ones.

    Args:
        guide: the experts.
        teacher: the clean network with its own input normalisation, a function of x_0.
        x0: clean images (B, ...), made by the diffusion model.
        t: integer times (B,).
        alphas_cumprod: (T,).
        noise: of the shape of x0.
        loss: ``"kl"`` for classifiers, ``"mse"`` for dense regressors, or a function (student,
            teacher) -> scalar.
        tau: temperature of the teacher in ``"kl"``.

    Returns:
        A scalar.
    """
    tau = _checks.number("tau", tau, positive=True)
    alpha = alphas_cumprod.to(device=x0.device, dtype=torch.float32)[t]
    noisy = noise_mix(x0, noise, alpha=alpha.sqrt(), sigma=(1.0 - alpha).sqrt())
    with torch.no_grad():
        target = teacher(x0)
    student = guide(noisy, t)
    if callable(loss):
        return loss(student, target)
    if loss == "kl":
        return kl_loss(student, target, tau=tau).mean()
    if loss == "mse":
        return F.mse_loss(student, target)
    raise ValueError(f"loss: expected 'kl', 'mse' or a function, got {loss!r}")


def train_experts(
    guide: ExpertGuide,
    teacher: Callable[[Tensor], Tensor],
    sample: Callable[[int, torch.Generator], Tensor],
    *,
    alphas_cumprod: Tensor,
    steps: int,
    batch: int = 256,
    lr: float = 1e-4,
    weight_decay: float = 0.05,
    loss: str | Loss = "kl",
    tau: float = 0.25,
    warm_start: bool = False,
    generator: torch.Generator,
) -> list[list[float]]:
    """Train the experts one after the other: AdamW, learning rate annealed linearly.

    Args:
        guide: the experts, trained in place; its network's mode (train, eval) is kept.
        teacher: see :func:`distillation_loss`.
        sample: ``sample(batch, generator)``: clean images.
        alphas_cumprod: (T,).
        steps: per expert. Published: 300 000 split over the experts.
        batch, lr, weight_decay, loss, tau: published values by default.
        warm_start: an expert starts from the one before it.
        generator: for images, times and noise; on the CPU.

    Returns:
        Losses, by expert and step.
    """
    if guide.official_bounds:
        raise ValueError("guide: expected official_bounds=False; training has half-open ranges")
    parameters = [p for p in guide.network.parameters() if p.requires_grad]
    history = []
    for expert in range(guide.n_experts):
        if warm_start and expert > 0:
            _copy_expert(guide, expert - 1, expert)
        # Parameters hold all experts: what weight decay does to the others is undone at the end.
        before = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
        anneal = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(1.0 - step / steps, 0.0)
        )
        low, high = guide.bounds[expert : expert + 2]
        losses = []
        for _ in range(steps):
            x0 = sample(batch, generator)
            t = torch.randint(low, high, (x0.shape[0],), generator=generator).to(x0.device)
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            value = distillation_loss(
                guide, teacher, x0, t,
                alphas_cumprod=alphas_cumprod, noise=noise, loss=loss, tau=tau,
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            anneal.step()
            losses.append(value.item())
        optimizer.zero_grad(set_to_none=True)
        stacked = _stacked(guide)
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                if parameter in stacked:
                    others = [e for e in range(guide.n_experts) if e != expert]
                    parameter[others] = old[others]
        history.append(losses)
    return history


def _stacked(guide: ExpertGuide) -> set[nn.Parameter]:
    """Parameters with one row per expert: all but those of normalisations."""
    return {
        p for n, p in guide.network.named_parameters() if p.requires_grad and ".experts." not in n
    }


@torch.no_grad()
def _copy_expert(guide: ExpertGuide, source: int, to: int) -> None:
    for parameter in _stacked(guide):
        parameter[to] = parameter[source]
    for module in guide.network.modules():
        if isinstance(getattr(module, "experts", None), nn.ModuleList):
            own: Any = module.experts
            own[to].load_state_dict(own[source].state_dict())


# -- guidance -------------------------------------------------------------------------------------


def guidance_gradient(
    guide: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    target: Tensor | Callable[[Tensor], Tensor],
    *,
    scale: float = 7.5,
) -> Tensor:
    """scale * grad_x log softmax(f_n(x_t))_y, or -scale * the gradient of a task loss.

    Args:
        guide: (x, t) -> output, an :class:`ExpertGuide` for example.
        x: noisy images (B, ...).
        t: integer times (B,).
        target: classes, int64 (B,), or a function of the output that gives a loss per sample (B,)
            or a scalar.
        scale: s.

    Returns:
        The shape of x, float32 (float64 for float64).

    Raises:
        ValueError: a class that there is not.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    with torch.enable_grad():
        leaf = x.detach().to(work).requires_grad_()
        output = guide(leaf.to(x.dtype), t)
        if isinstance(target, Tensor):
            if output.dim() != 2:
                raise ValueError(f"guide: expected logits (B, K), got {tuple(output.shape)}")
            index = _checks.index_map(
                "target", target, x.shape[0], output.shape[1], "batch of x", "x", x
            )
            value = F.log_softmax(output.to(work), dim=1).gather(1, index[:, None]).sum()
        else:
            value = -target(output.to(work)).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
    return scale * gradient


def condition_mean(mean: Tensor, variance: Tensor, gradient: Tensor) -> Tensor:
    """DDPM: mean + variance * gradient, the mean of the guided posterior."""
    return mean + variance * gradient


def condition_mean_normalised(
    mean: Tensor, variance: Tensor, gradient: Tensor, *, scale: float, official: bool = False
) -> Tensor:
    """mean + variance * scale * |mean| * gradient / |gradient|, as for DeepFloyd.

    Args:
        mean, variance, gradient: (B, ...); the gradient of log p without a scale.
        scale: s.
        official: one norm of the whole batch's gradient, and that of the first mean.

    Returns:
        The guided mean; without a gradient the mean itself.
    """

    def norm(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1).view(-1, *([1] * (x.dim() - 1)))

    length, size = (gradient.norm(), mean[:1].norm()) if official else (norm(gradient), norm(mean))
    unit = torch.where(length > 0.0, gradient / torch.where(length > 0.0, length, 1.0), 0.0)
    return mean + variance * (unit * size * scale)


def condition_score(
    x: Tensor, original: Tensor, gradient: Tensor, *, alpha: float
) -> tuple[Tensor, Tensor]:
    """DDIM: eps - sqrt(1 - abar) gradient, and the clean image that follows.

    Args:
        x: noisy images.
        original: predicted clean images (after the sampler's clipping).
        gradient: of :func:`guidance_gradient`.
        alpha: cumulative alpha abar of the time, in (0, 1).

    Returns:
        The guided noise prediction and the guided clean image.
    """
    alpha = _checks.number("alpha", alpha)
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha: expected a number in (0, 1), got {alpha}")
    signal, noise = alpha**0.5, (1.0 - alpha) ** 0.5
    epsilon = (x - signal * original) / noise - noise * gradient
    return epsilon, (x - noise * epsilon) / signal
