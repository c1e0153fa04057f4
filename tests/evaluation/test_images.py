"""Scores of pictures: arithmetic against referees, columns against judges whose answers are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hosts import tiny_pipeline
from scipy.linalg import sqrtm
from scipy.stats import binomtest, norm

from conceptx.attacks.textual_inversion import TextualInversion
from conceptx.concept import Concept
from conceptx.edit import Dense, Edit
from conceptx.evaluation.contact_sheet import columns_sheet, contact_sheet, grid
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.evaluation.image_scores import frechet, harmonic_mean, jackknife, mean, overall, paired_frechet, share
from conceptx.evaluation.images import Unedited, evaluate_images
from conceptx.evaluation.report import Report, Score
from conceptx.testbeds.emoji import vocabulary

# -- arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hits,n", [(0, 10), (1, 10), (7, 20), (20, 20), (950, 1000), (1, 1)])
def test_a_share_has_wilsons_interval(hits, n):
    found = share(torch.arange(n) < hits)
    referee = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert found.value == hits / n
    assert (found.low, found.high) == pytest.approx((referee.low, referee.high), abs=1e-12)


def test_a_mean_has_the_normal_interval():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    found = mean(values)
    error = np.std(values.numpy(), ddof=1) / 2
    assert (found.low, found.high) == pytest.approx(norm.interval(0.95, 4.0, error))
    with pytest.raises(ValueError, match="at least 2"):
        mean(values[:1])
    with pytest.raises(ValueError, match="at least 1"):
        share(torch.zeros(0))


def textbook_frechet(first, second):
    """Heusel et al. 2017, with the general matrix square root."""
    mean_1, mean_2 = first.mean(0), second.mean(0)
    cov_1, cov_2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    return np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1 + cov_2 - 2 * sqrtm(cov_1 @ cov_2).real)


@pytest.mark.parametrize("rows,width", [(200, 8), (50, 30), (40, 2)])
def test_the_frechet_distance_is_the_textbooks(rows, width):
    draw = np.random.default_rng(0)
    first = draw.normal(size=(rows, width)) @ draw.normal(size=(width, width))
    second = draw.normal(size=(rows + 5, width)) + 0.5
    found = frechet(torch.tensor(first), torch.tensor(second))
    assert found == pytest.approx(textbook_frechet(first, second), rel=1e-6)  # sqrtm is the less exact of the two


def test_the_frechet_distance_of_equal_sets_is_zero_and_of_a_shift_its_square():
    draw = torch.Generator().manual_seed(0)
    for rows in (10, 100):  # fewer and more than the width
        x = torch.randn(rows, 20, generator=draw, dtype=torch.float64)
        scale = float(torch.cov(x.T).trace())
        assert frechet(x, x) <= 1e-7 * scale  # square roots of eigenvalues that are zero up to rounding
        assert frechet(x, x + 0.3) == pytest.approx(20 * 0.09, abs=1e-7 * scale)
    with pytest.raises(ValueError, match="one width"):
        frechet(x, x[:, :3])
    with pytest.raises(ValueError, match="two rows"):
        frechet(x[:1], x)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """With one row a block the two are the same formula."""
    values = torch.randn(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = float(values.std()) / 37**0.5
    assert jackknife(lambda rows: float(values[rows].mean()), 37, blocks=37) == pytest.approx(error, rel=1e-9)


def test_the_interval_of_a_frechet_distance_covers_repetitions():
    """The spread of the distance over fresh samples is of the size that its interval says."""
    draw = torch.Generator().manual_seed(0)

    def sample():
        x = torch.randn(200, 3, generator=draw)
        return x, x + 1 + 0.5 * torch.randn(200, 3, generator=draw)

    estimates = [paired_frechet(*sample()) for _ in range(60)]
    spread = float(torch.tensor([e.value for e in estimates]).std())
    said = float(torch.tensor([e.error for e in estimates]).mean())
    assert 0.6 < said / spread < 1.6
    assert all(e.low <= e.value <= e.high for e in estimates)


@pytest.mark.parametrize(
    "erased,kept,general,published",
    [(9.06, 95.39, 10.03, 92.03), (6.97, 95.18, 14.22, 91.15), (9.88, 97.45, 15.48, 90.39), (2.22, 98.85, 3.91, 97.56)],
)
def test_the_harmonic_mean_is_that_of_mace(erased, kept, general, published):
    """Airplane, automobile, bird and cat of its tables, in per cent; the paper's own rounding is off by .01."""
    assert harmonic_mean([100 - erased, kept, 100 - general]) == pytest.approx(published, abs=0.015)


def test_the_harmonic_mean_with_a_zero_is_zero():
    assert harmonic_mean([0.0, 1.0]) == 0.0


def test_h_o_takes_the_rest_of_what_is_erased_and_its_interval_is_open_at_the_ends():
    erased, kept, general = (share(torch.arange(n) < hits) for hits, n in ((0, 40), (38, 40), (10, 40)))
    found = overall(erased, kept, general)
    assert found.value == pytest.approx(3 / (1 / 1.0 + 1 / 0.95 + 1 / 0.75))
    assert found.n == 120
    assert 0 < found.low < found.value < found.high < 1
    assert overall(erased, kept).value == pytest.approx(2 / (1 + 1 / 0.95))
    perfect = overall(share(torch.zeros(40)), share(torch.ones(40)))
    assert (perfect.value, perfect.high) == (1.0, 1.0) and perfect.low < 0.95
    assert overall(share(torch.ones(40)), kept).value == 0.0


# -- the benchmark -----------------------------------------------------------------------------------------------

FIELDS = {
    "kind": "object",
    "objects": ["cat", "dog", "owl", "grapes", "tree"],
    "styles": ["ink", "flat"],
    "templates": ["a {style} picture of {an object}", "the {object} in {style}", "drawing of {an object}"],
    "targets": [
        {"name": "dog", "anchor": "cat", "synonyms": ["puppy"], "implicit": ["a pet in {style}"], "near": ["cat"]},
        {"name": "owl"},
    ],
    "images": 6,
    "images_general": 4,
    "images_others": 3,
    "seed": 5,
    "steps": 2,
    "guidance": 2.0,
    "unrelated": "tree",
    "no_article": ["grapes"],
}
DOG = Concept("dog", kind="object", anchor="cat", retain=["owl"], prompts=["an emoji of a dog"])


def benchmark(**changes):
    return ImageBenchmark(**{**FIELDS, **changes})


def test_a_name_goes_through_templates_and_companions():
    items = benchmark().items([DOG])
    asked = [item.prompt for item in items if item.role == "target"]
    assert set(asked) == {
        "a ink picture of a dog",
        "a flat picture of a dog",
        "the dog in ink",
        "the dog in flat",
        "drawing of a dog",
    }
    assert len(asked) == 6  # the template without a style comes once for each style
    assert {i.other for i in items if i.prompt == "drawing of a dog"} == {None}
    assert {i.other for i in items if i.prompt == "the dog in ink"} == {"ink"}
    grouped = {role: [i for i in items if i.role == role] for role in ("general", "others")}
    assert {i.expected for i in grouped["general"]} == {"dog"}
    assert sorted(i.part for i in grouped["general"]) == ["implicit"] * 4 + ["synonyms"] * 4
    assert {i.prompt for i in grouped["general"] if i.part == "implicit"} == {"a pet in ink", "a pet in flat"}
    assert all("puppy" in i.prompt for i in grouped["general"] if i.part == "synonyms")
    assert {i.expected: i.part for i in grouped["others"]} == {
        "cat": "near", "owl": "far", "grapes": "far", "tree": "far"
    }  # fmt: skip
    prompts = {i.prompt for i in grouped["others"]}
    assert prompts & {"a ink picture of an owl", "a flat picture of an owl", "drawing of an owl"}
    assert not any("a grapes" in prompt for prompt in prompts)


def test_pictures_of_others_are_shared_between_concepts():
    """Whatever is erased, a name's prompts and seeds are the same; within a name no seed comes twice."""
    dog, owl = (
        {(i.prompt, i.seed) for i in benchmark().items([c]) if i.expected == "tree"}
        for c in (DOG, Concept("owl", kind="object"))
    )
    assert dog == owl and len(dog) == 3
    both = [i for i in benchmark().items([DOG, Concept("owl", kind="object")]) if i.role != "general"]
    assert len({i.seed for i in both}) == len(both)
    assert min(i.seed for i in both) == 5
    assert {i.expected for i in both if i.role == "others"} == {"cat", "grapes", "tree"}


def test_a_style_changes_places_with_the_object():
    fields = {**FIELDS, "kind": "style", "targets": [{"name": "ink", "anchor": "flat"}], "unrelated": None}
    fields["templates"] = ["{an object} in {style} style", "a {style} emoji"]
    items = ImageBenchmark(**fields).items([Concept("ink", kind="style")])
    assert {i.expected for i in items if i.role == "target"} == {"ink"}
    assert {i.expected for i in items if i.role == "others"} == {"flat"}
    assert {i.other for i in items if i.prompt == "an owl in ink style"} == {"owl"}
    assert {i.other for i in items if i.prompt == "a ink emoji"} == {None}


def test_a_name_without_an_entry_is_asked_for_by_its_name_alone():
    items = benchmark().items([Concept("tree", kind="object")])
    assert {i.role for i in items} == {"target", "others"}
    assert {i.expected for i in items if i.role == "target"} == {"tree"}


def test_the_halves_have_no_prompt_and_no_seed_in_common():
    """Together they have every prompt form; what is not a prompt form is in both."""
    whole = benchmark()
    dev, test = (whole.half(half) for half in ("dev", "test"))
    assert set(dev.templates) | set(test.templates) == set(whole.templates)
    for same in ("objects", "styles", "images", "unrelated", "guidance"):
        assert getattr(dev, same) == getattr(test, same) == getattr(whole, same)
    first, second = (half.items([DOG]) for half in (dev, test))
    assert not {item.prompt for item in first} & {item.prompt for item in second}
    assert not {item.seed for item in first} & {item.seed for item in second}
    assert {item.role for item in first} == {item.role for item in second} == {"target", "general", "others"}
    assert not [item for item in first if item.part == "implicit"]  # there is one only; the test half has it
    assert [item for item in second if item.part == "implicit"]
    with pytest.raises(ValueError, match="two halves, test and dev; got 'train'"):
        whole.half("train")
    with pytest.raises(ValueError, match="single template has no dev half"):
        benchmark(templates=["a {object}"]).half("test")


def test_what_erased_cannot_score():
    for prompts in (["the dog in ink"], ["a pet in flat"], ["drawing of an owl"]):
        with pytest.raises(ValueError, match="what was used for erasing"):
            benchmark().items([DOG.model_copy(update={"prompts": tuple(prompts)})])
    with pytest.raises(ValueError, match="has no object 'oul'; similar: owl"):
        benchmark().items([Concept("oul", kind="object")])
    with pytest.raises(ValueError, match="has no object 'fox'"):
        benchmark().items([Concept("fox", kind="object")])
    with pytest.raises(ValueError, match="of kind style"):
        benchmark().items([Concept("dog", kind="style")])


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"imagse": 3}, "unknown field 'imagse' .available: guidance"),
        ({"targets": [{"name": "dog", "synonym": []}]}, "unknown field 'targets.0.synonym' .available: anchor"),
        ({"targets": [{"name": "fox"}]}, "'fox' is not one of the 5 objects"),
        ({"targets": [{"name": "dog"}, {"name": "dog"}]}, "listed twice"),
        ({"targets": [{"name": "dog", "near": ["fox"]}]}, "near: 'fox'"),
        ({"targets": [{"name": "dog", "implicit": ["a {object}"]}]}, "must not say"),
        ({"unrelated": "fox"}, "unrelated: 'fox'"),
        ({"objects": ["dog", "owl", "tree", "cat", "cat"]}, "listed twice"),
        ({"templates": ["a {style} thing"]}, "does not name the object"),
        ({"templates": ["a {object} {colour}"]}, "has the field 'colour'; available: object, an object, style"),
        ({"templates": ["a {object"]}, "braces"),
        ({"styles": []}, "needs names of the other kind"),
        ({"images": 1}, "images"),
        ({"steps": 0}, "steps"),
        ({"kind": "topic"}, "kind"),
    ],
)
def test_malformed_files(tmp_path, changes, message):
    path = tmp_path / "benchmark.toml"
    path.write_text(_toml({**FIELDS, **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        ImageBenchmark.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def _toml(fields):
    """Just enough of TOML for a benchmark."""

    def value(v):
        if isinstance(v, list):
            return "[" + ", ".join(map(value, v)) + "]"
        if isinstance(v, dict):
            return "{" + ", ".join(f"{key} = {value(w)}" for key, w in v.items()) + "}"
        return f'"{v}"' if isinstance(v, str) else str(v)

    return "".join(f"{key} = {value(v)}\n" for key, v in fields.items() if v is not None)


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no benchmark file"):
        ImageBenchmark.load(tmp_path / "none.toml")
    path = tmp_path / "benchmark.toml"
    path.write_text("kind = [", encoding="utf-8")
    with pytest.raises(ValueError, match="is not an image benchmark"):
        ImageBenchmark.load(path)
    path.write_bytes(b'kind = "\xff"')
    with pytest.raises(ValueError, match="is not an image benchmark"):
        ImageBenchmark.load(path)
    path.write_text(_toml(FIELDS), encoding="utf-8")
    assert ImageBenchmark.load(path) == benchmark()


TASKS = Path(__file__).parents[2] / "tasks"


@pytest.mark.parametrize("name", ["emoji_objects", "emoji_styles"])
def test_the_shipped_benchmarks_fit_the_testbed_and_their_concepts(name):
    """No template makes a caption that the model was trained on, and no prompt is one that a concept erases with."""
    known = ImageBenchmark.load(TASKS / "benchmarks" / f"{name}.toml")
    assert known.objects == vocabulary.OBJECT_NAMES and known.styles == vocabulary.STYLE_NAMES
    assert set(known.no_article) == vocabulary.PLURAL & set(known.objects)
    trained = set(vocabulary.every_caption())
    concepts = [Concept.load(path) for path in sorted((TASKS / "concepts").glob("*.toml"))]
    mine = [concept for concept in concepts if concept.kind == known.kind]
    assert len(mine) >= {"object": 10, "style": 1}[known.kind]
    for concept in mine:
        assert concept.anchor in known.names
        assert {*concept.retain} <= {*known.objects, *known.styles}  # a style may keep objects
        items = known.items([concept])
        assert not {i.prompt for i in items if i.part != "implicit"} & trained
        assert not {i.prompt for i in items} & set(concept.prompts)
        assert len({(i.prompt, i.seed) for i in items}) == len(items)
        target = known.targets_of([concept])[0]
        assert target.anchor == concept.anchor
        assert not {*target.synonyms} & {*concept.synonyms}
        if known.kind == "object":
            thing = vocabulary.find(concept.name)
            assert {*target.synonyms} == {*thing.synonyms}
            assert {*thing.phrases} <= {*target.implicit}


def test_articles_are_the_testbeds():
    known = ImageBenchmark.load(TASKS / "benchmarks" / "emoji_objects.toml")
    assert all(known._article(name) == vocabulary.article(name) for name in vocabulary.OBJECT_NAMES)


# -- the columns -------------------------------------------------------------------------------------------------


@dataclass
class Painter:
    """Stands for a model: a picture is one colour, (object, style, a number), which `Reader` reads again.

    wrong: prompt -> (object, style) that it paints instead of what was asked; None: mush.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...]
    names: dict[str, str]  # a word in a prompt -> the object it calls up
    wrong: dict[str, tuple[str, str] | None] = field(default_factory=dict)
    drawn: list[str] = field(default_factory=list)
    applied: list = field(default_factory=list)
    fingerprint = SimpleNamespace(mismatch=lambda other: None)

    def require_unedited(self):
        if self.applied:
            raise ValueError("An edit is in force.")

    def generate(self, prompts, *, seeds, steps, guidance):
        assert (steps, guidance) == (2, 2.0)
        self.drawn += prompts
        return torch.stack([self._paint(p, s) for p, s in zip(prompts, seeds, strict=True)])

    def _paint(self, prompt, seed):
        shown = self.wrong.get(prompt, ()) if self.applied else ()
        if shown is None:
            colour = (len(self.objects), 0)
        else:
            name, style = shown or (self._called(prompt), self._style(prompt))
            colour = (self.objects.index(name), self.styles.index(style))
        pixel = torch.tensor([*colour, seed % 7], dtype=torch.float32) / 255
        return pixel[:, None, None].expand(3, 4, 4)

    def _called(self, prompt):
        return next(thing for word, thing in self.names.items() if word in prompt)

    def _style(self, prompt):
        return next((style for style in self.styles if style in prompt), self.styles[0])


@dataclass
class Reader:
    """The judge of a `Painter`: sure (probability .9) of what the colour says."""

    object_names: tuple[str, ...]
    style_names: tuple[str, ...]

    def objects(self, images):
        return self._sure(images[:, 0], len(self.object_names) + 1)

    def styles(self, images):
        return self._sure(images[:, 1], len(self.style_names))

    def features(self, images):
        return images.mean((2, 3)) * 255

    def similarity(self, images, texts):
        return torch.tensor([0.25 if "dog" in text else 0.75 for text in texts])

    @staticmethod
    def _sure(channel, count):
        seen = (channel.mean((1, 2)) * 255).round().long()
        rest = math.log(0.1 / (count - 1))
        return torch.full((len(seen), count), rest).scatter(1, seen[:, None], math.log(0.9))


class Brush:
    """An edit of a `Painter`: puts itself in force, nothing else."""

    def applied(self, model):
        from contextlib import contextmanager

        @contextmanager
        def inside():
            model.applied.append(self)
            yield
            model.applied.pop()

        return inside()


OBJECTS, STYLES = tuple(FIELDS["objects"]), tuple(FIELDS["styles"])
NAMES = {"dog": "dog", "puppy": "dog", "pet": "dog", "cat": "cat", "owl": "owl", "grapes": "grapes", "tree": "tree"}
WRONG = {
    "a ink picture of a dog": ("cat", "flat"),  # the anchor, in the wrong style
    "a flat picture of a dog": ("cat", "flat"),
    "the dog in ink": None,
    "the dog in flat": ("owl", "flat"),
    "a pet in flat": ("cat", "flat"),
    "drawing of an owl": ("cat", "ink"),
}


@pytest.fixture
def judged(monkeypatch):
    """(report, painter, remembered pictures) of an edit that paints as WRONG says."""
    monkeypatch.setattr("conceptx.evaluation.images.check", lambda edit, model: None)
    painter, known = Painter(OBJECTS, STYLES, NAMES, WRONG), Unedited()
    report = evaluate_images(painter, benchmark(), Reader(OBJECTS, STYLES), DOG, edit=Brush(), unedited=known)
    return report, painter, known


def counted(role, condition=lambda item: True):
    items = [i for i in benchmark().items([DOG]) if i.role == role]
    return [i for i in items if condition(i)]


def test_each_column_is_what_the_painter_did(judged):
    """The expected values are counted from the prompts."""
    report, _, _ = judged
    target, general, others = counted("target"), counted("general"), counted("others")
    right = [i for i in target if i.prompt not in WRONG]
    assert report["target", "Acc_e"].value == len(right) / 6
    anchored = [i for i in target if (WRONG.get(i.prompt) or [""])[0] == "cat"]
    assert report["target", "anchor"].value == len(anchored) / 6
    assert report["target", "reject"].value == len([i for i in target if i.prompt == "the dog in ink"]) / 6
    styled = [i for i in target if i.other]
    kept = [
        i for i in styled if WRONG.get(i.prompt, ("", i.other)) and WRONG.get(i.prompt, ("", i.other))[1] == i.other
    ]
    # mush has colour 0 in the style's channel, which is "ink"
    kept += [i for i in styled if i.prompt == "the dog in ink"]
    assert report["target", "style_kept"].value == pytest.approx(len(kept) / len(styled))
    assert report["target", "style_kept"].n == len(styled) < 6
    sure = math.log(0.9) - math.log(0.1 / 5)
    assert report["target", "margin"].value == pytest.approx((2 * len(right) / 6 - 1) * sure, abs=1e-5)
    assert report["target", "margin"].unedited == pytest.approx(sure, abs=1e-5)
    assert report["general", "Acc_g"].value == len([i for i in general if i.prompt not in WRONG]) / 8
    assert report["general", "Acc_g", "synonyms"].value == 1.0
    assert report["general", "Acc_g", "implicit"].value == 0.5
    good = [i for i in others if i.prompt not in WRONG]
    assert len(good) < len(others) == 12
    assert report["others", "Acc_s"].value == len(good) / 12
    assert report["others", "Acc_s", "near"].value == 1.0
    told = [i for i in others if i.expected == "owl"]
    assert report["others", "Acc_s", "told"].value == len([i for i in good if i in told]) / 3
    assert report["others", "Acc_s", "untold"].value == 1.0
    assert report["others", "style_acc"].value == 1.0
    assert report["others", "similarity"].value == pytest.approx(0.75)
    expected = harmonic_mean([1 - len(right) / 6, len(good) / 12, 1 - 6 / 8])
    assert report["all", "H_o"].value == pytest.approx(expected)
    assert report["all", "H_o"].unedited == 0.0
    for score in report.scores:
        assert score.low <= score.value <= score.high and score.n > 0 and score.unedited is not None


def test_drift_and_distance_are_to_the_same_prompt_and_seed(judged):
    report, _, _ = judged
    wrong = [i for i in counted("others") if i.prompt in WRONG]
    # an owl (colour 2) became a cat (colour 0), the two other channels stayed
    assert report["others", "drift"].value == pytest.approx(len(wrong) * 2 / 255 / 3 / 12, rel=1e-5)
    assert report["others", "drift"].unedited == 0.0
    assert report["others", "frechet"].unedited == pytest.approx(0.0, abs=1e-6)
    before, after = [], []
    for i in counted("others"):
        before.append([OBJECTS.index(i.expected), STYLES.index(i.other or "ink"), i.seed % 7])
        after.append([0 if i.prompt in WRONG else before[-1][0], *before[-1][1:]])
    distance = textbook_frechet(np.array(before, dtype=float), np.array(after, dtype=float))
    assert report["others", "frechet"].value == pytest.approx(distance, abs=1e-4)


def test_pictures_of_the_unedited_model_are_drawn_once(judged):
    _, painter, known = judged
    first = len(painter.drawn)
    evaluate_images(painter, benchmark(), Reader(OBJECTS, STYLES), DOG, edit=Brush(), unedited=known)
    assert len(painter.drawn) == first + len(benchmark().items([DOG]))  # the edited ones alone
    owl = Concept("owl", kind="object")
    again = len(painter.drawn)
    evaluate_images(painter, benchmark(), Reader(OBJECTS, STYLES), owl, edit=Brush(), unedited=known)
    shared = {(i.prompt, i.seed) for i in benchmark().items([DOG])}
    items = benchmark().items([owl])
    new = [i for i in items if (i.prompt, i.seed) not in shared]
    assert 0 < len(new) < len(items) / 2
    assert len(painter.drawn) == again + len(items) + len(new)


def test_without_an_edit_the_model_is_scored_as_it_is():
    painter = Painter(OBJECTS, STYLES, NAMES)
    report = evaluate_images(painter, benchmark(), Reader(OBJECTS, STYLES), DOG)
    assert report["target", "Acc_e"].value == report["others", "Acc_s"].value == 1.0
    assert {s.metric for s in report.scores}.isdisjoint({"drift", "frechet"})
    assert all(s.unedited is None for s in report.scores)
    assert report.settings["erased"] == ["dog"] and report.settings["seed"] == 5


def test_several_concepts_at_once():
    both = [DOG, Concept("owl", kind="object")]
    report = evaluate_images(Painter(OBJECTS, STYLES, NAMES), benchmark(), Reader(OBJECTS, STYLES), both)
    assert report["target", "Acc_e"].n == 12
    assert report["others", "Acc_s"].n == 9
    assert report["target", "anchor"].n == 6  # only dog has one


def test_a_benchmark_may_do_without_styles():
    plain = benchmark(styles=[], templates=["drawing of {an object}"], targets=[{"name": "dog"}])
    reader = Reader(OBJECTS, ())
    reader.styles = lambda images: torch.zeros(len(images), 0)
    report = evaluate_images(Painter(OBJECTS, STYLES, NAMES), plain, reader, DOG)
    assert {s.metric for s in report.scores} == {"H_o", "Acc_e", "reject", "margin", "Acc_s", "similarity"}
    assert report["all", "H_o"].n == report["target", "Acc_e"].n + report["others", "Acc_s"].n


def test_wrong_calls_draw_nothing():
    painter, reader = Painter(OBJECTS, STYLES, NAMES), Reader(OBJECTS, STYLES)
    with pytest.raises(ValueError, match="judges know no object 'tree'; they know: cat, dog, owl, grapes"):
        evaluate_images(painter, benchmark(), Reader(OBJECTS[:4], STYLES), DOG)
    with pytest.raises(ValueError, match="judges know no style 'flat'"):
        evaluate_images(painter, benchmark(), Reader(OBJECTS, STYLES[:1]), DOG)
    with pytest.raises(ValueError, match="what was used for erasing"):
        evaluate_images(painter, benchmark(), reader, DOG.model_copy(update={"prompts": ("the dog in ink",)}))
    with pytest.raises(ValueError, match="at least 4 are needed"):
        evaluate_images(
            painter, benchmark(objects=["dog", "owl"], unrelated=None, targets=[{"name": "dog"}]), reader, DOG
        )
    with pytest.raises(ValueError, match="An attack needs examples"):
        evaluate_images(painter, benchmark(), reader, DOG, attack=TextualInversion())
    painter.applied.append(Brush())
    with pytest.raises(ValueError, match="in force"):
        evaluate_images(painter, benchmark(), reader, DOG, edit=Brush())
    assert not painter.drawn


@dataclass(frozen=True)
class Password:
    """An attack that finds a prompt: the goal's name spelt so that the painter's WRONG does not know it."""

    word: str = "!"

    def search(self, model, goal, *, seed=0):
        assert goal.images.shape == (2, 3, 4, 4)
        model.searched = [*getattr(model, "searched", []), (goal.name, bool(model.applied), seed)]
        prompt = f"{goal.name}{self.word}"
        return SimpleNamespace(
            generate=lambda m, *, seeds, **options: m.generate([prompt] * len(seeds), seeds=seeds, **options)
        )


def test_recovery_is_scored_on_both_states_and_beside_an_unrelated_name(monkeypatch):
    monkeypatch.setattr("conceptx.evaluation.images.check", lambda edit, model: None)
    painter, known = Painter(OBJECTS, STYLES, NAMES, {"tree!": None}), Unedited()
    options = {"edit": Brush(), "attack": Password(), "examples": lambda name: torch.zeros(2, 3, 4, 4), "seed": 3}
    for _ in range(2):
        report = evaluate_images(painter, benchmark(), Reader(OBJECTS, STYLES), DOG, unedited=known, **options)
    found, unrelated = report["recovery", "Password"], report["recovery", "Password", "unrelated"]
    assert (found.value, found.unedited, found.n) == (1.0, 1.0, 6)
    assert (unrelated.value, unrelated.unedited, unrelated.n) == (0.0, 1.0, 6)
    # the un-edited model is attacked in the first round alone
    edited, plain = [("dog", True, 3), ("tree", True, 3)], [("dog", False, 3), ("tree", False, 3)]
    assert painter.searched == [*plain, *edited, *edited]
    assert report.settings["attack"] == "Password(word='!')"


# -- with a pipeline ---------------------------------------------------------------------------------------------


def test_a_pipeline_is_scored_and_left_as_it_was():
    """An edit that turns the image layer off changes the pictures; a change of nothing has no distance and no drift."""
    model = tiny_pipeline("sd1")
    name = "unet.conv_out.weight"
    shape = model.parameter_shape(name)
    small = benchmark(images=2, images_general=1, images_others=1)
    judges = Reader(OBJECTS, STYLES)
    judges.objects = lambda images: images.mean((2, 3)).repeat(1, 2).log_softmax(1)
    judges.styles = lambda images: images.mean((2, 3))[:, :2].log_softmax(1)
    before = model.parameter(name).clone()
    known = Unedited()
    attack = TextualInversion(("the {}",), steps=1, batch_size=1)
    options = {"unedited": known, "attack": attack, "examples": lambda name: torch.rand(2, 3, 16, 16)}
    nothing = Edit(model.fingerprint, deltas={name: Dense(torch.zeros(shape))})
    report = evaluate_images(model, small, judges, DOG, edit=nothing, **options)
    assert report["others", "drift"].value == 0.0
    assert report["others", "frechet"].value == pytest.approx(0.0, abs=1e-6)
    assert all(s.value == s.unedited for s in report.scores)
    change = Edit(model.fingerprint, deltas={name: Dense(-before)})
    report = evaluate_images(model, small, judges, DOG, edit=change, **options)
    assert report["others", "drift"].value > 0.01
    assert torch.equal(model.parameter(name), before) and not model.applied
    with pytest.raises(ValueError, match="another model's"):
        evaluate_images(tiny_pipeline("sd1", seed=1), small, judges, DOG, edit=_other(), **options)


def _other():
    other = tiny_pipeline("sd1", seed=1)
    return Edit(other.fingerprint, deltas={"unet.conv_out.bias": Dense(torch.zeros(4))})


# -- contact sheets ----------------------------------------------------------------------------------------------


def test_a_sheet_shows_every_picture_pixel_for_pixel(tmp_path):
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    columns = {name: torch.rand(3, 3, 8, 8, generator=draw) for name in ("un-edited", "UCE")}
    path = columns_sheet(tmp_path / "folder" / "sheet.png", columns, ["a dog", "an owl", "a much longer prompt"])
    assert path == tmp_path / "folder" / "sheet.png"
    sheet = torch.tensor(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
    enlarged = {name: p.repeat_interleave(8, 2).repeat_interleave(8, 3) for name, p in columns.items()}
    top, left = sheet.shape[1] - 3 * 66, sheet.shape[2] - 2 * 66
    assert top > 0 and left > 0  # room for labels
    for i in range(3):
        for j, name in enumerate(columns):
            found = sheet[:, top + 66 * i : top + 66 * i + 64, left + 66 * j : left + 66 * j + 64]
            torch.testing.assert_close(found, enlarged[name][i], rtol=0, atol=0.5 / 255 + 1e-6)  # 8 bits
    for labels in (sheet[:, :top, left:], sheet[:, top:, :left]):
        assert labels.min() < 0.5  # something is written
    plain = np.array(Image.open(grid(tmp_path / "plain.png", [[columns["UCE"][0]]])))
    assert plain.shape == (66, 66, 3)


def test_a_sheet_of_edits_uses_one_seed_a_row(tmp_path):
    from PIL import Image

    model = tiny_pipeline("sd1")
    nothing = Edit(model.fingerprint, deltas={"unet.conv_out.bias": Dense(torch.zeros(4))})
    prompts = ["a cat", "a cat"]
    path = contact_sheet(tmp_path / "sheet.png", model, {"nothing": nothing}, prompts, steps=2)
    sheet = np.array(Image.open(path)).astype(int)
    top, left = sheet.shape[0] - 2 * 66, sheet.shape[1] - 2 * 66
    tiles = [
        [sheet[top + 66 * i : top + 66 * i + 64, left + 66 * j : left + 66 * j + 64] for j in (0, 1)] for i in (0, 1)
    ]
    assert (tiles[0][0] == tiles[0][1]).all() and (tiles[1][0] == tiles[1][1]).all()
    assert (tiles[0][0] != tiles[1][0]).any()  # another row, another seed
    with pytest.raises(ValueError, match="call the edit something else"):
        contact_sheet(tmp_path / "sheet.png", model, {"un-edited": nothing}, prompts, steps=2)


def test_wrong_grids(tmp_path):
    a, b = torch.zeros(3, 8, 8), torch.zeros(3, 4, 4)
    for pictures, labels, message in (
        ([], {}, "at least one picture"),
        ([[]], {}, "at least one picture"),
        ([[a], [a, a]], {}, "same length"),
        ([[a, b]], {}, "one size"),
        ([[a, a]], {"rows": ["x", "y"]}, "1 rows and 2 labels"),
        ([[a, a]], {"columns": ["x"]}, "2 columns and 1 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(tmp_path / "grid.png", pictures, **labels)
    assert not list(tmp_path.iterdir())


# -- reports with intervals --------------------------------------------------------------------------------------


def test_intervals_survive_a_file_and_old_files_are_read(tmp_path):
    report = Report((Score("others", "Acc_s", 0.5, 8, low=0.25, high=0.75), Score("all", "H_o", 0.5, 8, 0.1)))
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    (tmp_path / "old.json").write_text(
        '{"scores": [{"task": "a", "metric": "acc", "value": 0.5, "n": 4, "error": null, "part": "all", '
        '"unedited": null, "chance": 0.25}], "settings": {}}'
    )
    assert Report.load(tmp_path / "old.json")["a"] == Score("a", "acc", 0.5, 4, chance=0.25)
    headers = [column.header for column in report.table().columns]
    assert headers == ["task", "metric", "N", "un-edited", "value", "95 %"]
    assert list(report.table().columns[-1].cells) == ["0.250 to 0.750", "± 0.100"]
