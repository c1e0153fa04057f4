"""`wrap` and `load` for text-to-image pipelines (for language models see test_language.py)."""

import types

import pytest
import torch
from hosts import PIPELINES, tiny_pipeline

from conceptx import load
from conceptx.models import DiffusionModel

every = pytest.mark.parametrize("kind", PIPELINES)


def dtypes(model):
    return {p.dtype for p in model.module.parameters()} | {p.dtype for p in model.pipeline.vae.parameters()}


@every
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_a_folder_of_diffusers_becomes_the_same_pipeline_in_one_dtype(kind, saved, tmp_path):
    """Half precision in the files is the trap: the text encoders alone would stay in it."""
    model = tiny_pipeline(kind)
    model.pipeline.to(dtype=saved)
    model.pipeline.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert isinstance(loaded, DiffusionModel) and dtypes(loaded) == {torch.float32}
    assert loaded.fingerprint.mismatch(tiny_pipeline(kind).fingerprint) is None
    assert type(loaded.pipeline) is type(model.pipeline)
    assert dtypes(load(str(tmp_path), dtype=torch.bfloat16)) == {torch.bfloat16}


def test_no_safety_checker_blackens_the_pictures(tmp_path):
    pipeline = tiny_pipeline("sd1").pipeline
    pipeline.register_to_config(requires_safety_checker=True)
    pipeline.save_pretrained(tmp_path)
    assert load(str(tmp_path)).pipeline.safety_checker is None


def test_progress_bars_of_diffusers_are_silent_with_those_of_transformers(tmp_path, capfd):
    from diffusers.utils import logging
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    tiny_pipeline("sd1").pipeline.save_pretrained(tmp_path)
    capfd.readouterr()
    disable_progress_bar()
    try:
        load(str(tmp_path))
    finally:
        enable_progress_bar()
    assert "components" not in "".join(capfd.readouterr()) and logging.is_progress_bar_enabled()


def test_a_name_that_is_nothing_says_what_a_name_can_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match="local folder, a hub name, 'smollm2', 'testbed:emoji' or 'testbed:janus'"
    ):
        load("nobody/nothing")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"]}')
    with pytest.raises((FileNotFoundError, ValueError)):
        load(str(tmp_path))


def test_the_testbed_brings_its_own_guidance(monkeypatch):
    from conceptx.testbeds import emoji

    made = tiny_pipeline("sd1").pipeline
    monkeypatch.setattr(emoji, "load", lambda: made)
    model = load("testbed:emoji")
    assert model.pipeline is made and model.guidance == emoji.GUIDANCE
    assert load("testbed:emoji", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_pipeline_without_a_denoiser_is_refused():
    from conceptx import wrap

    other = types.SimpleNamespace(components={}, scheduler=None, unet=None)
    with pytest.raises(ValueError, match="neither a unet nor a transformer"):
        wrap(other)
