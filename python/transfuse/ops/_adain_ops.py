"""Fakes and autograd of the raw adain ops, C++ and Triton: what ``torch.compile`` sees."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse.ops import _adain_core as core
from transfuse.ops._adain_core import Calls, Static

_registered: set[str] = set()
_RULES = core.rules(lambda: Calls(core.forward, core.backward, core.jvp, core.jvp_backward))


def _fake_out(content: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(content)


def _fake_gradients(grad, content, style, *rest):
    *_, content_grad, style_grad = rest
    return tuple(
        torch.empty_like(t) if wanted else t.new_empty((0,))
        for t, wanted in ((content, content_grad), (style, style_grad))
    )


def _setup(ctx, inputs, output, backend: str) -> None:
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    dims, eps, *needs = inputs[len(tensors) :]
    ctx.static = Static(tuple(dims), eps, backend, tuple(needs) if needs else (True, True))
    ctx.rest = len(inputs) - len(tensors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_of(name: str):
    vjp, _ = _RULES[name]

    def backward(ctx, *grads):
        if vjp is None:
            raise NotImplementedError(
                f"transfuse::adain_{name}: third derivatives are not implemented; use "
                'backend="reference".'
            )
        tensors = ctx.saved_tensors
        if name == "backward":
            grads = [g for g, wanted in zip(grads, ctx.static.needs, strict=True) if wanted]
        needs = ctx.needs_input_grad[: len(tensors)]
        found = vjp(ctx.static, tensors, None, grads, needs)
        return (*found, *([None] * ctx.rest))

    return backward


_PLACE = "int[] dims, float eps"
_SCHEMAS = {
    "forward": f"(Tensor content, Tensor style, {_PLACE}) -> Tensor",
    "backward": f"(Tensor grad, Tensor content, Tensor style, {_PLACE}, bool content_grad, "
    "bool style_grad) -> (Tensor, Tensor)",
    "jvp": f"(Tensor content, Tensor style, Tensor content_t, Tensor style_t, {_PLACE}) -> Tensor",
}
_FAKES = {"forward": _fake_out, "backward": _fake_gradients, "jvp": _fake_out}


def register() -> None:
    """Attach fakes and autograd to the C++ ops; called once, after the library is loaded."""
    # The kernel of a C++ op is chosen by the device, not by the name of a backend.
    _attach(_FAKES | {"jvp_backward": _fake_gradients}, "", "cpu")


def register_triton() -> None:
    """Make the Triton kernels ops of torch, as the C++ ones are. Imports no Triton."""
    if _triton_ops.COMPILED in _registered:
        return
    for name, signature in _SCHEMAS.items():
        _triton_ops.define("adain", f"adain_{name}", signature, recorded=True)
    _attach(_FAKES, "_triton", _triton_ops.COMPILED)


def _attach(fakes: dict[str, Callable], ending: str, backend: str) -> None:
    if backend in _registered:
        return
    _registered.add(backend)
    setup = functools.partial(_setup, backend=backend)
    for name, fake in fakes.items():
        op = f"transfuse::adain_{name}{ending}"
        torch.library.register_fake(op, fake)
        torch.library.register_autograd(op, _backward_of(name), setup_context=setup)
