"""One concept file, three kinds of models: the same geometry printed side by side.

python examples/one_concept_three_hosts.py geometry
python examples/one_concept_three_hosts.py drawn      # what maps at different places do to the pictures

geometry: half of the concept's texts is used to fit the subspaces, the other half to measure; everything is at one
site of each model, and nothing is drawn. drawn: the whole edits, on the benchmarks of the image models; what is in the
output folder is not measured again.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from cells import average, drawn_benchmark, once, values
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from conceptx import Concept, Report, load
from conceptx.eraser import VectorEraser, labelled_states, labelled_texts
from conceptx.evaluation.images import evaluate_images
from conceptx.geometry import Subspace
from conceptx.methods import LEACE, RLACE
from conceptx.models import LanguageModel, Model
from conceptx.places import tasks_folder
from conceptx.progress import only_ours, shown
from conceptx.testbeds import emoji

SITES = {  # model -> the site that is shown
    "smollm2": "layers.7.mlp_input",
    "testbed:emoji": "text_encoder.layers.0",
    "testbed:janus": "layers.2.mlp_input",
}
PLACES: dict[str, tuple[tuple[VectorEraser, tuple[str, ...] | None], ...]] = {  # None: the method's default
    "testbed:emoji": ((LEACE(), None), (RLACE(), ("text_encoder.layers.0",))),
    "testbed:janus": (
        (LEACE(), ("prompt.layers.2.mlp_input",)),
        (LEACE(), None),
        (RLACE(), ("prompt.layers.0.attention_input",)),
    ),
}
ROWS = ("site", "dimension", "tokens fitted on", "rank", "angle of basis and dual", "probe before", "probe after",
        "drift of the concept", "drift of the others")  # fmt: skip


def states(model: Model, concept: Concept, site: str, half: int) -> tuple[Tensor, Tensor]:
    """Activations (tokens, d) and labels of every second text."""
    texts, labels = labelled_texts(concept)
    return labelled_states(model, texts[half::2], labels[half::2], site)


def probe(space: Subspace | None, fitted: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> float:
    """Share of held-out tokens whose label a linear probe finds, both kinds counting alike."""
    (x, z), (seen, wanted) = fitted, held_out
    if space is not None:
        x, seen = space.remove(x), space.remove(seen)
    model = LogisticRegression(max_iter=2000, class_weight="balanced").fit(x.numpy(), z.numpy())
    right = torch.from_numpy(model.predict(seen.numpy())) == wanted
    return float(torch.stack([right[wanted == label].float().mean() for label in (0, 1)]).mean())


def drift(space: Subspace, x: Tensor) -> float:
    """|T(x) - x| as a share of |x - mean|, over all tokens."""
    return float((space.remove(x) - x).norm() / (x - x.mean(0)).norm())


def column(name: str, concept: Concept) -> Iterator[str]:
    """The rows of one model."""
    model, site = load(name), SITES[name]
    fitted, held_out = (states(model, concept, site, half) for half in (0, 1))
    space = LEACE(shrinkage=True).fit(*fitted)  # a language model has nearly as many dimensions as there are tokens
    angle = float(torch.rad2deg(space.angles(Subspace.orthogonal(space.dual.T))[0]))
    seen, labels = held_out
    yield site
    yield str(space.dim)
    yield str(len(fitted[0]))
    yield str(space.rank)
    yield f"{angle:.0f}°"
    yield f"{probe(None, fitted, held_out):.2f}"
    yield f"{probe(space, fitted, held_out):.2f}"
    yield f"{drift(space, seen[labels == 1]):.3f}"
    yield f"{drift(space, seen[labels == 0]):.3f}"


def geometry(concept: Concept, models: Sequence[str]) -> Table:
    columns = [list(column(name, concept)) for name in models]
    table = Table(title=f"{concept.name}: LEACE on {len(columns)} models", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    for row in zip(ROWS, *columns, strict=True):
        table.add_row(*row)
    return table


def drawn(concept: Concept, name: str, out: Path) -> Table:
    """Acc_e and Acc_s of an image model, un-edited and with maps at different places."""
    table = Table(title=f"{concept.name} on {name}", title_justify="left", box=SIMPLE_HEAD)
    for head in ("", "sites", "Acc_e", "Acc_s", "un-edited Acc_e", "un-edited Acc_s"):
        table.add_column(head, justify="right" if "Acc" in head else "left")
    for eraser, sites in PLACES[name]:
        what, where = type(eraser).__name__, "default" if sites is None else ", ".join(sites)
        path = out / f"{concept.name}-{name.partition(':')[2]}-{what.lower()}-{where.replace('.', '_')}.json"
        report = once(path, partial(measured, concept, name, eraser, sites))
        columns = (("target", "Acc_e"), ("others", "Acc_s"))
        numbers = [average(values([report], *column, before=before)) for before in (False, True) for column in columns]
        table.add_row(what, where, *numbers)
    return table


def measured(concept: Concept, name: str, eraser: VectorEraser, sites: tuple[str, ...] | None) -> Report:
    model = load(name)
    assert not isinstance(model, LanguageModel)
    suite = drawn_benchmark(f"{name.partition(':')[2]}_{concept.kind}s", 0)
    edit = eraser.erase(model, concept, sites=sites)
    return evaluate_images(model, suite, emoji.judges(), concept, edit=edit)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["geometry", "drawn"])
    parser.add_argument("--concept", type=Path, default=tasks_folder() / "concepts" / "dog.toml")
    parser.add_argument("--models", nargs="+", choices=list(SITES), help="default: all three, or both that draw")
    parser.add_argument("--out", type=Path, default=Path("docs/results/three-hosts"))
    parsed = parser.parse_args(arguments)
    if parsed.part == "drawn" and (silent := set(parsed.models or ()) - set(PLACES)):
        parser.error(f"{min(silent)} draws nothing; models that do: {', '.join(PLACES)}")
    only_ours()
    concept, console = Concept.load(parsed.concept), Console(width=120)
    with shown():
        if parsed.part == "geometry":
            console.print(geometry(concept, parsed.models or list(SITES)))
        else:
            for name in parsed.models or list(PLACES):
                console.print(drawn(concept, name, parsed.out))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
