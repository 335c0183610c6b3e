"""Saliency maps of a real vision transformer with a random tiny configuration."""

from __future__ import annotations

import pytest
import torch

from transfuse.methods.saliency.grad_cam import GradCAM, token_grid
from transfuse.methods.saliency.norm_grad import NormGrad

transformers = pytest.importorskip("transformers")


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=24, patch_size=4, num_labels=5, attn_implementation="eager",
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def test_tokens_of_a_transformer():
    """By the name of a norm, tokens as a grid; the class token is left out. Against the formula on
    activations and gradients taken by hand."""
    model, x = vit(), torch.rand(2, 3, 24, 24)
    (name,) = [n for n, _ in model.named_modules() if n.endswith("1.layernorm_before")]
    seen = []

    def keep(module, args, output):
        output.retain_grad()
        seen.append(output)

    handle = model.get_submodule(name).register_forward_hook(keep)
    logits = model(x).logits
    logits[[0, 1], [3, 1]].sum().backward()
    handle.remove()
    act, grad = (
        t[:, 1:].mT.unflatten(2, (6, 6)) for t in (seen[0].detach(), seen[0].grad.detach())
    )
    reshape = token_grid((6, 6))
    (raw,) = GradCAM(model, name, reshape=reshape).raw(x, [3, 1])
    want = (grad.mean((2, 3), keepdim=True) * act).sum(1)
    torch.testing.assert_close(raw, want, rtol=1e-4, atol=1e-8)
    (norms,) = NormGrad(model, name, reshape=reshape).raw(x, [3, 1])
    torch.testing.assert_close(norms, act.norm(dim=1) * grad.norm(dim=1), rtol=1e-4, atol=1e-8)
    assert GradCAM(model, name, reshape=reshape)(x).shape == (2, 24, 24)
    with pytest.raises(ValueError, match=r"token_grid\(\(rows, columns\)\)"):
        GradCAM(model, name)(x)


def test_the_field_s_package_gives_the_same_map():
    """pytorch-grad-cam's own classes, where it is installed."""
    package = pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(6, 5, 3, stride=2),
        torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(20, 4),
    ).eval()  # fmt: skip
    x, targets = torch.rand(3, 3, 13, 16), [0, 3, 1]
    for method, kind in (("gradcam", "GradCAM"), ("gradcam++", "GradCAMPlusPlus"),
                         ("layercam", "LayerCAM")):  # fmt: skip
        with getattr(package, kind)(model=model, target_layers=[model[3]]) as cam:
            want = torch.from_numpy(cam(x, [ClassifierOutputTarget(k) for k in targets]))
        found = GradCAM(model, "3", method=method)(x, targets)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
