"""Benchmarks of every transfuse op against what its user would write today, timed in one run.

``python -m transfuse.bench`` runs everything, ``python -m transfuse.bench attention --quick`` one
op in under a minute, ``python -m transfuse.bench compare old.json new.json`` compares two records.

How a figure is made, in order: inputs are drawn from a fixed seed; a float64 oracle is computed;
each candidate must agree with it or is reported as failed and never timed; the remaining candidates
are timed in turns, in one process, with the same threads and the same allocator settings.
"""
