"""LocalStyleFool: Regional Video Style Transfer Attack Using Segment Anything Model.

Yuxin Cao, Jinghao Li, Xi Xiao, Derui Wang, Minhui Xue, Hao Ge, Wei Liu, Guangwu Hu; IEEE S&P
Workshops 2024; arXiv 2403.11656. Its own code is not public; the query part is that of the same
authors' base method, yuxincao22/StyleFool. A robustness test for one's own video classifiers.

A clip v is stylised (s, see ``_clip_style``), a few tracked regions M_r are chosen by gradient and
area, and the composite x0 = v + sum_r M_r (s - v) is refined by queries inside M = union M_r:

    score_r = (rho_r / max rho)^lam (a_r / max a)^(1 - lam),    rho_r = mean |grad| over region r,
    u = sigma [xi; -xi], xi ~ N(0, I) M;   g = sum_i w_i u_i / sigma;   x <- clip(x +- eta sign g),

with w_i the rank of sample i's loss over n - 1; samples whose label left the top k share the mean
of the worst ranks. Noise comes from a counter and is never stored.

Deviations, all deliberate:

- The published criterion for regions is not available; the rule above weighs gradient and area.
- The box is around the composite inside M, and v is kept to the bit outside
  (``box="composite"``); the base code boxes around the clean clip (``box="clean"``).
- sigma is 1e-3 (the base code's command line has 1e-6, which float32 images barely hold).
- Samples without a valid label rank as +infinity, not as the loss 1000.
- The mean loss of an estimate is that of its valid samples; the base code divides it by their
  number once more.
- When no sample of an estimate is valid, new noise is drawn a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.diffusion_control._clip_style import rank_styles, stylize_clip
from transfuse.ops import nes_gradient, nes_perturb

__all__ = [
    "AttackResult",
    "LocalStyleAttack",
    "LocalStyleOptions",
    "NESEstimate",
    "composite",
    "estimate_gradient",
    "rank_styles",
    "region_scores",
    "sample_weights",
    "select_regions",
    "stylize_clip",
]

# (batch, T, C, H, W) -> logits (batch, K), or (values, classes), each (batch, k), best first.
Query = Callable[[Tensor], "Tensor | tuple[Tensor, Tensor]"]
BOXES = ("composite", "clean")


# -- regions --------------------------------------------------------------------------------------


def _check_masks(clip: Tensor, masks: Tensor) -> None:
    if masks.dtype != torch.bool or masks.dim() != 4:
        raise ValueError(f"masks: expected bool (R, T, H, W), got {_checks.describe(masks)}")
    if clip.dim() != 4 or tuple(masks.shape[1:]) != (clip.shape[0], *clip.shape[2:]):
        raise ValueError(
            f"masks: expected (R, T, H, W) of a clip (T, C, H, W), got {tuple(masks.shape)} for "
            f"{tuple(clip.shape)}"
        )


def region_scores(grad: Tensor, masks: Tensor, *, lam: float = 0.5) -> tuple[Tensor, Tensor]:
    """Score and area share of each region.

    Args:
        grad: (T, C, H, W) gradient of a surrogate's loss at the clip.
        masks: bool (R, T, H, W); regions may overlap.
        lam: in [0, 1]: 1 is gradient alone, 0 area alone.

    Returns:
        Scores and areas, each (R,) float64. An empty region scores 0.
    """
    _check_masks(grad, masks)
    lam = _checks.number("lam", lam)
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam: expected a number in [0, 1], got {lam}")
    # One product with all masks instead of a masked pass for each.
    members = masks.flatten(1).double()
    pixels = members.sum(1)
    share = pixels / max(members.shape[1], 1)
    strength = members @ grad.abs().mean(1).flatten().double() / pixels.clamp(min=1.0)

    def relative(x: Tensor) -> Tensor:
        largest = x.max() if x.numel() > 0 else x.sum()
        return x / largest if float(largest) > 0.0 else torch.ones_like(x)

    scores = relative(strength).pow(lam) * relative(share).pow(1.0 - lam)
    return torch.where(pixels > 0, scores, 0.0), share


def select_regions(
    grad: Tensor,
    masks: Tensor,
    *,
    lam: float = 0.5,
    max_regions: int = 3,
    min_area: float = 0.01,
) -> list[int]:
    """Numbers of the best regions, best first; ties to the lower number.

    Args:
        grad: (T, C, H, W).
        masks: bool (R, T, H, W).
        lam: of :func:`region_scores`.
        max_regions: at most as many.
        min_area: regions of a smaller share of the clip are left out.

    Raises:
        ValueError: no region is large enough, or shapes do not fit.
    """
    if isinstance(max_regions, bool) or not isinstance(max_regions, int) or max_regions < 1:
        raise ValueError(f"max_regions: expected a positive integer, got {max_regions!r}")
    scores, share = region_scores(grad, masks, lam=lam)
    order = torch.argsort(scores, descending=True, stable=True).tolist()
    kept = [r for r in order if share[r] >= min_area and share[r] > 0.0]
    if not kept:
        raise ValueError(
            f"masks: expected a region of at least {min_area} of the clip, "
            f"got {masks.shape[0]} regions with shares {share.tolist()}"
        )
    return kept[:max_regions]


def composite(clip: Tensor, stylised: Tensor, masks: Tensor) -> Tensor:
    """The clip with the stylised one inside the union of regions; exact on both sides.

    Args:
        clip: (T, C, H, W).
        stylised: the same shape.
        masks: bool (R, T, H, W).
    """
    _check_masks(clip, masks)
    if stylised.shape != clip.shape:
        raise ValueError(
            f"stylised: expected shape {tuple(clip.shape)}, got {tuple(stylised.shape)}"
        )
    return torch.where(masks.any(0)[:, None], stylised, clip)


# -- the estimate ---------------------------------------------------------------------------------


class NESEstimate(NamedTuple):
    """A gradient estimate; only its sign is used.

    ``valid`` samples of the last noise kept their label among the top k; ``loss`` is their mean
    loss; ``queries`` counts every sample.
    """

    gradient: Tensor
    loss: float
    valid: int
    queries: int


def _losses(answer: object, label: int, targeted: bool, top_k: int) -> tuple[Tensor, Tensor]:
    """Loss and validity of each sample: cross-entropy to the target, or minus the top logit."""
    if isinstance(answer, Tensor):
        logits = answer.detach().double().cpu()
        if logits.dim() != 2 or not 0 <= label < logits.shape[1]:
            raise ValueError(
                f"label: expected a class of logits (batch, K), got {label} for "
                f"{tuple(logits.shape)}"
            )
        values, classes = logits.topk(min(top_k, logits.shape[1]), dim=1)
        own = logits[:, label]
    else:
        values, classes = (part.detach().cpu() for part in answer)  # type: ignore[attr-defined]
        logits = values.double()
        own = torch.where(classes == label, logits, -torch.inf).amax(1)
        values, classes = logits[:, :top_k], classes[:, :top_k]
    if bool(logits.isnan().any()):
        raise ValueError("query_fn: expected numbers, got NaN logits")
    valid = (classes == label).any(1)
    return (logits.logsumexp(1) - own if targeted else -values[:, 0]), valid


def sample_weights(losses: Tensor, valid: Tensor, *, rank: bool = True) -> Tensor:
    """Weight of each sample in the estimate.

    With ``rank``: ascending rank of the loss over n - 1, in [0, 1]; invalid samples come last and
    share the mean of their ranks. Without: the loss, 0 for an invalid sample.

    Args:
        losses: (n,).
        valid: bool (n,).
    """
    if not rank:
        return torch.where(valid, losses, 0.0)
    count = losses.shape[0]
    order = torch.argsort(torch.where(valid, losses, torch.inf), stable=True)
    ranks = torch.empty(count, dtype=torch.float64)
    ranks[order] = torch.arange(count, dtype=torch.float64)
    if not bool(valid.all()):
        ranks[~valid] = ranks[~valid].mean()
    return ranks / max(count - 1, 1)


@torch.no_grad()
def estimate_gradient(
    query_fn: Query,
    x: Tensor,
    *,
    label: int | None = None,
    target: int | None = None,
    mask: Tensor | None = None,
    n: int = 48,
    sigma: float = 1e-3,
    chunk: int = 12,
    rank: bool = True,
    top_k: int = 1,
    retries: int = 3,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> NESEstimate:
    """Antithetic NES estimate of the attack loss, inside a mask.

    Args:
        query_fn: the black box: (batch, T, C, H, W) -> logits, or (values, classes) best first.
        x: clip (T, C, H, W).
        label: original class of an untargeted attack (loss: minus the largest logit).
        target: class of a targeted attack (loss: cross-entropy). One of the two.
        mask: bool, broadcasts to x.
        n: samples, even; half of them are the others mirrored.
        sigma: deviation of the noise.
        chunk: samples per query, even, divides n.
        rank: weights by rank, see :func:`sample_weights`.
        top_k: a sample counts if its label is among the top k.
        retries: new noise is drawn so often if no sample counts.
        generator: draws the seed; None: seed 0.
        backend: of ``transfuse.ops.nes_perturb`` and ``nes_gradient``.

    Returns:
        The estimate; its gradient is 0 outside the mask, and if no sample counted.

    Raises:
        ValueError: arguments that do not fit, NaN logits, sigma below 8 steps of x's dtype.

    Notes:
        Memory: one chunk of perturbed clips and one gradient, whatever n is.
    """
    label, targeted = _goal(label, target)
    for name, value in (("n", n), ("chunk", chunk)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 2 or value % 2:
            raise ValueError(f"{name}: expected a positive even integer, got {value!r}")
    if n % chunk:
        raise ValueError(f"chunk: expected a divisor of n = {n}, got {chunk}")
    if top_k < 1:
        raise ValueError(f"top_k: expected a positive integer, got {top_k}")
    sigma = _checks.number("sigma", sigma, positive=True)
    if sigma < 8.0 * torch.finfo(x.dtype).eps:
        raise ValueError(
            f"sigma: expected at least 8 steps of {x.dtype} "
            f"({8.0 * torch.finfo(x.dtype).eps:.2g}), got {sigma}"
        )
    if mask is not None and not bool(mask.any()):
        raise ValueError("mask: expected at least one True, got none")
    queries, half = 0, chunk // 2
    for _ in range(retries + 1):
        seed = _draw_seed(generator)
        losses, valid = [], []
        for start in range(0, n // 2, half):
            batch = nes_perturb(
                x, half, sigma=sigma, seed=seed, start=start, mask=mask, backend=backend
            )
            loss, counts = _losses(query_fn(batch), label, targeted, top_k)
            losses.append(loss)
            valid.append(counts)
        queries += n
        if bool(torch.cat(valid).any()):
            break
    loss, counts = torch.cat(losses), torch.cat(valid)
    if not bool(counts.any()):
        zero = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return NESEstimate(zero, float("nan"), 0, queries)
    weights = sample_weights(loss, counts, rank=rank).view(-1, 2, half)
    # Each noise has the weights of its two signs; u / sigma is the noise itself.
    pairs = (weights[:, 0] - weights[:, 1]).flatten().to(x.device)
    gradient = nes_gradient(pairs, x, seed=seed, mask=mask, backend=backend)
    return NESEstimate(gradient, loss[counts].mean().item(), int(counts.sum()), queries)


def _goal(label: int | None, target: int | None) -> tuple[int, bool]:
    if (label is None) == (target is None):
        raise ValueError("label, target: expected one of the two")
    goal = label if target is None else target
    if isinstance(goal, bool) or not isinstance(goal, int) or goal < 0:
        raise ValueError(f"label, target: expected a class number, got {goal!r}")
    return goal, target is not None


def _draw_seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


# -- the attack -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LocalStyleOptions:
    """Options of :class:`LocalStyleAttack`; the defaults are the published ones.

    Args:
        eps: half-width of the final box.
        budget: model queries at most.
        lam, max_regions, min_area: of :func:`select_regions`.
        n, sigma, chunk, rank, top_k: of :func:`estimate_gradient`.
        step: first step width.
        min_step: smallest step width.
        patience: untargeted: the step is halved when so many scores in a row do not fall.
        give_up: untargeted: iterations without a better score before the attack ends.
        box: ``"composite"`` or ``"clean"``: what the box is around, see the module.
        quantise: success is judged on the clip rounded to 8 bits inside the mask.
        shrink: targeted: first decrement of the box.
        backend: of the NES ops.
    """

    eps: float = 0.05
    budget: int = 300_000
    lam: float = 0.5
    max_regions: int = 3
    min_area: float = 0.01
    n: int = 48
    sigma: float = 1e-3
    chunk: int = 12
    rank: bool = True
    top_k: int = 1
    step: float = 1e-2
    min_step: float = 1e-3
    patience: int = 20
    give_up: int = 200
    box: str = "composite"
    quantise: bool = True
    shrink: float = 0.5
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("eps", "sigma", "step", "min_step", "shrink"):
            _checks.number(name, getattr(self, name), positive=True)
        for name in ("budget", "patience", "give_up", "max_regions", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.min_step > self.step:
            raise ValueError(f"min_step: expected at most step = {self.step}, got {self.min_step}")
        if self.box not in BOXES:
            raise ValueError(f"box: expected one of {', '.join(BOXES)}, got {self.box!r}")


class AttackResult(NamedTuple):
    """The last clip, model queries, whether it fools, the regions used and their union."""

    clip: Tensor
    queries: int
    success: bool
    regions: tuple[int, ...]
    mask: Tensor


@register(
    title="LocalStyleFool: Regional Video Style Transfer Attack Using Segment Anything Model",
    authors=(
        "Yuxin Cao",
        "Jinghao Li",
        "Xi Xiao",
        "Derui Wang",
        "Minhui Xue",
        "Hao Ge",
        "Wei Liu",
        "Guangwu Hu",
    ),
    year=2024,
    venue="IEEE S&P Workshops",
    arxiv="2403.11656",
    repository="https://github.com/yuxincao22/StyleFool",
    kind="procedure",
    ops=("nes_perturb", "nes_gradient"),
)
class LocalStyleAttack:
    """Regional style transfer and black-box refinement: a robustness test of one's own classifier.

    Args:
        query_fn: the black box: (batch, T, C, H, W) in [0, 1] -> logits (batch, K), or (values,
            classes), each (batch, k), best first.
        surrogate: differentiable stand-in, same input -> logits, whose gradient ranks the regions;
            None ranks by area alone.
        style_fn: ``style_fn(clip) -> stylised clip`` (see ``stylize_clip``); None: :meth:`attack`
            is given one.
        options: see :class:`LocalStyleOptions`.

    Raises:
        ValueError, TypeError: an option outside its range.

    Notes:
        Every model call counts as a query: n per estimate, 1 per clip that is looked at. A
        generator makes runs reproducible; without one the seed is the number of the estimate.

    Example:
        >>> weights = torch.linspace(-1, 1, 2 * 48).view(2, 48)
        >>> attack = LocalStyleAttack(lambda x: x.flatten(1) @ weights.T,
        ...                           options=LocalStyleOptions(n=8, chunk=8, budget=200))
        >>> clip, masks = torch.full((1, 3, 4, 4), 0.5), torch.ones(1, 1, 4, 4, dtype=torch.bool)
        >>> result = attack.attack(clip, masks, label=1, stylised=torch.full_like(clip, 0.4))
        >>> result.queries <= 200, result.regions
        (True, (0,))
    """

    def __init__(
        self,
        query_fn: Query,
        *,
        surrogate: Callable[[Tensor], Tensor] | None = None,
        style_fn: Callable[[Tensor], Tensor] | None = None,
        options: LocalStyleOptions | None = None,
    ) -> None:
        self.query_fn, self.surrogate, self.style_fn = query_fn, surrogate, style_fn
        self.options = LocalStyleOptions() if options is None else options

    def attack(
        self,
        clip: Tensor,
        masks: Tensor,
        *,
        label: int,
        target: int | None = None,
        stylised: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Stylise regions of a clip and refine them until the classifier errs.

        Args:
            clip: (T, C, H, W) in [0, 1]; T = 1 is an image.
            masks: bool (R, T, H, W), tracked regions from any segmenter.
            label: the true class.
            target: class wanted; None: any other.
            stylised: the stylised clip; None: ``style_fn`` makes it.
            generator: for the noise.

        Returns:
            :class:`AttackResult`; outside its mask the clip is the given one, bit for bit.
        """
        _check_masks(clip, masks)
        if float(clip.min()) < 0.0 or float(clip.max()) > 1.0:
            raise ValueError("clip: expected values in [0, 1]")
        if stylised is None:
            if self.style_fn is None:
                raise ValueError("stylised: expected a clip where there is no style_fn, got None")
            stylised = self.style_fn(clip)
        stylised = stylised.clamp(0.0, 1.0)
        run = _Run(self, clip, label, target, generator)
        regions = self._regions(run, clip, masks, stylised)
        mask = masks[list(regions)].any(0)[:, None].expand_as(clip)
        start = composite(clip, stylised, masks[list(regions)])
        if run.fools(start):
            if target is None or self.options.box == "composite":
                return run.result(start, True, regions, mask)
        elif target is not None:
            # A targeted refinement starts from a clip that is classified as wanted.
            return run.result(start, False, regions, mask)
        refine = run.untargeted if target is None else run.targeted
        x, success = refine(start, mask)
        return run.result(x, success, regions, mask)

    def _regions(self, run: _Run, clip: Tensor, masks: Tensor, stylised: Tensor) -> tuple[int, ...]:
        """The best regions, as many as it takes to change the prediction, at most max_regions."""
        options = self.options
        if self.surrogate is None:
            grad, lam = torch.ones_like(clip), 0.0
        else:
            with torch.enable_grad():
                x = clip.detach().clone().requires_grad_()
                goal = run.label if run.target is None else run.target
                logits = self.surrogate(x[None])
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor([goal]).to(x.device))
                (grad,) = torch.autograd.grad(loss, x)
            lam = options.lam
        chosen = select_regions(
            grad, masks, lam=lam, max_regions=options.max_regions, min_area=options.min_area
        )
        for count in range(1, len(chosen)):
            if run.fools(composite(clip, stylised, masks[chosen[:count]])):
                return tuple(chosen[:count])
        return tuple(chosen)


class _Run:
    """One attack: the clip, its goal, and the queries made so far."""

    def __init__(
        self,
        attack: LocalStyleAttack,
        clip: Tensor,
        label: int,
        target: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.query_fn, self.options, self.clip = attack.query_fn, attack.options, clip
        self.label, self.target = _goal(label, None)[0], target
        if target is not None and (_goal(None, target)[0] == label):
            raise ValueError(f"target: expected another class than label {label}")
        # A generator of our own where none is given: estimates must not share their noise.
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.queries = 0

    def result(self, x: Tensor, success: bool, regions: Sequence[int], mask: Tensor):
        """With the clip as it would be stored."""
        return AttackResult(
            self._stored(x, mask), self.queries, success, tuple(regions), mask[:, 0]
        )

    def _stored(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.options.quantise:
            return x
        rounded = (x * 255.0).round() / 255.0
        # Only what the attack changed is rounded: the rest is the clip, bit for bit.
        return torch.where(x == self.clip, self.clip, rounded)

    def _left(self, cost: int) -> bool:
        return self.queries + cost <= self.options.budget

    @torch.no_grad()
    def look(self, x: Tensor) -> tuple[float, list[int]]:
        """Top score and top classes of a clip as it would be stored; one query."""
        self.queries += 1
        answer = self.query_fn(self._stored(x)[None])
        if isinstance(answer, Tensor):
            values, classes = answer[0].topk(min(self.options.top_k, answer.shape[1]))
        else:
            values, classes = answer[0][0], answer[1][0]
        if bool(values.isnan().any()):
            raise ValueError("query_fn: expected numbers, got NaN logits")
        return float(values[0]), classes[: self.options.top_k].tolist()

    def fools(self, x: Tensor) -> bool:
        """Whether the prediction is another one, or the target; one query."""
        return self._reached(self.look(x)[1][0])

    def _reached(self, best: int) -> bool:
        return best != self.label if self.target is None else best == self.target

    def _estimate(self, x: Tensor, mask: Tensor) -> Tensor:
        o = self.options
        goal = {"label": self.label} if self.target is None else {"target": self.target}
        found = estimate_gradient(
            self.query_fn, x, mask=mask, n=o.n, sigma=o.sigma, chunk=o.chunk, rank=o.rank,
            top_k=o.top_k, retries=0, generator=self.generator, backend=o.backend, **goal,
        )  # fmt: skip
        self.queries += found.queries
        return found.gradient.to(x.dtype)

    def _move(self, x: Tensor, step: Tensor, mask: Tensor, centre: Tensor, eps: float) -> Tensor:
        """Into the box and [0, 1] inside the mask; the clip elsewhere."""
        moved = torch.minimum(torch.maximum(x + step, centre - eps), centre + eps).clamp(0.0, 1.0)
        return torch.where(mask, moved, self.clip)

    def untargeted(self, x: Tensor, mask: Tensor) -> tuple[Tensor, bool]:
        """Lower the top score until the label changes."""
        o = self.options
        centre = x if o.box == "composite" else self.clip
        x = self._move(x, torch.zeros_like(x), mask, centre, o.eps)
        step, best, stale, history = o.step, float("inf"), 0, []
        while self._left(o.n + 1) and stale < o.give_up:
            gradient = self._estimate(x, mask)
            x = self._move(x, step * gradient.sign(), mask, centre, o.eps)
            score, classes = self.look(x)
            if self._reached(classes[0]):
                return x, True
            history.append(score)
            stale = 0 if score < best else stale + 1
            best = min(best, score)
            recent = history[-o.patience :]
            if len(recent) == o.patience and recent[-1] >= recent[0]:
                step, history = max(step / 2.0, o.min_step), []
        return x, False

    def targeted(self, x: Tensor, mask: Tensor) -> tuple[Tensor, bool]:
        """Shrink the box while the target stays in the top k."""
        o = self.options
        centre = x if o.box == "composite" else self.clip
        width, shrink, step = 1.0, o.shrink, o.step
        smallest = 0.001
        while self._left(o.n + 1) and width > o.eps:
            gradient = self._estimate(x, mask)
            goal, lr = max(width - shrink, o.eps), step
            accepted = False
            while self._left(1):
                moved = self._move(x, -lr * gradient.sign(), mask, centre, goal)
                if self.target in self.look(moved)[1]:
                    x, width, accepted = moved, goal, True
                    break
                if lr / 2.0 < o.min_step:
                    break
                lr /= 2.0
            if accepted:
                continue
            if shrink <= smallest and lr <= o.min_step:
                # The box cannot shrink now: move inside it, towards the target.
                x = self._move(x, -o.min_step * gradient.sign(), mask, centre, width)
            shrink = max(shrink / 2.0, smallest)
        return x, width <= o.eps and self._left(1) and self.fools(x)
