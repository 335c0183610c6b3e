"""Tools that hold every op to the same contract.

``spec`` describes an op as data; ``specs`` collects the descriptions; ``oracle`` states the
tolerance rule; ``inputs`` makes inputs and memory that reveal misbehaving kernels; ``functorch`` is
the table of autograd transforms; ``golden`` reads recorded outputs of official implementations;
``matrix`` writes the support matrix.
"""

from transfuse.testing.golden import Golden
from transfuse.testing.golden import load as load_golden
from transfuse.testing.oracle import Comparison, compare
from transfuse.testing.spec import BadCase, CallArgs, Case, OpSpec, RawCall

__all__ = [
    "BadCase",
    "CallArgs",
    "Case",
    "Comparison",
    "Golden",
    "OpSpec",
    "RawCall",
    "compare",
    "load_golden",
]
