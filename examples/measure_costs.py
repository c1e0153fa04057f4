"""CPU time and memory of each method on SmolLM2-135M: load, record, solve or train, save; each in a process of its own.

python examples/measure_costs.py elm pisces rmu directional_ablation leace rlace --out docs/results/costs.json

Settings are those of tasks/recipes/smollm2, the concept is the chemical elements.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chemical_elements/{}.toml", "{}.toml")  # of recipes, the more special first
RECORDS = ("recording", "teachers", "sampling", "what the model knows")  # beginnings of what progress says


def measure(method: str) -> dict[str, float]:
    """CPU seconds of each phase on one thread, megabytes at the peak and after loading."""
    import torch

    from conceptx import Concept, load, methods
    from conceptx.demo.language import fast_dtype
    from conceptx.places import tasks_folder
    from conceptx.progress import heard_by
    from conceptx.settings import read_recipe

    torch.set_num_threads(1)
    kind = getattr(methods, {module: name for name, module in methods.MODULES.items()}[method])
    recipes = tasks_folder() / "recipes" / "smollm2"
    found = [recipes / name.format(method) for name in NAMES if (recipes / name.format(method)).is_file()]
    values = read_recipe(found[0]) if found else {}
    more = {"sites": values.pop("sites")} if "sites" in values else {}
    start = time.process_time()
    model = load("smollm2", dtype=fast_dtype())
    concept = Concept.load(tasks_folder() / "concepts" / "chemical_elements.toml")
    loaded, memory = time.process_time(), _peak()
    recorded, last = 0.0, loaded

    def listen(what: str, done: int, total: int, note: str) -> None:
        nonlocal recorded, last
        now = time.process_time()
        if done and what.startswith(RECORDS):
            recorded += now - last
        last = now

    with heard_by(listen):
        edit = kind.from_settings(values).erase(model, concept, **more)
    erased = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        edit.save(folder)
        saved = time.process_time()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "load": loaded - start,
        "record": recorded,
        "solve or train": erased - loaded - recorded,
        "save": saved - erased,
        "MB after load": memory,
        "MB at peak": _peak(),
        "kB on disk": size / 1000,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    if arguments.out is None:
        sys.stdout.write(json.dumps(measure(arguments.methods[0])))
        return
    costs = {}
    for method in arguments.methods:
        alone = [sys.executable, "-W", "ignore", __file__, method]
        costs[method] = json.loads(subprocess.run(alone, capture_output=True, text=True, check=True).stdout)
        sys.stdout.write(f"{method}: " + ", ".join(f"{k} {v:.1f}" for k, v in costs[method].items()) + "\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
