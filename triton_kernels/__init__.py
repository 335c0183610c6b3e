"""Triton kernels of transfuse: one module per op family, jit kernels and their launchers.

Importing this package does not import Triton; importing one of its launcher modules does, and
raises one ``ImportError`` naming the extra ``transfuse[triton]`` where Triton is missing.
"""
