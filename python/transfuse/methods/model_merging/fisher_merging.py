r"""Merging Models with Fisher-Weighted Averaging.

Michael Matena, Colin Raffel; NeurIPS 2022; arXiv 2111.09832. Official code: mmatena/model_merging
(TensorFlow).

Models k = 1..M of one architecture, fine-tuned from one initialisation, with parameters theta_k and
the diagonal F_k of their Fisher information; coefficients c_k:

    F_k     = 1/N sum_i sum_y p(y | x_i; theta_k) (d log p(y | x_i; theta_k) / d theta)^2
    w_k     = c_k / |F_k|_2                                       (norm over all merged parameters)
    theta*  = sum_k w_k F_k theta_k / sum_k w_k F_k               element by element

with F at least 1e-6, set after the norm is taken, and by default for the first model (the target)
alone: where nobody is certain its values stay. Coefficients are found by trying a grid (two models)
or draws from the simplex on held-out data.

Deviations from the official code, all deliberate:

- Where the denominator is 0 (the target's coefficient at the end of a grid, dead units of all
  donors) the target's value is taken; the official code gives NaN.
- Running statistics of normalisation layers are averaged with the coefficients alone; integer
  buffers, and whatever has no Fisher information (heads), stay the target's.
- The Fisher information of linear layers is summed without per-example gradients.
- A warning where the models are too far apart to share an initialisation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.model_merging import _state_dicts as states_of
from transfuse.methods.model_merging._fisher import diagonal_fisher
from transfuse.methods.model_merging._state_dicts import Names, States, Tied
from transfuse.ops import lincomb, multi_gram, multi_norm, ratio_merge
from transfuse.ops._progress import Progress, reporter

__all__ = [
    "Candidate",
    "coefficient_candidates",
    "diagonal_fisher",
    "fisher_merge",
    "iter_merged",
    "search",
]

# Cosine of two models below which they hardly come from one initialisation.
LEAST_COSINE = 0.5


class Candidate(NamedTuple):
    """Coefficients (M,), the merged state dict, and its score (NaN where none was asked for)."""

    coefficients: Tensor
    merged: dict[str, Tensor]
    score: float


class _Call(NamedTuple):
    states: list[Mapping[str, Tensor]]
    fishers: list[Mapping[str, Tensor]] | None
    names: states_of.Plan


@register(
    title="Merging Models with Fisher-Weighted Averaging",
    authors=("Michael Matena", "Colin Raffel"),
    year=2022,
    venue="NeurIPS",
    arxiv="2111.09832",
    repository="https://github.com/mmatena/model_merging",
    kind="merger",
    ops=("ratio_merge", "lincomb", "multi_norm", "multi_gram"),
)
def fisher_merge(
    states: States,
    fishers: Sequence[Mapping[str, Tensor]] | None = None,
    coefficients: Tensor | Sequence[float] | None = None,
    *,
    floor: float = 1e-6,
    favor_target: bool = True,
    normalize: bool = True,
    keep: Names = (),
    progress: Progress = False,
) -> dict[str, Tensor]:
    r"""One state dict from those of M models, each parameter weighted by its Fisher information.

    Args:
        states: M mappings of names to tensors (state dicts, or files read tensor by tensor: see
            ``transfuse.integrations.safetensors``); the first is the target.
        fishers: as many mappings, see :func:`diagonal_fisher`; None: plain weighted averages of all
            floating tensors. Names without one stay the target's.
        coefficients: (M,), at least 0; None: all equal.
        floor: least Fisher information.
        favor_target: the floor is that of the target only.
        normalize: divide each Fisher information by its norm.
        keep: names that stay the target's (its head), or a function that says so.
        progress: see ``transfuse.ops.hutchinson_trace``.

    Returns:
        Names of the target and tensors in its dtypes, in its order. Nothing of it shares memory
        with the inputs.

    Raises:
        TypeError, ValueError: state dicts of other names, shapes or kinds (with a list of the
            differences), quantised weights, coefficients or Fisher information that are negative or
            not finite, or 0 everywhere.

    Notes:
        Weights that share memory in the target are merged once and share it again. Reads of a
        mapping are twice each Fisher information (once for its norm) and once each model.

    Reference:
        Matena & Raffel 2022 (arXiv:2111.09832), equation 1 and section 3.

    Example:
        >>> import torch
        >>> from transfuse.methods.model_merging.fisher_merging import fisher_merge
        >>> states = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 3.0])}]
        >>> fishers = [{"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}]
        >>> fisher_merge(states, fishers)
        {'w': tensor([1.5000, 2.5000])}
    """
    made = iter_merged(
        states,
        fishers,
        coefficients,
        floor=floor,
        favor_target=favor_target,
        normalize=normalize,
        keep=keep,
        progress=progress,
    )
    found = dict(made)
    return {name: found[name] for name in states[0]}


def iter_merged(
    states: States,
    fishers: Sequence[Mapping[str, Tensor]] | None = None,
    coefficients: Tensor | Sequence[float] | None = None,
    *,
    floor: float = 1e-6,
    favor_target: bool = True,
    normalize: bool = True,
    keep: Names = (),
    progress: Progress = False,
) -> Iterator[tuple[str, Tensor]]:
    """The items of :func:`fisher_merge`, a few tensors at a time, in no particular order.

    Everything is checked, and norms are taken, before the first item.

    Example:
        >>> import torch
        >>> from transfuse.methods.model_merging.fisher_merging import iter_merged
        >>> list(iter_merged([{"w": torch.zeros(2)}, {"w": torch.ones(2)}]))
        [('w', tensor([0.5000, 0.5000]))]
    """
    call = _checked(states, fishers, keep)
    table = _coefficients(coefficients, len(call.states))
    weights = _weights(call, table[None], normalize)[0]
    items = _items(call, table, weights, floor, favor_target, progress)
    return ((name, tensors[0]) for name, tensors in items)


def _checked(states: States, fishers: Sequence[Mapping[str, Tensor]] | None, keep: Names) -> _Call:
    found = states_of.check_states("states", states)
    importance = None
    if fishers is not None:
        importance = states_of.check_states("fishers", fishers)
        if len(importance) != len(found):
            raise ValueError(
                f"fishers: expected {len(found)} mappings (as states), got {len(importance)}"
            )
    weighted = (lambda name: True) if importance is None else importance[0].__contains__
    statistics = states_of.STATISTICS
    names = states_of.plan(
        found, keep, lambda name: weighted(name) and not name.endswith(statistics)
    )
    if importance is not None:
        problems = []
        for k, fisher in enumerate(importance):
            for name in names.merged:
                if name not in fisher:
                    problems.append(f"{name} is missing in fishers[{k}]")
                    continue
                shape = tuple(states_of.peek(fisher, name).shape)
                wanted = tuple(states_of.peek(found[0], name).shape)
                if shape != wanted:
                    problems.append(
                        f"{name} in fishers[{k}] has shape {shape}, in states[0] {wanted}"
                    )
            unknown = [n for n in fisher if n not in found[0]]
            problems += [f"{n} is in fishers[{k}] and not in states[0]" for n in unknown]
        states_of.refuse(problems)
    if not names.merged:
        raise ValueError("states: expected at least one tensor to merge, got none")
    return _Call(found, importance, names)


def _coefficients(value: Tensor | Sequence[float] | None, models: int) -> Tensor:
    table = torch.ones(models) if value is None else torch.as_tensor(value, dtype=torch.float64)
    table = table.detach().to(device="cpu", dtype=torch.float64)
    if table.shape != (models,):
        raise ValueError(f"coefficients: expected shape ({models},), got {tuple(table.shape)}")
    if not bool((table.isfinite() & (table >= 0)).all()) or float(table.sum()) <= 0:
        raise ValueError(
            "coefficients: expected finite numbers of at least 0 with a positive sum, got "
            f"{table.tolist()}"
        )
    return table


def _weights(call: _Call, tables: Tensor, normalize: bool) -> Tensor:
    """(S, M): coefficients over the norms of the Fisher information."""
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected a bool, got {_checks.describe(normalize)}")
    if call.fishers is None or not normalize:
        return tables
    norms = []
    for k, fisher in enumerate(call.fishers):
        tied = Tied()
        # Tensor by tensor and in no order: the same norm for files and for memory.
        squares = math.fsum(
            float(multi_norm([fisher[name].detach()])) ** 2
            for name in call.names.merged
            if tied.original(name, states_of.peek(call.states[0], name)) == name
        )
        if not 0.0 < squares < math.inf and bool((tables[:, k] > 0).any()):
            raise ValueError(
                f"fishers[{k}]: expected a positive, finite norm, got {math.sqrt(squares)}: no "
                "parameter is known to matter, or some are not finite"
            )
        norms.append(math.sqrt(squares) if squares > 0.0 else 1.0)
    return tables / torch.tensor(norms, dtype=torch.float64)


def _items(
    call: _Call,
    plain: Tensor,
    weights: Tensor,
    floor: float,
    favor_target: bool,
    progress: Progress,
) -> Iterator[tuple[str, list[Tensor]]]:
    """Names and their merged tensors, one per row of coefficients (S, M) or one for (M,)."""
    plain, weights = (t[None] if t.dim() == 1 else t for t in (plain, weights))
    states, names = call.states, call.names
    report = reporter(progress, "merging", len(names.merged) + len(names.averaged))
    done = 0
    tied, ready = Tied(), dict[str, list[Tensor]]()
    angle = _Angle(len(states))
    for part in states_of.groups(names.merged, states):
        first = {n: tied.original(n, states_of.peek(states[0], n)) for n in part}
        once = [n for n in part if first[n] == n]
        if once:
            thetas = [[state[n].detach() for n in once] for state in states]
            angle.add(thetas)
            if call.fishers is None:
                made = [_averaged(thetas, row) for row in plain]
            else:
                fishers = [[fisher[n].detach() for n in once] for fisher in call.fishers]
                made = ratio_merge(
                    thetas,
                    fishers,
                    weights,
                    floor=floor,
                    favor_target=favor_target,
                    normalize=None,
                )  # type: ignore[assignment]
            for j, name in enumerate(once):
                ready[name] = [row[j] for row in made]
        for name in part:
            yield name, ready[first[name]]
        done += len(part)
        report(done)
        # Only dicts in memory have tied weights, whose result is wanted again.
        ready = ready if isinstance(states[0], dict) else {}
    angle.warn()
    for name in names.averaged:
        thetas = [[state[name].detach()] for state in states]
        yield name, [_averaged(thetas, row)[0] for row in plain]
    if names.averaged:
        report(done + len(names.averaged))
    for name in names.kept:
        yield name, [states[0][name].detach().clone() for _ in plain]


def _averaged(thetas: list[list[Tensor]], row: Tensor) -> list[Tensor]:
    device = thetas[0][0].device
    return lincomb(thetas, (row / row.sum()).to(device))


class _Angle:
    """Cosines of the models with the target, over everything that was merged."""

    def __init__(self, models: int) -> None:
        self._products = torch.zeros(models, models, dtype=torch.float64)

    def add(self, thetas: list[list[Tensor]]) -> None:
        if len(thetas) > 1:
            self._products += multi_gram(thetas).double().cpu()

    def warn(self) -> None:
        size = self._products.diagonal().sqrt()
        cosines = self._products[0, 1:] / (size[0] * size[1:]).clamp_min(1e-300)
        far = [k for k, c in enumerate(cosines.tolist(), 1) if c < LEAST_COSINE]
        if far and float(size[0]) > 0:
            values = [round(float(cosines[k - 1]), 3) for k in far]
            warnings.warn(
                f"states{far}: cosine with states[0] {values}; models of other initialisations do "
                "not merge",
                stacklevel=4,
            )


def coefficient_candidates(models: int, points: int = 51, *, seed: int = 0) -> Tensor:
    """Settings to try: a grid from (1, 0) to (0, 1) for two models, else draws from the simplex.

    Returns:
        (points, models) float64, rows of sum 1.

    Raises:
        TypeError, ValueError: numbers out of range.

    Example:
        >>> coefficient_candidates(2, 3)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    models, points = (
        _checks.positive_int("models", models),
        _checks.positive_int("points", points),
    )
    if models == 2 and points > 1:
        first = torch.linspace(1, 0, points, dtype=torch.float64)
        return torch.stack((first, 1 - first), 1)
    generator = torch.Generator().manual_seed(seed)
    # Normalised exponential numbers are Dirichlet(1).
    uniform = torch.rand(points, models, generator=generator, dtype=torch.float64)
    draws = -torch.log1p(-uniform)
    return draws / draws.sum(1, keepdim=True)


def search(
    states: States,
    fishers: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    score: Callable[[dict[str, Tensor]], float] | None = None,
    candidates: Tensor | None = None,
    points: int = 51,
    seed: int = 0,
    at_once: int = 1,
    floor: float = 1e-6,
    favor_target: bool = True,
    normalize: bool = True,
    keep: Names = (),
    progress: Progress = False,
) -> Iterator[Candidate]:
    """Merged models for many coefficients, one after the other; the caller keeps the best.

    Args:
        states, fishers, floor, favor_target, normalize, keep: see :func:`fisher_merge`.
        score: of a merged state dict, on held-out data; None: scores are NaN.
        candidates: (S, M) coefficients; None: those of :func:`coefficient_candidates`.
        points, seed: of these.
        at_once: settings that are merged in one reading of the models; each takes the memory of
            one model.
        progress: see ``transfuse.ops.hutchinson_trace``.

    Yields:
        :class:`Candidate`.

    Example:
        >>> import torch
        >>> states = [{"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}]
        >>> found = search(states, points=5, score=lambda s: -abs(float(s["w"]) - 0.7))
        >>> max(found, key=lambda c: c.score).coefficients
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    call = _checked(states, fishers, keep)
    models = len(call.states)
    if candidates is None:
        candidates = coefficient_candidates(models, points, seed=seed)
    tables = torch.stack([_coefficients(row, models) for row in torch.as_tensor(candidates)])
    weights = _weights(call, tables, normalize)
    at_once = _checks.positive_int("at_once", at_once)
    report = reporter(progress, "coefficients", len(tables))
    done = 0
    for some, own in zip(tables.split(at_once), weights.split(at_once), strict=True):
        made = dict(_items(call, some, own, floor, favor_target, False))
        for s, row in enumerate(some):
            merged = {name: made[name][s] for name in call.states[0]}
            yield Candidate(row, merged, math.nan if score is None else float(score(merged)))
            done += 1
            report(done)
