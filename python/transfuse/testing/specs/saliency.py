"""Specs of ``grad_weighted_map`` and ``normgrad_map``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from transfuse.ops import grad_weighted_map, normgrad_map
from transfuse.ops._saliency_reference import grad_weighted_map_reference, normgrad_map_reference
from transfuse.testing import backends
from transfuse.testing.spec import BadCase, CallArgs, Case, OpSpec, RawCall, Tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
BENCH = frozenset({"bench"})


@dataclass(frozen=True)
class Layer:
    """Shapes (B, C, *S) of activations and gradients, their layout, and the options of one call.

    ``channels_last``: memory in that order, whatever the layout says. ``mean`` is added to the
    activations; weights of Grad-CAM++ and XGrad-CAM divide by their sums.
    """

    shape: tuple[int, ...]
    options: tuple[tuple[str, object], ...] = ()
    layout: str = "nchw"
    grad_shape: tuple[int, ...] | None = None
    channels_last: bool = False
    mean: float = 0.0

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """The call with these or similar tensors."""
        options = dict(self.options)
        if backend is not None:
            options["backend"] = backend
        return op(tensors["act"], tensors["grad"], layout=self.layout, **options)

    def case(self, name: str, tags: frozenset[str]) -> Case:
        """As a case."""

        def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
            tensors = {}
            shapes = {"act": self.shape, "grad": self.grad_shape or self.shape}
            for name, shape in shapes.items():
                x = torch.randn(shape, generator=generator)
                x = (x.abs() + self.mean if name == "act" and self.mean else x).to(dtype)
                if self.layout != "nchw":
                    x = x.movedim(1, -1).contiguous()
                elif self.channels_last:
                    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
                tensors[name] = x.to(device)
            return CallArgs(self.call, tensors)

        return Case(name, make, ("act", "grad"), tags)


def _method(name: str) -> tuple[tuple[str, object], ...]:
    return (("method", name),)


def _phases(phase1: str, phase2: str, **geometry: object) -> tuple[tuple[str, object], ...]:
    return (("phase1", phase1), ("phase2", phase2), *geometry.items())


_SMALL = (2, 3, 3, 4)

_MAPS: dict[str, tuple[Layer, frozenset[str]]] = {
    "gradcam": (Layer(_SMALL), TINY),
    "gradcam++": (Layer(_SMALL, _method("gradcam++"), mean=0.5), TINY),
    "xgradcam": (Layer(_SMALL, _method("xgradcam"), mean=0.5), TINY),
    "layercam": (Layer((1, 2, 3, 2), _method("layercam"), "nhwc"), TINY),
    "hirescam": (Layer((1, 2, 3, 2), _method("hirescam")), TINY),
    "elementwise": (Layer((1, 4, 3, 2), _method("elementwise"), "nhwc"), TINY),
    "tokens": (Layer((2, 5, 7), layout="tokens"), TINY),
    "tokens, ++": (Layer((2, 5, 7), _method("gradcam++"), "tokens", mean=0.5), AWKWARD),
    "one location": (Layer((3, 5, 1, 1), _method("xgradcam"), mean=0.5), AWKWARD),
    "one channel": (Layer((2, 1, 5, 7)), AWKWARD),
    "no batch": (Layer((0, 3, 2, 2)), AWKWARD),
    "no locations": (Layer((2, 3, 0, 2), _method("layercam")), AWKWARD),
    # More channels than are summed in one go, and locations that fill no vector.
    "many channels": (Layer((2, 131, 3, 5)), AWKWARD),
    "many channels, last": (
        Layer((2, 300, 9, 8), _method("xgradcam"), "nhwc", mean=0.5),
        AWKWARD,
    ),
    "volume": (Layer((2, 6, 3, 5, 7), _method("gradcam++"), mean=0.5), AWKWARD),
    "strides of channels last": (Layer((2, 35, 5, 7), channels_last=True), AWKWARD),
    "large map": (Layer((1, 67, 41, 59)), AWKWARD),
    "linear": (Layer((1, 70, 40, 41), _method("linear")), AWKWARD),
    "elementwise, last": (Layer((1, 259, 9, 15), _method("elementwise"), "nhwc"), AWKWARD),
    "resnet": (Layer((2, 512, 7, 7), _method("xgradcam"), mean=0.5), REAL),
    "vit": (Layer((1, 384, 197), layout="tokens"), REAL),
    "vgg": (Layer((64, 512, 28, 28)), BENCH),
}

_NORMS: dict[str, tuple[Layer, frozenset[str]]] = {
    "norm": (Layer(_SMALL), TINY),
    "filter norm": (Layer(_SMALL, _phases("conv1x1", "filter_norm")), TINY),
    "sum": (Layer((1, 2, 3, 2), _phases("conv1x1", "sum"), "nhwc"), TINY),
    "max": (Layer((1, 2, 3, 2), _phases("conv1x1", "max")), TINY),
    "3x3 norm": (Layer(_SMALL, _phases("conv3x3", "norm")), TINY),
    "3x3 filter norm": (Layer((1, 5, 3, 2), _phases("conv3x3", "filter_norm"), "nhwc"), AWKWARD),
    "3x3 max": (Layer((2, 3, 4, 3), _phases("conv3x3", "max")), AWKWARD),
    "depthwise norm": (Layer((1, 2, 3, 4), _phases("conv3x3_depthwise", "norm")), TINY),
    "depthwise filter norm": (
        Layer((2, 19, 4, 5), _phases("conv3x3_depthwise", "filter_norm"), "nhwc"),
        AWKWARD,
    ),
    "depthwise max": (Layer((2, 67, 4, 9), _phases("conv3x3_depthwise", "max")), AWKWARD),
    "depthwise sum": (Layer((1, 3, 2, 4, 3), _phases("conv3x3_depthwise", "sum")), AWKWARD),
    "scaling norm": (Layer((2, 5, 3), _phases("scaling", "norm"), "tokens"), AWKWARD),
    "selective": (Layer(_SMALL, _phases("scaling", "filter_norm")), TINY),
    "scaling max": (Layer((2, 131, 3, 5), _phases("scaling", "max")), AWKWARD),
    "bias norm": (Layer(_SMALL, _phases("bias", "norm")), AWKWARD),
    "bias max": (Layer((2, 70, 3, 5), _phases("bias", "max"), "nhwc"), AWKWARD),
    "proper": (
        Layer(
            (2, 3, 6, 5),
            _phases("conv", "norm", kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
            grad_shape=(2, 4, 3, 4),
        ),
        TINY,
    ),
    "proper max": (
        Layer(
            (1, 3, 6, 7),
            _phases("conv", "max", kernel_size=3, stride=2, padding=2, dilation=2),
            "nhwc",
            grad_shape=(1, 2, 3, 4),
        ),
        AWKWARD,
    ),
    "volume": (Layer((1, 3, 2, 3, 4), _phases("conv3x3", "norm")), AWKWARD),
    "one location": (Layer((3, 5, 1, 1), _phases("conv3x3", "filter_norm")), AWKWARD),
    "no batch": (Layer((0, 3, 2, 2), _phases("conv3x3", "max")), AWKWARD),
    "no locations": (Layer((2, 3, 0, 2), _phases("conv3x3_depthwise", "norm")), AWKWARD),
    "large map": (Layer((1, 67, 41, 43), _phases("conv3x3", "sum")), AWKWARD),
    "channels last": (Layer((1, 300, 9, 15), layout="nhwc"), AWKWARD),
    "resnet": (Layer((2, 512, 7, 7), _phases("conv3x3", "filter_norm")), REAL),
    "vgg": (Layer((8, 512, 28, 28)), BENCH),
}


def _fuzz_map(choose: Callable[[Sequence[object]], object]) -> Case:
    method = choose(("gradcam", "gradcam++", "xgradcam", "layercam", "hirescam", "elementwise"))
    plan = Layer(
        (choose((1, 2, 5)), choose((1, 2, 7, 17, 66)), choose((1, 3, 8)), choose((1, 5, 17))),
        _method(method),
        choose(("nchw", "nhwc")),
        mean=0.5,
    )
    return plan.case(f"fuzz {plan}", AWKWARD)


def _fuzz_norm(choose: Callable[[Sequence[object]], object]) -> Case:
    phase1 = choose(("scaling", "bias", "conv1x1", "conv3x3", "conv3x3_depthwise", "conv"))
    phase2 = choose(("norm", "filter_norm", "sum", "max"))
    space = (choose((1, 3, 8)), choose((1, 5, 17)))
    batch, channels = choose((1, 2, 5)), choose((1, 2, 7, 17, 66))
    geometry: dict[str, object] = {}
    out = space
    if phase1 == "conv":
        kernel, padding, dilation = choose((1, 2, 3)), choose((0, 1)), choose((1, 2))
        stride = choose((1, 2, 3))
        least = dilation * (kernel - 1) + 1 - 2 * padding
        space = tuple(max(n, least) for n in space)
        out = tuple((n - least) // stride + 1 for n in space)
        geometry = {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
        }
    plan = Layer(
        (batch, channels, *space),
        _phases(phase1, phase2, **geometry),
        choose(("nchw", "nhwc")),
        grad_shape=(batch, channels if phase1 != "conv" else choose((1, 3)), *out),
    )
    return plan.case(f"fuzz {plan}", AWKWARD)


def _bad(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    arguments = {"act": torch.zeros(2, 3, 4, 5), "grad": torch.zeros(2, 3, 4, 5), **changes}

    def call(op: Callable[..., object]) -> object:
        given = dict(arguments)
        return op(given.pop("act"), given.pop("grad"), **given)

    return BadCase(name, call, error, match)


_SHARED = (
    _bad("class", TypeError, "act: expected a tensor, got None", act=None),
    _bad("rank", ValueError, r"act: expected \(B, C, h, w\) or", act=torch.zeros(3, 4, 5)),
    _bad("integers", TypeError, "grad: expected float32", grad=torch.zeros(2, 3, 4, 5).long()),
    _bad("sparse", TypeError, "act: expected a dense", act=torch.zeros(2, 3, 4, 5).to_sparse()),
    _bad("shapes", ValueError, "grad: expected the shape of act", grad=torch.zeros(2, 3, 5, 4)),
    _bad("dtypes", TypeError, "grad: expected dtype", grad=torch.zeros(2, 3, 4, 5).double()),
    _bad(
        "channels",
        ValueError,
        "act: expected at least one channel",
        act=torch.zeros(2, 0, 4, 5),
        grad=torch.zeros(2, 0, 4, 5),
    ),
    _bad("layout", ValueError, "layout: expected one of 'nchw'", layout="channels_last"),
    _bad("layout class", ValueError, "layout: expected one of", layout=["nchw"]),
    _bad("tokens", ValueError, r"act: expected \(B, T, C\)", layout="tokens"),
    _bad("backend", ValueError, "backend: expected one of", backend="opencl"),
    _bad("backend cuda", RuntimeError, "backend 'cuda' cannot run", backend="cuda"),
)

_TOKENS = {"act": torch.zeros(2, 4, 5), "grad": torch.zeros(2, 4, 5), "layout": "tokens"}


def _raw_calls(weighted: bool) -> Callable[[str], tuple[RawCall, ...]]:
    def calls(backend: str) -> tuple[RawCall, ...]:
        if not backends.native(backend):
            return ()
        generator = torch.Generator().manual_seed(0)
        found = []
        for grad in (False, True):
            pair = [
                torch.randn((2, 3, 20), generator=generator).requires_grad_(grad) for _ in range(2)
            ]
            if weighted:
                op, rest = torch.ops.transfuse.grad_weighted_map, (0,)
            else:
                op = torch.ops.transfuse.normgrad_map
                rest = ([1, 4, 5], 2, 0, [1, 3, 3], [1, 1, 1], [0, 1, 1], [1, 1, 1])
            found.append(RawCall(f"gradients {grad}", op, (*pair, *rest)))
        return tuple(found)

    return calls


def _numbers(args: CallArgs) -> int:
    return sum(x.numel() for x in args.tensors.values())


_REFUSES = {
    "jvp of jvp": "one more forward-mode derivative is not implemented",
    "compile, func.grad": "do not support torch.func transforms",
    "compile, func.jvp": "do not support torch.func transforms",
    "compile, func.vmap": "do not support torch.func transforms",
}


def _bytes(args: CallArgs) -> int:
    return sum(x.numel() * x.element_size() for x in args.tensors.values())


SPECS = (
    OpSpec(
        name="grad_weighted_map",
        op=grad_weighted_map,
        reference=grad_weighted_map_reference,
        cases=tuple(plan.case(name, tags) for name, (plan, tags) in _MAPS.items()),
        dtypes=DTYPES,
        backends=("reference", "cpu", "triton", "cuda"),
        flops=lambda args: 2 * _numbers(args),
        bytes=_bytes,
        errors=(
            *_SHARED,
            _bad("method", ValueError, "method: expected one of 'gradcam'", method="scorecam"),
        ),
        gradcheck=("xgradcam",),
        refuses=_REFUSES,
        fuzz=_fuzz_map,
        raw_calls=_raw_calls(True),
    ),
    OpSpec(
        name="normgrad_map",
        op=normgrad_map,
        reference=normgrad_map_reference,
        cases=tuple(plan.case(name, tags) for name, (plan, tags) in _NORMS.items()),
        dtypes=DTYPES,
        backends=("reference", "cpu", "triton", "cuda"),
        flops=lambda args: 2 * _numbers(args),
        bytes=_bytes,
        errors=(
            *_SHARED,
            _bad("phase1", ValueError, "phase1: expected one of 'scaling'", phase1="conv5x5"),
            _bad("phase2", ValueError, "phase2: expected one of 'norm'", phase2="mean"),
            _bad("no kernel", ValueError, "kernel_size: expected the kernel", phase1="conv"),
            _bad("kernel", ValueError, "kernel_size: expected only with", kernel_size=3),
            _bad("padding", ValueError, "padding: expected only with", padding=1),
            _bad(
                "entries",
                ValueError,
                "kernel_size: expected one integer or 2, got 3",
                phase1="conv",
                kernel_size=(1, 1, 1),
            ),
            _bad("real", TypeError, "stride: expected integers, got 2.0", phase1="conv",
                 kernel_size=1, stride=2.0),
            _bad("no stride", ValueError, "stride: .* at least 1, got 0", phase1="conv",
                 kernel_size=1, stride=0),
            _bad("large", ValueError, r"kernel that fits into the \(4, 5\)", phase1="conv",
                 kernel_size=6),
            _bad(
                "mismatch",
                ValueError,
                r"grad: expected \(2, 3\) locations, which is what",
                phase1="conv",
                kernel_size=3,
                stride=2,
                padding=1,
            ),
            _bad("grid", ValueError, "'conv3x3' needs neighbours", phase1="conv3x3", **_TOKENS),
        ),
        gradcheck=("norm", "selective", "proper"),
        refuses=_REFUSES,
        fuzz=_fuzz_norm,
        raw_calls=_raw_calls(False),
    ),
)  # fmt: skip
