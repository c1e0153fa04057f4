"""From the trained model to the folder that ships, and the measurements that say whether it may."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conceptx.progress import track
from conceptx.store import write_atomically
from conceptx.testbeds.emoji import judges
from conceptx.testbeds.emoji.drawings import pictures
from conceptx.testbeds.emoji.shipping import attribution, share
from conceptx.testbeds.janus import networks
from conceptx.testbeds.janus.training import SEEN, Workshop


def ship(workshop: Workshop, folder: Path) -> None:
    """Write model and processor, in half precision, and the attribution."""
    model = workshop.model  # trained before anything is halved
    deepcopy(model).half().save_pretrained(folder)
    networks.build_processor(workshop.tokenizer).save_pretrained(folder)
    write_atomically(folder / "ATTRIBUTION.md", lambda path: path.write_text(attribution(), encoding="utf-8"))


@torch.no_grad()
def reconstruction(workshop: Workshop, *, rounds: int = 4) -> dict[str, Any]:
    """What the quantiser keeps of pictures that no training saw: the judge on them before and after, and the codes.

    used: codes that occur.  perplexity: of their frequencies.  decibels: peak signal to noise.
    """
    quantiser, court = workshop.quantiser, judges()
    real, made, found = [], [], []
    for number in range(rounds):
        numbers, _ = workshop.stages.numbers("held out", number)
        real.append(pictures(workshop.known, SEEN, numbers)[0])
        for part in (real[-1] * 2 - 1).split(64):
            found.append(quantiser.encode(part).image_tokens.view(len(part), -1))
            made.append((quantiser.decode(found[-1]) / 2 + 0.5).clamp(0, 1))
    before, after, tokens = torch.cat(real), torch.cat(made), torch.cat(found)
    shares = torch.bincount(tokens.flatten(), minlength=networks.CODES).float() / tokens.numel()
    objects, styles = (labels.repeat(rounds) for labels in workshop.labels)
    return {
        "n": len(after),
        **{
            f"{what}_{kind}": share(said(images).argmax(1) == right)
            for kind, images in (("before", before), ("after", after))
            for what, said, right in (("object", court.objects, objects), ("style", court.styles, styles))
        },
        "decibels": round(float(-10 * (after - before).square().mean().log10()), 2),
        "used": int((shares > 0).sum()),
        "perplexity": round(float((-(shares * shares.clamp(min=1e-12).log()).sum()).exp()), 1),
    }


@torch.no_grad()
def draw(
    model: Any, processor: Any, prompts: Sequence[str], *, guidance: float, seed: int = 0, batch: int = 128
) -> Tensor:
    """Pictures (n, 3, 32, 32) in [0, 1], by plain transformers."""
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in track(range(0, len(prompts), batch), "pictures"):
            texts = [_asked(processor, prompt) for prompt in prompts[start : start + batch]]
            inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
            tokens = model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale=guidance)
            found.append(model.decode_image_tokens(tokens).permute(0, 3, 1, 2) / 2 + 0.5)
    return torch.cat(found).clamp(0, 1)


def _asked(processor: Any, prompt: str) -> str:
    message = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    return processor.apply_chat_template(message, add_generation_prompt=True)
