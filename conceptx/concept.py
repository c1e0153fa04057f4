"""What to erase: a `Concept`, written in Python or read from a TOML file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from conceptx.words import whole_words

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["topic", "person", "character", "style", "attribute", "object"]


def _no_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank")
    return text


def _png(name: str) -> str:
    if not name.lower().endswith(".png"):
        raise ValueError(f"a picture must be a PNG file, got {name!r}")
    return name


# Fields that may stand in JSONL files -> what a line has.
IN_FILES = {"texts": ("text",), "retain_texts": ("text",), "pairs": ("with", "without")}
Text = Annotated[str, AfterValidator(_no_blank)]
Picture = Annotated[str, AfterValidator(_png)]


class Personas(BaseModel):
    """Prefixes under which the model writes as an expert in the concept and as one who has never met it (ELM)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    expert: Annotated[tuple[Text, ...], Field(min_length=1)]
    novice: Annotated[tuple[Text, ...], Field(min_length=1)]


class Concept(BaseModel):
    """A concept to erase. Frozen; fields that a method does not use may stay empty.

    name:         what it is called ("chemical elements").
    kind:         topic, person, character, style, attribute or object.
    description:  a noun phrase that says what belongs to it; persona prompts use it (default: the name).
    synonyms:     other names of the same thing.
    prompts:      short prompts that call it up.
    pairs:        prompts that call it up, each with the same prompt without it: (with, without) (EAR).
    texts:        texts about it (the forget corpus).
    anchor:       what to show or say instead.
    retain:       names of what must be kept.
    retain_texts: texts about other things (the retain corpus).
    contexts:     sentences put before a question to coax the concept out (attacks).
    classes:      for an attribute, its values with texts of each: {"female": [...], "male": [...]}.
    personas:     expert and novice prefixes for ELM (default: general templates around the description).
    images:       PNG files that show it, all of one size (MACE).
    masks:        for each of the images, a PNG file that is light where the concept is (default: the whole picture).

    A concept may be called by its name alone: `Concept("Van Gogh", kind="style")`.
    Raises ValueError, in one sentence for each field that is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    kind: Kind = "topic"
    description: str = ""
    synonyms: tuple[Text, ...] = ()
    prompts: tuple[Text, ...] = ()
    pairs: tuple[tuple[Text, Text], ...] = ()
    texts: tuple[Text, ...] = ()
    anchor: str | None = None
    retain: tuple[Text, ...] = ()
    retain_texts: tuple[Text, ...] = ()
    contexts: tuple[Text, ...] = ()
    classes: dict[Text, tuple[Text, ...]] = {}
    personas: Personas | None = None
    images: tuple[Picture, ...] = ()
    masks: tuple[Picture, ...] = ()

    def __init__(self, name: str = "", **fields: Any) -> None:
        try:
            super().__init__(name=name, **fields)
        except ValidationError as error:
            raise ValueError(_explain(error, name or "a concept without a name")) from None

    @model_validator(mode="after")
    def _consistent(self) -> Concept:
        mine = {name.casefold() for name in (self.name, *self.synonyms)}
        if clash := sorted(name for name in self.retain if name.casefold() in mine):
            raise ValueError(f"retain contains the concept itself: {clash}")
        if clash := [first for first, second in self.pairs if first == second]:
            raise ValueError(f"a pair has the same prompt twice: {clash[0]!r}")
        if clash := sorted(set(self.texts) & set(self.retain_texts)):
            raise ValueError(f"{len(clash)} texts are in texts and in retain_texts, the first is {clash[0][:60]!r}")
        if len(self.classes) == 1:
            raise ValueError(f"classes needs at least two values, it has only {list(self.classes)}")
        if self.masks and len(self.masks) != len(self.images):
            raise ValueError(
                f"there are {len(self.images)} images and {len(self.masks)} masks; each needs one, or none"
            )
        return self

    @property
    def about(self) -> str:
        """The description, or the name where there is none."""
        return self.description or self.name

    @staticmethod
    def load(path: str | Path) -> Concept:
        """Read a concept from a TOML file.

        Corpora may stand in JSONL files beside it, one {"text": ...} a line: `texts_file = "corpora/forget.jsonl"`
        and `retain_texts_file`; pairs too, one {"with": ..., "without": ...} a line: `pairs_file`. `images` and `masks`
        hold paths from that folder on. A path that leaves the file's folder is refused.

        Raises FileNotFoundError when a file is missing, ValueError when it is not TOML or not a concept.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no concept file {path}.")
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a TOML file: {error}.") from None
        for key, keys in IN_FILES.items():
            if (name := fields.pop(f"{key}_file", None)) is not None:
                if not isinstance(mine := fields.get(key, []), list):
                    raise ValueError(f"{path}: {key} must be a list, got {mine!r}.")
                fields[key] = [*mine, *_read_lines(path.parent, name, keys)]
        for key in {"images", "masks"} & fields.keys():
            if not isinstance(names := fields[key], list):
                raise ValueError(f"{path}: {key} must be a list of files, got {names!r}.")
            fields[key] = [str(_inside(path.parent, name, "picture file")) for name in names]
        return Concept(**fields)


def pairs_of(concept: Concept) -> Sequence[tuple[str, str]]:
    """(with, without): the concept's pairs, or its prompts with the anchor in the place of its name.

    Raises ValueError when it has neither pairs nor an anchor, or when a prompt does not hold the name as whole words.
    """
    if concept.pairs:
        return concept.pairs
    if not (anchor := (concept.anchor or "").strip()):
        raise ValueError(f"Pairs of prompts need an anchor, or to be given; {concept.name!r} has neither.")
    name, prompts = whole_words(concept.name), concept.prompts or (concept.name,)
    if without := [prompt for prompt in prompts if not name.search(prompt)]:
        raise ValueError(f"The prompt {without[0]!r} does not hold {concept.name!r} as whole words; give pairs.")
    return [(prompt, name.sub(lambda _: anchor, prompt)) for prompt in prompts]


def pictures(concept: Concept) -> tuple[Tensor, Tensor]:
    """The concept's images (n, 3, h, w) in [0, 1] and their masks (n, 1, h, w) of 0 and 1; without masks, all 1.

    A pixel of a mask counts where it is at least half as light as white.
    Raises FileNotFoundError for a missing file; ValueError when there are no images, a file is no picture, sizes
    differ, or a mask is dark throughout.
    """
    import torch

    if not concept.images:
        raise ValueError(f"The concept {concept.name!r} has no images.")
    shots = [_pixels(name, "RGB") for name in concept.images]
    if len({shot.shape for shot in shots}) > 1:
        raise ValueError(f"The images of {concept.name!r} have different sizes.")
    images = torch.stack(shots)
    if not concept.masks:
        return images, torch.ones_like(images[:, :1])
    masks = [_pixels(name, "L") for name in concept.masks]
    for name, mask in zip(concept.masks, masks, strict=True):
        if mask.shape[1:] != images.shape[2:] or not bool((mask >= 0.5).any()):
            raise ValueError(f"The mask {name} is dark throughout, or its size is not that of the images.")
    return images, (torch.stack(masks) >= 0.5).float()


def _pixels(name: str, mode: str) -> Tensor:
    """(channels, h, w) in [0, 1]"""
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    if not Path(name).is_file():
        raise FileNotFoundError(f"There is no picture file {name}.")
    try:
        with Image.open(name) as image:
            values = np.atleast_3d(np.asarray(image.convert(mode), dtype=np.float32))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name} is not a whole picture: {error}.") from None
    return torch.from_numpy(values / 255).permute(2, 0, 1)


def _inside(folder: Path, name: object, what: str) -> Path:
    """The file of that name. Raises ValueError when it lies outside the folder, FileNotFoundError without one."""
    if not isinstance(name, str):
        raise ValueError(f"The name of a {what} must be a text, got {name!r}.")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"The {what} {name!r} lies outside the concept's folder.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no {what} {path}.")
    return path


def _read_lines(folder: Path, name: object, keys: tuple[str, ...]) -> list[Any]:
    """Of each line of a JSONL file what it has under the keys: one text, or several."""
    path = _inside(folder, name, "corpus file")
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 file: {error}.") from None
    return [_read_line(line, path, number, keys) for number, line in enumerate(lines, 1)]


def _read_line(line: str, path: Path, number: int, keys: tuple[str, ...]) -> Any:
    try:
        row = json.loads(line)
        found = [row[key] for key in keys]
    except (json.JSONDecodeError, KeyError, TypeError):
        wanted = ", ".join(f'"{key}": ...' for key in keys)
        raise ValueError(f"{path}, line {number}: expected {{{wanted}}}, got {line.strip()[:60]!r}.") from None
    return found[0] if len(found) == 1 else found


def _explain(error: ValidationError, name: str) -> str:
    """One sentence a problem, with the fields that exist where an unknown one was given."""
    problems = []
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"])) or "the concept"
        if problem["type"] == "extra_forbidden":
            problems.append(f"unknown field {where!r} (available: {', '.join(sorted(Concept.model_fields))})")
        else:
            problems.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
    return f"Concept {name!r}: {'; '.join(problems)}."
