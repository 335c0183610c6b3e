"""EasyRef on real diffusers UNets and transformers language models, random and tiny."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from transfuse.integrations.diffusers import AttendProcessor, patch
from transfuse.integrations.transformers import ReferenceDecoder
from transfuse.methods.diffusion_control.easy_ref import (
    EasyRef,
    EasyRefOptions,
    ProjectionMLP,
    pad_groups,
)
from transfuse.methods.diffusion_control.style_injection import StyleInjectionOptions
from transfuse.testing.models import tiny_unet

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    shapes = (2, 4, 8, 8), (2, 5, 12), (2, 4, 12)
    return [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]


class DenseProcessor:
    """Decoupled attention written out for one layer, independent of the library."""

    def __init__(self, weights, references, factor, allowed=None):
        self.weights, self.references, self.factor = weights, references, factor
        self.allowed = allowed

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def split(x):
            return x.reshape(*x.shape[:2], attn.heads, -1).permute(0, 2, 1, 3)

        q = split(attn.to_q(hidden_states))
        k, v = (split(f(encoder_hidden_states)) for f in (attn.to_k, attn.to_v))
        kr, vr = (split(self.references @ w.T) for w in self.weights)
        logits = q @ k.mT * attn.scale
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed[:, None, None], -torch.inf)
        out = logits.softmax(-1) @ v + self.factor * F.softmax(q @ kr.mT * attn.scale, -1) @ vr
        return attn.to_out[0](out.permute(0, 2, 1, 3).reshape(*hidden_states.shape[:2], -1))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["beside", "appended"])
def test_unet_equals_a_dense_implementation(layout, masked):
    x, text, p = inputs(torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 0]], dtype=torch.bool) if masked else None
    model = tiny_unet().double()
    expected_plain = model(x, 11, text).sample
    processors = dict(model.attn_processors)
    options = EasyRefOptions(appended=4, weight=0.6) if layout == "appended" else EasyRefOptions()
    handle = patch(model, options)
    for one in handle.adapters[0]:
        for parameter in one.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    reference = tiny_unet().double()
    dense = dict(reference.attn_processors)
    for name, one in zip(handle.layers, handle.adapters[0], strict=True):
        assert name.endswith("attn2")
        weights = one.to_k_ref.weight, one.to_v_ref.weight
        dense[f"{name}.processor"] = DenseProcessor(weights, p, 0.6, mask)
    reference.set_attn_processor(dense)
    for step in (11, 7, 3):
        expected = reference(x, step, text).sample
        if layout == "appended":
            whole = None if mask is None else F.pad(mask, (0, 4), value=True)
            context = torch.cat([text, p], 1)
            out = model(x, step, context, encoder_attention_mask=whole).sample
        else:
            handle.set_references(p, 0.6)
            out = model(x, step, text, encoder_attention_mask=mask).sample
        torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
        assert not torch.allclose(out, expected_plain, atol=1e-3)
    handle.remove()
    assert model.attn_processors == processors
    assert torch.equal(model(x, 11, text).sample, expected_plain)


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_beside_the_other_patches_and_off_in_any_order(order):
    x, text, p = inputs()
    model = tiny_unet()
    expected, processors = model(x, 11, text).sample, dict(model.attn_processors)
    handles = [
        patch(model, AttendProcessor()),
        patch(model, StyleInjectionOptions()),
        patch(model, EasyRefOptions()),
    ]
    for role in ("content", "style"):
        with handles[1].capture(role):
            model(x[:1], 11, text[:1])
    handles[2].set_references(p)
    with handles[1].inject():
        both = model(x, 11, text).sample
    only = model(x, 11, text).sample
    assert not torch.allclose(both, only, atol=1e-4)
    assert not torch.allclose(only, expected, atol=1e-3)
    for index in order:
        handles[index].remove()
    assert model.attn_processors == processors
    assert torch.equal(model(x, 11, text).sample, expected)


@torch.no_grad()
def test_half_precision():
    x, text, p = inputs(torch.bfloat16)
    model = tiny_unet().to(torch.bfloat16)
    with EasyRef(model).set_references(p.float(), 0.5) as handle:
        out = model(x, 11, text).sample
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()
        handle.clear()
        assert not torch.equal(model(x, 11, text).sample, out)


# --- the language model --------------------------------------------------------------------------


def language_model(kind, attention="sdpa"):
    torch.manual_seed(0)
    config = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": attention,
    }
    if kind == "qwen2_vl":
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        config.pop("attn_implementation")
        config = Qwen2VLTextConfig(**config, rope_parameters=rope)
        config._attn_implementation = attention
        return Qwen2VLTextModel(config).eval()
    name = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
    config = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{name}Model")(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen2_vl"])
def test_causal_references_are_tokens_appended_to_the_last_layer(kind):
    """With causal references and references set to what the layers before the last make of real
    tokens, the model must give what it gives for those tokens."""
    model = language_model(kind)
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(2))
    states = model(input_ids=ids, output_hidden_states=True)
    decoder = ReferenceDecoder(model, 3, causal_references=True)
    # The references are one set for the whole batch, so run the rows one by one.
    for row in range(2):
        decoder.references.copy_(states.hidden_states[-2][row, 6:])
        out = decoder(input_ids=ids[row : row + 1, :6])
        torch.testing.assert_close(out[0], states.last_hidden_state[row, 6:], rtol=1e-4, atol=1e-5)
    assert not model.layers[-1]._forward_pre_hooks
    assert not model.rotary_emb._forward_pre_hooks
    again = model(input_ids=ids).last_hidden_state
    assert torch.equal(again, states.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen2_vl"])
def test_bidirectional_by_default_and_the_same_for_both_implementations(kind):
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(2))
    outs = []
    for attention in ("sdpa", "eager"):
        model = language_model(kind, attention)
        decoder = ReferenceDecoder(model, 3, generator=torch.Generator().manual_seed(3))
        outs.append(decoder(input_ids=ids))
        decoder.references[2] += 1.0
        changed = decoder(input_ids=ids)
        assert not torch.allclose(changed[:, 0], outs[-1][:, 0], atol=1e-5), "sees a later one"
        decoder.causal_references = True
        first = decoder(input_ids=ids)[:, 0]
        decoder.references[2] -= 1.0
        torch.testing.assert_close(decoder(input_ids=ids)[:, 0], first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_padded_groups_train_references_and_projection():
    model = language_model("qwen2").requires_grad_(False)
    decoder, projection = ReferenceDecoder(model, 4), ProjectionMLP(32, 12)
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(n, 32, generator=g) for n in (3, 4)]
    padded = pad_groups([images, images[:1]])
    out = projection(decoder(inputs_embeds=padded.tokens, attention_mask=padded.mask.long()))
    alone = projection(decoder(inputs_embeds=images[0][None]))
    # Positions differ (references follow the padding), so only shape and finiteness are equal here;
    # the same positions must give the same result.
    positions = torch.cat([torch.arange(3), torch.full((4,), 2)])[None].expand(2, -1)
    same = projection(
        decoder(
            inputs_embeds=padded.tokens,
            attention_mask=padded.mask.long(),
            position_ids=torch.stack([torch.arange(7), positions[1]]),
        )
    )
    torch.testing.assert_close(same[1], alone[0], rtol=1e-4, atol=1e-5)
    assert out.shape == (2, 4, 12)
    out.square().sum().backward()
    assert decoder.references.grad.isfinite().all()
    assert decoder.references.grad.abs().sum() > 0


def test_decoder_refuses():
    with pytest.raises(TypeError, match="has no layers, norm, rotary_emb"):
        ReferenceDecoder(torch.nn.Linear(2, 2), 4)
    model = language_model("llama")
    decoder = ReferenceDecoder(model, 4)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"sdpa or eager.* got 'flash_attention_2'"):
        decoder(input_ids=torch.zeros(1, 2, dtype=torch.long))
