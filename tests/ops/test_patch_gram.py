"""What patch_gram promises beyond the contract of every op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from transfuse.ops import _patch_gram_reference, patch_gram
from transfuse.ops._patch_gram_call import normalise
from transfuse.testing.specs import find_spec

SPEC = find_spec("patch_gram")


@pytest.fixture(params=["reference", "cpu"])
def backend(request, device_for) -> str:
    device_for(SPEC, request.param, torch.float32)
    return request.param


def unfolded(x, *args, **options):
    p = F.unfold(x, *args, **options)
    return torch.einsum("bil,bjl->ij", p, p)


def test_every_entry_is_its_own_sum(backend):
    """By loops, for one geometry with everything; others are compared with the reference."""
    x = torch.randint(-3, 4, (2, 2, 6, 5)).double()
    got = patch_gram(x, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(3, 1), backend=backend)
    padded = F.pad(x, (0, 0, 1, 1))
    want = torch.zeros(12, 12, dtype=torch.float64)
    for b in range(2):
        for y in range(0, 8 - 3, 2):
            for column in range(5 - 2):
                p = padded[b, :, y : y + 4 : 3, column : column + 3].reshape(-1)
                want += torch.outer(p, p)
    assert torch.equal(got, want), "integers are exact"


def test_symmetric_to_the_bit_and_positive(backend):
    x = torch.randn(3, 5, 17, 19)
    s = patch_gram(x, 3, stride=2, padding=1, backend=backend)
    assert torch.equal(s, s.T)
    assert torch.linalg.eigvalsh(s.double()).min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sums_keep_their_digits(dtype, device_for):
    """Numbers of one sign, as pixels from 0 to 255 have: rounding does not average out."""
    device_for(SPEC, "cpu", dtype)
    x = (255 * torch.rand(64, 3, 32, 32)).to(dtype)
    s = patch_gram(x, 3, padding=1, backend="cpu")
    want = unfolded(x.double(), 3, padding=1)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s.double(), want, rtol=2e-6, atol=0)


def test_images_in_pieces(monkeypatch):
    x = torch.randn(5, 2, 9, 9)
    for chunk in (1, 2000):
        monkeypatch.setattr(_patch_gram_reference, "CHUNK", chunk)
        _, geometry = normalise(x, 3, 1, 1, 1)
        got = _patch_gram_reference.composed(x[None], geometry)[0]
        torch.testing.assert_close(got, unfolded(x, 3, padding=1))


def test_patch_embeddings_run_as_one_product():
    """Where no two patches meet; pixels that no patch reaches do not count."""
    x = torch.randn(2, 3, 11, 14).double()
    torch.testing.assert_close(
        patch_gram(x, (3, 4), stride=(3, 4)), unfolded(x, (3, 4), stride=(3, 4))
    )
    s = patch_gram(x.requires_grad_(), 4, stride=4)
    (grad,) = torch.autograd.grad(s.square().sum(), x)
    (want,) = torch.autograd.grad(unfolded(x, 4, stride=4).square().sum(), x)
    torch.testing.assert_close(grad, want)


def test_parts_of_the_images_are_summed_in_one_order(device_for):
    """Enough patches to be divided, into parts that do not depend on the threads."""
    device_for(SPEC, "cpu", torch.float32)
    x = torch.randn(9, 1, 300, 300)
    torch.set_num_threads(1)
    one = patch_gram(x, 3, padding=1, backend="cpu")
    torch.set_num_threads(3)
    assert torch.equal(patch_gram(x, 3, padding=1, backend="cpu"), one)
    torch.testing.assert_close(
        one.double(), unfolded(x.double(), 3, padding=1), rtol=1e-5, atol=1.0
    )
