"""The diagonal of the Fisher information of a classifier, without per-example gradients of layers.

A linear layer with input a and output gradient g has the per-example gradient sum_t g_t a_t^T, so

    F_W = sum_i (sum_t g_it a_it^T)^2 = (G * G)^T (A * A)       for one position t per example

and with several positions one product per example, squared and added at once. What is no linear
layer, or one that is used twice in a pass, is differentiated per example, by torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from transfuse import _checks
from transfuse.ops._progress import Progress, reporter

MODES = ("exact", "sample", "empirical")
# Numbers of per-example gradients that are held at a time.
HELD = 2**23

Forward = Callable[[nn.Module, Any], Tensor]


def first_of(model: nn.Module, batch: Any) -> Tensor:
    """Logits of a batch that is the input, or a tuple that begins with it."""
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def second_of(batch: Any) -> Tensor:
    """Labels of a batch that is a tuple of inputs and labels."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            'batches: expected tuples of inputs and labels for mode="empirical", got '
            f"{_checks.describe(batch)}"
        )
    return batch[1]


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: str = "exact",
    n: int = 4096,
    seed: int = 0,
    forward: Forward | None = None,
    labels: Callable[[Any], Tensor] | None = None,
    progress: Progress = False,
) -> dict[str, Tensor]:
    r"""The diagonal Fisher information of every parameter.

    .. math:: F = \frac{1}{N} \sum_i \sum_y p(y \mid x_i) \left(
              \frac{\partial \log p(y \mid x_i)}{\partial \theta} \right)^2

    Args:
        model: a classifier; evaluated in eval mode, and left as it was.
        batches: a loader of inputs, or of tuples that begin with them.
        mode: ``"exact"``: all classes weighted by their probability; ``"sample"``: one label drawn
            from it; ``"empirical"``: the label of the data.
        n: examples at most.
        seed: of the draws.
        forward: ``(model, batch) -> logits (B, C)``; None: the model on the first entry.
        labels: ``batch -> labels (B,)`` of ``"empirical"``; None: the second entry.
        progress: see ``transfuse.ops.hutchinson_trace``.

    Returns:
        One tensor per name of ``model.named_parameters()``, at least float32.

    Raises:
        TypeError, ValueError: an option out of range, no examples, logits that are not (B, C).

    Notes:
        The square is taken per example and position sums inside it; one backward pass for all
        classes at once. Beside the result, memory is that of the activations, C times, and of at
        most 8 million per-example numbers. The model must treat examples apart (no batch
        statistics).

    Example:
        >>> import torch
        >>> from transfuse.methods.model_merging.fisher_merging import diagonal_fisher
        >>> model = torch.nn.Linear(3, 2)
        >>> fisher = diagonal_fisher(model, [torch.randn(8, 3)])
        >>> {name: tuple(f.shape) for name, f in fisher.items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {_checks.describe(model)}")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    n = _checks.positive_int("n", n)
    forward = first_of if forward is None else forward
    labels = second_of if labels is None else labels
    report = reporter(progress, "diagonal Fisher", n)
    sums = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in model.named_parameters()
    }
    generator = torch.Generator().manual_seed(seed)
    training = [module for module in model.modules() if module.training]
    model.eval()
    done = 0
    try:
        for batch in batches:
            batch = _rows(batch, 0, n - done)
            count = _add_batch(model, batch, mode, forward, labels, generator, sums)
            done += count
            report(done)
            if done >= n:
                break
    finally:
        for module in training:
            module.training = True
    if done == 0:
        raise ValueError("batches: expected at least one example, got none")
    return {name: total / done for name, total in sums.items()}


def _rows(batch: Any, begin: int, end: int) -> Any:
    return tree_map(lambda t: t[begin:end] if isinstance(t, Tensor) and t.dim() > 0 else t, batch)


class _Tape:
    """Inputs and outputs of the linear layers of one pass."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        owners: dict[int, int] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                owners[id(p)] = owners.get(id(p), 0) + 1
        self.layers = [
            module
            for module in model.modules()
            if type(module) is nn.Linear
            and all(owners[id(p)] == 1 for p in module.parameters(recurse=False))
        ]
        self._hooks = [layer.register_forward_hook(self._seen) for layer in self.layers]

    def _seen(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Frozen weights and data alone would leave nothing to differentiate by.
        if not output.requires_grad:
            output.requires_grad_()
        self.calls.setdefault(layer, []).append((inputs[0].detach(), output))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def usable(self, batch: int) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Layers called once, on examples in front."""
        return {
            layer: calls[0]
            for layer, calls in self.calls.items()
            if len(calls) == 1 and calls[0][0].dim() >= 2 and calls[0][0].shape[0] == batch
        }


def _add_batch(
    model: nn.Module,
    batch: Any,
    mode: str,
    forward: Forward,
    labels: Callable[[Any], Tensor],
    generator: torch.Generator,
    sums: dict[str, Tensor],
) -> int:
    """Add a batch to the sums; the number of its examples."""
    tape = _Tape(model)
    try:
        with torch.enable_grad():
            logits = forward(model, batch)
            if logits.dim() != 2:
                raise ValueError(f"logits: expected (B, C), got shape {tuple(logits.shape)}")
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    finally:
        tape.remove()
    count = logits.shape[0]
    if count == 0:
        return 0
    cotangents = _cotangents(log_p.detach(), mode, lambda: labels(batch), generator)
    layers = tape.usable(count)
    names = {id(p): name for name, p in model.named_parameters()}
    rest: dict[str, Tensor] = dict(model.named_parameters())
    if layers:
        outputs = [output for _, output in layers.values()]
        found = torch.autograd.grad(
            log_p, outputs, cotangents, is_grads_batched=True, allow_unused=True
        )
        for (layer, (x, _)), grads in zip(layers.items(), found, strict=True):
            for p in layer.parameters(recurse=False):
                rest.pop(names[id(p)])
            if grads is None:
                continue
            weight = sums[names[id(layer.weight)]]
            add_linear(weight, x, grads)
            if layer.bias is not None:
                total = grads.flatten(2, -2).sum(2) if grads.dim() > 3 else grads
                sums[names[id(layer.bias)]] += total.to(weight.dtype).square().sum((0, 1))
    if rest:
        _add_per_example(model, batch, forward, rest, cotangents, sums)
    return count


def _cotangents(
    log_p: Tensor, mode: str, labels: Callable[[], Tensor], generator: torch.Generator
) -> Tensor:
    """(R, B, C): for each of R backward passes what log p is multiplied by; squares add up."""
    p = log_p.exp()
    if mode == "exact":
        return _exact(p)
    if mode == "sample":
        drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
        return torch.zeros_like(p).scatter(1, drawn, 1.0)[None]
    given = labels()
    if given.shape != p.shape[:1] or given.is_floating_point():
        raise ValueError(
            f"labels: expected integers ({p.shape[0]},), got {_checks.describe(given)}"
        )
    return torch.zeros_like(p).scatter(1, given[:, None].to(p.device, torch.int64), 1.0)[None]


def _exact(p: Tensor) -> Tensor:
    """sqrt(p_ic) e_c for every class c."""
    classes = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    return p.sqrt().mT[:, :, None] * classes[:, None, :]


def add_linear(total: Tensor, x: Tensor, grads: Tensor) -> None:
    """Add the squares of per-example gradients of a weight.

    Args:
        total: (o, n), added to.
        x: (B, ..., n) inputs.
        grads: (R, B, ..., o) gradients of the outputs.
    """
    x, grads = x.to(total.dtype), grads.to(total.dtype)
    if x.dim() == 2:
        total.addmm_(grads.square().sum(0).mT, x.square())
        return
    x, grads = x.flatten(1, -2), grads.flatten(2, -2)
    step = max(1, HELD // max(1, total.numel()))
    for row in grads:
        for a, g in zip(x.split(step), row.split(step), strict=True):
            total += (g.mT @ a).square_().sum(0)


def _add_per_example(
    model: nn.Module,
    batch: Any,
    forward: Forward,
    rest: dict[str, Tensor],
    cotangents: Tensor,
    sums: dict[str, Tensor],
) -> None:
    """The same for parameters of any kind, by torch.func."""
    frozen = {
        name: t.detach()
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if name not in rest
    }
    own = {name: p.detach() for name, p in rest.items()}

    def log_p(params: dict[str, Tensor], example: Any) -> Tensor:
        one = tree_map(lambda t: t[None] if isinstance(t, Tensor) else t, example)
        logits = forward(_Bound(model, {**frozen, **params}), one)  # type: ignore[arg-type]
        return logits[0].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def squares(example: Any, rows: Tensor) -> dict[str, Tensor]:
        _, pull = torch.func.vjp(lambda params: log_p(params, example), own)  # type: ignore[misc]
        (found,) = torch.vmap(pull)(rows)
        return {name: g.square().sum(0) for name, g in found.items()}

    per_example = sum(p.numel() for p in rest.values()) * cotangents.shape[0]
    step = max(1, HELD // max(1, per_example))
    count = cotangents.shape[1]
    mapped = tree_map(lambda t: 0 if isinstance(t, Tensor) and t.dim() > 0 else None, batch)
    for begin in range(0, count, step):
        part = _rows(batch, begin, begin + step)
        rows = cotangents[:, begin : begin + step].movedim(1, 0)
        found = torch.vmap(squares, in_dims=(mapped, 0), randomness="same")(part, rows)
        for name, g in found.items():
            sums[name] += g.to(sums[name].dtype).sum(0)


class _Bound:
    """A module that is called with given tensors."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        self._model, self._tensors = model, tensors

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return torch.func.functional_call(self._model, self._tensors, inputs, named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
