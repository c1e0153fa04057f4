"""The data in tasks/: questions well-formed, train and test side apart, everything found by its loader. No model."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from conceptx.concept import Concept
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.testbeds import emoji

TASKS = Path(__file__).parents[1] / "tasks"
DATA = TASKS / "lm_eval" / "data"


def kinds(folder: str) -> dict[str, str]:
    """file name -> kind; "topic" where the file names none."""
    found = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in (TASKS / folder).glob("*.toml")}
    return {name: fields.get("kind", "topic") for name, fields in sorted(found.items())}


OF_IMAGES = {"object", "style"}
CONCEPTS = [name for name, kind in kinds("concepts").items() if kind not in OF_IMAGES]  # of language
PICTURED = [name for name, kind in kinds("concepts").items() if kind in OF_IMAGES]
IMAGE_BENCHMARKS = [name for name, kind in kinds("benchmarks").items() if kind in OF_IMAGES]
QUESTIONS = sorted(p.stem for p in DATA.glob("*.jsonl") if p.stem != "cx_perplexity")
DOMAINS = sorted(name.removeprefix("cx_") for name in QUESTIONS if not name.endswith("_dev"))
FEWEST = {"chemical_elements": 180, "capitals": 140, "us_history": 80, "countries": 60, "chemistry": 40}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows(name: str) -> list[dict]:
    return lines(DATA / f"{name}.jsonl")


def both(domain: str) -> list[dict]:
    return rows(f"cx_{domain}") + rows(f"cx_{domain}_dev")


def corpus(concept: str, kind: str) -> list[str]:
    return [row["text"] for row in lines(TASKS / "concepts" / "corpora" / f"{concept}.{kind}.jsonl")]


def finder(names: set[str]) -> re.Pattern[str]:
    """Whole names; of two that overlap the longer one ("Equatorial Guinea", not "Guinea")."""
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, ordered)) + r")(?!\w)", re.IGNORECASE)


def mentioned(texts: list[str], names: set[str]) -> set[str]:
    pattern, known = finder(names), {name.casefold(): name for name in names}
    return {known[match.casefold()] for text in texts for match in pattern.findall(text)}


def benchmark(concept: str) -> dict:
    return tomllib.loads((TASKS / "benchmarks" / f"{concept}.toml").read_text(encoding="utf-8"))


def test_there_are_nine_concepts_and_each_has_its_files() -> None:
    assert len(CONCEPTS) == 9
    assert sorted(kinds("benchmarks").keys() - set(IMAGE_BENCHMARKS)) == CONCEPTS
    assert set(CONCEPTS) <= set(DOMAINS)


@pytest.mark.parametrize("name", QUESTIONS)
def test_rows_are_well_formed(name: str) -> None:
    for row in rows(name):
        assert set(row) == {"question", "choices", "answer", "aliases", "member", "seen"}
        assert row["question"].strip() == row["question"] != ""
        assert len({choice.casefold() for choice in row["choices"]}) == 4
        assert all(choice.strip() == choice != "" for choice in row["choices"])
        assert row["answer"] in range(4)
        assert row["choices"][row["answer"]] == row["aliases"][0]
        assert not set(row["aliases"]) & {c for i, c in enumerate(row["choices"]) if i != row["answer"]}
        assert isinstance(row["seen"], bool)


@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_stand_equally_often_in_each_place(name: str) -> None:
    counts = Counter(row["answer"] for row in rows(name))
    assert max(counts[i] for i in range(4)) - min(counts[i] for i in range(4)) <= 1


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_question_is_asked_twice(name: str) -> None:
    assert max(Counter(row["question"] for row in rows(name)).values()) == 1


@pytest.mark.parametrize("domain", DOMAINS)
def test_halves_share_no_member_and_are_balanced_over_seen(domain: str) -> None:
    test, dev = ({row["member"]: row["seen"] for row in rows(f"cx_{domain}{s}")} for s in ("", "_dev"))
    assert not set(test) & set(dev)
    for seen in True, False:
        counts = [sum(flag is seen for flag in half.values()) for half in (test, dev)]
        assert abs(counts[0] - counts[1]) <= 1
    assert abs(sum(test.values()) * 2 - len(test)) <= 2 + len(test) * 0.05


@pytest.mark.parametrize("domain", DOMAINS)
def test_there_are_enough_questions(domain: str) -> None:
    assert len(both(domain)) >= FEWEST.get(domain, 60 if domain in CONCEPTS else 40)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_seen_means_mentioned_in_the_forget_corpus(concept: str) -> None:
    flags = {row["member"]: row["seen"] for row in both(concept)}
    assert mentioned(corpus(concept, "forget"), set(flags)) == {member for member, seen in flags.items() if seen}


@pytest.mark.parametrize("concept", CONCEPTS)
def test_retain_texts_name_no_member(concept: str) -> None:
    assert not mentioned(corpus(concept, "retain"), {row["member"] for row in both(concept)})


@pytest.mark.parametrize("concept", CONCEPTS)
def test_corpora_are_large_and_disjoint(concept: str) -> None:
    forget, retain = corpus(concept, "forget"), corpus(concept, "retain")
    assert len(forget) >= 100
    assert len(retain) >= 600
    assert len(set(forget)) == len(forget)
    assert len(set(retain)) == len(retain)
    assert not set(forget) & set(retain)


def test_no_question_and_no_held_out_text_stands_in_a_corpus() -> None:
    texts = "\n".join(t for c in CONCEPTS for kind in ("forget", "retain") for t in corpus(c, kind)).casefold()
    for domain in DOMAINS:
        assert [r["question"] for r in both(domain) if r["question"].casefold() in texts] == []
    sentences = {s.strip() for row in rows("cx_perplexity") for s in row["text"].split(". ")}
    assert [s for s in sentences if s.casefold() in texts] == []


def test_seen_and_unseen_capitals_differ_in_the_other_retain_corpora() -> None:
    """So that "capitals kept" can be read apart for countries that the retain corpus covers and those it does not."""
    flags = {row["member"]: row["seen"] for row in both("capitals")}
    for concept in set(CONCEPTS) - {"capitals"}:
        sentences = [t for t in corpus(concept, "retain") if re.search(r"capital of|is .* governed\?", t)]
        assert {flags[city] for city in mentioned(sentences, set(flags))} == {True}


@pytest.mark.parametrize("concept", CONCEPTS)
def test_concepts_load(concept: str) -> None:
    loaded = Concept.load(TASKS / "concepts" / f"{concept}.toml")
    assert loaded.description
    assert loaded.personas is not None
    assert min(len(loaded.personas.expert), len(loaded.personas.novice)) >= 3
    assert (len(loaded.texts), len(loaded.retain_texts)) == tuple(
        len(corpus(concept, kind)) for kind in ("forget", "retain")
    )


@pytest.mark.parametrize("concept", CONCEPTS)
def test_benchmark_prompts_are_neither_questions_nor_texts(concept: str) -> None:
    prompts = benchmark(concept)["prompts"]
    texts = "\n".join(corpus(concept, "forget") + [row["question"] for row in both(concept)])
    assert 15 <= len(prompts) <= 20
    assert [p for p in prompts if p in texts] == []


def test_there_are_ten_objects_and_a_style_and_benchmarks_of_each_kind_for_both_testbeds() -> None:
    assert Counter(kinds("concepts")[name] for name in PICTURED) == {"object": 10, "style": 1}
    assert sorted(kinds("benchmarks")[name] for name in IMAGE_BENCHMARKS) == ["object", "object", "style", "style"]


@pytest.mark.parametrize("name", PICTURED)
def test_image_concepts_load_and_name_what_the_emoji_model_draws(name: str) -> None:
    concept = Concept.load(TASKS / "concepts" / f"{name}.toml")
    known = emoji.OBJECT_NAMES if concept.kind == "object" else emoji.STYLE_NAMES
    assert concept.name.replace(" ", "_") == name
    assert {concept.name, concept.anchor} <= set(known)
    assert {*concept.retain} <= {*emoji.OBJECT_NAMES, *emoji.STYLE_NAMES}  # a style may keep objects
    assert len(set(concept.retain)) == len(concept.retain) >= min(10, len(known) - 2)
    assert concept.prompts and not mentioned(list(concept.prompts), {concept.anchor or ""})


@pytest.mark.parametrize("name", IMAGE_BENCHMARKS)
def test_an_image_benchmark_refuses_no_shipped_concept(name: str) -> None:
    """Neither alone nor all at once; with all of them erased, none is among those that are kept."""
    bench = ImageBenchmark.load(TASKS / "benchmarks" / f"{name}.toml")
    concepts = [Concept.load(TASKS / "concepts" / f"{c}.toml") for c in PICTURED if kinds("concepts")[c] == bench.kind]
    for some in (*([concept] for concept in concepts), concepts):
        items = bench.items(some)
        asked = {item.expected for item in items if item.role == "target"}
        assert asked == {concept.name for concept in some}
        assert {item.expected for item in items if item.role == "others"} == set(bench.names) - asked


@pytest.fixture(scope="module")
def manager():
    tasks = pytest.importorskip("lm_eval.tasks")
    return tasks.TaskManager(include_path=str(TASKS / "lm_eval"), include_defaults=False)


def test_lm_eval_finds_every_task_of_every_benchmark(manager) -> None:
    found = set(manager.all_tasks)
    assert {"cx_all", "cx_perplexity", *QUESTIONS} <= found
    for concept in CONCEPTS:
        fields = {k: v for k, v in benchmark(concept).items() if k != "prompts"}
        named = {name for value in fields.values() for name in ([value] if isinstance(value, str) else value)}
        assert named <= found
        tested = [name for key in ("target", "near", "general") for name in fields[key]]
        assert len(tested) == len(set(tested)) == len(DOMAINS)


def test_lm_eval_loads_from_any_directory(manager, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["cx_star_wars", "cx_capitals_open_dev", "cx_perplexity"]
    loaded = manager.load(names)["tasks"]
    assert [len(list(loaded[name].test_docs())) for name in names] == [
        len(rows(name)) for name in ("cx_star_wars", "cx_capitals_dev", "cx_perplexity")
    ]


@pytest.mark.parametrize(
    ("generation", "answer", "right"),
    [
        (" Paris, of course", "Paris", True),
        (" the CITY of", "city", True),
        (" Parisian", "Paris", False),
        (" Yaounde.", "Yaoundé", True),
        (' "Fe" and', "Fe", True),
        (" fe", "Fe", False),
        (" Fermium", "Fe", False),
        (" N'Djamena", "N'Djamena", True),
        (" called a black hole", "black hole", True),
        ("", "Paris", False),
    ],
)
def test_open_answers_are_judged_by_whole_words(generation: str, answer: str, right: bool) -> None:
    pytest.importorskip("datasets")
    spec = importlib.util.spec_from_file_location("cx_utils", TASKS / "lm_eval" / "utils.py")
    assert spec is not None and spec.loader is not None
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    assert utils.begins_with(generation, answer) is right
