"""How the small Janus is made from the drawings: quantiser -> decoder.

The quantiser learns pictures first without codes, then with the codes that k-means finds; the decoder learns the next
image token after a caption, a tenth of the captions masked for classifier-free guidance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conceptx.progress import track
from conceptx.testbeds.emoji.drawings import Variation, pictures
from conceptx.testbeds.emoji.vocabulary import STYLE_NAMES, STYLES, caption
from conceptx.testbeds.janus import networks
from conceptx.testbeds.janus.vocabulary import NUMBERS, OBJECTS
from conceptx.testbeds.stages import Stages

SEEN = Variation(shift=0.04, scale=(0.9, 1.05), tint=0.04, colour=0.04, watermark=0.0)  # what the model is trained on
MASKED = 0.1  # of the captions


@dataclass(frozen=True)
class Schedule:
    """Steps and batch sizes of the stages, and the seed of all of them."""

    plain: int = 300
    quantiser: int = 2000
    decoder: int = 3000
    pictures: int = 32  # a step of the quantiser
    captions: int = 64  # a step of the decoder
    variations: int = 40
    seed: int = 0

    @staticmethod
    def quick(seed: int = 0) -> Schedule:
        """A hundredth of the steps: shows that everything runs, draws nothing."""
        return Schedule(plain=3, quantiser=20, decoder=30, variations=2, seed=seed)


@dataclass(frozen=True, eq=False)
class Workshop:
    """Drawings in, a trained model out; `folder` keeps the checkpoints and the finished parts."""

    drawings: Tensor  # (all objects, styles, 4, 96, 96)
    folder: Path
    schedule: Schedule = Schedule()

    @cached_property
    def stages(self) -> Stages:
        return Stages(self.folder, f"janus {self.schedule}", self.schedule.seed)

    @cached_property
    def tokenizer(self) -> Any:
        return networks.build_tokenizer()

    @cached_property
    def model(self) -> Any:
        """The whole model, trained."""
        torch.manual_seed(self.schedule.seed)
        model = networks.build_model(self.tokenizer)
        model.model.vqmodel = self.quantiser
        with torch.no_grad():
            model.model.generation_embeddings.weight.copy_(2 * self.quantiser.quantize.embedding.weight)
        model.model.vision_model.requires_grad_(False)
        model.model.aligner.requires_grad_(False)
        return self.stages.finished("decoder", model, self._train_decoder)

    # -- stage 1: quantiser -------------------------------------------------------------------------------------------

    @cached_property
    def quantiser(self) -> Any:
        torch.manual_seed(self.schedule.seed)
        module = networks.build_model(self.tokenizer).model.vqmodel
        module = self.stages.finished("plain", module, self._train_plain)
        return self.stages.finished("quantiser", module.requires_grad_(True), self._train_quantiser)

    def _train_plain(self, module: Any) -> None:
        module.quantize.requires_grad_(False)  # not used yet
        self.stages.train("plain", module, self.images, plain_loss, self.schedule.plain, learning_rate=2e-3)

    def _train_quantiser(self, module: Any) -> None:
        module.quantize.embedding.weight.data.copy_(self._centres(module))
        self.stages.train("quantiser", module, self.images, quantiser_loss, self.schedule.quantiser, learning_rate=2e-3)
        with torch.no_grad():  # decoding reads unit vectors, and the nearest one is then the one of least angle
            module.quantize.embedding.weight.copy_(F.normalize(module.quantize.embedding.weight, dim=-1))

    @torch.no_grad()
    def _centres(self, module: Any) -> Tensor:
        """Codes (512, 8) of unit length, from k-means on the states of 1,024 pictures."""
        from sklearn.cluster import KMeans

        images = torch.cat([self.images(10**6 + i) for i in range(1024 // self.schedule.pictures)])
        states = torch.cat([directions(module, part) for part in images.split(64)]).permute(0, 2, 3, 1).flatten(0, 2)
        means = KMeans(networks.CODES, n_init=1, max_iter=30, random_state=self.schedule.seed).fit(states.numpy())
        return F.normalize(torch.from_numpy(means.cluster_centers_).float(), dim=-1)

    @cached_property
    def known(self) -> Tensor:
        """(objects x styles, 4, 96, 96) of the objects that this model knows."""
        return self.drawings[list(NUMBERS)].flatten(0, 1)

    @cached_property
    def labels(self) -> tuple[Tensor, Tensor]:
        """(objects, styles) of the drawings that this model knows, by the judges' numbers."""
        return torch.tensor(NUMBERS).repeat_interleave(len(STYLES)), torch.arange(len(STYLES)).repeat(len(NUMBERS))

    def images(self, step: int) -> Tensor:
        """Random pictures (n, 3, 32, 32) in [-1, 1]."""
        numbers, _ = self.stages.numbers("images", step)
        chosen = torch.randint(len(self.known), (self.schedule.pictures,), generator=numbers)
        return pictures(self.known[chosen], SEEN, numbers)[0] * 2 - 1

    # -- stage 2: decoder ---------------------------------------------------------------------------------------------

    def _train_decoder(self, model: Any) -> None:
        self.stages.train(
            "decoder",
            model,
            self._told,
            decoder_loss,
            self.schedule.decoder,
            learning_rate=2e-3,
            weight_decay=0.05,
        )

    def _told(self, step: int) -> dict[str, Tensor]:
        """Prompts of random drawings, padded on the left, and their image tokens (n, 64)."""
        numbers, draw = self.stages.numbers("decoder", step)
        kinds, variations = self.codes.shape[:2]
        chosen = torch.randint(kinds, (self.schedule.captions,), generator=numbers)
        codes = self.codes[chosen, torch.randint(variations, chosen.shape, generator=numbers)]
        prompts = self.tokenizer([self._prompt(int(pair), draw) for pair in chosen], padding=True, return_tensors="pt")
        ids = prompts.input_ids
        masked = torch.rand(len(ids), generator=numbers) < MASKED
        begin = self.tokenizer.convert_tokens_to_ids(networks.BEGIN)
        kept = (ids == self.tokenizer.bos_token_id) | (ids == begin)  # as the class masks the unconditional rows
        ids = torch.where(masked[:, None] & ~kept, self.tokenizer.pad_token_id, ids)
        return {"ids": ids, "mask": prompts.attention_mask, "codes": codes.long()}

    def _prompt(self, pair: int, draw: random.Random) -> str:
        thing, style = divmod(pair, len(STYLES))
        text = caption(OBJECTS[thing], STYLE_NAMES[style], draw).text
        return f"{networks.USER}{text}{networks.ASSISTANT}{networks.BEGIN}"

    @cached_property
    @torch.no_grad()
    def codes(self) -> Tensor:
        """Image tokens of every drawing in many variations: (drawings, variations, 64)."""
        found = []
        for number in track(range(self.schedule.variations), "image tokens"):
            numbers, _ = self.stages.numbers("codes", number)
            images = pictures(self.known, SEEN, numbers)[0] * 2 - 1
            parts = [self.quantiser.encode(part).image_tokens.view(len(part), -1) for part in images.split(64)]
            found.append(torch.cat(parts).short())
        return torch.stack(found, 1)


def directions(module: Any, images: Tensor) -> Tensor:
    """States of pictures before they are quantised, of unit length: (n, 8, rows, columns)."""
    return F.normalize(module.quant_conv(module.encoder(images)), dim=1)


def plain_loss(module: Any, images: Tensor) -> Tensor:
    return picture_loss(module.decoder(module.post_quant_conv(directions(module, images))), images)


def quantiser_loss(module: Any, images: Tensor) -> Tensor:
    """The pictures' error with straight-through gradients, and codes and states drawn to each other."""
    states = directions(module, images)
    codes = F.normalize(module.quantize.embedding.weight, dim=-1)
    nearest = (states.permute(0, 2, 3, 1) @ codes.T).argmax(-1)
    found = codes[nearest].permute(0, 3, 1, 2)
    made = module.decoder(module.post_quant_conv(states + (found - states).detach()))
    towards_states = (found - states.detach()).square().sum(1).mean()
    towards_codes = (found.detach() - states).square().sum(1).mean()
    return picture_loss(made, images) + towards_states + 0.25 * towards_codes


def picture_loss(made: Tensor, images: Tensor) -> Tensor:
    gap = made - images
    edges = gap.diff(dim=2).abs().mean() + gap.diff(dim=3).abs().mean()
    return gap.abs().mean() + 0.5 * gap.square().mean() + 0.5 * edges


@torch.autocast("cpu", torch.bfloat16)  # a quarter less time
def decoder_loss(model: Any, data: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the image tokens, each after the prompt and the tokens before it."""
    codes = data["codes"]
    texts = model.get_input_embeddings()(data["ids"])
    before = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    mask = F.pad(data["mask"], (0, before.shape[1]), value=1)
    states = model.model.language_model(
        inputs_embeds=torch.cat([texts, before], 1), attention_mask=mask, use_cache=False
    ).last_hidden_state
    logits = model.model.generation_head(states[:, -codes.shape[1] :])
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())
