"""The small claims of style injection on two real photographs, and its picture.

40 x 40 tokens of china.jpg (content) and flower.jpg (style): queries and keys are unit-norm 5 x 5
grey patches without their mean, values are RGB, logit scale 8. Each claim comes with the mistake it
is there to catch.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from transfuse.methods.diffusion_control.style_injection import adain_latent

gallery = pytest.importorskip("transfuse.bench.gallery.style_injection", exc_type=ImportError)

SIZE = (40, 40)
GAMMAS = (0.0, 0.3, 0.75, 1.0)


@pytest.fixture(scope="module")
def photos():
    try:
        return [gallery.tokens(name, SIZE, dtype=torch.float64) for name in ("china", "flower")]
    except gallery.Unavailable as reason:
        pytest.skip(str(reason))


def contrast(photos, temperature):
    return gallery.injected(*photos, gamma=1.0, temperature=temperature).std().item()


@pytest.mark.claim
def test_adain_gives_the_content_the_channel_statistics_of_the_style(photos):
    content, style = (photo.rgb[0, 0].T.reshape(1, 3, *SIZE).float() for photo in photos)
    out = adain_latent(content, style, eps=0.0)
    for statistic in (torch.mean, torch.std):
        mine, wanted = statistic(out, (2, 3)), statistic(style, (2, 3))
        assert (mine - wanted).abs().max() < 1e-5
        assert (statistic(content, (2, 3)) - wanted).abs().max() > 0.05, "nothing to match"
    # The default eps costs sigma_s * eps / sigma_c at most.
    default = adain_latent(content, style)
    shrinkage = (default.std((2, 3)) - style.std((2, 3))).abs()
    assert (shrinkage <= 1.01e-4 * style.std((2, 3)) / content.std((2, 3)) + 1e-6).all()


@pytest.mark.claim
def test_a_larger_temperature_keeps_more_contrast(photos):
    assert contrast(photos, 1.5) >= 1.25 * contrast(photos, 1.0)
    assert contrast(photos, 1 / 1.5) < contrast(photos, 1.0), "dividing by T must fail the claim"


@pytest.mark.claim
def test_the_content_query_pulls_a_noisy_query_back(photos):
    content, style = photos
    own = gallery.noisy(content.patches)
    clean = gallery.injected(content, style, gamma=1.0, temperature=1.5)
    distances = [
        gallery.distance(
            gallery.injected(content, style, own=own, gamma=gamma, temperature=1.5), clean
        )
        for gamma in GAMMAS
    ]
    assert all(far > near for far, near in itertools.pairwise(distances)), distances
    assert distances[0] > 0.1
    assert distances[-1] == 0.0, "at gamma = 1 the own query must not matter at all"


def test_the_picture_is_drawn(tmp_path, photos):
    pytest.importorskip("matplotlib")
    path = tmp_path / "style_injection.png"
    assert gallery.main(["--out", str(path), "--size", "12", "16"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_smaller_than_a_patch_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gallery.main(["--out", str(tmp_path / "a.png"), "--size", "4", "40"])
    assert "more than 5" in capsys.readouterr().err
