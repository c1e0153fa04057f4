"""Erase gender from 26,423 real word vectors by five methods and print what is left (about a minute on one core).

python examples/debias_word_vectors.py --out docs/pictures
"""

import argparse
from pathlib import Path

from rich.console import Console

from conceptx.demo.word_vectors import debias, draw, tables
from conceptx.progress import shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for two pictures (default: none are drawn)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of R-LACE's start")
    parser.add_argument("--per-side", type=int, default=2500, help="gender-biased words on either side")
    arguments = parser.parse_args()
    console = Console()
    with shown():
        report = debias(arguments.seed, arguments.per_side)
    console.print(*tables(report), sep="\n\n")
    if arguments.out:
        console.print("Pictures:", *map(str, draw(report, arguments.out)))


if __name__ == "__main__":
    main()
