"""Which rows a step takes: a function of its number alone."""

from __future__ import annotations

import random
from functools import lru_cache


def rows_of_step(step: int, size: int, rows: int, key: str) -> list[int]:
    """`size` consecutive places in an endless sequence of permutations of the rows; the key decides which ones."""
    places = range(step * size, (step + 1) * size)
    return [_permutation(f"{key} {place // rows}", rows)[place % rows] for place in places]


@lru_cache(maxsize=16)
def _permutation(seed: str, rows: int) -> list[int]:
    return random.Random(seed).sample(range(rows), rows)
