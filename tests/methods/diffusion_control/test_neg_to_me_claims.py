"""The small claim of negative token merging, with a known answer.

Tokens are 3 x 3 colour patches of china.jpg on a 24 x 24 grid, layer-normed as a network's tokens
are (patches of the sky are otherwise all the same); image 1 is a random permutation of the
reference's tokens plus 5 % noise. The paper's axis finds the permutation again, the official code's
does not.
"""

from __future__ import annotations

import pytest
import torch

from transfuse.methods.diffusion_control.neg_to_me import push_from_reference
from transfuse.ops import nearest_tokens

inputs = pytest.importorskip("transfuse.bench.inputs", exc_type=ImportError)

SIDE, ALPHA, THRESHOLD = 24, 0.9, 0.65


@pytest.fixture(scope="module")
def tokens():
    try:
        picture = inputs.photo("china")
    except Exception as reason:  # scikit-learn or Pillow is missing
        pytest.skip(str(reason))
    rows = torch.linspace(0, picture.shape[0] - 3, SIDE).round().long()
    columns = torch.linspace(0, picture.shape[1] - 3, SIDE).round().long()
    patches = picture.unfold(0, 3, 1).unfold(1, 3, 1)[rows][:, columns].reshape(SIDE**2, -1)
    patches = torch.nn.functional.layer_norm(patches, patches.shape[-1:])
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(SIDE**2, generator=generator)
    noise = torch.randn(patches.shape, generator=generator) * 0.05 * patches.std()
    return patches, patches[order] + noise, order


@pytest.mark.claim
def test_the_paper_finds_the_permutation_and_the_official_axis_does_not(tokens):
    reference, image, order = tokens
    found = nearest_tokens(image[None], reference[None]).index[0]
    assert (found == order).float().mean() >= 0.9
    # The official code takes, at position j, the reference token of the best generated token.
    official = nearest_tokens(reference[None], image[None]).index[0]
    assert (official == order).float().mean() < 0.05


@pytest.mark.claim
def test_pushed_tokens_are_further_away_by_exactly_one_plus_alpha(tokens):
    reference, image, _ = tokens
    y = push_from_reference(image[None], reference, alpha=ALPHA, threshold=THRESHOLD)[0]
    similarity, index = (t[0] for t in nearest_tokens(image[None], reference[None]))
    pushed = similarity > THRESHOLD
    assert pushed.float().mean() > 0.5
    assert torch.equal(y[~pushed], image[~pushed])
    before, after = ((t - reference[index]).norm(dim=-1)[pushed] for t in (image, y))
    torch.testing.assert_close(after, (1 + ALPHA) * before, rtol=1e-5, atol=1e-5)


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    gallery = pytest.importorskip("transfuse.bench.gallery.neg_to_me", exc_type=ImportError)
    path = tmp_path / "neg_to_me.png"
    if gallery.main(["--out", str(path), "--size", "12", "17"]) == 2:
        pytest.skip("the photographs are not available")
    assert path.read_bytes().startswith(b"\x89PNG")
