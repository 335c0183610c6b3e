"""One contract per kind, over all methods of that kind."""

from __future__ import annotations

import pytest
import torch

import transfuse.methods as methods


@pytest.mark.parametrize("slug", methods.list(kind="patch"))
class TestPatch:
    """Built with defaults on a model: installed, described, removed without a trace."""

    def test_defaults_build_and_describe_themselves(self, slug, text_denoiser):
        patch = methods.get(slug)(text_denoiser)
        assert patch.installed
        assert patch.layers
        assert type(patch).__name__ in repr(patch)
        assert "installed" in repr(patch)
        patch.remove()
        assert not patch.installed
        assert "removed" in repr(patch)
        patch.remove()

    def test_removal_leaves_nothing_behind(self, slug, text_denoiser):
        def fingerprint():
            return [
                (
                    name,
                    sorted(module.__dict__),
                    len(module._forward_pre_hooks),
                    len(module._forward_hooks),
                )
                for name, module in text_denoiser.named_modules()
            ]

        x = torch.randn(1, 4, 4, 4)
        before, expected = fingerprint(), text_denoiser(x, 1)
        state = {name: tensor.clone() for name, tensor in text_denoiser.state_dict().items()}
        with methods.get(slug)(text_denoiser):
            text_denoiser(x, 1)
        assert fingerprint() == before
        assert torch.equal(text_denoiser(x, 1), expected)
        for name, tensor in text_denoiser.state_dict().items():
            assert torch.equal(tensor, state.pop(name))
        assert not state

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_runs_in_dtype_and_is_reproducible(self, slug, text_denoiser, dtype):
        model, x = text_denoiser.to(dtype), torch.randn(2, 4, 4, 4).to(dtype)
        with torch.no_grad(), methods.get(slug)(model):
            first, second = model(x, 1), model(x, 1)
        assert first.dtype == dtype
        assert first.isfinite().all()
        assert torch.equal(first, second)

    def test_model_without_a_place_for_it_is_refused(self, slug):
        with pytest.raises(ValueError, match=r"no (self|cross)-attention"):
            methods.get(slug)(torch.nn.Linear(3, 3))


def test_every_kind_in_use_has_a_contract():
    tested = {"patch"}
    used = {methods.card(slug).kind for slug in methods.list()}
    assert used <= tested, f"write the contract test of: {sorted(used - tested)}"
