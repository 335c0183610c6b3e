"""A forked child computes on, although torch's thread pool does not survive a fork."""

from __future__ import annotations

import os
import sys

import pytest

from transfuse import _native

FORK = """
import os, signal, sys, time
import torch
from transfuse.ops import KV, attend

torch.set_num_threads(2)
# Heads for several threads, yet so few elements that torch's own ops stay on one: those would
# hang in the child, whatever transfuse does.
q, k, v, weight = torch.randn(4, 2, 4, 64, 16).unbind(0)
q.requires_grad_()

def both():
    out = attend(q, KV(k, v), backend="cpu")
    (grad,) = torch.autograd.grad(out, q, weight)
    return out.detach(), grad

expected = both()
(torch.ones(1 << 20) + 1).sum()  # torch's pool is certainly running now
child = os.fork()
if child == 0:
    same = all(torch.equal(x, y) for x, y in zip(both(), expected, strict=True))
    os._exit(0 if same else 3)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        print("child ended with", os.waitstatus_to_exitcode(status))
        break
    time.sleep(0.05)
else:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("child hangs")
again = both()
print("parent", all(torch.equal(x, y) for x, y in zip(again, expected, strict=True)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS libraries do not survive a fork")
@pytest.mark.skipif(not _native.status().loaded, reason="CPU kernels are not loaded")
def test_forked_child_gives_the_same_bits(run_code):
    assert run_code(FORK).splitlines() == ["child ended with 0", "parent True"]
