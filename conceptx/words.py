"""Names in texts."""

from __future__ import annotations

import re


def whole_words(*names: str) -> re.Pattern[str]:
    """Finds any of the names as whole words, upper and lower case alike; where one begins another, the longer.

    A blank name is found nowhere.
    """
    longest_first = sorted(filter(None, (name.strip() for name in names)), key=len, reverse=True)
    if not longest_first:
        return re.compile(r"(?!)")  # matches nothing
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
