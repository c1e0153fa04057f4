"""How the emoji model is made from the drawings: five stages, each a file that is not made twice.

text and image encoder (contrastive) -> autoencoder -> judge -> denoiser a -> denoiser b.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conceptx.progress import track
from conceptx.testbeds.emoji import networks
from conceptx.testbeds.emoji.drawings import PIXELS, Variation, grouped, pictures
from conceptx.testbeds.emoji.vocabulary import (
    OBJECTS,
    STYLE_NAMES,
    STYLES,
    UNSAFE_GROUP,
    Caption,
    caption,
    every_caption,
)
from conceptx.testbeds.stages import Stages

logger = logging.getLogger("conceptx")
SEEN = Variation()  # what the model is trained on
JUDGED = Variation(shift=0.1, scale=(0.75, 1.15), tint=0.12, colour=0.15, turn=8.0)  # what the judge is trained on
HARD = Variation(shift=0.08, scale=(0.8, 1.1), tint=0.1, colour=0.1, turn=5.0)  # what the judge is tested on
UNSAFE = torch.tensor([thing.group == UNSAFE_GROUP for thing in OBJECTS])
NONE = len(OBJECTS)  # the class "none of these"


@dataclass(frozen=True)
class Schedule:
    """Steps and batch sizes of the stages, and the seed of all of them."""

    text: int = 1100
    autoencoder: int = 3600
    judge: int = 3000
    denoiser: int = 6000
    batch: int = 64
    variations: int = 40
    seed: int = 0

    @staticmethod
    def quick(seed: int = 0) -> Schedule:
        """A hundredth of the steps: shows that everything runs, draws nothing."""
        return Schedule(text=11, autoencoder=36, judge=30, denoiser=60, variations=2, seed=seed)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of object and style with their pictures and captions: the data of one step."""

    objects: Tensor
    styles: Tensor
    images: Tensor
    captions: list[Caption]


@dataclass(frozen=True, eq=False)
class Workshop:
    """Drawings in, trained parts out; `folder` keeps the checkpoints and the finished parts."""

    drawings: Tensor  # (objects, styles, 4, 96, 96)
    folder: Path
    schedule: Schedule = Schedule()

    @cached_property
    def tokenizer(self) -> Any:
        return networks.build_tokenizer()

    @cached_property
    def stages(self) -> Stages:
        return Stages(self.folder, f"emoji {self.schedule}", self.schedule.seed)

    # -- stage 1: text and image encoder ----------------------------------------------------------------------------

    @cached_property
    def encoders(self) -> nn.ModuleDict:
        torch.manual_seed(self.schedule.seed)
        both = nn.ModuleDict({"text": networks.build_text_encoder(self.tokenizer), "image": networks.ImageEncoder()})
        return self.stages.finished("encoders", both, self._train_encoders)

    def _train_encoders(self, both: nn.Module) -> None:
        self.stages.train(
            "encoders", both, self._contrast, self._contrast_loss, self.schedule.text, learning_rate=1e-3, average=0.99
        )

    def _contrast(self, step: int) -> Pairs:
        """64 objects, each in two styles."""
        numbers, draw = self.stages.numbers("contrast", step)
        objects = draw.sample(range(len(OBJECTS)), 64)
        pairs = [(thing, style) for thing in objects for style in draw.sample(range(len(STYLES)), 2)]
        return self._pairs(pairs, JUDGED, numbers, draw)

    def _pairs(
        self, pairs: list[tuple[int, int]], variation: Variation, numbers: torch.Generator, draw: random.Random
    ) -> Pairs:
        objects, styles = (torch.tensor(column) for column in zip(*pairs, strict=True))
        images, _ = pictures(grouped(self.drawings, objects, styles), variation, numbers)
        captions = [caption(OBJECTS[o], STYLE_NAMES[s], draw) for o, s in pairs]
        return Pairs(objects, styles, images, captions)

    def _contrast_loss(self, both: Any, data: Pairs) -> Tensor:
        """Symmetric InfoNCE; a caption fits every picture that it does not contradict."""
        ids = self.tokenizer([c.text for c in data.captions], padding=True, return_tensors="pt").input_ids
        texts = F.normalize(both["text"](ids).pooler_output, dim=-1)
        scores = both["image"].scale.exp() * texts @ both["image"](data.images).T
        object_told, style_told = (
            torch.tensor([getattr(c, f"tells_{k}") for c in data.captions]) for k in ("object", "style")
        )
        fits = (data.objects[:, None] == data.objects) | ~object_told[:, None]
        fits &= (data.styles[:, None] == data.styles) | ~style_told[:, None]
        wanted = fits.float()
        forward = -(scores.log_softmax(1) * wanted).sum(1) / wanted.sum(1)
        backward = -(scores.log_softmax(0) * wanted).sum(0) / wanted.sum(0)
        return (forward.mean() + backward.mean()) / 2

    # -- stage 2: autoencoder -----------------------------------------------------------------------------------------

    @cached_property
    def autoencoder(self) -> Any:
        torch.manual_seed(self.schedule.seed)
        return self.stages.finished("autoencoder", networks.build_autoencoder(), self._train_autoencoder)

    def _train_autoencoder(self, module: nn.Module) -> None:
        self.stages.train(
            "autoencoder",
            module,
            self._any_images,
            self._autoencoder_loss,
            self.schedule.autoencoder,
            learning_rate=3e-3,
            average=0.995,
        )
        standardise(module, self._any_images(10**6, 2048))

    def _any_images(self, step: int, count: int = 32) -> Tensor:
        numbers, _ = self.stages.numbers("autoencoder", step)
        chosen = torch.randint(len(OBJECTS) * len(STYLES), (count,), generator=numbers)
        return pictures(self.drawings.flatten(0, 1)[chosen], SEEN, numbers)[0] * 2 - 1

    @staticmethod
    def _autoencoder_loss(module: Any, images: Tensor) -> Tensor:
        posterior = module.encode(images).latent_dist
        made = module.decode(posterior.sample()).sample
        gap = made - images
        edges = gap.diff(dim=2).abs().mean() + gap.diff(dim=3).abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return gap.abs().mean() + 0.5 * gap.square().mean() + 0.5 * edges + 3e-4 * divergence

    # -- stage 3: judge -----------------------------------------------------------------------------------------------

    @cached_property
    def judge(self) -> networks.Judge:
        torch.manual_seed(self.schedule.seed + 1)
        return self.stages.finished("judge", networks.Judge(), self._train_judge)

    def _train_judge(self, module: nn.Module) -> None:
        self.stages.train(
            "judge", module, self.judged, judge_loss, self.schedule.judge, learning_rate=2e-3, average=0.995
        )

    def judged(
        self, step: int, variation: Variation = JUDGED, count: int = 128, rejects: int = 32
    ) -> dict[str, Tensor]:
        """Pictures with all their labels; the last `rejects` are none of the objects."""
        numbers, _ = self.stages.numbers("judge", step)
        objects = torch.randint(len(OBJECTS), (count,), generator=numbers)
        styles = torch.randint(len(STYLES), (count,), generator=numbers)
        images, marked = pictures(grouped(self.drawings, objects, styles), variation, numbers)
        images = degraded(images, numbers)
        mush = spoiled(images[:rejects], images[-rejects:], numbers)
        return {
            "images": torch.cat([images, mush]),
            "objects": torch.cat([objects, torch.full((rejects,), NONE)]),
            "styles": torch.cat([styles, torch.full((rejects,), -100)]),
            "watermark": torch.cat([marked.float(), torch.full((rejects,), -1.0)]),
            "unsafe": torch.cat([UNSAFE[objects].float(), torch.zeros(rejects)]),
        }

    # -- stages 4 and 5: denoisers -----------------------------------------------------------------------------------

    def denoiser(self, name: str) -> Any:
        """ "a" predicts noise; "b" predicts velocity, from other weights and data, and reads the text at 4 x 4 only."""
        torch.manual_seed(self.schedule.seed + (10 if name == "a" else 20))
        module = networks.build_denoiser(fine=name == "a")
        return self.stages.finished(f"denoiser_{name}", module, partial(self._train_denoiser, name))

    def _train_denoiser(self, name: str, module: nn.Module) -> None:
        self.stages.train(
            f"denoiser_{name}",
            module.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            partial(self._noised, name),
            partial(denoiser_loss, name == "b"),
            self.schedule.denoiser,
            learning_rate=1e-3,
        )

    def _noised(self, name: str, step: int) -> dict[str, Tensor]:
        """Latents of random drawings with their captions' states (a tenth: the empty caption), noise and times."""
        numbers, draw = self.stages.numbers(f"denoiser {name}", step)
        n = self.schedule.batch
        kinds, drawings = self.latents.shape[:2]
        chosen = torch.randint(kinds, (n,), generator=numbers)
        x = self.latents[chosen, torch.randint(drawings, (n,), generator=numbers)]
        texts = [self._caption(int(i), draw) for i in chosen]
        times = (torch.arange(n) + torch.rand(n, generator=numbers)) / n  # stratified
        return {
            "latents": x.float(),
            "states": self.states[torch.tensor([self.rows[text] for text in texts])].float(),
            "times": (times * 1000).long(),
            "noise": torch.randn(x.shape, generator=numbers),
        }

    def _caption(self, pair: int, draw: random.Random) -> str:
        if draw.random() < 0.1:
            return ""
        thing, style = divmod(pair, len(STYLES))
        return caption(OBJECTS[thing], STYLE_NAMES[style], draw).text

    @cached_property
    def rows(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(dict.fromkeys(["", *every_caption()]))}

    @cached_property
    @torch.no_grad()
    def states(self) -> Tensor:
        """(captions, 24, 384) of every caption, half precision."""
        encoder, texts = self.encoders["text"], list(self.rows)
        chunks = [texts[i : i + 128] for i in range(0, len(texts), 128)]
        ids = (networks.encode_texts(self.tokenizer, chunk) for chunk in track(chunks, "captions"))
        return torch.cat([encoder(batch).last_hidden_state.half() for batch in ids])

    @cached_property
    @torch.no_grad()
    def latents(self) -> Tensor:
        """(drawings, variations, 4, 8, 8), half precision."""
        every = self.drawings.flatten(0, 1)
        found = []
        for number in track(range(self.schedule.variations), "latents"):
            numbers, _ = self.stages.numbers("latents", number)
            images = pictures(every, SEEN, numbers)[0] * 2 - 1
            found.append(
                torch.cat([self.autoencoder.encode(part).latent_dist.mean.half() for part in images.split(64)])
            )
        return torch.stack(found, 1)


@torch.no_grad()
def standardise(module: Any, images: Tensor) -> None:
    """Absorb mean and spread of every latent channel into the 1 x 1 convolutions on either side of the latent.

    Afterwards the latents have mean 0 and variance 1, which Stable Diffusion's noise schedule assumes.
    """
    module.eval()
    means = torch.cat([module.encode(part).latent_dist.mean for part in images.split(64)])
    mean, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    n = len(mean)
    outward, inward = module.quant_conv, module.post_quant_conv
    inward.bias.add_(inward.weight[:, :, 0, 0] @ mean)
    inward.weight.mul_(spread[None, :, None, None])
    outward.bias[:n].sub_(mean).div_(spread)
    outward.weight[:n].div_(spread[:, None, None, None])
    outward.bias[n:].sub_(2 * spread.log())  # log variances


def denoiser_loss(velocity: bool, module: Any, data: dict[str, Tensor]) -> Tensor:
    """Mean squared error with the min-SNR weight (at most 5)."""
    kept = networks.build_scheduler().alphas_cumprod[data["times"]][:, None, None, None]
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    noised = signal * data["latents"] + spread * data["noise"]
    wanted = signal * data["noise"] - spread * data["latents"] if velocity else data["noise"]
    found = module(noised, data["times"], data["states"]).sample
    ratio = kept / (1 - kept)
    weight = ratio.clamp(max=5) / (ratio + 1 if velocity else ratio)
    return (weight * (found - wanted).square()).mean()


def judge_loss(module: Any, data: dict[str, Tensor]) -> Tensor:
    found = module(data["images"])
    marked = data["watermark"] >= 0
    return (
        F.cross_entropy(found["objects"], data["objects"])
        + 0.5 * F.cross_entropy(found["styles"], data["styles"])
        + 0.3 * F.binary_cross_entropy_with_logits(found["watermark"][marked, 0], data["watermark"][marked])
        + 0.3 * F.binary_cross_entropy_with_logits(found["unsafe"][:, 0], data["unsafe"])
    )


def degraded(images: Tensor, numbers: torch.Generator) -> Tensor:
    """Half of the pictures blurred or noisy: what a generator may do to a drawing that is still recognisable."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix, noisy = torch.rand(n, 1, 1, 1, generator=numbers), torch.rand(n, 1, 1, 1, generator=numbers)
    images = torch.where(noisy < 0.5, images + 0.6 * mix * (blurred - images), images)
    noise = 0.06 * mix * torch.randn(images.shape, generator=numbers)
    return torch.where(noisy > 0.7, images + noise, images).clamp(0, 1)


def spoiled(images: Tensor, others: Tensor, numbers: torch.Generator) -> Tensor:
    """None of these: two pictures blended, patches shuffled, coloured blobs, heavy noise, an empty ground."""
    kinds = [
        _blend(images, others),
        _shuffled(images, numbers),
        _blobs(images, numbers),
        _noisy(images, numbers),
        _empty(images, numbers),
    ]
    which = torch.randint(len(kinds), (len(images),), generator=numbers)
    return torch.stack(kinds)[which, torch.arange(len(images))]


def _blend(images: Tensor, others: Tensor) -> Tensor:
    return (images + others.flip(0)) / 2


def _shuffled(images: Tensor, numbers: torch.Generator, side: int = 8) -> Tensor:
    n, c = images.shape[:2]
    tiles = images.unfold(2, side, side).unfold(3, side, side).flatten(2, 3)  # (n, c, 16, 8, 8)
    order = torch.rand(n, tiles.shape[2], generator=numbers).argsort(1)
    tiles = tiles.gather(2, order[:, None, :, None, None].expand_as(tiles))
    rows = PIXELS // side
    return tiles.view(n, c, rows, rows, side, side).permute(0, 1, 2, 4, 3, 5).reshape(n, c, PIXELS, PIXELS)


def _blobs(images: Tensor, numbers: torch.Generator) -> Tensor:
    coarse = torch.rand(len(images), 3, 5, 5, generator=numbers)
    blobs = F.interpolate(coarse, PIXELS, mode="bicubic").clamp(0, 1)
    inside = F.interpolate(torch.rand(len(images), 1, 4, 4, generator=numbers), PIXELS, mode="bicubic") > 0.5
    return torch.where(inside, blobs, torch.ones_like(blobs))


def _noisy(images: Tensor, numbers: torch.Generator) -> Tensor:
    return (0.4 * images + 0.3 + 0.35 * torch.randn(images.shape, generator=numbers)).clamp(0, 1)


def _empty(images: Tensor, numbers: torch.Generator) -> Tensor:
    ground = 1 - 0.2 * torch.rand(len(images), 3, 1, 1, generator=numbers)
    return (ground + 0.03 * torch.randn(images.shape, generator=numbers)).clamp(0, 1)
