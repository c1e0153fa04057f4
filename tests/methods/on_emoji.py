"""A few pictures of the dog and of what was retained, judged: enough to see that an edit does what it should."""

from functools import cache

import torch

from conceptx import Concept
from conceptx.places import tasks_folder
from conceptx.testbeds import emoji

STYLES = ("noto", "twemoji", "fluent")
OTHERS = ("owl", "apple", "car", "fish", "rose", "book", "key", "moon", "rocket", "penguin")
PROMPTS = [f"a {style} dog" for style in STYLES for _ in range(4)] + [f"a {STYLES[0]} {name}" for name in OTHERS]
NAMES = ["dog"] * 12 + [*OTHERS]


def dog():
    return Concept.load(tasks_folder() / "concepts" / "dog.toml")


def _hits(model):
    images = model.generate(PROMPTS, seeds=range(len(PROMPTS)), steps=12)
    judges = emoji.judges()
    wanted = torch.tensor([judges.object_names.index(name) for name in NAMES])
    return (judges.objects(images).argmax(-1) == wanted).double()


@cache
def _unedited(model):
    return _hits(model)


def scores(model, edit):
    """Shares of pictures that show the dog, and what else was asked for, before and with the edit."""
    before = _unedited(model)
    with edit.applied(model):
        after = _hits(model)
    shares = {"dog": after[:12], "others": after[12:], "dog before": before[:12], "others before": before[12:]}
    return {name: float(hits.mean()) for name, hits in shares.items()}
