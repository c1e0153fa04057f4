"""Peak memory of folding an edit into a model on the disk, and of editing a pipeline in memory; random weights.

    python tests/benchmarks/fold_memory.py [--quick] [--folder DIR]

A language model of 1.1 billion parameters (2.2 GB in bfloat16, shards of at most 450 MB) and a pipeline of SD 1.4's
shapes in float32 (a U-Net of 3.4 GB in one file) are written to a temporary folder, which needs about 10 GB in all.
Each row runs in a process of its own. Memory is the largest resident size (VmHWM of Linux, mapped files included) above
the one before the edit was loaded, after the libraries have been warmed up on a tiny model. The disk rows are set
against the largest file, the row in memory against the pipeline's weights: there the weights are loaded before, so it
is (weights + what came on top) / weights. Folding on the disk is also checked bit for bit against folding in memory.

--quick has models a tenth as large.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does

import torch
from safetensors.torch import save_file
from torch import nn

from conceptx.concept import Concept
from conceptx.edit import Columns, Edit, LowRank
from conceptx.geometry import Subspace
from conceptx.methods import UCE
from conceptx.models import DiffusionModel, load, wrap
from conceptx.models.checkpoints import fold_checkpoint
from conceptx.models.on_disk import on_disk

MB = 1e6
MARGIN = 1.10  # what the issue allows
TOKENS = 77
METALS = ["tin", "gold", "iron", "copper", "zinc", "lead"]


@dataclass(frozen=True)
class Size:
    """Of the synthetic models."""

    hidden: int
    layers: int
    shard: int  # bytes
    channels: tuple[int, ...]  # of the U-Net


FULL = Size(2048, 22, 450_000_000, (320, 640, 1280, 1280))
QUICK = Size(768, 24, 120_000_000, (96, 192, 384, 384))


@dataclass(frozen=True)
class Result:
    """allowed: the largest file, or the weights.  used: peak above the start, plus the weights if those are loaded."""

    what: str
    allowed: int
    used: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.used / self.allowed


# -- synthetic models --------------------------------------------------------------------------------------------------


def language_model(folder: Path, size: Size) -> Path:
    """A Llama of random weights, written shard by shard."""
    from hosts import tokenizer
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=4,
        vocab_size=32_000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    _write_shards(folder, config, size.shard)
    return folder


def _write_shards(folder: Path, config: Any, most: int) -> None:
    import json

    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(s.numel() * 2 for s in shards[-1].values()) + shape.numel() * 2 > most:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _weights(name, shape) for name, shape in shard.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(shape.numel() * 2 for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _weights(name: str, shape: torch.Size) -> torch.Tensor:
    random = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5, generator=random)


def pipeline(size: Size) -> DiffusionModel:
    """SD 1.4's shapes, random weights, a tokenizer of few words."""
    import copy

    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from hosts import _ddim, clip_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = copy.deepcopy(clip_tokenizer())
    tokens.model_max_length = TOKENS
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=size.channels, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, **ids)
        )
    return wrap(
        StableDiffusionPipeline(
            vae=_filled(vae),
            text_encoder=_filled(text),
            tokenizer=tokens,
            unet=_filled(unet),
            scheduler=_ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


@torch.no_grad()
def _filled(module: nn.Module) -> nn.Module:
    buffers = {name: torch.arange(b.shape[-1])[None] for name, b in module.named_buffers()}  # CLIP's position numbers
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.normal_(0, 0.02)
    for name, buffer in buffers.items():
        module.get_buffer(name).copy_(buffer)
    return module.eval()


# -- edits -------------------------------------------------------------------------------------------------------------


def edits(folder: Path) -> Iterator[tuple[str, Edit]]:
    """Of the kinds that ELM, PISCES and the vector methods make, in every layer."""
    model = on_disk(folder)
    linear = [name for name in model.places if name.endswith("_proj.weight")]
    shapes = {name: model.parameter_shape(name) for name in linear}
    pairs = {name: LowRank(_random(out, 16) / 100, _random(16, inside)) for name, (out, inside) in shapes.items()}
    yield "pairs of rank 16 on every linear layer", Edit(model.fingerprint, deltas=pairs)
    columns = {name: Columns(torch.arange(50), _random(shapes[name][0], 50) / 100) for name in linear if "down" in name}
    yield "50 value vectors a layer", Edit(model.fingerprint, deltas=columns)
    for what, mean in (("maps of rank 4 before every sublayer", 0.0), ("the same with a mean: new biases", 1.0)):
        sites = [name for name in model.sites if name.endswith(("attention_input", "mlp_input"))]
        maps = {name: (_removal(model.width(name), mean),) for name in sites}
        yield what, Edit(model.fingerprint, maps=maps)


def _removal(d: int, mean: float) -> Any:
    return Subspace.orthogonal(_random(d, 4).double(), mean * _random(d).double()).removal()


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# -- measuring ---------------------------------------------------------------------------------------------------------


def _memory(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def _peak(action: Callable[[], Any]) -> tuple[int, float]:
    """(largest resident size above the one at the start, seconds)"""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start, begin = _memory("VmRSS"), time.perf_counter()
    action()
    return _memory("VmHWM") - start, time.perf_counter() - begin


def _fold_on_disk(checkpoint: Path, edit: Path, out: Path, warm: Path) -> tuple[int, float]:
    torch.set_num_threads(1)
    fold_checkpoint(warm / "model", Edit.load(warm / "edit"), warm / "out")
    return _peak(lambda: fold_checkpoint(checkpoint, Edit.load(edit), out))


def _edit_in_memory(size: Size, out: Path) -> tuple[int, int, float]:
    """(bytes of the weights, peak on top of them, seconds) of erasing, folding and saving."""
    torch.set_num_threads(1)
    model = pipeline(size)
    weights = sum(
        p.nbytes
        for part in model.pipeline.components.values()
        if isinstance(part, nn.Module)
        for p in part.parameters()
    )
    concepts = [Concept(name, kind="object", anchor="garden", retain=["cat", "dog"]) for name in METALS]

    def erase_fold_and_save() -> None:
        edit = UCE().erase(model, concepts)
        edit.fold(model)
        model.save_pretrained(out, edit)

    _warm_up(out.parent / "warm-memory")
    return weights, *_peak(erase_fold_and_save)


def _warm_up(folder: Path) -> None:
    from hosts import tiny_pipeline

    model = tiny_pipeline("sd1")
    model.save_pretrained(folder, UCE().erase(model, Concept("tin", kind="object", anchor="gold")))


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a fresh process, whose memory nobody has used."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _warm_models(folder: Path) -> dict[str, Path]:
    from hosts import tiny, tiny_pipeline

    language, pipe = tiny("llama"), tiny_pipeline("sd1")
    language.module.save_pretrained(folder / "language" / "model")
    next(edits(folder / "language" / "model"))[1].save(folder / "language" / "edit")
    pipe.pipeline.save_pretrained(folder / "pipeline" / "model")
    UCE().erase(pipe, Concept("tin", kind="object", anchor="gold")).save(folder / "pipeline" / "edit")
    return {"language": folder / "language", "pipeline": folder / "pipeline"}


def results(size: Size, folder: Path) -> Iterator[Result]:
    """One row a measurement; what is written is removed as soon as it has been compared."""
    warm = _warm_models(folder / "warm")
    yield from _language_rows(size, folder, warm["language"])
    yield from _pipeline_rows(size, folder, warm["pipeline"])


def _language_rows(size: Size, folder: Path, warm: Path) -> Iterator[Result]:
    checkpoint = language_model(folder / "llama", size)
    shards = [path.stat().st_size for path in checkpoint.glob("*.safetensors")]
    for what, edit in edits(checkpoint):
        edit.save(folder / "edit")
        used, seconds = _alone(_fold_on_disk, checkpoint, folder / "edit", folder / "out", warm)
        _compare(checkpoint, Edit.load(folder / "edit"), folder / "out")
        _remove(folder / "out")
        yield Result(f"{sum(shards) / 1e9:.1f} GB in {len(shards)} files, {what}", max(shards), used, seconds)
    _remove(checkpoint)


def _pipeline_rows(size: Size, folder: Path, warm: Path) -> Iterator[Result]:
    model = pipeline(size)
    UCE().erase(model, [Concept(name, kind="object", anchor="garden") for name in METALS]).save(folder / "uce")
    model.pipeline.save_pretrained(folder / "pipe")
    del model
    gc.collect()
    files = [path.stat().st_size for path in (folder / "pipe").rglob("*.safetensors")]
    what = f"{sum(files) / 1e9:.1f} GB"
    used, seconds = _alone(_fold_on_disk, folder / "pipe", folder / "uce", folder / "out", warm)
    _compare(folder / "pipe", Edit.load(folder / "uce"), folder / "out")
    _remove(folder / "out", folder / "pipe")
    yield Result(f"pipeline of {what}, a map of the text", max(files), used, seconds)
    weights, used, seconds = _alone(_edit_in_memory, size, folder / "memory")
    _remove(folder / "memory")
    yield Result(f"pipeline of {what} in memory: erase, fold, save", weights, weights + used, seconds)


def _compare(checkpoint: Path, edit: Edit, out: Path) -> None:
    """Raises AssertionError unless every tensor on the disk is that of the folded model in memory."""
    model = load(str(checkpoint))
    with edit.fold(model).applied(model):
        wanted = dict(model.module.named_parameters())
        found = on_disk(out)
        assert found.places.keys() >= wanted.keys()
        for name in wanted:
            here, there = found.parameter(name), model.parameter(name)
            assert here is not None and there is not None and torch.equal(here, there), name


def _remove(*folders: Path) -> None:
    import shutil

    for folder in folders:
        shutil.rmtree(folder)


HEAD = (
    "| model and edit | allowed (largest file, or weights), MB | used, MB | used : allowed | s |\n|---"
    + "|--:" * 4
    + "|"
)


def line(result: Result) -> str:
    cells = [result.what, f"{result.allowed / MB:,.0f}", f"{result.used / MB:,.0f}", f"{result.ratio:.2f}"]
    return "| " + " | ".join([*cells, f"{result.seconds:.0f}"]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models a tenth as large")
    parser.add_argument("--folder", type=Path, help="where the models are written; default: a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    print(HEAD)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for result in results(QUICK if options.quick else FULL, Path(folder)):
            print(line(result), flush=True)
            missed += result.ratio > MARGIN
    print("\nAll within 10 % of what is allowed, bit for bit." if not missed else f"\n{missed} beyond what is allowed.")
    return missed


if __name__ == "__main__":
    sys.exit(main())
