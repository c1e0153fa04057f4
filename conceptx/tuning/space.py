"""The settings that a search may vary, and the sampler that chooses among them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from conceptx.settings import Choices, Range, tunable_fields

RANDOM = (
    6  # trials before the sampler models what it has seen (better than 3 and 10 on noisy quadratics of 10 settings)
)
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """Ranges and choices by the name of the setting.  whole: those that take whole numbers only."""

    parts: Mapping[str, Range | Choices]
    whole: frozenset[str]

    @staticmethod
    def of(method: type, fields: Sequence[str] | None, known: Sequence[Settings]) -> Space:
        """What the method marks as tunable, or the fields among it, with room for the settings that are known.

        Raises ValueError when nothing is tunable, or not what was asked for.
        """
        marked = _marked(method, fields)
        parts = {name: _widened(part, [settings[name] for settings in known]) for name, part in marked.items()}
        return Space(parts, frozenset(name for name in parts if isinstance(known[0][name], int)))

    def plain(self) -> dict[str, Any]:
        return {name: asdict(part) for name, part in self.parts.items()}

    def ask(self, seen: Sequence[tuple[Settings, float]], seed: int) -> dict[str, Any]:
        """The next point, a function of the seed and of what was seen (settings, value; larger is better)."""
        import optuna

        distributions = {name: self._distribution(name) for name in self.parts}
        with _quietly():
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM, multivariate=True)
            study = optuna.create_study(direction="maximize", sampler=sampler)
            for settings, value in seen:
                params = {name: self._coordinate(name, settings[name]) for name in self.parts}
                study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
            found = study.ask(distributions).params
        return {name: self._value(name, found[name]) for name in self.parts}

    def _distribution(self, name: str) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        part = self.parts[name]
        if isinstance(part, Choices):
            return CategoricalDistribution(range(len(part.values)))
        if name in self.whole:
            return IntDistribution(int(part.low), int(part.high), log=part.log)
        return FloatDistribution(part.low, part.high, log=part.log)

    def _coordinate(self, name: str, value: Any) -> Any:
        part = self.parts[name]
        return part.values.index(value) if isinstance(part, Choices) else value

    def _value(self, name: str, coordinate: Any) -> Any:
        part = self.parts[name]
        return part.values[coordinate] if isinstance(part, Choices) else coordinate


def _marked(method: type, fields: Sequence[str] | None) -> dict[str, Range | Choices]:
    marked = tunable_fields(method)
    if not marked:
        from conceptx import methods

        others = [name for name in methods.__all__ if tunable_fields(getattr(methods, name))]
        raise ValueError(f"{method.__name__} has no tunable settings; {', '.join(others)} have some.")
    wanted = list(marked) if fields is None else list(fields)
    if unknown := [name for name in wanted if name not in marked]:
        raise ValueError(f"{method.__name__} has no tunable {', '.join(unknown)}; it has {', '.join(marked)}.")
    if not wanted:
        raise ValueError(f"No setting was given; {method.__name__} has {', '.join(marked)}.")
    return {name: part for name, part in marked.items() if name in wanted}


def _widened(part: Range | Choices, held: Sequence[Any]) -> Range | Choices:
    if isinstance(part, Range):
        return Range(min(part.low, *held), max(part.high, *held), part.log)
    values = plain(part.values)
    for value in held:
        values += [] if value in values else [value]
    return Choices(tuple(values))


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Optuna's own log."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
