"""Activations and gradients of named layers, taken within one call and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import near_matches
from transfuse.methods.saliency._targets import total_score


class Captured(NamedTuple):
    """One entry per layer; ``input_gradient`` where it was asked for."""

    activations: list[Tensor]
    gradients: list[Tensor]
    input_gradient: Tensor | None


class _Seen(NamedTuple):
    value: Tensor  # what is returned: the output, or the input of a convolution
    output: Tensor  # in the graph
    version: int


def find_layers(model: nn.Module, layers: object) -> dict[str, nn.Module]:
    """Name -> module, in the order asked for.

    Raises:
        TypeError, ValueError: no names, a name twice, or one that the model does not have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {_checks.describe(model)}")
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, Sequence) or len(names) == 0:
        raise TypeError(f"layers: expected names of modules, got {_checks.describe(layers)}")
    known = dict(model.named_modules())
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"layers: expected names of modules, got {_checks.describe(name)}")
        if name not in known:
            raise ValueError(f"layers: no module {name!r}; {near_matches(name, known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"layers: expected different names, got {list(names)}")
    return {name: known[name] for name in names}


def check_input(x: object) -> Tensor:
    """A floating batch that autograd may use."""
    x = _checks.dense("x", x)
    _checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected a batch, (B, ...), got shape {tuple(x.shape)}")
    if x.is_inference():
        raise ValueError("x: made in inference mode, which autograd cannot use; pass x.clone()")
    return x.detach()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode, no parameter asks for gradients, and gradients
    are recorded whatever the surroundings say; afterwards all is as it was."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"model: parameter {name!r} was made in inference mode, which autograd cannot use"
            )
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def capture(
    model: nn.Module,
    x: object,
    layers: object,
    targets: object,
    *,
    inputs: bool = False,
    input_gradient: bool = False,
    guided: bool = False,
) -> Captured:
    """Run a model once forwards and once backwards, and take what layers put out.

    Args:
        model: Any module; called as ``model(x)`` in evaluation mode.
        x: (B, ...), the batch.
        layers: Names of modules; empty only with ``input_gradient``.
        targets: What is explained, see ``_targets.Targets``.
        inputs: Return each layer's input in place of its output (for convolutions).
        input_gradient: Also the gradient with respect to x.
        guided: Gradients that come back to a ReLU keep their positive part only.

    Raises:
        TypeError, ValueError: what cannot be explained; the message says why.
        RuntimeError: A layer's output was changed in place behind its back.

    Notes:
        The graph starts at the earliest layer. What follows a layer gets a copy of its output, so
        operations in place do no harm.
    """
    found = find_layers(model, layers) if layers or not input_gradient else {}
    x = check_input(x)
    seen: dict[str, _Seen] = {}
    handles = []
    with evaluation(model):
        try:
            for name, module in found.items():
                handles.append(module.register_forward_hook(_watch(name, seen, inputs)))
            if guided:
                handles += _guide(model)
            if input_gradient:
                x.requires_grad_()
            output = model(x)
            missing = [name for name in found if name not in seen]
            if missing:
                raise ValueError(f"layers: the model did not run {missing[0]!r}")
            score = total_score(output, targets)
            return _differentiate(found, seen, score, x if input_gradient else None)
        finally:
            for handle in handles:
                handle.remove()
            seen.clear()


def _watch(name: str, seen: dict[str, _Seen], inputs: bool):
    def hook(module: nn.Module, args: tuple, output: object) -> Tensor:
        if name in seen:
            raise ValueError(
                f"layers: {name!r} runs more than once in a call of the model, so that its "
                "activations are not one tensor"
            )
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(
                f"layers: {name!r} puts out {_checks.describe(output)}, expected a floating tensor"
            )
        watched = output if output.requires_grad else output.detach().requires_grad_()
        value = args[0].detach().clone() if inputs else watched.detach()
        seen[name] = _Seen(value, watched, watched._version)
        return watched.clone()

    return hook


def _guide(model: nn.Module) -> list:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: g.clamp_min(0))

    kinds = (nn.ReLU, nn.ReLU6)
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    if not handles:
        raise ValueError("model: guided backpropagation needs nn.ReLU or nn.ReLU6 modules")
    return handles


def _differentiate(
    found: dict[str, nn.Module], seen: dict[str, _Seen], score: Tensor, x: Tensor | None
) -> Captured:
    for name in found:
        if seen[name].output._version != seen[name].version:
            raise RuntimeError(
                f"layers: the output of {name!r} was changed in place after the layer ran"
            )
    wanted = [seen[name].output for name in found] + ([] if x is None else [x])
    if not score.requires_grad:
        raise ValueError(
            "targets: the score does not depend on the layers (computed under no_grad, detached, "
            "or from something else)"
        )
    grads = torch.autograd.grad(score, wanted, allow_unused=True)
    for name, grad in zip([*found, "x"], grads, strict=False):
        if grad is None:
            raise ValueError(f"layers: the score does not depend on {name!r}")
    values = [seen[name].value for name in found]
    return Captured(values, list(grads[: len(found)]), None if x is None else grads[-1])


# ---- token grids ---------------------------------------------------------------------------------


def token_grid(size: tuple[int, int], *, skip: int = 1) -> Callable[[Tensor], Tensor]:
    """A ``reshape`` for transformers: tokens (B, skip + h w, C) to images (B, C, h, w).

    Args:
        size: Rows and columns of patches.
        skip: Leading tokens that are no patches (class, registers), which are dropped.

    Returns:
        A function of a tensor.

    Example:
        >>> import torch
        >>> token_grid((2, 3))(torch.zeros(4, 7, 5)).shape
        torch.Size([4, 5, 2, 3])
    """
    rows, columns = (_checks.positive_int("size", n) for n in size)
    if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
        raise ValueError(f"skip: expected a number of tokens, got {_checks.describe(skip)}")

    def reshape(x: Tensor) -> Tensor:
        _checks.tensor("tokens", x, ("B", "T", "C"))
        if x.shape[1] != skip + rows * columns:
            raise ValueError(
                f"reshape: expected {skip} + {rows} x {columns} tokens, got {x.shape[1]}"
            )
        return x[:, skip:].transpose(1, 2).unflatten(2, (rows, columns))

    return reshape


def to_maps(captured: Captured, names: Sequence[str], reshape: object) -> list[tuple]:
    """(activation, gradient) of each layer as (B, C, *S)."""
    pairs = []
    for name, *pair in zip(names, captured.activations, captured.gradients, strict=True):
        if reshape is not None:
            pair = [reshape(t) for t in pair]  # type: ignore[operator]
        if pair[0].dim() not in (4, 5):
            raise ValueError(
                f"layers: {name!r} gives shape {tuple(pair[0].shape)}, expected (B, C, h, w) or "
                "(B, C, d, h, w); pass a reshape, for tokens token_grid((rows, columns))"
            )
        pairs.append(tuple(pair))
    return pairs


def map_size(size: object, x: Tensor, rank: int) -> tuple[int, ...] | None:
    """The size of the result: ``"input"``, None (that of the layer) or numbers."""
    if size is None:
        return None
    if isinstance(size, str):
        if size != "input":
            raise ValueError(f"size: expected 'input', None or integers, got {size!r}")
        space = tuple(x.shape[2:])
        if len(space) != rank:
            raise ValueError(
                f"size: 'input' needs {rank} spatial axes of x, got {tuple(x.shape)}; pass integers"
            )
        return space
    return size  # type: ignore[return-value]
