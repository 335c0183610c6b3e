"""muP for networks that exist: which dimensions grow, and what that means for rates and weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks

_MARK = "_mu_shape"
_MODES = ("mup", "standard")
_OPTIMIZERS = ("sgd", "adam", "adamw")


class MuShape(NamedTuple):
    """How a tensor grows: number of dimensions that do, width / base width of fan-out and fan-in
    (1 where they do not). Rates are left alone where ``scaled`` is False."""

    infinite: int
    fan_out: float
    fan_in: float
    scaled: bool


class MuReadout(nn.Linear):
    r"""A read-out layer: from a width that grows to outputs that do not.

    .. math:: f(x) = W\, \frac{c\, x}{m} + b, \qquad m = \text{width} / \text{base width}

    Args:
        in_features: width.
        out_features: outputs.
        bias: whether there is one.
        output_mult: c, a number to tune on the small network; it transfers.

    Notes:
        m is 1 until :func:`parametrise` sets it.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, output_mult: float = 1.0
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.output_mult = _checks.number("output_mult", output_mult)
        self.width_mult = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (self.output_mult / self.width_mult))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, output_mult={self.output_mult}, m={self.width_mult}"


def parametrise(
    model: nn.Module,
    base: nn.Module,
    delta: nn.Module,
    mode: str = "mup",
    *,
    rescale: bool = True,
) -> nn.Module:
    r"""Put a freshly initialised model into muP, in place.

    A dimension in which ``base`` and ``delta`` differ is infinite. Read-out layers get their
    multiplier m; their weights and biases, and biases of layers with an infinite fan-in, are scaled
    once by :math:`\sqrt m` (their standard initialisation shrinks with the fan-in).

    Args:
        model: the one to train, at its initialisation.
        base: the same network at the width that rates were tuned for; only shapes are read, so it
            may lie on the meta device.
        delta: the same at another width. All widths that will grow must differ from those of base.
        mode: ``"mup"``, or ``"standard"``: shapes are marked, nothing is changed.
        rescale: False for a model whose weights come from a checkpoint made after a rescaling.

    Returns:
        The model. Its parameters carry their marks; copies of them do not.

    Raises:
        TypeError, ValueError: networks that do not fit together, a model that is parametrised
            already, a growing dimension that ``delta`` does not show, or an ``nn.Linear`` from an
            infinite to a finite width that is no :class:`MuReadout`.

    Notes:
        Attention logits must be divided by the head dim and not by its root; that is the model's
        own business. A read-out weight that is shared with another layer (tied embeddings) is not
        rescaled: it is initialised as that layer wants it. Gains of normalisations are vectors.
    """
    if mode not in _MODES:
        raise ValueError(f"mode: expected 'mup' or 'standard', got {_checks.describe(mode)}")
    for name, network in (("model", model), ("base", base), ("delta", delta)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name}: expected an nn.Module, got {_checks.describe(network)}")
    own = dict(model.named_parameters())
    if any(hasattr(parameter, _MARK) for parameter in own.values()):
        raise ValueError(
            "model: expected one that is not parametrised yet, got one that is; a second call "
            "would scale its weights again"
        )
    shapes = _shapes(own, dict(base.named_parameters()), dict(delta.named_parameters()), mode)
    if mode == "mup":
        _check_readouts(model, shapes)
    for name, parameter in own.items():
        setattr(parameter, _MARK, shapes[name])
    if mode == "mup":
        _apply(model, rescale)
    return model


def mu_shape(parameter: Tensor) -> MuShape:
    """The mark of a parameter.

    Raises:
        ValueError: it has none.
    """
    mark = getattr(parameter, _MARK, None)
    if mark is None:
        raise ValueError(
            f"params: expected parameters of a model after parametrise, got "
            f"{_checks.describe(parameter)} without its mark (copies of a model lose them: "
            "parametrise the copy)"
        )
    return mark


def mu_param_groups(
    params: Iterable[Tensor], lr: float, weight_decay: float = 0.0, *, optimizer: str
) -> list[dict[str, object]]:
    """Groups for a torch optimizer in which ``lr`` is the rate of the base width.

    ``"sgd"``: vectors lr m, matrices lr m_out / m_in; decay / the same factor. ``"adam"`` (decay in
    the gradient) and ``"adamw"`` (decoupled): matrices lr / m_in, of ``"adam"`` with decay x m_in;
    all others lr.

    Args:
        params: parameters of a model after :func:`parametrise`.
        lr: tuned at the base width.
        weight_decay: the same.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.

    Returns:
        One group for each pair of rate and decay, in the order of the first parameter of each.

    Raises:
        ValueError: a parameter without a mark, or another optimizer.
    """
    if optimizer not in _OPTIMIZERS:
        raise ValueError(
            f"optimizer: expected one of {', '.join(map(repr, _OPTIMIZERS))}, got {optimizer!r}"
        )
    _checks.number("lr", lr, positive=True)
    if _checks.number("weight_decay", weight_decay) < 0:
        raise ValueError(f"weight_decay: expected a number of at least 0, got {weight_decay}")
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in params:
        rate, decay = _factors(mu_shape(parameter), optimizer)
        groups.setdefault((lr * rate, weight_decay * decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def mu_normal_(
    parameter: Tensor, std: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Fill with N(0, std^2), times m_in^-1/2 where both dimensions of a matrix grow.

    Raises:
        ValueError: a parameter without a mark.
    """
    shape = mu_shape(parameter)
    factor = shape.fan_in**-0.5 if shape.scaled and shape.infinite == 2 else 1.0
    with torch.no_grad():
        return parameter.normal_(0.0, std * factor, generator=generator)


def _factors(shape: MuShape, optimizer: str) -> tuple[float, float]:
    """Of the rate and of the decay."""
    if not shape.scaled or shape.infinite == 0:
        return 1.0, 1.0
    if optimizer == "sgd":
        grown = shape.fan_out * shape.fan_in
        rate = grown if shape.infinite == 1 else shape.fan_out / shape.fan_in
        return rate, 1.0 / rate
    if shape.infinite == 1:
        return 1.0, 1.0
    return 1.0 / shape.fan_in, shape.fan_in if optimizer == "adam" else 1.0


def _shapes(
    own: dict[str, nn.Parameter], base: dict[str, nn.Parameter], delta: dict[str, nn.Parameter],
    mode: str,
) -> dict[str, MuShape]:  # fmt: skip
    for label, other in (("base", base), ("delta", delta)):
        if own.keys() != other.keys():
            odd = sorted(own.keys() ^ other.keys())
            raise ValueError(f"{label}: expected the parameters of model, got differences at {odd}")
    shapes = {}
    for name, parameter in own.items():
        sizes, bases, deltas = parameter.shape, base[name].shape, delta[name].shape
        if not len(sizes) == len(bases) == len(deltas):
            raise ValueError(
                f"{name}: expected equal numbers of dimensions, got {tuple(sizes)}, base "
                f"{tuple(bases)}, delta {tuple(deltas)}"
            )
        grows = [b != d for b, d in zip(bases, deltas, strict=True)]
        for axis, (size, origin, grow) in enumerate(zip(sizes, bases, grows, strict=True)):
            if size != origin and not grow:
                raise ValueError(
                    f"{name}: expected base and delta to differ in dimension {axis}, which grows "
                    f"from {origin} to {size} in model, got {origin} in both"
                )
        if any(grows[2:]):
            raise ValueError(f"{name}: expected only dimensions 0 and 1 to grow, got {grows}")
        ratios = [size / origin for size, origin in zip(sizes, bases, strict=True)]
        fan_in = ratios[1] if len(ratios) > 1 else 1.0
        fan_out = ratios[0] if len(ratios) > 0 else 1.0
        shapes[name] = MuShape(sum(grows), fan_out, fan_in, mode == "mup")
    return shapes


def _check_readouts(model: nn.Module, shapes: dict[str, MuShape]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            if shapes[names[id(module.weight)]].infinite > 0:
                raise ValueError(
                    f"model: expected no transposed convolution that grows, got one at {name}"
                )
            continue
        if not isinstance(module, nn.Linear) or isinstance(module, MuReadout):
            continue
        shape = shapes[names[id(module.weight)]]
        if shape.infinite == 1 and shape.fan_in != 1.0:
            raise ValueError(
                f"model: expected a MuReadout at {name}, which maps a width that grows to one that "
                "does not, got nn.Linear"
            )


@torch.no_grad()
def _apply(model: nn.Module, rescale: bool) -> None:
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or weight is None:
            continue
        grown = mu_shape(weight).fan_in
        if isinstance(module, MuReadout):
            module.width_mult = grown
            if rescale and users[id(weight)] == 1:
                weight.mul_(grown**0.5)
        if rescale and module.bias is not None and users[id(module.bias)] == 1:
            module.bias.mul_(grown**0.5)
