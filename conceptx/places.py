"""Where the library's data files are."""

from __future__ import annotations

from pathlib import Path


def tasks_folder() -> Path:
    """The folder `tasks/`: inside an installed package, or beside the package in a checkout.

    Raises FileNotFoundError when neither is there.
    """
    package = Path(__file__).parent
    for folder in (package / "_tasks", package.parent / "tasks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("The folder tasks/ is missing; install conceptx from a complete checkout or wheel.")
