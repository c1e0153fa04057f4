"""The command line. Thin: it reads files, calls the library, shows progress, and writes what comes back."""

from conceptx.cli.amend import amend
from conceptx.cli.checkpoints import fold
from conceptx.cli.dictionaries import train
from conceptx.cli.edits import demo, erase, features, methods
from conceptx.cli.frame import app, main
from conceptx.cli.pairs import pairs
from conceptx.cli.scores import attack, evaluate
from conceptx.cli.studies import compare, report, tune

__all__ = [
    "amend",
    "app",
    "attack",
    "compare",
    "demo",
    "erase",
    "evaluate",
    "features",
    "fold",
    "main",
    "methods",
    "pairs",
    "report",
    "train",
    "tune",
]
