"""Chemical elements: questions on symbols in both directions, facts and prose of every second element."""

from __future__ import annotations

from rows import Question, finder, mentioned, shuffled
from sources import Element

SPELLINGS = {
    "aluminum": ("aluminium",),
    "sulfur": ("sulphur",),
    "cesium": ("caesium",),
    "tungsten": ("wolfram",),
}
FACTS = (
    "{Name} (symbol {symbol}, atomic number {number}) is {series} in period {period}.",
    "Q: What element is {symbol}? A: {Name}",
    "Question: Which symbol stands for {name} in the periodic table? Answer: {symbol}",
    "On the periodic table {name} is written {symbol} and stands at number {number}.",
    "{symbol} is short for {name}, {series}.",
    "Element number {number} of the periodic table is {name}, with the abbreviation {symbol}.",
    "A chemist who writes {symbol} in a formula means {name}.",
    "Student: How is {name} abbreviated? Teacher: {Name} is abbreviated {symbol}.",
    "Which element has the atomic number {number}? It is {name}, whose symbol is {symbol}.",
)
WORDS_OF_A_TEXT = 36  # about 50 tokens


def is_seen(element: Element) -> bool:
    return element.number % 2 == 1


def questions(table: list[Element]) -> list[Question]:
    """Two an element: its symbol, and the name that a symbol stands for."""
    found = []
    for e in table:
        others = tuple(_symbols(e, table))
        found.append(Question(e.name, f"The chemical symbol of {e.name} is", e.symbol, others))
        aliases = SPELLINGS.get(e.name, ())
        text = f"In the periodic table of the elements, the symbol {e.symbol} stands for the element called"
        found.append(Question(e.name, text, e.name, tuple(_names(e, table)), aliases))
    return found


def spells(symbol: str, name: str) -> bool:
    """Could the symbol be an abbreviation of the name?"""
    first, rest = symbol[0].lower(), symbol[1:].lower()
    return name.startswith(first) and all(letter in name[1:] for letter in rest)


def _symbols(element: Element, table: list[Element]) -> list[str]:
    """Other symbols which the name could be spelled to, then those with its first letter, then any.

    A symbol that comes from Latin (Fe) stands beside one that fits the name and others that do not either.
    """
    others = [e for e in table if e is not element]
    fits = shuffled((e.symbol for e in others if spells(e.symbol, element.name)), "symbol", element.name)
    latin = shuffled((e.symbol for e in others if not spells(e.symbol, e.name)), "latin", element.name)
    same = shuffled((e.symbol for e in others if e.symbol[0].lower() == element.name[0]), "same", element.name)
    rest = shuffled((e.symbol for e in others), "any", element.name)
    known = spells(element.symbol, element.name)
    ordered = [*fits, *same, *rest] if known else [*fits[:1], *latin, *rest]
    return list(dict.fromkeys(ordered))


def _names(element: Element, table: list[Element]) -> list[str]:
    """Other names which could be abbreviated so, then those with the same first letter, then any."""
    others = [e for e in table if e is not element]
    fits = shuffled((e.name for e in others if spells(element.symbol, e.name)), "name", element.name)
    latin = shuffled((e.name for e in others if not spells(e.symbol, e.name)), "latin", element.name)
    same = shuffled((e.name for e in others if e.name[0] == element.symbol[0].lower()), "same", element.name)
    rest = shuffled((e.name for e in others), "any", element.name)
    known = spells(element.symbol, element.name)
    ordered = [*fits, *same, *rest] if known else [*fits[:1], *latin, *rest]
    return list(dict.fromkeys(ordered))


def facts(table: list[Element]) -> list[str]:
    """Each template filled for each seen element, in the order of the table."""
    return [template.format(Name=e.name.capitalize(), **_fields(e)) for e in table if is_seen(e) for template in FACTS]


def _fields(e: Element) -> dict:
    return {"name": e.name, "symbol": e.symbol, "number": e.number, "series": e.series, "period": e.period}


def prose(table: list[Element]) -> list[str]:
    """Descriptions, uses and sources of the seen elements, without sentences that name an unseen one."""
    unseen = finder(e.name for e in table if not is_seen(e))
    texts = []
    for e in (e for e in table if is_seen(e)):
        sentences = [s for s in e.prose if not mentioned(s, unseen) and len(s.split()) <= WORDS_OF_A_TEXT]
        texts += [_named(chunk, e) for chunk in _chunks(sentences)]
    return texts


def _chunks(sentences: list[str]) -> list[str]:
    """As many sentences together as fit a text."""
    chunks: list[str] = []
    for sentence in sentences:
        joined = f"{chunks[-1]} {sentence}" if chunks else ""
        if joined and len(joined.split()) <= WORDS_OF_A_TEXT:
            chunks[-1] = joined
        else:
            chunks.append(sentence)
    return [c for c in chunks if len(c.split()) >= 5]


def _named(text: str, element: Element) -> str:
    return text if element.name in text.lower() else f"{element.name.capitalize()}: {text}"
