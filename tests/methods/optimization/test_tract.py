"""TrAct: golden arrays, the closed form, every kind of layer, and what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.optimization import _tract_gradient
from transfuse.methods.optimization.tract import TrActConv2d, TrActLinear, tract, unwrap
from transfuse.testing import golden

GOLDEN = golden.load("tract")


def layer_of(given, lam):
    weight, bias = given["weight"], given.get("bias")
    out, into = weight.shape[:2]
    if weight.dim() == 2:
        layer = nn.Linear(into, out, bias is not None, dtype=torch.float64)
    else:
        stride, padding = (tuple(given[name].tolist()) for name in ("stride", "padding"))
        layer = nn.Conv2d(into, out, tuple(weight.shape[2:]), stride, padding, dtype=torch.float64)
    layer.load_state_dict({k: v for k, v in (("weight", weight), ("bias", bias)) if v is not None})
    return tract(layer, lam)


@pytest.mark.parametrize("case", GOLDEN.cases)
def test_golden(case):
    given = GOLDEN.inputs(case)
    layer = layer_of(given, float(given["lambda"]))
    x = given["x"].requires_grad_()
    y = layer(x)
    y.backward(given["grad_out"])
    GOLDEN.check(y, "y", case)
    GOLDEN.check(layer.weight.grad, "dweight", case)
    GOLDEN.check(x.grad, "dx", case)
    if layer.bias is not None:
        GOLDEN.check(layer.bias.grad, "dbias", case)


def direct(x, grad, lam):
    """The formula on rows, with an inverse."""
    moment = x.mT @ x / x.shape[0] + lam * torch.eye(x.shape[1], dtype=x.dtype)
    return grad.mT @ x @ torch.linalg.inv(moment)


def rows_of(layer, x, grad):
    """Rows of a convolution by padding, unfolding and nothing else."""
    around = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    p = F.unfold(F.pad(x, around, mode=mode), layer.kernel_size, layer.dilation, 0, layer.stride)
    return p.mT.flatten(0, 1), grad.flatten(2).mT.flatten(0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": (1, 2), "stride": (2, 1)},
        {"padding": 2, "dilation": 2},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": (2, 1), "padding_mode": "circular", "stride": 2},
        {"padding": 1, "padding_mode": "replicate", "dilation": (1, 2)},
        {"padding": "same"},
        {"padding": "same", "dilation": 2, "padding_mode": "reflect"},
        {"padding": "valid", "bias": False},
        {"kernel_size": (2, 4), "padding": "same"},  # not the same on both sides
        {"kernel_size": (9, 7)},  # one patch per image: fewer rows than n
    ],
    ids=str,
)
def test_every_convolution(options):
    layer = nn.Conv2d(2, 3, **{"kernel_size": 3, **options}, dtype=torch.float64)
    x = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    expected = layer(x)
    tract(layer, 0.2)
    y = layer(x)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    want = direct(*rows_of(layer, x, grad), 0.2).view_as(layer.weight)
    torch.testing.assert_close(layer.weight.grad, want)
    # One image without a batch is a batch of one.
    layer.zero_grad()
    layer(x[0]).backward(grad[0])
    want = direct(*rows_of(layer, x[:1], grad[:1]), 0.2).view_as(layer.weight)
    torch.testing.assert_close(layer.weight.grad, want)


@pytest.mark.parametrize("rows", [1, 11, 12, 13, 40])
@pytest.mark.parametrize("out", [3, 20])
def test_both_sides_of_the_inverse(rows, out):
    x, grad = torch.randn(rows, 12).double(), torch.randn(rows, out).double()
    layer = TrActLinear(12, out, dtype=torch.float64, lam=0.05)
    layer(x).backward(grad)
    torch.testing.assert_close(layer.weight.grad, direct(x, grad, 0.05))


def test_pre_activations_move_by_b_times_their_gradient():
    """The aim of the method, which is reached where the rows are independent."""
    for rows in (1, 5, 12):
        x, grad = torch.randn(rows, 12).double(), torch.randn(rows, 4).double()
        layer = TrActLinear(12, 4, bias=False, dtype=torch.float64, lam=1e-12)
        layer(x).backward(grad)
        torch.testing.assert_close(x @ layer.weight.grad.mT, rows * grad, rtol=1e-6, atol=1e-6)


def test_tokens_need_not_be_contiguous():
    x = torch.randn(6, 4, 5).double()
    layer = TrActLinear(6, 3, dtype=torch.float64)
    y = layer(x.permute(1, 2, 0))
    grad = torch.randn_like(y)
    y.backward(grad.expand_as(y))
    want = direct(x.permute(1, 2, 0).reshape(-1, 6), grad.flatten(0, 1), 0.1)
    torch.testing.assert_close(layer.weight.grad, want)
    layer.zero_grad()
    layer(x[:, 0, 0]).sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("make", [lambda: nn.Linear(27, 8), lambda: nn.Conv2d(3, 8, 3)], ids="lc")
def test_autocast_computes_the_gradient_in_float32(make):
    """Pixels from 0 to 255: their squares overflow half precision."""
    layer = tract(make())
    x = 255 * torch.rand((50, 27) if isinstance(layer, nn.Linear) else (4, 3, 8, 8))
    with torch.autocast("cpu", dtype=torch.float16):
        y = layer(x)
    assert y.dtype == torch.float16
    grad = torch.randn_like(y)
    y.backward(grad)
    assert layer.weight.grad.dtype == torch.float32
    rows = (x, grad) if isinstance(layer, nn.Linear) else rows_of(layer, x, grad)
    want = direct(*(t.double() for t in rows), 0.1).view_as(layer.weight)
    error = (layer.weight.grad - want).norm() / want.norm()
    assert error < 1e-2, f"{error:.1e}: the moment or the product was rounded to half precision"
    # The backward pass may also run inside.
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).backward(grad.to(torch.bfloat16))
    assert (layer.weight.grad - want).norm() / want.norm() < 1e-2


def test_half_precision_weights():
    layer = tract(nn.Linear(12, 4).bfloat16())
    x = torch.randn(20, 12).bfloat16()
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert layer.weight.grad.dtype == torch.bfloat16
    want = direct(x.double(), grad.double(), 0.1)
    torch.testing.assert_close(layer.weight.grad.double(), want, rtol=1e-2, atol=1e-2)


def test_in_place_and_undone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names, weight = list(model.state_dict()), model[0].weight
    for layer in (model[0], model[2]):
        assert tract(layer, 0.2) is layer
        assert layer.lam == 0.2
        assert tract(layer).lam == 0.1, "options can be set again"
    assert isinstance(model[0], TrActConv2d)
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[2], TrActLinear)
    assert list(model.state_dict()) == names
    assert model[0].weight is weight
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model(x), plain(x))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other[0], TrActConv2d)
        assert torch.equal(other(x), plain(x))
    model(x).square().mean().backward()
    changed = model[0].weight.grad.clone()
    optimizer.zero_grad()
    assert model[0].unwrap() is model[0]
    unwrap(model[2])
    assert [type(m) for m in model] == [nn.Conv2d, nn.Flatten, nn.Linear]
    assert model[0].__dict__.keys() == plain[0].__dict__.keys()
    for part in (model, plain):
        part(x).square().mean().backward()
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)
    assert not torch.allclose(changed, plain[0].weight.grad)


def test_nothing_is_computed_for_a_frozen_weight(monkeypatch):
    def never(*args):
        raise AssertionError("the gradient of a frozen weight was computed")

    monkeypatch.setattr(_tract_gradient, "weight_gradient", never)
    layer = tract(nn.Linear(6, 3))
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 6))
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 5.0))
    layer.weight.requires_grad_(True)
    with torch.no_grad():
        layer(torch.zeros(0, 6))


def test_differentiating_again_is_refused():
    layer, x = tract(nn.Linear(4, 2)), torch.randn(3, 4, requires_grad=True)
    loss = layer(x).square().sum()
    grads = torch.autograd.grad(loss, (x, layer.weight), create_graph=True)
    penalty = torch.autograd.grad(grads[0].square().sum(), x, retain_graph=True)[0]
    plain = nn.functional.linear(x, layer.weight.detach(), layer.bias.detach())
    (slope,) = torch.autograd.grad(plain.square().sum(), x, create_graph=True)
    torch.testing.assert_close(penalty, torch.autograd.grad(slope.square().sum(), x)[0])
    with pytest.raises(NotImplementedError, match=r"TrAct: the weight gradient .* cannot be diff"):
        torch.autograd.grad(grads[1].sum(), x)


def test_compiled():
    layer = tract(nn.Conv2d(2, 3, 3))
    x = torch.randn(2, 2, 6, 6)
    layer(x).square().mean().backward()
    want = layer.weight.grad.clone()
    layer.zero_grad()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    torch.testing.assert_close(layer.weight.grad, want)


def test_first_layers_of_model_libraries():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    vit = transformers.ViTModel(
        transformers.ViTConfig(**small, num_hidden_layers=1, image_size=16, patch_size=4)
    )
    resnet = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    )
    for model, layer in (
        (vit, vit.embeddings.patch_embeddings.projection),
        (resnet, resnet.embedder.embedder.convolution),
    ):
        x = torch.randn(3, 3, 16, 16)
        tract(layer)
        inputs, grads = [], []
        layer.register_forward_hook(lambda m, i, o, inputs=inputs: inputs.append(i[0]))
        layer.register_full_backward_hook(lambda m, i, o, grads=grads: grads.append(o[0]))
        model(pixel_values=x).last_hidden_state.square().sum().backward()
        rows = [t.double() for t in rows_of(layer, inputs[0], grads[0])]
        want = direct(*rows, 0.1).view_as(layer.weight).float()
        torch.testing.assert_close(layer.weight.grad, want, rtol=1e-3, atol=1e-4 * want.abs().max())


PROCESS = """
import sys, torch, torch.distributed as dist
from transfuse.methods.optimization.tract import TrActLinear
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
x, grad = torch.randn(20, 6).double(), torch.randn(20, 3).double()
layer = TrActLinear(6, 3, dtype=torch.float64, group=dist.group.WORLD)
# 4 rows here (fewer than n) and 16 there; the gradient of the whole is their sum.
mine = slice(0, 4) if rank == 0 else slice(4, 20)
layer(x[mine]).backward(grad[mine])
dist.all_reduce(layer.weight.grad)
moment = x.T @ x / 20 + 0.1 * torch.eye(6).double()
torch.testing.assert_close(layer.weight.grad, grad.T @ x @ torch.linalg.inv(moment))
dist.destroy_process_group()
"""


def test_moments_of_all_processes(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed package")
    command = [sys.executable, "-c", PROCESS]
    other = subprocess.Popen([*command, "1", str(tmp_path / "store")])
    try:
        subprocess.run([*command, "0", str(tmp_path / "store")], check=True, timeout=120)
        assert other.wait(timeout=120) == 0
    finally:
        other.kill()


class Own(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("layer", "options", "error", "match"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), {}, ValueError, "one group, got 2"),
        (nn.ConvTranspose2d(4, 4, 3), {}, TypeError, "got ConvTranspose2d"),
        (nn.Conv1d(4, 4, 3), {}, TypeError, "got Conv1d"),
        (nn.LazyLinear(4), {}, TypeError, "got LazyLinear"),
        (Own(4, 4), {}, TypeError, "got Own"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), {}, TypeError, "Parametrized"),
        (None, {}, TypeError, "layer: expected"),
        (nn.Linear(4, 4), {"lam": 0.0}, ValueError, "lam: expected a number greater than 0"),
        (nn.Linear(4, 4), {"lam": -1}, ValueError, "lam"),
        (nn.Linear(4, 4), {"lam": "1"}, TypeError, "lam"),
        (nn.Linear(4, 4), {"lam": float("nan")}, ValueError, "lam"),
    ],
)
def test_refused_layers(layer, options, error, match):
    before = type(layer)
    with pytest.raises(error, match=match):
        tract(layer, **options)
    assert type(layer) is before


def test_refused_calls():
    with pytest.raises(TypeError, match="layer: expected a TrAct layer, got Linear"):
        unwrap(nn.Linear(2, 2))
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: x
    with pytest.raises(TypeError, match="has not been replaced"):
        tract(replaced)
    layer = tract(nn.Linear(3, 2))
    with pytest.raises(TypeError, match="x: expected a floating tensor, got a int64 tensor"):
        layer(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="x: expected at least one row"):
        layer(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="lam"):
        TrActConv2d(3, 4, 3, lam=0)
    constant = torch.full((200, 60), 3.0)
    with pytest.raises(RuntimeError, match=r"not positive definite in torch\.float32; lam = 1e-12"):
        TrActLinear(60, 2, lam=1e-12)(constant).sum().backward()
    TrActLinear(60, 2)(constant).sum().backward()
    layer(torch.full((5, 3), float("nan"))).sum().backward()
    assert layer.weight.grad.isnan().all()
