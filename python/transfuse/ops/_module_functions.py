"""A module as a function of its parameters, for the curvature operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse import _checks


def check_callable(name: str, value: object) -> None:
    """Something that can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, got {_checks.describe(value)}")


def select_parameters(
    model: nn.Module, params: Mapping[str, Tensor] | Sequence[Tensor] | None, *, check: bool
) -> dict[str, Tensor]:
    """The chosen parameters by their names in the model, in the order they are given in.

    Raises:
        TypeError, ValueError: no module; tensors that are not its parameters; with ``check`` a
            module whose outputs are random or whose calls change its buffers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {_checks.describe(model)}")
    if check:
        _refuse_training_mode(model)
    own: dict[str, Tensor] = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in own.items()}
    if params is None:
        chosen = {name: p for name, p in own.items() if p.requires_grad}
        if len(chosen) == 0:
            raise ValueError("model: expected parameters that require a gradient, got none")
        return chosen
    if isinstance(params, Mapping):
        given = list(params.values())
    elif isinstance(params, Sequence) and not isinstance(params, (str, Tensor)):
        given = list(params)
    else:
        raise TypeError(
            f"params: expected a sequence or dict of the model's parameters, "
            f"got {_checks.describe(params)}"
        )
    for index, value in enumerate(given):
        if id(value) not in names:
            raise ValueError(
                f"params: expected parameters of the model, got {_checks.describe(value)} at "
                f"position {index}, which is none of them"
            )
    if len({id(value) for value in given}) != len(given):
        raise ValueError("params: expected each parameter once, got one of them twice")
    return {names[id(value)]: value for value in given}


def _refuse_training_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not module.training:
            continue
        where = f"{name or 'itself'} ({type(module).__name__})"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(
                f"model: expected outputs that are not random, got active dropout at {where}; "
                "call model.eval() first"
            )
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ValueError(
                f"model: expected samples that do not depend on each other, got batch statistics "
                f"in training mode at {where}; call model.eval() first"
            )


def functional_model(
    model: nn.Module, device: torch.device
) -> Callable[[dict[str, Tensor], Any], tuple[Any, Any]]:
    """``(params, (inputs, targets)) -> (outputs, targets)``, both moved to the device."""

    def call(point: dict[str, Tensor], batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"batches: expected pairs (inputs, targets), got {_checks.describe(batch)}"
            )
        inputs, targets = moved(batch[0], device), moved(batch[1], device)
        if isinstance(inputs, Mapping):
            outputs = torch.func.functional_call(model, point, (), dict(inputs))
        else:
            arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            outputs = torch.func.functional_call(model, point, arguments)
        return outputs, targets

    return call


def moved(value: Any, device: torch.device) -> Any:
    """Nested tensors on another device; other things as they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(moved(entry, device) for entry in value)
    return value
