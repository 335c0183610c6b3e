"""TrAct: Making First-layer Pre-Activations Trainable.

Felix Petersen, Christian Borgelt, Stefano Ermon; NeurIPS 2024; arXiv 2410.23970; official code
Felix-Petersen/tract.

The first layer z = x W^T + bias sees rows x (b, n): all samples, tokens or image patches of the
batch. Gradient descent on W moves z by an amount that grows with the brightness and contrast of x.
Here the weight gradient is replaced by the step that moves z itself along its negative gradient,

    z* = z - eta b G,   min over dW of |z* - (W + dW) x|^2 + lambda b |dW|^2,

whose closed form the optimiser receives as the gradient of W,

    dW = G^T x (x^T x / b + lambda I)^-1,

with G = dL/dz of a batch-mean loss. Values, the gradient of the bias and that of x are untouched.
With fewer rows than n the same dW = G^T (x x^T / b + lambda I)^-1 x inverts the smaller matrix.

Deviations from the official code, all deliberate:

- The inverse is two triangular solves with a Cholesky factor, in float32 (float64 for float64),
  also under autocast. The code inverts; its option "cholesky_inverse" calls the routine on the
  matrix instead of on its factor and is not offered.
- Convolutions keep dilation, padding mode, "same" padding, device and dtype, which the code drops;
  tokens need not be contiguous. Groups are refused.
- The second moment of patches comes from ``transfuse.ops.patch_gram``, without unfolding.
- ``group`` sums second moments over the processes of data-parallel training; the code has no such
  option, and neither sums by default.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.optimization._tract_gradient import Rows, preactivation_gradient

__all__ = ["TrActConv2d", "TrActLinear", "tract", "unwrap"]


class _TrAct:
    """What both layers add to torch's: two attributes, and the gradient."""

    lam: float
    group: object

    def _options(self, lam: float, group: object) -> None:
        self.lam = _checks.number("lam", lam, positive=True)
        self.group = group

    def unwrap(self) -> nn.Module:
        """Makes the layer torch's own again, in place, and returns it."""
        return unwrap(self)  # type: ignore[arg-type]


class TrActLinear(_TrAct, nn.Linear):
    r"""A linear first layer whose weight gradient moves its pre-activations.

    .. math:: dW = G^T x \, (x^T x / b + \lambda I)^{-1}

    Args:
        in_features, out_features, bias, device, dtype: of ``torch.nn.Linear``; parameters and
            state-dict keys are the same.
        lam: lambda, in units of squared input values: 0.1 for inputs of mean 0 and deviation 1, 0.2
            for long training, 0.05 for a stronger effect.
        group: process group whose second moments are summed; None: each process its own.

    Raises:
        ValueError, TypeError: lambda not above 0, input that is not floating, no rows.
        NotImplementedError: differentiating the weight gradient: it is no gradient of a function.

    Notes:
        Rows are all but the last dimension of the input, b their number; b belongs to the second
        moment alone. So k micro-batches are not the same as one batch of all. A loss summed over
        the batch gives the same direction, scaled by b. Clipping sees the new gradient, which can
        be ten times as long.

        Extra cost per step: 2 b n^2 + n^3 / 3 + 2 n^2 m, for n <= b; nothing if the weight needs no
        gradient.

        Where x^T x / b + lambda I is not positive definite in working precision, the gradient is
        NaN on devices other than the CPU, where it raises. NaN or infinity in x gives NaN.

    Reference:
        Petersen et al. 2024 (arXiv:2410.23970).

    Example:
        >>> layer = TrActLinear(4, 2)
        >>> layer(torch.randn(8, 4)).square().mean().backward()
        >>> layer.weight.grad.shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lam: float = 0.1,
        group: object = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._options(lam, group)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + bias``."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return F.linear(x, self.weight, self.bias)
        _check_input(x)
        z = F.linear(x, self.weight.detach(), self.bias)
        rows = Rows.linear(x.numel() // max(x.shape[-1], 1), self.lam, self.group)
        return preactivation_gradient(z, self.weight, x, rows)

    def extra_repr(self) -> str:
        """As torch's, with lambda."""
        return f"{super().extra_repr()}, lam={self.lam:g}"


class TrActConv2d(_TrAct, nn.Conv2d):
    r"""A convolution as first layer, whose weight gradient moves its pre-activations.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode,
            device, dtype: of ``torch.nn.Conv2d``, of which this is one group; parameters and
            state-dict keys are the same.
        lam, group: see :class:`TrActLinear`, also for what it raises.

    Notes:
        Rows are the patches of the (padded) images, b = B H_out W_out, n = C kh kw. Their second
        moment is ``transfuse.ops.patch_gram``.

    Example:
        >>> layer = TrActConv2d(3, 8, 3, padding=1)
        >>> layer(torch.randn(2, 3, 6, 6)).mean().backward()
        >>> layer.weight.grad.shape
        torch.Size([8, 3, 3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lam: float = 0.1,
        group: object = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=bias,
            padding_mode=padding_mode,  # type: ignore[arg-type]  # torch checks it
            device=device,
            dtype=dtype,
        )
        self._options(lam, group)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return self._conv_forward(x, self.weight, self.bias)
        _check_input(x)
        z = self._conv_forward(x, self.weight.detach(), self.bias)
        spread, padding = self._spread()
        if spread is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, spread, mode=mode)
        rows = Rows.convolution(
            z.shape,
            self.kernel_size,  # type: ignore[arg-type]  # pairs, which torch declares longer
            self.stride,  # type: ignore[arg-type]
            padding,
            self.dilation,  # type: ignore[arg-type]
            self.lam,
            self.group,
        )
        return preactivation_gradient(z, self.weight, x, rows)

    def _spread(self) -> tuple[list[int] | None, tuple[int, int]]:
        """Padding that ``unfold`` does not know, for ``F.pad``; and what is left to it."""
        around = list(self._reversed_padding_repeated_twice)
        left, right, top, bottom = around
        if self.padding_mode != "zeros" or left != right or top != bottom:
            return around, (0, 0)
        return None, (top, left)

    def extra_repr(self) -> str:
        """As torch's, with lambda."""
        return f"{super().extra_repr()}, lam={self.lam:g}"


_CLASSES: dict[type, type] = {nn.Linear: TrActLinear, nn.Conv2d: TrActConv2d}


@register(
    title="TrAct: Making First-layer Pre-Activations Trainable",
    authors=("Felix Petersen", "Christian Borgelt", "Stefano Ermon"),
    year=2024,
    venue="NeurIPS",
    arxiv="2410.23970",
    repository="https://github.com/Felix-Petersen/tract",
    kind="layer",
    ops=("patch_gram",),
)
def tract(
    layer: nn.Linear | nn.Conv2d, lam: float = 0.1, *, group: object = None
) -> TrActLinear | TrActConv2d:
    """Turns a model's first layer into one whose weight gradient moves its pre-activations.

    In place: the same object, parameters, buffers, hooks and state-dict keys, so optimisers,
    checkpoints and references to the layer stay valid. Call ``unwrap`` to undo it.

    Args:
        layer: ``torch.nn.Linear`` or ``torch.nn.Conv2d`` with one group: ``resnet.conv1``, or
            ``patch_embed.proj`` of a vision transformer. Called again on such a layer, it sets new
            options.
        lam: lambda; see :class:`TrActLinear`.
        group: process group whose second moments are summed; None: each process its own.

    Returns:
        The layer.

    Raises:
        TypeError: Another kind of layer, also a subclass of the two with its own rules.
        ValueError: Several groups, lambda not above 0.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10))
        >>> tract(model[0])
        TrActConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), lam=0.1)
        >>> unwrap(model[0])
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if type(layer) not in (*_CLASSES, *_CLASSES.values()):
        raise TypeError(
            "layer: expected torch.nn.Linear or torch.nn.Conv2d (for another class take one of its "
            f"layers, and apply parametrisations elsewhere), got {type(layer).__name__}"
        )
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise ValueError(f"layer: expected a convolution with one group, got {layer.groups}")
    if "forward" in layer.__dict__:
        raise TypeError("layer: expected a layer whose forward has not been replaced")
    lam = _checks.number("lam", lam, positive=True)
    wrapped: Any = layer
    wrapped.__class__ = _CLASSES.get(type(layer), type(layer))
    wrapped._options(lam, group)
    return wrapped


def unwrap(layer: TrActLinear | TrActConv2d) -> nn.Linear | nn.Conv2d:
    """Makes a layer torch's own again, in place, and returns it.

    Raises:
        TypeError: It is no TrAct layer.
    """
    for plain, wrapped in _CLASSES.items():
        if type(layer) is wrapped:
            found: Any = layer
            found.__class__ = plain
            del found.lam, found.group
            return found
    raise TypeError(f"layer: expected a TrAct layer, got {type(layer).__name__}")


def _check_input(x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating tensor, got {_checks.describe(x)}")
    if x.numel() == 0:
        raise ValueError(
            f"x: expected at least one row to train on, got shape {tuple(x.shape)}; without "
            "gradients empty batches pass"
        )
