"""Sharpness-aware minimisation as a wrapper of any torch optimiser: SAM and ASAM."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from transfuse import _checks
from transfuse.methods.optimization import _sam

# Added to the norm, which may be 0.
EPS = 1e-12

Base = Optimizer | Callable[[Any], Optimizer]


class SAM(Optimizer):
    r"""Steps with the gradient at the worst point nearby.

    .. math:: \epsilon = \rho \, \frac{\theta^2 g}{\lVert \theta g \rVert} \;\text{(adaptive)}
              \quad\text{or}\quad \rho \, \frac{g}{\lVert g \rVert}, \qquad
              \theta \leftarrow \mathrm{base}(\theta, \nabla L(\theta + \epsilon))

    Args:
        params: Parameters or parameter groups; a group may have its own ``adaptive``.
        base_optimizer: Makes the optimiser that takes the step from the groups:
            ``lambda groups: torch.optim.SGD(groups, lr=0.1)``; or one made for these parameters.
        rho: Radius: 0.05 for SAM, 0.5 for the adaptive form (ASAM).
        adaptive: Scale each direction by the parameter's size.
        model: Its batch-norm statistics are left alone by all passes but the first.

    Raises:
        TypeError, ValueError: Parameters that are not real floating tensors, options out of range.

    Notes:
        Two ways to use it: :meth:`step` with a closure, or :meth:`ascend` and :meth:`descend` after
        one backward pass each. One norm over all parameters and groups; it and the radius stay on
        the device. The parameters come back from a copy, bit for bit. Parameters without a gradient
        in the first pass stay where they are. Clip gradients before :meth:`descend` only.

        With a gradient scaler, give it to both calls and update it once afterwards: the first pass
        is unscaled before the ascent, and if either pass finds infinities nothing but the scale
        changes. (``scaler.step`` on this object would leave the perturbed parameters in place.)

        With gradient accumulation both passes need the same micro-batches.

    Reference:
        Foret et al. 2021, Sharpness-aware minimization (arXiv:2010.01412); Kwon et al. 2021, ASAM
        (arXiv:2102.11600).

    Example:
        >>> model = nn.Linear(4, 2)
        >>> make = lambda groups: torch.optim.SGD(groups, lr=0.1)
        >>> optimizer = SAM(model.parameters(), make, rho=0.05)
        >>> x = torch.randn(8, 4)
        >>> loss = optimizer.step(lambda: model(x).square().mean())
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Base,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self.rho = _checks.number("rho", rho)
        if self.rho < 0:
            raise ValueError(f"rho: expected a radius of at least 0, got {rho}")
        self._start(params, base_optimizer, adaptive, model)

    def _start(
        self, params: Iterable[Any], base: Base, adaptive: bool, model: nn.Module | None
    ) -> None:
        if not isinstance(adaptive, bool):
            raise TypeError(f"adaptive: expected a bool, got {_checks.describe(adaptive)}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module or None, got {_checks.describe(model)}")
        super().__init__(params, {"adaptive": adaptive})
        self.model = model
        if not isinstance(base, Optimizer):
            made = base(self.param_groups)
            if not isinstance(made, Optimizer):
                raise TypeError(
                    "base_optimizer: expected an optimiser or a function that makes one from "
                    f"parameter groups, got one that makes {_checks.describe(made)}"
                )
            base = made
        else:
            for group in base.param_groups:
                group.setdefault("adaptive", adaptive)
        mine, its = (
            {id(p) for group in groups for p in group["params"]}
            for groups in (self.param_groups, base.param_groups)
        )
        if mine != its:
            raise ValueError(
                f"base_optimizer: expected one of the same {len(mine)} parameters, got {len(its)}"
            )
        self.base_optimizer = base
        # The same dictionaries: schedulers may take either optimiser.
        self.param_groups = base.param_groups
        for p in self._params:
            if not p.is_floating_point():
                raise TypeError(
                    f"params: expected real floating parameters, got {_checks.describe(p)}"
                )
        if any(p.dtype in _sam.HALF for p in self._params):
            warnings.warn(
                "parameters in half precision: small perturbations are rounded away; keep them in "
                "float32 and use autocast",
                stacklevel=4,
            )
        self._backup: list[Tensor] | None = None
        self._spare: list[Tensor] | None = None
        self._overflow: Tensor | None = None

    @property
    def _params(self) -> list[Tensor]:
        """Every parameter once."""
        found = {id(p): p for group in self.param_groups for p in group["params"]}
        return list(found.values())

    def _slices(self) -> list[_sam.Slice]:
        rules = {
            id(p): bool(group["adaptive"]) for group in self.param_groups for p in group["params"]
        }
        params = self._params
        for p in params:
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise TypeError(f"gradients: expected dense ones, got layout {p.grad.layout}")
        return _sam.slices(params, [p.grad for p in params], [rules[id(p)] for p in params])

    @property
    def ascended(self) -> bool:
        """Whether the parameters are perturbed: between :meth:`ascend` and :meth:`descend`."""
        return self._backup is not None

    @torch.no_grad()
    def ascend(self, *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Perturb the parameters, from the gradients of the first pass, which are cleared.

        Args:
            scaler: The scaler of the loss; the gradients are unscaled first.

        Returns:
            The norm that the radius was divided by, 0-dimensional.

        Raises:
            RuntimeError: The parameters are perturbed already.
        """
        return self._ascend(torch.as_tensor(self.rho), scaler)

    def _ascend(
        self, radius: Tensor, scaler: torch.amp.GradScaler | None, *, released: bool = False
    ) -> Tensor:
        parts = self._unscaled(scaler)
        params = self._params
        device = params[0].device
        size = _sam.norm(parts, device)
        factor = self._unless_overflow(radius.to(device, size.dtype) / (size + EPS))
        if released:
            self._keep_copies()
            for part, moves in zip(parts, _sam.released_directions(parts), strict=True):
                _sam.add_scaled(part, moves, factor)
        else:
            self._backup = _sam.ascend(parts, params, self._spare, factor)
            self._spare = None
        self.zero_grad()
        return size

    def _begin(self, scaler: torch.amp.GradScaler | None) -> list[_sam.Slice]:
        """Unscale, keep the parameters, and give those with a gradient."""
        parts = self._unscaled(scaler)
        self._keep_copies()
        return parts

    def _keep_copies(self) -> None:
        self._backup = _sam.copies(self._params, self._spare)
        self._spare = None

    def _unscaled(self, scaler: torch.amp.GradScaler | None) -> list[_sam.Slice]:
        """Unscale, and give the parameters with a gradient."""
        if self.ascended:
            raise RuntimeError("ascend: the parameters are perturbed already; call descend first")
        parts = self._slices()
        self._overflow = None
        if scaler is not None and scaler.is_enabled():
            scaler.unscale_(self)
            device = self._params[0].device
            found = list(scaler._found_inf_per_device(self).values())
            if found:
                self._overflow = torch.stack([f.to(device) for f in found]).sum() > 0
        return parts

    def _unless_overflow(self, factor: Tensor) -> Tensor:
        return factor if self._overflow is None else torch.where(self._overflow, 0.0, factor)

    @torch.no_grad()
    def descend(
        self, *, scaler: torch.amp.GradScaler | None = None, clip_norm: float | None = None
    ) -> bool:
        """Restore the parameters and step with the gradients of the second pass.

        Args:
            scaler: The scaler of the loss; call its ``update`` afterwards.
            clip_norm: Largest norm of the gradients.

        Returns:
            Whether the base optimiser was called: not if a pass overflowed.

        Raises:
            RuntimeError: No :meth:`ascend` came before.
        """
        if self._backup is None:
            raise RuntimeError("descend: call ascend first")
        if clip_norm is not None:
            clip_norm = _checks.number("clip_norm", clip_norm, positive=True)
        _sam.restore(self._params, self._backup)
        saved, self._backup = self._backup, None
        stepped = self._step_base(scaler, clip_norm)
        self._keep(saved, stepped)
        self.zero_grad()
        return stepped

    def _step_base(self, scaler: torch.amp.GradScaler | None, clip_norm: float | None) -> bool:
        scaled = scaler is not None and scaler.is_enabled()
        if scaled:
            scaler.unscale_(self.base_optimizer)  # type: ignore[union-attr]
        if self._overflow is not None and bool(self._overflow):
            return False
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._params, clip_norm)
        if not scaled:
            self.base_optimizer.step()
            return True
        found = scaler._found_inf_per_device(self.base_optimizer)  # type: ignore[union-attr]
        scaler.step(self.base_optimizer)  # type: ignore[union-attr]
        return not any(bool(f) for f in found.values())

    def _keep(self, saved: list[Tensor], stepped: bool) -> None:
        """What happens to the copy of the parameters: it is the memory of the next one."""
        self._spare = saved

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Gives the loss of the batch, the same at each call; no backward pass.

        Returns:
            The loss before the step.

        Raises:
            TypeError: No closure.
        """
        closure = self._checked(closure)
        loss = self._backward(closure)
        self.ascend()
        with self._undone_on_error(), self._still():
            self._backward(closure)
        self.descend()
        return loss

    def _checked(self, closure: Callable[[], Any] | None) -> Callable[[], Any]:
        if not callable(closure):
            raise TypeError(
                f"closure: expected a function that gives the loss, got {_checks.describe(closure)}"
            )
        return closure

    def _backward(self, closure: Callable[[], Any]) -> Tensor:
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
            loss.backward()
        return loss.detach()

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """The parameters do not stay perturbed, whatever a closure raises."""
        try:
            yield
        except BaseException:
            if self._backup is not None:
                _sam.restore(self._params, self._backup)
                self._backup = None
            raise

    def _still(self):
        return contextlib.nullcontext() if self.model is None else frozen_statistics(self.model)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base_optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of the base optimiser.

        Raises:
            RuntimeError: The parameters are perturbed.
        """
        if self.ascended:
            raise RuntimeError("state_dict: the parameters are perturbed; call descend first")
        return {"base_optimizer": self.base_optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict`."""
        self.base_optimizer.load_state_dict(state_dict["base_optimizer"])
        self.param_groups = self.base_optimizer.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after the start: copies of the parameters are held.

        Raises:
            RuntimeError: Always, once built.
        """
        if hasattr(self, "base_optimizer"):
            raise RuntimeError("add_param_group: give all parameters when the optimiser is built")
        super().add_param_group(param_group)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which normalisation layers use batch statistics as ever but record none.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> with frozen_statistics(norm):
        ...     _ = norm(torch.randn(5, 3))
        >>> int(norm.num_batches_tracked)
        0
    """
    changed: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            changed.append((module, "track_running_stats", module.track_running_stats))
            module.track_running_stats = False
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training:
            # These record whatever that flag says, and round even with momentum 0.
            for name in ("running_mean", "running_var"):
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, None)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
