"""Whether a missing backend is a skip or a failure."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from transfuse.testing import OpSpec, backends

REQUIRE_NATIVE = "TRANSFUSE_REQUIRE_NATIVE"


@pytest.fixture
def device_for() -> Callable[[OpSpec, str, torch.dtype], torch.device]:
    """The device to test a backend on; skips the test where the backend cannot run.

    With ``TRANSFUSE_REQUIRE_NATIVE=1`` in the environment (as in CI), missing CPU kernels are a
    failure.
    """

    def device_for(spec: OpSpec, backend: str, dtype: torch.dtype) -> torch.device:
        reason = backends.unavailable(spec, backend, dtype)
        if reason is not None:
            if backend == "cpu" and os.environ.get(REQUIRE_NATIVE) == "1":
                pytest.fail(f"{spec.name}, {backend}: {reason}")
            pytest.skip(f"{spec.name}, {backend}: {reason}")
        return backends.device_of(backend)

    return device_for
