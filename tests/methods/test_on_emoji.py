"""UCE and ESD on the trained emoji model, and what they leave for a program that has only diffusers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conceptx import Concept, Edit, load
from conceptx.demo.images import short_benchmark
from conceptx.evaluation.images import Unedited, evaluate_images
from conceptx.methods import ESD, UCE
from conceptx.models import DiffusionModel
from conceptx.places import tasks_folder
from conceptx.settings import build, read_recipe
from conceptx.store import load_tensors
from conceptx.testbeds import emoji

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
REMEMBERED = Unedited()


@pytest.fixture(scope="module")
def model():
    return load(emoji.NAME)


def concept(name="dog"):
    return Concept.load(tasks_folder() / "concepts" / f"{name}.toml")


def report(model, edit, name="dog"):
    suite = short_benchmark(concept(name)).model_copy(update={"seed": 5})
    return evaluate_images(model, suite, emoji.judges(), concept(name), edit=edit, unedited=REMEMBERED)


def assert_erased(found):
    """The bar of the issue, on fewer pictures."""
    assert found["target", "Acc_e"].unedited >= 0.8
    assert found["target", "Acc_e"].value <= 0.1
    assert found["others", "Acc_s"].value >= 0.9 * found["others", "Acc_s"].unedited


def test_uce_takes_the_dog_and_leaves_the_others(model):
    found = report(model, UCE().erase(model, concept()))
    assert_erased(found)
    assert found["general", "Acc_g"].value < 0.5 * found["general", "Acc_g"].unedited


def test_the_same_file_takes_the_dog_from_another_denoiser(model, tmp_path):
    """Nothing is fitted again: the second denoiser shares the text encoder and nothing else."""
    UCE().erase(model, concept()).save(tmp_path)
    other = DiffusionModel(emoji.load("b"), guidance=emoji.GUIDANCE)
    prompts = ["a noto dog", "a twemoji dog", "a fluent cat", "a noto owl", "a twemoji pizza", "an ink car"]
    wanted = torch.tensor([emoji.judges().object_names.index(prompt.split()[-1]) for prompt in prompts])

    def seen():
        return emoji.judges().objects(other.generate(prompts, seeds=range(6), steps=20)).argmax(1) == wanted

    before = seen()
    with Edit.load(tmp_path).applied(other):
        after = seen()
    assert before.all() and not after[:2].any() and after[2:].all()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["x", "u"])
def test_esd_takes_the_dog(model, variant):
    recipe = read_recipe(tasks_folder() / "recipes" / "emoji" / "esd.toml")
    found = report(model, build(ESD, {**recipe, "variant": variant}).erase(model, concept()))
    assert found["target", "Acc_e"].value <= 0.1
    if variant == "x":
        assert_erased(found)


def test_a_map_and_its_fold_draw_the_same(model):
    edit = UCE().erase(model, concept("strawberry"))
    prompts = ["a noto strawberry", "a twemoji apple"]
    with edit.applied(model):
        mapped = model.generate(prompts, seeds=[0, 1], steps=10)
    with edit.fold(model).applied(model):
        folded = model.generate(prompts, seeds=[0, 1], steps=10)
    plain = model.generate(prompts, seeds=[0, 1], steps=10)
    assert (mapped - folded).abs().max() < 1e-3  # float32 products in another order, through ten steps
    assert (mapped[0] - plain[0]).abs().mean() > 0.02


PLAIN = """
import sys, torch
from safetensors.torch import save_file
from diffusers import StableDiffusionPipeline
folder, lora, out = sys.argv[1:4]
no_checker = {"safety_checker": None, "requires_safety_checker": False}
pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **no_checker)
pipe.text_encoder.float()
pipe.load_lora_weights(lora, adapter_name="edit")
images = {}
for strength in map(float, sys.argv[4:]):
    pipe.set_adapters(["edit"], adapter_weights=[strength])
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images[str(strength)] = pipe(["a noto dog", "a fluent owl"], generator=generators, **settings).images
assert "conceptx" not in sys.modules
save_file(images, out)
"""


def test_the_command_line_writes_a_lora_that_plain_diffusers_draws_alike(model, tmp_path):
    """Two fresh processes: one erases and exports, one has nothing but diffusers."""
    folder, lora = tmp_path / "edit", tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    call = [
        sys.executable,
        "-m",
        "conceptx",
        "erase",
        emoji.NAME,
        "--concept",
        str(tasks_folder() / "concepts" / "dog.toml"),
    ]
    subprocess.run(
        [*call, "--method", "uce", "--out", str(folder), "--lora", str(lora)], check=True, capture_output=True
    )
    strengths = [-1.0, 0.5, 1.0, 2.0]
    plain = [sys.executable, "-c", PLAIN, str(emoji.folder()), str(lora.parent), str(tmp_path / "images.safetensors")]
    subprocess.run([*plain, *map(str, strengths)], check=True, capture_output=True, cwd=tmp_path)
    drawn = load_tensors(tmp_path / "images.safetensors")
    edit = Edit.load(folder)
    assert json.loads((folder / "edit.json").read_text())["provenance"][0]["method"] == "UCE"
    for strength in strengths:
        with (strength * edit).applied(model):
            ours = model.generate(["a noto dog", "a fluent owl"], seeds=[0, 1], steps=10)
        assert (drawn[str(strength)] - ours).abs().max() < 1e-4, strength  # float32 in another order; 2e-6 was seen
    assert Path(lora).stat().st_size < 2e6


def test_the_lora_of_esd_draws_alike_in_a_plain_pipeline(model, tmp_path):
    recipe = read_recipe(tasks_folder() / "recipes" / "emoji" / "esd.toml")
    edit = build(ESD, {**recipe, "rank": 4, "steps": 4, "learning_rate": 1e-2}).erase(model, concept())
    edit.export_diffusers_lora(tmp_path, model)
    plain = emoji.load()
    plain.load_lora_weights(str(tmp_path), adapter_name="edit")
    prompts, seeds = ["a noto dog", "a fluent owl"], [0, 1]
    unedited = model.generate(prompts, seeds=seeds, steps=10)
    for strength in (-1.0, 1.0, 2.0):
        plain.set_adapters(["edit"], adapter_weights=[strength])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"}
        drawn = plain(prompts, generator=generators, **settings).images
        with (strength * edit).applied(model):
            ours = model.generate(prompts, seeds=seeds, steps=10)
        assert (drawn - ours).abs().max() < 1e-4, strength  # float32 in another order; 2e-6 was seen
        assert (ours - unedited).abs().mean() > 5e-3


SHORT = """
kind = "object"
objects = ["dog", "cat", "owl", "key", "castle"]
styles = ["noto", "ink"]
templates = ["the {object} in {style}"]
images = 4
images_general = 1
images_others = 1
steps = 10
guidance = 3.0
unrelated = "castle"
"""


def test_the_command_line_scores_attacks_and_draws(model, tmp_path):
    from typer.testing import CliRunner

    from conceptx.cli import app

    UCE().erase(model, concept()).save(tmp_path / "edit")
    (tmp_path / "short.toml").write_text(SHORT)
    (tmp_path / "attack.toml").write_text("steps = 2\nbatch_size = 2\nlearning_rate = 0.02\n")
    paths = {
        "edit": "edit",
        "benchmark": "short.toml",
        "attack": "attack.toml",
        "picture": "sheet.png",
        "json": "r.json",
    }
    options = [part for name, file in paths.items() for part in (f"--{name}", str(tmp_path / file))]
    call = ["evaluate", emoji.NAME, "--concept", str(tasks_folder() / "concepts" / "dog.toml"), *options]
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert result.exit_code == 0 and "Acc_e" in result.output and "recovery" in result.output
    scores = {(s["task"], s["metric"], s["part"]): s for s in json.loads((tmp_path / "r.json").read_text())["scores"]}
    assert scores["target", "Acc_e", "all"]["n"] == 4 and scores["target", "Acc_e", "all"]["unedited"] is not None
    assert scores["recovery", "TextualInversion", "unrelated"]["n"] == 4
    assert (tmp_path / "sheet.png").stat().st_size > 1000
