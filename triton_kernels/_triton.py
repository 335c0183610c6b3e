"""The one place that imports Triton, so that its absence has one message."""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "the Triton kernels of transfuse need Triton; install the extra: "
        "pip install 'transfuse[triton]'"
    ) from error

__all__ = ["tl", "triton"]
