"""An `ImageBenchmark`: which pictures say that a concept is gone and that the others are kept. Read from TOML."""

from __future__ import annotations

import string
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from conceptx.concept import Concept, Text
from conceptx.models.parameters import similar

Role = Literal["target", "general", "others"]
FIELDS = ("object", "an object", "style")  # what a template may name in braces


@dataclass(frozen=True)
class Item:
    """One picture to draw and what should be in it.

    role:     target (the erased name, explicit), general (a synonym or an implicit prompt) or others.
    expected: the name that the un-edited model should draw, of the benchmark's kind.
    other:    the name of the other kind in the prompt (the style of an object, the object of a style), if any.
    part:     finer role: synonyms or implicit; near or far.
    name:     the word in the prompt: a synonym, or the expected name; "" for an implicit prompt.
    """

    role: Role
    expected: str
    other: str | None
    part: str
    name: str
    prompt: str
    seed: int


class Target(BaseModel):
    """A concept that may be erased, and how it is asked for.

    anchor:   what the eraser should show instead; its share among the target's pictures is reported.
    synonyms: other names, put into the benchmark's templates.
    implicit: whole prompts that call it up without naming it; {style} (or {object}) is filled in turn.
    near:     names that resemble it most: their accuracy is reported apart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    anchor: str | None = None
    synonyms: tuple[Text, ...] = ()
    implicit: tuple[Text, ...] = ()
    near: tuple[Text, ...] = ()


class ImageBenchmark(BaseModel):
    """Prompts, seeds and numbers of pictures. Frozen.

    kind:      what is erased: "object" or "style".
    targets:   what else to ask of concepts that may be erased, one `[[targets]]` each; any other name may be erased too
               and is asked for by its name alone.
    objects, styles: the names in use. Those of `kind` that are not erased are the others; the other kind goes in turn
               through the prompts.
    templates: prompts, none of them used for erasing; {object}, {an object} (with its article) and {style}.
    images, images_general, images_others: pictures of each erased name, of each synonym and implicit prompt, and of
               each other name.
    seed:      the first seed.  steps, guidance: of the sampler; None: the model's own.
    unrelated: a name of the same kind on which the same attack is made, for comparison.
    no_article: names before which {an object} puts none ("grapes").
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["object", "style"]
    targets: tuple[Target, ...] = ()
    objects: tuple[Text, ...] = ()
    styles: tuple[Text, ...] = ()
    templates: Annotated[tuple[Text, ...], Field(min_length=1)]
    images: Annotated[int, Field(ge=2)] = 20
    images_general: Annotated[int, Field(ge=1)] = 10
    images_others: Annotated[int, Field(ge=1)] = 2
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: float | None = None
    unrelated: str | None = None
    no_article: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ImageBenchmark:
        for template in self.templates:
            if self.kind not in (fields := _fields(template)) and not (self.kind == "object" and "an object" in fields):
                raise ValueError(f"the template {template!r} does not name the {self.kind}")
        for text in (*self.templates, *(prompt for target in self.targets for prompt in target.implicit)):
            if unknown := _fields(text) - set(FIELDS):
                raise ValueError(f"{text!r} has the field {min(unknown)!r}; available: {', '.join(FIELDS)}")
            if not self.companions and _fields(text) & (
                {"style"} if self.kind == "object" else {"object", "an object"}
            ):
                raise ValueError(f"{text!r} needs names of the other kind, and there are none")
        for text in (prompt for target in self.targets for prompt in target.implicit):
            if _fields(text) & {self.kind, f"an {self.kind}"}:
                raise ValueError(f"the implicit prompt {text!r} has a field for the name that it must not say")
        for name in ("names", "companions"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"a name is listed twice among the {len(getattr(self, name))} {name}")
        asked = [("targets", [t.name for t in self.targets]), ("near", [n for t in self.targets for n in t.near])]
        for field, names in [*asked, ("unrelated", [self.unrelated] if self.unrelated else [])]:
            if missing := sorted(set(names) - set(self.names)):
                raise ValueError(f"{field}: {missing[0]!r} is not one of the {len(self.names)} {self.kind}s")
        if len({t.name for t in self.targets}) < len(self.targets):
            raise ValueError("a target is listed twice")
        return self

    @staticmethod
    def load(path: str | Path) -> ImageBenchmark:
        """Raises FileNotFoundError, or ValueError (one sentence) when the file is no image benchmark."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no benchmark file {path}.")
        try:
            return ImageBenchmark(**tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not an image benchmark: {error}.") from None
        except ValidationError as error:
            raise ValueError(f"{path} is not an image benchmark: {_explain(error)}.") from None

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the kind that is erased."""
        return self.objects if self.kind == "object" else self.styles

    @property
    def sampler(self) -> dict[str, Any]:
        """Options of a model's `generate`; one that draws token by token takes no steps."""
        steps = {} if self.steps is None else {"steps": self.steps}
        return {"guidance": self.guidance, **steps}

    @property
    def companions(self) -> tuple[str, ...]:
        """All names of the other kind."""
        return self.styles if self.kind == "object" else self.objects

    @property
    def other_kind(self) -> str:
        return "style" if self.kind == "object" else "object"

    def half(self, half: str) -> ImageBenchmark:
        """Every second prompt form: the first, third, … of templates and implicit prompts for "test", the others for
        "dev", on which settings are chosen; its pictures begin from seeds of their own.

        Raises ValueError for another half, or when a single template leaves nothing for "dev".
        """
        if half not in ("test", "dev"):
            raise ValueError(f"The prompts have two halves, test and dev; got {half!r}.")
        if len(self.templates) < 2:
            raise ValueError("A benchmark with a single template has no dev half.")
        first = 1 if half == "dev" else 0
        targets = tuple(t.model_copy(update={"implicit": t.implicit[first::2]}) for t in self.targets)
        seed = self.seed + first * len(self.names) * max(self.images, self.images_general, self.images_others)
        templates = self.templates[first::2]
        return self.model_copy(update={"templates": templates, "targets": targets, "seed": seed})

    def targets_of(self, concepts: Sequence[Concept]) -> tuple[Target, ...]:
        """The entries of the concepts. Raises ValueError for a name that the benchmark has not, or another kind."""
        if wrong := [concept for concept in concepts if concept.kind != self.kind]:
            raise ValueError(f"The benchmark is on erasing {self.kind}s; {wrong[0].name!r} is of kind {wrong[0].kind}.")
        if missing := [concept.name for concept in concepts if concept.name not in self.names]:
            raise ValueError(f"The benchmark has no {self.kind} {missing[0]!r}; {similar(missing[0], self.names)}.")
        known = {target.name: target for target in self.targets}
        return tuple(known.get(concept.name, Target(name=concept.name)) for concept in concepts)

    def items(self, concepts: Sequence[Concept]) -> tuple[Item, ...]:
        """Every picture to draw when these concepts are erased.

        A name goes through companions and templates in turn, so that a few pictures meet each of them. Picture j of
        name k begins from seed + j (number of names) + k, whatever is erased: pictures of the un-edited model can
        be shared by all concepts of a benchmark. Raises ValueError when a prompt is one of the concepts' own: it would
        be scored on what it was erased with.
        """
        targets = self.targets_of(concepts)
        erased = {target.name for target in targets}
        near = {name for target in targets for name in target.near}
        found = [item for target in targets for item in self._asked(target)]
        for name in self.names:
            if name not in erased:
                part = "near" if name in near else "far"
                found += self._named("others", name, name, part, self.images_others)
        _refuse_overlap(found, concepts)
        return tuple(found)

    def samples(self, concepts: Sequence[Concept], each: int = 4) -> list[str]:
        """A few prompts of each role, for a contact sheet: erased, synonyms and implicit, neighbours, others."""
        rows: dict[tuple[str, str], list[str]] = {}
        for item in self.items(concepts):
            rows.setdefault((item.role, item.part), []).append(item.prompt)
        return [prompt for prompts in rows.values() for prompt in list(dict.fromkeys(prompts))[:each]]

    def _asked(self, target: Target) -> Iterator[Item]:
        yield from self._named("target", target.name, target.name, "all", self.images)
        for synonym in target.synonyms:
            yield from self._named("general", target.name, synonym, "synonyms", self.images_general)
        for text in target.implicit:
            yield from self._drawn("general", target.name, "", "implicit", (text,), self.images_general)

    def _named(self, role: Role, expected: str, name: str, part: str, count: int) -> Iterator[Item]:
        return self._drawn(role, expected, name, part, self.templates, count)

    def _drawn(
        self, role: Role, expected: str, name: str, part: str, templates: Sequence[str], count: int
    ) -> Iterator[Item]:
        place, companions = self.names.index(expected), self.companions or ("",)
        for j in range(count):
            turn = (j + place) % len(companions)
            template = templates[(j // len(companions) + turn + place) % len(templates)]
            prompt = self._fill(template, name, companions[turn])
            other = companions[turn] if _fields(template) - {self.kind, f"an {self.kind}"} else None
            yield Item(role, expected, other, part, name, prompt, self.seed + j * len(self.names) + place)

    def _fill(self, template: str, name: str, companion: str) -> str:
        thing, style = (name, companion) if self.kind == "object" else (companion, name)
        return template.format(**{"object": thing, "an object": self._article(thing), "style": style})

    def _article(self, name: str) -> str:
        if not name or name in self.no_article:
            return name
        vowel = name[0].casefold() in "aeiou" and not name.casefold().startswith(("uni", "use", "eu"))
        return f"{'an' if vowel else 'a'} {name}"


def _fields(text: str) -> set[str]:
    """The names in braces."""
    try:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise ValueError(f"{text!r} has unmatched braces ({error})") from None


def _refuse_overlap(items: Sequence[Item], concepts: Sequence[Concept]) -> None:
    used = {prompt for concept in concepts for prompts in (concept.prompts, *concept.pairs) for prompt in prompts}
    if overlap := sorted({item.prompt for item in items} & used):
        raise ValueError(
            f"{len(overlap)} prompts of the benchmark are prompts of the concept, the first is {overlap[0]!r}; "
            "what was used for erasing cannot score it."
        )


def _explain(error: ValidationError) -> str:
    """The first problem, with the fields that exist where an unknown one was given."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        fields = Target.model_fields if len(problem["loc"]) > 1 else ImageBenchmark.model_fields
        return f"unknown field {where!r} (available: {', '.join(sorted(fields))})"
    return f"{where}: {problem['msg']}".removeprefix(": ").replace("Value error, ", "")
