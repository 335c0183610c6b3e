"""Fake kernels and autograd of the raw C++ adain ops: what ``torch.compile`` sees."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.ops import _adain_core as core
from transfuse.ops._adain_core import Calls, Static

_registered = False
_RULES = core.rules(lambda: Calls(core.forward, core.backward, core.jvp, core.jvp_backward))


def _fake_out(content: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(content)


def _fake_gradients(grad, content, style, *rest):
    *_, content_grad, style_grad = rest
    return tuple(
        torch.empty_like(t) if wanted else t.new_empty((0,))
        for t, wanted in ((content, content_grad), (style, style_grad))
    )


def _setup(ctx, inputs, output) -> None:
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    dims, eps, *needs = inputs[len(tensors) :]
    # The kernel of a raw op is chosen by the device, not by the name of a backend.
    ctx.static = Static(tuple(dims), eps, "cpu", tuple(needs) if needs else (True, True))
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


def register() -> None:
    """Attach fakes and autograd to the C++ ops; called once, after the library is loaded."""
    global _registered
    if _registered:
        return
    _registered = True
    fakes = {
        "forward": _fake_out,
        "backward": _fake_gradients,
        "jvp": _fake_out,
        "jvp_backward": _fake_gradients,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"transfuse::adain_{name}", fake)
        torch.library.register_autograd(
            f"transfuse::adain_{name}", _backward_of(name), setup_context=_setup
        )
