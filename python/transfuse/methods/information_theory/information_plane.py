r"""Opening the Black Box of Deep Neural Networks via Information.

Ravid Shwartz-Ziv, Naftali Tishby; 2017; arXiv 1703.00810.

For every layer and recorded epoch, the mutual information of its activations T with the input X and
with the label Y. Activations are binned, and the symbol of a sample is the tuple of its cells:

    I(X; T) = H(T) - sum_x p(x) H(T | X = x),     I(T; Y) = H(T) - sum_y p(y) H(T | Y = y)

with plug-in entropies in bits, p(x) over distinct input rows and p(y) over distinct labels. Rows
are counted by codes (``transfuse.ops.row_groups``), without a loop over inputs or classes.

Deviations from the official code, all deliberate:

- An activation below the first edge goes to the first cell and is counted in ``outside``; the
  released negative index puts it into the last (``wrap=True``).
- ``range="minmax"`` and ``"quantile"`` fit the edges to a layer, which the released [-1, 1] does
  for tanh only. The Miller-Madow correction is an addition.
- H(T | X) is computed, also where the network is deterministic and it is 0.
- Where most occupied cells hold one sample, I(X; T) says how many samples there are and no more:
  the share of such cells is returned, and warned of above a half.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods._hooks import HookHandle, choose_names
from transfuse.methods.information_theory._binned_information import (
    CORRECTIONS,
    WIDEST,
    BinnedInformation,
    check_bins,
    identities,
    information,
)
from transfuse.methods.information_theory._information_bound import (
    InformationBound,
    information_bound,
)

__all__ = [
    "BinnedInformation",
    "InformationBound",
    "InformationPlane",
    "PlaneResult",
    "binned_mi",
    "information_bound",
]

SPATIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda t: t.flatten(1),
    "mean": lambda t: t.flatten(2).mean(2),
}


class PlaneResult(NamedTuple):
    """What was recorded: E epochs, L layers, in the order of ``layers``.

    ``information`` (E, L, 2) I(X; T) and I(T; Y) in bits; ``entropy``, ``singletons`` and
    ``outside`` (E, L) as in :class:`BinnedInformation`; ``gradients`` (E, L, 2) norm of the mean
    and of the standard deviation of the weight's gradient over mini-batches, over the norm of the
    weight; NaN where none were given. All float64.
    """

    epochs: list[int]
    layers: tuple[str, ...]
    information: Tensor
    entropy: Tensor
    singletons: Tensor
    outside: Tensor
    gradients: Tensor


def binned_mi(
    t: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    bins: int = 30,
    range: tuple[float, float] | str = (-1.0, 1.0),
    wrap: bool = False,
    correction: str | None = None,
) -> BinnedInformation:
    """Mutual information of binned activations with inputs and with labels.

    ``I(X; T) = H(T) - H(T | X)`` and ``I(T; Y) = H(T) - H(T | Y)``, in bits, of cells.

    Args:
        t: (n, u), activations, floating; compared with edges in float32.
        x: (n, ...) input rows, or (n,) integers that number them.
        y: (n,) labels, or (n, C) one-hot rows.
        bins: number of edges, at least 2.
        range: first and last edge (equally spaced between), ``"minmax"`` of the activations, or
            ``"quantile"``: edges with equally many of them between.
        wrap: activations below the first edge go to the last cell, as in the released code.
        correction: None, or ``"miller-madow"`` for every entropy.

    Returns:
        :class:`BinnedInformation`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or NaN.

    Notes:
        Known answers: I(X; T) is at most H(X), and equal to it for cells that tell all inputs
        apart; I(T; Y) is at most H(Y) and I(X; T).

    Example:
        >>> t = torch.tensor([[-0.9], [-0.9], [0.9], [0.9]])
        >>> found = binned_mi(t, torch.arange(4), torch.tensor([0, 0, 1, 1]))
        >>> found.input, found.label
        (1.0, 1.0)
    """
    t = _checks.tensor("t", t, ("n", "u"))
    _checks.floating("t", t)
    check_bins(bins, range)
    if not isinstance(wrap, bool):
        raise TypeError(f"wrap: expected True or False, got {_checks.describe(wrap)}")
    _correction(correction)
    x_id, y_id = identities("x", x, t.shape[0]), identities("y", y, t.shape[0])
    return information(t, x_id, y_id, bins, range, wrap, correction)


def _correction(value: object) -> None:
    _checks.choice("correction", value, {c: 0 for c in CORRECTIONS})


@register(
    title="Opening the Black Box of Deep Neural Networks via Information",
    authors=("Ravid Shwartz-Ziv", "Naftali Tishby"),
    year=2017,
    venue="arXiv",
    arxiv="1703.00810",
    repository="https://github.com/ravidziv/IDNNs",
    kind="metric",
    ops=("row_groups",),
)
class InformationPlane:
    r"""Records the information plane of a network while it is trained.

    .. math:: \left( I(X; T_l),\ I(T_l; Y) \right) \text{ for layers } l \text{ at chosen epochs}

    ``with InformationPlane(...) as plane:`` takes the hooks off on leaving; ``remove()`` does too.

    Args:
        model: called with ``inputs``; in evaluation mode while it is recorded.
        layers: names of modules whose outputs (n, u) are recorded, in this order.
        inputs: (n, ...), all of the data, training and test; what the model takes.
        labels: (n,) integers, or (n, C) one-hot rows.
        bins, range, wrap, correction: as :func:`binned_mi`; "minmax" and "quantile" are fitted for
            each layer and epoch anew.
        noise: variance of normal noise that is added to ``copies`` of every activation before
            binning; 0: none. From ``seed``, the same for every record.
        copies: with noise, of every sample.
        spatial: for outputs of more than 2 dimensions: ``"flatten"`` or ``"mean"`` over the
            positions; None refuses them.
        batch_size: samples that pass the model at a time; None: all.
        seed: of the noise.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Notes:
        A record costs one pass of the data and, per layer, one read of its activations and a sort
        of n numbers. Dropout and batch norm are in evaluation mode while recording, and every
        module gets its own mode back.

    Reference:
        Shwartz-Ziv and Tishby 2017 (arXiv:1703.00810). Saxe et al., On the Information Bottleneck
        Theory of Deep Learning, ICLR 2018: compression depends on the activation and on binning.

    Example:
        >>> import torch
        >>> from transfuse.methods.information_theory.information_plane import InformationPlane
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> with InformationPlane(net, ["1"], x, torch.tensor([0, 1, 1, 0])) as plane:
        ...     found = plane.record(0)
        >>> plane.result().information.shape
        torch.Size([1, 1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        inputs: Tensor,
        labels: Tensor,
        *,
        bins: int = 30,
        range: tuple[float, float] | str = (-1.0, 1.0),
        wrap: bool = False,
        correction: str | None = None,
        noise: float = 0.0,
        copies: int = 10,
        spatial: str | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {_checks.describe(model)}")
        modules = dict(model.named_modules())
        self.layers = tuple(dict.fromkeys(_named(modules, layers)))
        inputs = _checks.dense("inputs", inputs)
        if inputs.dim() < 1 or inputs.shape[0] < 2:
            raise ValueError(f"inputs: expected at least 2 samples, got {tuple(inputs.shape)}")
        check_bins(bins, range)
        if not isinstance(wrap, bool):
            raise TypeError(f"wrap: expected True or False, got {_checks.describe(wrap)}")
        _correction(correction)
        self.noise = _checks.number("noise", noise)
        if self.noise < 0.0:
            raise ValueError(f"noise: expected a variance of at least 0, got {self.noise}")
        self.copies = _checks.positive_int("copies", copies)
        if spatial is not None:
            _checks.choice("spatial", spatial, {name: 0 for name in SPATIAL})
        n = inputs.shape[0]
        self.batch_size = (
            n if batch_size is None else _checks.positive_int("batch_size", batch_size)
        )
        self.model, self.inputs = model, inputs
        self.bins, self.range, self.wrap, self.correction = bins, range, wrap, correction
        self.spatial, self.seed = spatial, seed
        self._x = identities("inputs", inputs, n)
        self._y = identities("labels", labels, n)
        found = {name: getattr(modules[name], "weight", None) for name in self.layers}
        self._weights = {name: w for name, w in found.items() if isinstance(w, Tensor)}
        self._seen: dict[str, list[Tensor]] | None = None
        self._records: list[tuple[int, list[BinnedInformation], Tensor]] = []
        self._warned: set[str] = set()
        self._reset_gradients()
        parts = [modules[name].register_forward_hook(self._hook(name)) for name in self.layers]
        self._handle = HookHandle(self.layers, parts)

    # ---- hooks ----------------------------------------------------------------------------------

    @property
    def installed(self) -> bool:
        """Whether the hooks are still in the model."""
        return self._handle.installed

    def remove(self) -> None:
        """Take the hooks off; what was recorded stays. A second call does nothing."""
        self._handle.remove()

    def __enter__(self) -> InformationPlane:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "installed" if self.installed else "removed"
        return (
            f"{type(self).__name__}({len(self.layers)} layers, bins={self.bins}, "
            f"range={self.range!r}, {len(self._records)} records, {state})"
        )

    def _hook(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(module: nn.Module, args: object, output: object) -> None:
            if self._seen is None:
                return
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"layer {name!r}: expected a tensor as output, got {_checks.describe(output)}"
                )
            self._seen[name].append(output.detach())

        return keep

    # ---- records --------------------------------------------------------------------------------

    @torch.no_grad()
    def record(self, epoch: int) -> list[BinnedInformation]:
        """Run all inputs and add what each layer keeps of input and label.

        Args:
            epoch: a number for the record; need not be consecutive.

        Returns:
            One :class:`BinnedInformation` per layer.

        Raises:
            RuntimeError: the hooks were removed; a layer did not run, or ran more than once.
            ValueError: outputs that are not one row of numbers for each sample, or NaN.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int):
            raise TypeError(f"epoch: expected an integer, got {_checks.describe(epoch)}")
        if not self.installed:
            raise RuntimeError("record: the hooks have been removed from the model")
        found = []
        for name, t in zip(self.layers, self._activations(), strict=True):
            x, y = self._x, self._y
            if self.noise > 0.0:
                t, x, y = self._noisy(t), x.repeat(self.copies), y.repeat(self.copies)
            try:
                point = information(t, x, y, self.bins, self.range, self.wrap, self.correction)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
            self._warn(name, point)
            found.append(point)
        self._records.append((epoch, found, self._gradient_norms()))
        self._reset_gradients()
        return found

    def _activations(self) -> list[Tensor]:
        kept: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        with _evaluating(self.model):
            for batch in self.inputs.split(self.batch_size):
                self._seen = {name: [] for name in self.layers}
                try:
                    self.model(batch)
                    seen = self._seen
                finally:
                    self._seen = None
                for name, outputs in seen.items():
                    if len(outputs) != 1:
                        times = "did not run" if not outputs else f"ran {len(outputs)} times"
                        raise RuntimeError(
                            f"layer {name!r} {times} in one call of the model; record layers that "
                            "run once"
                        )
                    kept[name].append(self._rows(name, outputs[0], batch.shape[0]))
        return [torch.cat(kept[name]) for name in self.layers]

    def _rows(self, name: str, t: Tensor, rows: int) -> Tensor:
        if t.dim() < 2 or t.shape[0] != rows or not t.is_floating_point():
            raise ValueError(
                f"layer {name!r}: expected floating activations of {rows} rows, got "
                f"{_checks.describe(t)}"
            )
        if t.dim() > 2:
            if self.spatial is None:
                raise ValueError(
                    f"layer {name!r}: expected outputs (n, u), got shape {tuple(t.shape)}; choose "
                    "spatial='flatten' or spatial='mean'"
                )
            t = SPATIAL[self.spatial](t)
        if t.shape[1] > WIDEST:
            raise ValueError(
                f"layer {name!r}: expected at most {WIDEST} units, got {t.shape[1]}, whose cells "
                "would all differ; project or pool them first"
            )
        return t

    def _noisy(self, t: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn((self.copies, *t.shape), generator=generator).to(t.device)
        return (t.float() + self.noise**0.5 * drawn).flatten(0, 1)

    def _warn(self, name: str, point: BinnedInformation) -> None:
        if point.singletons > 0.5 and name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"layer {name!r}: {100 * point.singletons:.0f}% of the occupied cells hold one "
                "sample; I(X; T) then measures the number of samples. Use fewer bins, fewer units "
                "or more samples",
                stacklevel=3,
            )

    # ---- gradients ------------------------------------------------------------------------------

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Take in the gradients of one mini-batch; call it after each backward pass.

        Raises:
            RuntimeError: no recorded layer has a weight with a gradient.
        """
        taken = 0
        for name, weight in self._weights.items():
            if weight.grad is None:
                continue
            taken += 1
            grad = weight.grad.double()
            if name not in self._sums:
                self._sums[name] = (torch.zeros_like(grad), torch.zeros_like(grad))
            # Welford's update: means and squared deviations, without cancellation.
            self._batches[name] = self._batches.get(name, 0) + 1
            mean, square = self._sums[name]
            step = grad - mean
            mean += step / self._batches[name]
            square += step * (grad - mean)
        if taken == 0:
            raise RuntimeError("add_gradients: no recorded layer has a weight with a gradient")

    def _reset_gradients(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._batches: dict[str, int] = {}

    def _gradient_norms(self) -> Tensor:
        found = torch.full((len(self.layers), 2), float("nan"), dtype=torch.float64)
        for i, name in enumerate(self.layers):
            if name in self._sums:
                mean, square = self._sums[name]
                norm = self._weights[name].detach().double().norm()
                deviation = (square / self._batches[name]).sqrt()
                found[i] = torch.stack((mean.norm() / norm, deviation.norm() / norm)).cpu()
        return found

    def result(self) -> PlaneResult:
        """Everything recorded so far.

        Returns:
            :class:`PlaneResult`; arrays of no epochs if nothing was.
        """
        shape = (len(self._records), len(self.layers))

        def array(*fields: str) -> Tensor:
            numbers = [[[getattr(p, f) for f in fields] for p in ps] for _, ps, _ in self._records]
            return torch.tensor(numbers, dtype=torch.float64).reshape(*shape, len(fields))

        gradients = [g for _, _, g in self._records]
        return PlaneResult(
            [epoch for epoch, _, _ in self._records],
            self.layers,
            array("input", "label"),
            array("entropy")[..., 0],
            array("singletons")[..., 0],
            array("outside")[..., 0],
            torch.stack(gradients) if gradients else torch.zeros(*shape, 2, dtype=torch.float64),
        )


def _named(modules: dict[str, nn.Module], layers: object) -> list[str]:
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: expected a sequence of names, got {_checks.describe(layers)}")
    if len(layers) == 0:
        raise ValueError("layers: expected at least one name, got none")
    for name in layers:
        if name not in modules:
            choose_names(modules, [name], "module")
            raise ValueError(f"layers: expected the name of a module, got {name!r}")
    return list(layers)


@contextmanager
def _evaluating(model: nn.Module):
    """Evaluation mode, and every module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
