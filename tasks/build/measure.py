"""Print the table of ../README.md, measured on the un-edited SmolLM2: `python tasks/build/measure.py [TASK ...]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

TASKS = Path(__file__).parent.parent / "lm_eval"


def main(names: list[str]) -> None:
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from conceptx.testbeds import smollm2

    model, tokenizer = smollm2.load(torch.bfloat16)
    host = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, device="cpu", max_length=512)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    for name in names or sorted(path.stem for path in TASKS.glob("cx_*.yaml") if path.stem != "cx_all"):
        sys.stdout.write(_line(name, host, manager) + "\n")
        sys.stdout.flush()


def _line(name: str, host: Any, manager: Any) -> str:
    from lm_eval import simple_evaluate

    result = simple_evaluate(model=host, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True)
    scores = {k.split(",")[0]: v for k, v in result["results"][name].items() if isinstance(v, float)}
    samples = result["samples"][name]
    metric = next(m for m in ("acc", "exact_match", "word_perplexity") if m in scores)
    halves = [[s[metric] for s in samples if s["doc"].get("seen") is seen] for seen in (True, False)]
    parts = [f"{sum(h) / len(h):.2f}" if h else "" for h in halves]
    shown = f"{scores[metric]:.2f} | {scores.get('acc_norm', float('nan')):.2f}".replace("nan", "")
    return f"| `{name}` | {len(samples)} | {len(halves[0])} | {shown} | {' | '.join(parts)} |"


if __name__ == "__main__":
    main(sys.argv[1:])
