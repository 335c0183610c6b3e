"""Residual networks in mean-field form: all weights iid N(0, 1), widths and depths in the forward
pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks

# mode -> exponent of the depth in the residual branches where none is given
MODES = {"ntp": 0.0, "mup": 0.0, "depth_mup": 0.5}


@dataclass(frozen=True, kw_only=True)
class MeanFieldOptions:
    """What a network of a family shares with its wider and deeper relatives.

    Args:
        mode: ``"ntp"`` (gamma = gamma0), ``"mup"`` or ``"depth_mup"`` (gamma = gamma0 sqrt N).
        alpha: branches are scaled by L^-alpha; None for 1/2 with ``"depth_mup"``, else 0.
        tau: 1 for residual networks, 0 for plain ones; at least 0.
        gamma0: feature-learning strength, greater than 0.
    """

    mode: str = "depth_mup"
    alpha: float | None = None
    tau: float = 1.0
    gamma0: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(
                f"mode: expected one of {', '.join(map(repr, MODES))}, got {self.mode!r}"
            )
        if self.alpha is not None:
            _checks.number("alpha", self.alpha)
        if _checks.number("tau", self.tau) < 0:
            raise ValueError(f"tau: expected a number of at least 0, got {self.tau}")
        _checks.number("gamma0", self.gamma0, positive=True)

    @property
    def depth_exponent(self) -> float:
        """a of L^-a."""
        return MODES[self.mode] if self.alpha is None else self.alpha


class MeanFieldNet(nn.Module):
    r"""A residual network whose learning rate transfers over width and depth.

    .. math:: h_1 = W_0 x / \sqrt D, \quad h_{l+1} = \tau h_l + L^{-a} N^{-1/2} W_l \phi(h_l),
              \quad f = W_{out}\, \phi(h_{L+1}) / (\gamma \sqrt N)

    Args:
        inputs: D.
        outputs: O.
        width: N.
        depth: L, hidden layers.
        options: the family.
        activation: phi.
        generator: for the weights, iid N(0, 1).

    Raises:
        TypeError, ValueError: a size that is no positive integer.

    Example:
        >>> import torch
        >>> from transfuse.methods.optimization.lr_transfer import MeanFieldNet
        >>> net = MeanFieldNet(6, 2, width=16, depth=3)
        >>> net(torch.ones(5, 6)).shape, net.gamma
        (torch.Size([5, 2]), 4.0)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int,
        depth: int,
        options: MeanFieldOptions | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"inputs": inputs, "outputs": outputs, "width": width, "depth": depth}
        for name, size in sizes.items():
            _checks.positive_int(name, size)
        self.options = MeanFieldOptions() if options is None else options
        self.inputs, self.outputs, self.width, self.depth = inputs, outputs, width, depth
        self._activation = activation
        generator = torch.Generator().manual_seed(0) if generator is None else generator

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.first = weight(width, inputs)
        self.hidden = nn.ParameterList(weight(width, width) for _ in range(depth))
        self.readout = weight(outputs, width)

    @property
    def gamma(self) -> float:
        """gamma0, times sqrt N under muP."""
        scale = 1.0 if self.options.mode == "ntp" else math.sqrt(self.width)
        return self.options.gamma0 * scale

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (n, O) of inputs (n, D)."""
        branch = self.depth**-self.options.depth_exponent * self.width**-0.5
        h = F.linear(x, self.first) * self.inputs**-0.5
        for weight in self.hidden:
            h = self.options.tau * h + F.linear(self._activation(h), weight) * branch
        return F.linear(self._activation(h), self.readout) / (self.gamma * math.sqrt(self.width))

    def param_groups(self, lr: float, *, optimizer: str = "sgd") -> list[dict[str, object]]:
        """Groups for a torch optimizer in which ``lr`` is the rate that transfers, eta0.

        Args:
            lr: eta0.
            optimizer: ``"sgd"``, eta = eta0 gamma^2 for all; ``"adam"``, eta0 N^-1/2 L^(a - 1) for
                hidden weights and eta0 for the others (epsilon near 0; muP modes only).

        Raises:
            ValueError: another optimizer, Adam for NTP, or a rate that is not positive.
        """
        _checks.number("lr", lr, positive=True)
        if optimizer == "sgd":
            return [{"params": list(self.parameters()), "lr": lr * self.gamma**2}]
        if optimizer != "adam":
            raise ValueError(f"optimizer: expected 'sgd' or 'adam', got {optimizer!r}")
        if self.options.mode == "ntp":
            raise ValueError("optimizer: expected 'sgd' for mode 'ntp', got 'adam'")
        hidden = lr * self.width**-0.5 * self.depth ** (self.options.depth_exponent - 1)
        return [
            {"params": list(self.hidden), "lr": hidden},
            {"params": [self.first, self.readout], "lr": lr},
        ]

    def extra_repr(self) -> str:
        return f"width={self.width}, depth={self.depth}, {self.options}"
