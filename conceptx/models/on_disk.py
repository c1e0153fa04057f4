"""A model folder as a host: known from its configuration, its weights read from the disk when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from conceptx.edit import Delta, Fingerprint, Part
from conceptx.edit.fold import layer_of
from conceptx.edit.host import WHOLE
from conceptx.models import parameters
from conceptx.models.autoregressive import FAMILIES, ARImageModel
from conceptx.models.base import INDEX, Model, pipeline_index, pipeline_of
from conceptx.models.diffusion import DiffusionModel
from conceptx.models.language import LanguageModel
from conceptx.models.sites import block_of
from conceptx.models.wrapper import edits_on
from conceptx.progress import quietly
from conceptx.store import opened

CONFIG = "config.json"
TEXT_PREFIX = "text_model"  # before the names of CLIP's text encoder in older checkpoints


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored: its file, relative to the checkpoint, and its key there."""

    file: Path
    key: str


Places = Mapping[str, tuple[Place, ...]]  # parameter -> all its copies: tied ones may be stored under each name


class OnDisk:
    """The part of a host that is read from a folder when it is asked for."""

    folder: Path
    places: Places

    @property
    def stored(self) -> set[Place]:
        """Where the parameters are."""
        return {place for places in self.places.values() for place in places}

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of the stored weights; no more than one is mapped at a time."""
        parts = cast(Model, self).components
        return Fingerprint(
            {name: Part.of(kind, self._values(part, _prefix(name))) for name, (kind, part) in parts.items()}
        )

    def _values(self, part: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, _ in part.named_parameters():
            yield name, mapped(self.folder, self.places[prefix + name][0])

    def parameter(self, name: str) -> Tensor | None:
        """As of a model in memory, but not live: a view in (out, in) of the file."""
        module = cast(Model, self).module
        absent = parameters.parameter(module, name) is None
        return None if absent else parameters.oriented(module, name, mapped(self.folder, self.places[name][0]))

    def beside_weights(self, biases: Mapping[str, Delta]) -> dict[Path, dict[str, Tensor]]:
        """New biases by file and key: each goes where the weight of its layer is, in that one's precision."""
        found: dict[Path, dict[str, Tensor]] = {}
        for name, delta in biases.items():
            place = self.places[f"{layer_of(name)}.weight"][0]
            value = delta.added_to(torch.zeros(cast(Model, self).parameter_shape(name), dtype=torch.float64))
            key = f"{layer_of(place.key)}.bias"
            found.setdefault(place.file, {})[key] = value.to(mapped(self.folder, place).dtype)
        return found


class LanguageModelOnDisk(OnDisk, LanguageModel):
    """Without a tokenizer: no text is read."""

    def __init__(self, module: Any, folder: Path) -> None:
        LanguageModel.__init__(self, module, None)
        self.folder, self.places = folder, _places(module, folder, folder)


class ARImageModelOnDisk(OnDisk, ARImageModel):
    """Without a processor: nothing is drawn."""

    def __init__(self, module: Any, folder: Path) -> None:
        self.module, self.applied = module, edits_on(module)
        self.folder, self.places = folder, _places(module, folder, folder)


class PipelineOnDisk(OnDisk, DiffusionModel):
    """Its components are subfolders."""

    def __init__(self, pipeline: Any, folder: Path) -> None:
        DiffusionModel.__init__(self, pipeline)
        found = {name: _places(part, folder / name, folder) for name, (_, part) in self.components.items()}
        self.folder = folder
        self.places = {_prefix(name) + inside: p for name, places in found.items() for inside, p in places.items()}


ModelOnDisk = LanguageModelOnDisk | ARImageModelOnDisk | PipelineOnDisk


def on_disk(folder: Path) -> ModelOnDisk:
    """The model in a folder. Raises FileNotFoundError or ValueError when it is none, unknown or not whole."""
    if (index := pipeline_index(str(folder))) is not None:
        return PipelineOnDisk(_pipeline(folder, index), folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no model ({CONFIG} and {INDEX} are missing).")
    return _of_transformers(folder)


def _of_transformers(folder: Path) -> LanguageModelOnDisk | ARImageModelOnDisk:
    from transformers import AutoConfig, AutoModelForCausalLM, JanusForConditionalGeneration

    kind = read_json(folder / CONFIG).get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{folder / CONFIG} names no model type of transformers.")
    if kind not in FAMILIES:
        block_of(kind)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        if kind in FAMILIES:
            return ARImageModelOnDisk(JanusForConditionalGeneration(config), folder)
        return LanguageModelOnDisk(AutoModelForCausalLM.from_config(config, trust_remote_code=False), folder)


def _pipeline(folder: Path, index: Mapping[str, Any]) -> Any:
    with quietly():
        parts = {name: _component(folder / name, *index[name]) for name in _component_names(index)}
        modules = {name: part for name, part in parts.items() if part is not None}
        return pipeline_of(str(folder), dict(index), torch.float32, **modules)


def _component_names(index: Mapping[str, Any]) -> list[str]:
    return [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and all(value)]


def _component(folder: Path, library: str, kind: str) -> nn.Module | None:
    """A component without its weights, or None when it has none (a tokenizer, a scheduler)."""
    found = getattr(import_module(library), kind, None) if library in ("diffusers", "transformers") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        return None
    known: Any = found
    with torch.device("meta"):
        if library == "diffusers":
            return known.from_config(known.load_config(folder))
        return known(known.config_class.from_pretrained(folder))


def _prefix(component: str) -> str:
    """Of the names of a component's parameters."""
    return "" if component == WHOLE else f"{component}."


# -- where the weights are ---------------------------------------------------------------------------------------------


def _places(part: nn.Module, folder: Path, checkpoint: Path) -> Places:
    """Where a component's parameters are stored. Raises ValueError when one is missing or has another shape."""
    stored = _stored(folder)
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in part.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    places: dict[str, tuple[Place, ...]] = {}
    for parameter, names in tied.items():
        spellings = dict.fromkeys(key for name in names for key in _spellings(part, name))
        keys = [key for key in spellings if key in stored]
        if not keys:
            raise ValueError(f"The safetensors files in {folder} lack the weight {names[0]}.")
        shape = list(parameter.shape)
        if wrong := [key for key in keys if stored[key][1] != shape]:
            raise ValueError(f"{wrong[0]} in {folder} has the shape {stored[wrong[0]][1]}, not {shape}.")
        copies = tuple(Place(stored[key][0].relative_to(checkpoint), key) for key in keys)
        places |= dict.fromkeys(names, copies)
    return places


def _stored(folder: Path) -> dict[str, tuple[Path, list[int]]]:
    """(file, shape) of every key in a component's weights."""
    found: dict[str, tuple[Path, list[int]]] = {}
    for path in _shards(folder):
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key in found:
                    raise ValueError(f"{key} is stored twice in {folder}, in {found[key][0].name} and {path.name}.")
                found[key] = (path, list(file.get_slice(key).get_shape()))
    return found


def _shards(folder: Path) -> list[Path]:
    """The files of a component's weights: those that its index names, or the only one."""
    files, index = sorted(folder.glob("*.safetensors")), index_of(folder)
    if not files:
        raise ValueError(f"{folder} holds no weights in safetensors.")
    named = files[:1] if index is None else sorted({folder / name for name in read_json(index)["weight_map"].values()})
    if missing := [path.name for path in named if path not in files]:
        raise ValueError(f"{folder} lacks {missing[0]}, which its index names.")
    if extra := [path.name for path in files if path not in named]:
        raise ValueError(f"{folder} holds more than one set of weights ({extra[0]} beside {named[0].name}); leave one.")
    return named


def index_of(folder: Path) -> Path | None:
    """The file that says which key is where, perhaps of a variant. Raises ValueError when there are several."""
    found = sorted(folder.glob("*.safetensors.index*.json"))
    if len(found) > 1:
        raise ValueError(f"{folder} holds more than one set of weights ({found[0].name}, {found[1].name}); leave one.")
    if found and not isinstance(read_json(found[0]).get("weight_map"), dict):
        raise ValueError(f"{found[0]} has no weight_map.")
    return found[0] if found else None


def _spellings(part: nn.Module, name: str) -> list[str]:
    """How a parameter may be named in a checkpoint: a base model is saved without the prefix it has in a larger one."""
    prefixes = dict.fromkeys([getattr(part, "base_model_prefix", ""), TEXT_PREFIX])
    longer = [f"{prefix}.{name}" for prefix in prefixes if prefix]
    shorter = [name.removeprefix(f"{prefix}.") for prefix in prefixes if prefix and name.startswith(f"{prefix}.")]
    return [name, *longer, *shorter]


def mapped(folder: Path, place: Place) -> Tensor:
    """A stored tensor; the file is unmapped with it."""
    with opened(folder / place.file) as file:
        return file.get_tensor(place.key)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError when it is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return found
