"""A run of ELM on a tiny model, in a process of its own: python elm_run.py OUT STEPS (see test_elm.py)."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from hosts import GARDEN, METALS, tiny

from conceptx import Concept
from conceptx.methods import ELM

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a random model follows no persona
    out, steps, dropout = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    eraser = ELM(
        layers=(0, 2), rank=2, eta=5.0, dropout=dropout, steps=steps, batch_size=2, learning_rate=1e-3,
        max_tokens=16, fluency_texts=4, fluency_tokens=6,
    )  # fmt: skip
    concept = Concept("metals", texts=METALS, retain_texts=GARDEN)
    edit = eraser.erase(tiny(), concept, seed=1, checkpoint=out / "checkpoint")
    several = PartialState()
    sys.stdout.write(f"{several.process_index} of {several.num_processes} processes\n")
    if several.is_main_process:
        edit.save(out / "edit")
    several.destroy_process_group()
