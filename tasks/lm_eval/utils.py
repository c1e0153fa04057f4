"""What the YAML files beside this one call: loading a JSONL file, judging an open answer."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

from datasets import Dataset

DATA = Path(__file__).parent / "data"
FILLERS = re.compile(r"^(?:(?:the|a|an|called|known as|named)\s+)+")


def load(file: str, **_: Any) -> dict[str, Dataset]:
    """The test split from a file in data/, from whatever directory lm_eval runs in."""
    return {"test": Dataset.from_json(str(DATA / file), keep_in_memory=True)}


def judge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the generation begins with an accepted answer: case, accents, punctuation and articles aside."""
    return {"exact_match": float(any(begins_with(results[0], alias) for alias in doc["aliases"]))}


def begins_with(generation: str, answer: str) -> bool:
    """Whole words only; an answer of one or two letters (an element's symbol) must match in case."""
    if len(answer) <= 2:
        return re.match(rf"\W*{re.escape(answer)}(?!\w)", generation) is not None
    said, wanted = (FILLERS.sub("", plain(text)) for text in (generation, answer))
    return f"{said} ".startswith(f"{wanted} ")


def plain(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(c for c in letters if not unicodedata.combining(c))
    return " ".join(re.sub(r"['’.]", "", kept).translate(_PUNCTUATION).split())


_PUNCTUATION = {ord(c): " " for c in '-,;:!?()[]"“”*_/'}
