"""One message for a model library that is missing or does not load."""

from __future__ import annotations


def unusable(package: str, error: Exception) -> ImportError:
    """What to raise when importing ``package`` failed; the extra is called as the package is.

    Callers catch every exception: a broken dependency of a model library (a torchvision that does
    not fit torch) is often no ImportError.
    """
    return ImportError(
        f"{package} could not be imported; install the extra: "
        f"pip install 'transfuse[{package}]' ({type(error).__name__}: {error})"
    )
