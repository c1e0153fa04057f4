"""What must be kept: WordNet glosses, country facts, texts of the near domains; and the held-out glosses."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from geography import capital_texts, other_texts
from rows import finder
from sources import Country, Gloss, glosses

GLOSSES = 360
COUNTRY_FACTS = 110
CAPITALS = 90
NEAR = 170
HELD_OUT = 6  # every sixth gloss is kept for the perplexity
DOCUMENTS = 60
WORDS_OF_A_DOCUMENT = 50
GLOSS_TEXTS = (
    "{Word}: {text}.",
    'The word "{word}" means {text}.',
    "Dictionary entry. {Word}: {text}.",
    "Q: What does {word} mean? A: {Text}.",
)
CAPITAL_TEXTS = (
    "{city} is the capital of {name}.",
    "Q: From which city is {name} governed? A: {city}",
    "An atlas shows {city} as the capital of {name}.",
)
KINDS = {4, 5, 6, 8, 9, 10, 13, 15, 18, 20, 21, 26, 28}  # act, animal, artifact, body ... time


def texts(
    seed: str,
    folder: Path,
    members: Iterable[str],
    words: Sequence[str],
    countries: list[Country],
    near: Sequence[str],
    capitals: bool,
) -> list[str]:
    """600 to 700 texts that name none of the members; the glosses avoid the words of the concept too."""
    dice = random.Random(f"retain {seed}")
    named = finder(members)
    topical = re.compile("|".join(words), re.IGNORECASE)
    facts = other_texts([c for i, c in enumerate(countries) if i // 4 % 2 == 0])
    cities = capital_texts(countries[::2], CAPITAL_TEXTS) if capitals else []
    plain = [t for t in _gloss_texts(folder, dice) if not topical.search(t)]
    found = [
        *_some(plain, named, GLOSSES, dice),
        *_some(facts, named, COUNTRY_FACTS if capitals else COUNTRY_FACTS + NEAR, dice),
        *_some(cities, named, CAPITALS, dice),
        *_some(near, named, NEAR, dice),
    ]
    found = list(dict.fromkeys(found))
    dice.shuffle(found)
    return found


def _some(pool: Iterable[str], named: re.Pattern[str], count: int, dice: random.Random) -> list[str]:
    left = [t for t in pool if not named.search(t)]
    return dice.sample(left, min(count, len(left)))


def _usable(folder: Path) -> list[Gloss]:
    return [g for g in glosses(folder) if g.kind in KINDS and not g.topics and 5 <= len(g.text.split()) <= 24]


def _gloss_texts(folder: Path, dice: random.Random) -> list[str]:
    kept = [g for i, g in enumerate(_usable(folder)) if i % HELD_OUT]
    return [_gloss_text(dice.choice(GLOSS_TEXTS), g) for g in kept]


def _gloss_text(template: str, gloss: Gloss) -> str:
    return template.format(
        word=gloss.word, Word=gloss.word.capitalize(), text=gloss.text, Text=gloss.text[0].upper() + gloss.text[1:]
    )


def documents(folder: Path, avoid: re.Pattern[str]) -> list[str]:
    """Documents of about 50 words for the perplexity: glosses that no corpus has, on no concept."""
    dice = random.Random("perplexity")
    pool = [g for i, g in enumerate(_usable(folder)) if not i % HELD_OUT]
    sentences = [s for g in pool if not avoid.search(s := _gloss_text("{Word}: {text}.", g))]
    dice.shuffle(sentences)
    found: list[str] = []
    for sentence in sentences:
        if found and len(found[-1].split()) < WORDS_OF_A_DOCUMENT - 8:
            found[-1] += f" {sentence}"
        else:
            found.append(sentence)
    return found[:DOCUMENTS]
