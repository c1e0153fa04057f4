"""One concept file, three kinds of models: the same geometry printed side by side.

python examples/one_concept_three_hosts.py tasks/concepts/dog.toml

Half of the concept's texts is used to fit the subspaces, the other half to measure; everything is at one site of each
model. Nothing is drawn or generated.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from conceptx import Concept, load
from conceptx.eraser import labelled_states, labelled_texts
from conceptx.geometry import Subspace
from conceptx.methods import LEACE
from conceptx.models import Model
from conceptx.progress import only_ours, shown

SITES = {  # model -> the site that is shown
    "smollm2": "layers.7.mlp_input",
    "testbed:emoji": "text_encoder.layers.0",
    "testbed:janus": "layers.2.mlp_input",
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concept", type=Path)
    parser.add_argument("--models", nargs="+", default=list(SITES), choices=list(SITES))
    parsed = parser.parse_args(arguments)
    only_ours()
    concept = Concept.load(parsed.concept)
    with shown():
        columns = [list(column(name, concept)) for name in parsed.models]
    table = Table(title=f"{concept.name}: LEACE on {len(columns)} models", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for name in parsed.models:
        table.add_column(name, justify="right")
    for row in zip(ROWS, *columns, strict=True):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
