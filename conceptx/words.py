"""Names in texts."""

from __future__ import annotations

import re


def whole_words(*names: str) -> re.Pattern[str]:
    """Finds any of the names as whole words, upper and lower case alike; where one begins another, the longer.

    Raises ValueError when there is none, or when one is blank: it would be found everywhere.
    """
    if not names or any(not name.strip() for name in names):
        raise ValueError(f"Words to look for must not be blank, got {names}.")
    longest_first = sorted((name.strip() for name in names), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
