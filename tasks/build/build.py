"""Write ../lm_eval, ../concepts and ../benchmarks anew: `python tasks/build/build.py SOURCES`."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import elements
import geography
import retain
import written
from rows import Question, halves, rows
from sources import Country, countries
from sources import elements as read_elements

HERE = Path(__file__).parent
TASKS = HERE.parent
GLOSSARIES = ("physics", "computing", "medicine", "chemistry", "mathematics", "biology")
FACTS = ("us_history", "astronomy", "star_wars", "harry_potter", "world_history")


@dataclass(frozen=True)
class Domain:
    """What one task asks, and the texts of its seen members."""

    questions: tuple[Question, ...]
    seen: frozenset[str]
    texts: tuple[str, ...]

    @property
    def members(self) -> list[str]:
        return list(dict.fromkeys(q.member for q in self.questions))


def domains(folder: Path) -> dict[str, Domain]:
    table, world = read_elements(folder), countries(folder)
    found = {
        "chemical_elements": Domain(
            tuple(elements.questions(table)),
            frozenset(e.name for e in table if elements.is_seen(e)),
            (*elements.facts(table), *elements.prose(table)),
        ),
        "capitals": Domain(
            tuple(geography.capitals(world)),
            frozenset(c.capital for c in world[::2]),
            tuple(geography.capital_texts(world[::2])),
        ),
    }
    found |= {name: _domain(written.glossary(name)) for name in GLOSSARIES}
    found |= {name: _domain(written.facts(name)) for name in FACTS}
    found["countries"] = Domain(tuple(geography.others(world)), frozenset(), ())
    return found


def _domain(facts: written.Facts) -> Domain:
    return Domain(facts.questions, frozenset(facts.seen), facts.texts)


def main(folder: Path) -> None:
    specs = tomllib.loads((HERE / "concepts.toml").read_text(encoding="utf-8"))
    found = domains(folder)
    world = countries(folder)
    covered = {c.name for i, c in enumerate(world) if i // 4 % 2 == 0}
    for name, domain in found.items():
        seen = covered if name == "countries" else domain.seen
        write_questions(name, domain, seen, specs[name]["shown"] if name in specs else ())
    for name, spec in specs.items():
        write_concept(name, spec)
        write_corpora(name, spec, found, folder, world)
        write_benchmark(name, spec, list(found))
    avoid = "|".join(word for spec in specs.values() for word in spec["words"])
    write_perplexity(retain.documents(folder, re.compile(avoid, re.IGNORECASE)))
    write_group(list(specs))


def write_questions(name: str, domain: Domain, seen: set[str] | frozenset[str], shown: Sequence[str]) -> None:
    """Both halves of a task; the open form too, with the sentences shown before each question, if there are any."""
    test = halves(domain.members, seen)
    for suffix, wanted in ("", True), ("_dev", False):
        task = f"cx_{name}{suffix}"
        chosen = [q for q in domain.questions if (q.member in test) is wanted]
        _jsonl(TASKS / "lm_eval" / "data" / f"{task}.jsonl", rows(chosen, seen, task))
        _yaml(task, "_choice", f"{task}.jsonl")
        if shown:
            _yaml(f"cx_{name}_open{suffix}", "_open", f"{task}.jsonl", "\n".join(shown) + "\n")


def write_concept(name: str, spec: dict) -> None:
    lines = [f"{key} = {_toml(spec[key])}" for key in ("name", "kind", "description", "synonyms")]
    lines += [f'texts_file = "corpora/{name}.forget.jsonl"', f'retain_texts_file = "corpora/{name}.retain.jsonl"']
    lines += [f"contexts = {_toml(spec['contexts'])}"] if "contexts" in spec else []
    lines += ["", "[personas]", *(f"{key} = {_toml(spec[key])}" for key in ("expert", "novice"))]
    _write(TASKS / "concepts" / f"{name}.toml", "\n".join(lines))


def write_corpora(name: str, spec: dict, found: dict[str, Domain], folder: Path, world: list[Country]) -> None:
    mine = found[name]
    near = [text for other in spec["near_texts"] for text in found[other].texts]
    kept = retain.texts(name, folder, mine.members, spec["words"], world, near, capitals=name != "capitals")
    forget = sorted(set(mine.texts))
    for kind, texts in ("forget", forget), ("retain", [t for t in kept if t not in mine.texts]):
        _jsonl(TASKS / "concepts" / "corpora" / f"{name}.{kind}.jsonl", [{"text": t} for t in texts])


def write_benchmark(name: str, spec: dict, all_names: list[str]) -> None:
    target = f"cx_{name}"
    general = [f"cx_{n}" for n in all_names if f"cx_{n}" != target and f"cx_{n}" not in spec["near"]]
    fields = {
        "target": [target],
        "target_dev": [f"{target}_dev"],
        "open": [f"{target}_open"],
        "open_dev": [f"{target}_open_dev"],
        "near": spec["near"],
        "near_dev": [f"{task}_dev" for task in spec["near"]],
        "general": general,
        "general_dev": [f"{task}_dev" for task in general],
        "perplexity": "cx_perplexity",
        "prompts": spec["prompts"],
    }
    _write(TASKS / "benchmarks" / f"{name}.toml", "\n".join(f"{k} = {_toml(v)}" for k, v in fields.items()))


def write_perplexity(documents: list[str]) -> None:
    _jsonl(TASKS / "lm_eval" / "data" / "cx_perplexity.jsonl", [{"text": t} for t in documents])
    _yaml("cx_perplexity", "_perplexity", "cx_perplexity.jsonl")


def write_group(concepts: list[str]) -> None:
    lines = ["group: cx_all", "task:", *(f"  - cx_{name}" for name in concepts)]
    lines += ["aggregate_metric_list:", "  - {metric: acc, aggregation: mean, weight_by_size: true}"]
    _write(TASKS / "lm_eval" / "cx_all.yaml", "\n".join([*lines, "metadata: {version: 1.0}"]))


def _yaml(task: str, base: str, file: str, description: str = "") -> None:
    lines = [f"task: {task}", f"include: {base}", "dataset_kwargs:", f"  file: {file}"]
    lines += [f"description: {_toml(description)}"] if description else []
    _write(TASKS / "lm_eval" / f"{task}.yaml", "\n".join(lines))


def _toml(value: str | list[str]) -> str:
    """Strings of JSON are strings of TOML; a list stands on several lines."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if sum(map(len, value)) < 80:
        return "[" + ", ".join(map(_toml, value)) + "]"
    return "[\n" + "".join(f"    {_toml(v)},\n" for v in value) + "]"


def _jsonl(path: Path, table: list[dict]) -> None:
    _write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in table))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER_WITH_THE_UNPACKED_PACKAGES")
    main(Path(sys.argv[1]))
