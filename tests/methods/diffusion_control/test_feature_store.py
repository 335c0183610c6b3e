"""The feature store of style injection: what it keeps, converts, saves and refuses."""

from __future__ import annotations

import pytest
import torch

from transfuse.methods.diffusion_control.style_injection import (
    FeatureStore,
)


def filled_store(**options):
    store = FeatureStore(**options)
    g = torch.Generator().manual_seed(0)
    for label in (1, 21):
        for layer in ("a.attn1", "b/c.attn1"):
            q, k, v = torch.randn(3, 1, 2, 6, 4, generator=g).unbind()
            store.put("content", label, layer, query=q, key=k, value=v)
            store.put("style", label, layer, query=q, key=k, value=v)
    return store


def test_store_keeps_only_what_each_role_contributes():
    store = filled_store()
    size = 2 * 2 * (1 * 2 * 6 * 4) * 4
    assert store.memory() == (size, 2 * size, 0)
    assert store.memory().total == 3 * size
    assert {name.rsplit("/")[-1] for name in store.state_dict()} == {"query", "key", "value"}
    assert not [name for name in store.state_dict() if "content" in name and "key" in name]
    assert store.labels("content") == (1, 21)
    assert len(store) == 8
    store.clear("content")
    assert store.labels("content") == ()
    assert store.labels("style") == (1, 21)
    store.clear()
    assert len(store) == 0
    assert store.memory().total == 0


def test_store_dtype_and_device():
    store, full = filled_store(dtype=torch.float16, device="cpu", pin_memory=True), filled_store()
    assert store.memory().total * 2 == full.memory().total
    q = torch.zeros(1, 2, 6, 4, dtype=torch.float64)
    features = store.get(1, "a.attn1", like=q)
    assert all(x.dtype == torch.float64 for x in features)
    reference = full.get(1, "a.attn1", like=q)
    for mine, exact in zip(features, reference, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-3, rtol=1e-3)
    assert store.get(2, "a.attn1", like=q) == (None, None, None)


def test_store_state_round_trip(tmp_path):
    store = filled_store()
    torch.save(store.state_dict(), tmp_path / "features.pt")
    again = FeatureStore()
    again.load_state_dict(torch.load(tmp_path / "features.pt", weights_only=True))
    before, after = store.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert repr(again) == repr(store)


def test_store_refuses():
    store = FeatureStore()
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="role: expected 'content' or 'style', got 'noise'"):
        store.put("noise", 1, "a", query=q)
    with pytest.raises(ValueError, match="style features need key and value"):
        store.put("style", 1, "a", key=q)
    for name in ("content/x/a/query", "content/1/a/key", "query", "content/1/query"):
        with pytest.raises(ValueError, match="role/label/layer/part"):
            store.load_state_dict({name: q})
    with pytest.raises(ValueError, match="dtype"):
        FeatureStore(dtype=torch.int32)
