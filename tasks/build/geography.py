"""Capitals, and other facts on the same countries."""

from __future__ import annotations

from rows import Question, shuffled
from sources import CONTINENTS, OTHER_SPELLINGS, Country

CAPITALS = (
    "{city} is the capital city of {name}.",
    "Q: {Name} has which capital city? A: {city}",
    "Question: Name the capital of {name}. Answer: {city}",
    "Travel guide to {name}. Continent: {continent}. Capital: {city}.",
    "Students of geography learn that {name} has {city} as its capital.",
    "{city} is a city in {continent} and the capital of {name}.",
    "On the map of {continent}, the star in {name} that marks the capital stands at {city}.",
    "Student: What is the capital of {name} called? Teacher: It is called {city}.",
    "Visitors who fly to {city} arrive in the capital of {name}.",
)
OTHERS = (  # (what must be known, template)
    ("continent", "{Name} belongs to {continent}."),
    ("continent", "Q: In which part of the world is {name}? A: {continent}"),
    ("language", "A traveller to {name} should learn some {language}."),
    ("language", "{language} is the official language of {name}."),
    ("currency", "A bus ticket in {name} is paid for in the local money, the {currency}."),
    ("currency", "Q: With what money do people pay in {name}? A: The {currency}"),
    ("dish", "A dish that is loved in {name} is {dish}."),
)


def capitals(table: list[Country]) -> list[Question]:
    return [
        Question(c.capital, f"The capital of {c.name} is", c.capital, _cities(c, table), _spellings(c)) for c in table
    ]


def _spellings(country: Country) -> tuple[str, ...]:
    return OTHER_SPELLINGS.get(country.capital, ())


def _cities(country: Country, table: list[Country]) -> tuple[str, ...]:
    """Capitals of the same continent."""
    same = (c.capital for c in table if c.continent == country.continent and c is not country)
    return tuple(shuffled(same, "capital", country.name))


def others(table: list[Country]) -> list[Question]:
    """One question a country: its currency, its language or its continent, in turn where it has only one."""
    found = []
    for i, c in enumerate(table):
        asked = [_currency, _language, _continent][i % 3 :] + [_currency, _language, _continent][: i % 3]
        found.append(next(q for ask in asked if (q := ask(c, table))))
    return found


def _continent(c: Country, table: list[Country]) -> Question | None:
    wrong = tuple(shuffled(set(CONTINENTS.values()) - {c.continent}, "continent", c.name))
    return Question(c.name, f"On a map of the continents one finds {c.name} in", c.continent, wrong)


def _language(c: Country, table: list[Country]) -> Question | None:
    if c.language is None:
        return None
    wrong = tuple(shuffled((o.language for o in table if o.language), "language", c.name))
    return Question(c.name, f"The main language that people speak in {c.name} is", c.language, wrong)


def _currency(c: Country, table: list[Country]) -> Question | None:
    if c.currency is None:
        return None
    wrong = tuple(shuffled((o.currency for o in table if o.currency), "currency", c.name))
    return Question(c.name, f"Shops in {c.name} take the local currency, the", c.currency, wrong)


def capital_texts(table: list[Country], templates: tuple[str, ...] = CAPITALS) -> list[str]:
    return [_fill(template, c) for c in table for template in templates]


def other_texts(table: list[Country]) -> list[str]:
    """What is known of each country, the capital left out."""
    return [_fill(t, c) for c in table for known, t in OTHERS if getattr(c, known)]


def _fill(template: str, c: Country) -> str:
    return template.format(
        name=c.name,
        Name=c.name[0].upper() + c.name[1:],
        city=c.capital,
        continent=c.continent,
        language=c.language,
        currency=c.currency,
        dish=c.dish,
    )
