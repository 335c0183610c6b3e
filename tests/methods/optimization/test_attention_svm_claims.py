"""The small claim: normalised descent goes in the direction of the support vector machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from transfuse.methods.optimization.attention_svm import (
    AttentionProbe,
    alignment,
    att_svm,
    normalized_gd,
)

N, TOKENS, D, INSTANCES, STEPS = 4, 5, 10, 5, 1500


def problem():
    generator = torch.Generator().manual_seed(0)

    def unit(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return F.normalize(drawn, dim=-1)

    x, z = unit(INSTANCES, N, TOKENS, D), unit(INSTANCES, N, D)
    y = torch.where(torch.rand(INSTANCES, N, generator=generator) > 0.5, 1.0, -1.0)
    return x, z, y.double(), unit(INSTANCES, D)


@pytest.mark.claim
def test_descent_converges_to_the_support_vector_machine():
    x, z, y, v = problem()
    found = {}
    for gradient in ("stable", "naive"):
        probe = AttentionProbe(D, v=v)
        normalized_gd(probe, x, z, y, steps=STEPS, gradient=gradient)
        selected = probe.log_attention(x, z).argmax(-1)
        svm = att_svm(x, z, selected).weight
        found[gradient] = alignment(probe.w, svm)
        if gradient == "stable":
            scores = y[..., None] * (x @ v[:, None, :, None])[..., 0]
            best = scores.argmax(-1) == selected
            assert best.double().mean() >= 0.9, "descent may end at a token that is best nearby"
            own = scores.gather(-1, selected[..., None])
            near = att_svm(x, z, selected).support
            assert (scores.expand_as(near)[near] < own.expand_as(near)[near]).all()
            transposed = alignment(probe.w, svm.mT)
    assert found["stable"].min() >= 0.99
    assert found["naive"].min() < 0.97, "rounding noise drives the plain gradient"
    assert transposed.max() < 0.9


@pytest.mark.claim
def test_factors_converge_to_the_smallest_nuclear_norm():
    """Norm and margin of the direction, as the minimiser need not be unique."""
    x, z, y, v = (t[:2] for t in problem())
    probe = AttentionProbe(D, D, v=v, generator=torch.Generator().manual_seed(1))
    normalized_gd(probe, x, z, y, steps=STEPS)
    selected = probe.log_attention(x, z).argmax(-1)
    nuclear = att_svm(x, z, selected, norm="nuc", tol=1e-4)
    top = x.gather(-2, selected[..., None, None].expand(-1, -1, 1, D))
    margins = torch.einsum("istd,ide,ise->ist", top - x, probe.w, z)
    margins = margins.scatter(-1, selected[..., None], torch.inf).amin((-2, -1))
    reached = torch.linalg.matrix_norm(probe.w, ord="nuc") / margins
    assert (reached <= 1.1 * nuclear.norm).all()


def test_the_picture_is_drawn(tmp_path):
    gallery = pytest.importorskip("transfuse.bench.gallery.attention_svm", exc_type=ImportError)
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert gallery.main(["--out", str(path), "--steps", "40", "--runs", "2"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        gallery.main(["--out", str(path), "--steps", "0"])
