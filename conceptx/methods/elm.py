"""ELM, Erasure of Language Memory (Gandikota, Feucht, Marks, Bau 2024, arXiv 2410.02760)."""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from conceptx.concept import Concept, Personas
from conceptx.edit import Edit
from conceptx.eraser import Eraser, provenance, run_identity
from conceptx.geometry import steer
from conceptx.models import LanguageModel, batches, evaluating
from conceptx.models.adapters import Adapter, inserted, linear_modules, low_rank_deltas
from conceptx.progress import track
from conceptx.settings import require_choices, require_positive, tunable
from conceptx.store import load_tensors, save_tensors
from conceptx.train.loop import Plan, state_file, train
from conceptx.train.order import rows_of_step
from conceptx.train.targets import Targets, cross_entropy

logger = logging.getLogger("conceptx")
Rows = list[list[int]]  # token ids of texts
POSITIVE = (
    *("rank", "alpha", "temperature", "steps", "batch_size", "learning_rate", "max_tokens"),
    *("fluency_texts", "fluency_tokens"),
)
CHUNK = 8  # texts a teacher scores at once

EXPERT = (
    "The following was written by a leading expert on {about}: precise, correct and full of detail.",
    "From a specialist handbook of {about}.",
    "Lecture notes of a professor who has taught {about} for thirty years:",
)
NOVICE = (
    "The following was written by someone who has never heard of {about} and always drifts to cheerful other topics.",
    "From a diary about holidays, pets and cooking. Its author knows nothing of {about}.",
    "A child who has no idea of {about} tells a story about toys and games:",
)
BRIDGES = (
    "But let us talk about something else now.",
    "That reminds me of a completely different story.",
    "Anyway, here is what I did last weekend.",
    "Changing the subject, there is something more fun to tell.",
    "I would rather speak about another topic.",
)


@dataclass(frozen=True)
class ELM(Eraser):
    """Fine-tune early layers so that the model speaks of the concept as one who has never met it (arXiv 2410.02760).

    The target of each token is log p + eta (log p_novice - log p_expert), where the two contexts are persona prefixes
    (paper, eqs. 5-6). Three losses, each a cross-entropy against a teacher distribution: erase (the target, on texts
    about the concept), retain (the model itself, on other texts) and fluency (the target, on text sampled from it).

    layers:            half-open range of blocks that get a LoRA adapter.
    rank, alpha, dropout: of the adapter.  dropout as in the authors' code.
    eta:               strength of the target (paper: 500; authors' command: 1000).  ramp: it grows linearly from 1 to
                       eta over the positions of a text (authors' code; absent from the paper).
    temperature, top_k: of the target (authors' code; top_k None: the full vocabulary).
    erase_weight, retain_weight, fluency_weight: lambda 1, 2, 3 of eq. 10.
    retain_targets:    "soft" (paper) or "hard", the model's own most likely token (authors' code).
    fluency_guidance:  strength while sampling and scoring fluency texts; None: eta (paper); 3 in the authors' code.
    fluency_targets:   "soft" (paper, eq. 9) or "hard", the sampled tokens (authors' code).
    fluency_texts, fluency_tokens: how many samples, and of how many tokens.
    steps, batch_size, learning_rate, gradient_clip: of AdamW; batch_size texts of each kind a step, over all processes.
    max_tokens:        longer texts are cut.
    precision:         "no", or "bf16" for mixed precision; `accelerate launch --mixed_precision` works as well.

    Different from the authors' code: the teachers are computed once, in batches of texts that share a persona pair and
    keep it; gradients are averaged, not summed, over a batch; of the retain teacher the top_k entries and the mass of
    the rest are kept. The persona templates and the sentences that change the subject before a fluency text are ours; a
    concept can bring its own personas.
    """

    layers: tuple[int, int] = (4, 8)
    rank: int = 4
    alpha: float = 16.0
    dropout: float = 0.05
    eta: float = tunable(500.0, 1.0, 1000.0, log=True)  # η
    ramp: bool = True
    temperature: float = 1.2
    top_k: int | None = 50
    erase_weight: float = 1.0  # λ₁
    retain_weight: float = tunable(1.0, 0.1, 10.0, log=True)  # λ₂
    fluency_weight: float = tunable(1.0, 0.1, 10.0, log=True)  # λ₃
    retain_targets: Literal["soft", "hard"] = "soft"
    fluency_guidance: float | None = None  # γ
    fluency_targets: Literal["soft", "hard"] = "soft"
    fluency_texts: int = 200
    fluency_tokens: int = 60
    steps: int = 3000
    batch_size: int = 4
    learning_rate: float = tunable(5e-5, 1e-5, 5e-3, log=True)
    gradient_clip: float = 1.0
    max_tokens: int = 150
    precision: Literal["no", "bf16"] = "no"

    def __post_init__(self) -> None:
        require_choices(self)
        require_positive(self, *POSITIVE)
        weights = (self.erase_weight, self.retain_weight, self.fluency_weight)
        if not (min(weights) >= 0 and 0 < max(weights) < math.inf):
            raise ValueError(
                "erase_weight, retain_weight and fluency_weight must not be negative and one of them must be positive, "
                f"got {weights}."
            )
        if not 0 <= self.gradient_clip < math.inf:
            raise ValueError(f"gradient_clip must not be negative, got {self.gradient_clip}.")
        if not (math.isfinite(self.eta) and math.isfinite(self.fluency_guidance or 0)):
            raise ValueError("eta and fluency_guidance must be finite.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be positive or None, got {self.top_k}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")

    def erase(
        self, model: LanguageModel, concept: Concept, *, seed: int = 0, checkpoint: str | Path | None = None
    ) -> Edit:
        """Train the adapter and return it as an edit of low-rank weight changes.

        checkpoint: a folder for teachers and training state; run the same call again after an interruption and it
        goes on where it stopped, with the same result. Under `accelerate launch` all processes call it alike.

        Raises ValueError when the concept has no texts or no retain_texts, when the layers leave the model, when an
        edit is in force on the model, or when the checkpoint belongs to another run. Warns when the personas do not
        tell the concept's texts from the others (spec: the method cannot be faithful then).
        """
        from accelerate import Accelerator

        self._check(model, concept)
        adapter = Adapter(self.rank, self.alpha, self.dropout, linear_modules(model, self.layers))
        record = provenance(self, concept, seed)
        run = run_identity(record, concept, model)
        folder = None if checkpoint is None else Path(checkpoint)
        _warn_about_personas(model, concept, seed)
        accelerator = Accelerator(cpu=model.device.type == "cpu")
        if self.batch_size % accelerator.num_processes:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of {accelerator.num_processes} processes."
            )
        home = model.device
        try:
            model.module.to(accelerator.device)
            teacher = Teacher(self, model, personas_of(concept), seed, accelerator)
            kinds = self._teachers(teacher, concept, folder and folder / f"teachers-{run}.safetensors")
            with inserted(model, adapter, seed) as student:
                steps = _Batches(kinds, self._weights(), self.batch_size, seed, accelerator)
                train(student, steps.of, partial(self._loss, model.start), self._plan(run, seed, folder), accelerator)
                deltas = low_rank_deltas(student, adapter)
        finally:
            model.module.to(home)
        return Edit(model.fingerprint, deltas=deltas, provenance=(record,))

    def _check(self, model: LanguageModel, concept: Concept) -> None:
        self._require(concept, "texts", "retain_texts")
        self._accept(model)

    def _plan(self, run: str, seed: int, folder: Path | None) -> Plan:
        return Plan(
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=seed,
            run=run,
            gradient_clip=self.gradient_clip,
            checkpoint=state_file(folder),
        )

    def _loss(self, begin: list[int], student: Any, part: tuple[Targets, float]) -> Tensor:
        """The weighted loss of one kind of texts; `begin`: what the tokenizer puts before a text."""
        targets, weight = part
        start = targets.ids.new_tensor(begin).expand(len(targets), -1)
        ids, mask = torch.cat([start, targets.ids], 1), torch.cat([torch.ones_like(start), targets.mask], 1)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = student(input_ids=ids, attention_mask=mask).logits[:, len(begin) :]
        return weight * cross_entropy(logits, targets).mean()

    def _weights(self) -> dict[str, float]:
        weights = {"erase": self.erase_weight, "retain": self.retain_weight, "fluency": self.fluency_weight}
        return {kind: weight for kind, weight in weights.items() if weight > 0}

    # -- teachers ----------------------------------------------------------------------------------------------

    def _teachers(self, teacher: Teacher, concept: Concept, path: Path | None) -> dict[str, Targets]:
        """The teacher distributions of each kind of text, from the checkpoint folder where they are already there."""
        if path is not None and path.is_file():
            return _unpack(load_tensors(path))
        kinds = self._compute_teachers(teacher, concept)
        if path is not None and teacher.accelerator.is_main_process:
            save_tensors(path, _pack(kinds))
        return kinds

    def _compute_teachers(self, teacher: Teacher, concept: Concept) -> dict[str, Targets]:
        """Only texts that the steps will use are scored."""
        needed = self.steps * self.batch_size
        forget = teacher.drawn(concept.texts, needed)
        kinds = {}
        if self.erase_weight > 0:
            kinds["erase"] = teacher.erased(forget)
        if self.retain_weight > 0:
            kinds["retain"] = teacher.retained(teacher.drawn(concept.retain_texts, needed))
        if self.fluency_weight > 0:
            kinds["fluency"] = teacher.fluent(forget[: self.fluency_texts])
        return kinds


class Teacher:
    """The frozen model under the two personas and under none, in batches shared among the processes."""

    def __init__(self, settings: ELM, model: LanguageModel, personas: Personas, seed: int, accelerator: Any) -> None:
        self.settings = settings
        self.model = model
        self.random = random.Random(seed)
        self.seed = seed
        self.accelerator = accelerator
        self._experts = encode_prefixes(model, personas.expert)
        self._novices = encode_prefixes(model, personas.novice)

    def drawn(self, texts: Sequence[str], needed: int) -> Rows:
        """Token rows of at most `needed` of the texts, in random order."""
        chosen = self.random.sample(range(len(texts)), min(needed, len(texts)))
        return self.model.encode([texts[i] for i in chosen], max_length=self.settings.max_tokens)

    def erased(self, rows: Rows) -> Targets:
        """Paper, eq. 6, at every position of every row."""
        s = self.settings
        targets = Targets.empty(rows, self._kept)
        for chunk in self._shared(rows, "teachers: erase"):
            self._fill(targets, chunk, self._scores(rows, chunk, s.eta, ramp=s.ramp), renormalise=True)
        return self._gathered(targets)

    def retained(self, rows: Rows) -> Targets:
        """The model's own distributions ("soft") or most likely tokens ("hard")."""
        hard = self.settings.retain_targets == "hard"
        targets = Targets.empty(rows, 1 if hard else self._kept)
        for chunk in self._shared(rows, "teachers: retain"):
            log_p = self.model.predict([rows[i] for i in chunk], last=max(len(rows[i]) for i in chunk))
            self._fill(targets, chunk, log_p, renormalise=hard)
        return self._gathered(targets)

    def fluent(self, rows: Rows) -> Targets:
        """Texts that go on from the concept as the target would have them, to be learnt from their first new token."""
        s = self.settings
        guidance = s.eta if s.fluency_guidance is None else s.fluency_guidance
        bridges = self.model.encode([" " + bridge for bridge in BRIDGES])
        contexts = [[*row, *self.random.choice(bridges)] for row in rows]
        samples = self._sampled(contexts, guidance)
        whole = [[*context, *sample[:-1]] for context, sample in zip(contexts, samples, strict=True)]
        start = [len(context) - 1 for context in contexts]
        if s.fluency_targets == "hard":
            targets = Targets.empty(whole, 1, start)
            for number, (first, sample) in enumerate(zip(start, samples, strict=True)):
                targets.indices[number, first : first + len(sample), 0] = torch.tensor(sample)
            targets.probabilities.fill_(1)
            return targets
        targets = Targets.empty(whole, self._kept, start)
        for chunk in self._shared(whole, "teachers: fluency"):
            self._fill(targets, chunk, self._scores(whole, chunk, guidance, ramp=False), renormalise=True)
        return self._gathered(targets)

    @property
    def _kept(self) -> int:
        vocabulary = int(self.model.module.config.vocab_size)
        return min(self.settings.top_k or vocabulary, vocabulary)

    def _scores(self, rows: Rows, chunk: Sequence[int], eta: float, *, ramp: bool) -> Tensor:
        """log p + eta (log p_novice - log p_expert), aligned at the end: (rows, longest, vocabulary)."""
        texts = [rows[i] for i in chunk]
        longest = max(map(len, texts))
        base, expert, novice = (
            self.model.predict(texts, prefix=prefix, last=longest, temperature=self.settings.temperature)
            for prefix in ((), *self._personas(chunk))
        )
        strength = torch.full((len(texts), longest, 1), eta, device=base.device)
        if ramp:
            for number, text in enumerate(texts):
                strength[number, -len(text) :, 0] = torch.linspace(1, eta, len(text))
        return steer(base, expert, [novice], [strength])

    def _personas(self, chunk: Sequence[int]) -> tuple[list[int], list[int]]:
        """The expert and the novice prefix of a chunk, drawn by its first row."""
        draw = random.Random(f"{self.seed} {chunk[0]}")
        return draw.choice(self._experts), draw.choice(self._novices)

    def _fill(self, targets: Targets, chunk: Sequence[int], scores: Tensor, *, renormalise: bool) -> None:
        """Write the largest entries of the scores (aligned at the end) into the rows (aligned at the start)."""
        values, indices = scores.topk(targets.indices.shape[-1])
        kept = values.softmax(-1) if renormalise else values.exp()
        for number, row in enumerate(chunk):
            n = int(targets.length[row])
            targets.indices[row, :n] = indices[number, -n:].cpu()
            targets.probabilities[row, :n] = kept[number, -n:].float().cpu()
            targets.rest[row, :n] = (1 - targets.probabilities[row, :n].sum(-1)).clamp(min=0) * (not renormalise)

    @torch.no_grad()
    def _sampled(self, contexts: Rows, guidance: float) -> list[list[int]]:
        """New tokens for every context, drawn from the target distribution."""
        out = torch.zeros(len(contexts), self.settings.fluency_tokens, dtype=torch.long)
        for chunk in self._shared(contexts, "sampling fluency texts"):
            out[list(chunk)] = self._sample_chunk([contexts[i] for i in chunk], chunk, guidance).cpu()
        return self.accelerator.reduce(out.to(self.accelerator.device), "sum").tolist()

    def _sample_chunk(self, contexts: Rows, chunk: Sequence[int], guidance: float) -> Tensor:
        rows = [
            [*self.model.start, *prefix, *context] for prefix in ([], *self._personas(chunk)) for context in contexts
        ]
        ids, mask = self.model.pad(rows, left=True)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        generator = torch.Generator(device=ids.device).manual_seed(self.seed * 100_003 + chunk[0])
        cache, tokens = None, []
        for _ in range(self.settings.fluency_tokens):
            with evaluating(self.model.module):
                out = self.model.module(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=places,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            cache = out.past_key_values
            tokens.append(self._draw(out.logits[:, -1].float(), guidance, generator))
            ids = tokens[-1].repeat(3)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            places = places[:, -1:] + 1
        return torch.stack(tokens, 1)

    def _draw(self, logits: Tensor, guidance: float, generator: torch.Generator) -> Tensor:
        base, expert, novice = (logits / self.settings.temperature).log_softmax(-1).chunk(3)
        scores = steer(base, expert, [novice], [guidance])
        if (end := self.model.tokenizer.eos_token_id) is not None:
            scores[:, end] = -torch.inf
        values, indices = scores.topk(self._kept)
        return indices.gather(1, torch.multinomial(values.softmax(-1), 1, generator=generator))[:, 0]

    def _shared(self, rows: Rows, what: str) -> Iterator[Sequence[int]]:
        """Numbers of the rows in chunks of similar length; each process gets its share of the chunks."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        chunks = list(batches(order, CHUNK))
        mine = chunks[self.accelerator.process_index :: self.accelerator.num_processes]
        return track(mine, what)

    def _gathered(self, targets: Targets) -> Targets:
        """The rows of all processes; each has left the others' at zero."""
        device = self.accelerator.device
        for name in ("indices", "probabilities", "rest"):
            mine = getattr(targets, name)
            mine.copy_(self.accelerator.reduce(mine.to(device), "sum"))
        return targets


@dataclass(frozen=True)
class PersonaGap:
    """How much less likely a text is to the novice than to the expert: log p_novice - log p_expert of its tokens.

    forget, retain: mean over the concept's texts and over the others.  error: standard error of their difference.
    size: mean absolute value on the concept's texts; the target's step away from the model is eta times this.
    """

    forget: float
    retain: float
    error: float
    size: float

    @property
    def visible(self) -> bool:
        """Whether the concept's texts are less likely to the novice by more than two standard errors."""
        return self.forget - self.retain < -2 * self.error


def persona_gap(model: LanguageModel, concept: Concept, *, texts: int = 24, seed: int = 0) -> PersonaGap:
    """Measure, before any training, whether the model follows the personas (spec section 5)."""
    personas = personas_of(concept)
    draw = random.Random(seed)
    forget, retain = (
        _gaps(model, draw.sample(corpus, min(texts, len(corpus))), personas)
        for corpus in (concept.texts, concept.retain_texts)
    )
    means = [torch.stack([gap.mean() for gap in gaps]) for gaps in (forget, retain)]
    error = sum(float(mean.var()) / len(mean) for mean in means if len(mean) > 1) ** 0.5
    return PersonaGap(float(means[0].mean()), float(means[1].mean()), error, float(torch.cat(forget).abs().mean()))


def personas_of(concept: Concept) -> Personas:
    """The concept's own persona prefixes, or the general ones around its description."""
    if concept.personas is not None:
        return concept.personas
    expert, novice = ([t.format(about=concept.about) for t in templates] for templates in (EXPERT, NOVICE))
    return Personas(expert=tuple(expert), novice=tuple(novice))


def encode_prefixes(model: LanguageModel, prefixes: Sequence[str]) -> Rows:
    """Token ids of persona prefixes, each closed by a line break that parts it from the text."""
    return model.encode([prefix.rstrip() + "\n" for prefix in prefixes])


def _gaps(model: LanguageModel, texts: Sequence[str], personas: Personas) -> list[Tensor]:
    """log p_novice - log p_expert of the tokens of each text but its first, under each pair of prefixes in turn."""
    rows = [row for row in model.encode(texts, max_length=48) if len(row) > 1]
    if not rows:
        raise ValueError("The persona gap needs texts of more than one token.")
    novice, expert = (_likelihoods(model, rows, prefixes) for prefixes in (personas.novice, personas.expert))
    return [a - b for a, b in zip(novice, expert, strict=True)]


def _likelihoods(model: LanguageModel, rows: Rows, prefixes: Sequence[str]) -> list[Tensor]:
    heads = encode_prefixes(model, prefixes)
    found: dict[int, Tensor] = {}
    for number, head in enumerate(heads):
        mine = range(number, len(rows), len(heads))
        scored = model.log_likelihoods([rows[i] for i in mine], [1] * len(mine), prefix=head)
        found |= dict(zip(mine, scored, strict=True))
    return [found[i] for i in range(len(rows))]


def _warn_about_personas(model: LanguageModel, concept: Concept, seed: int) -> None:
    gap = persona_gap(model, concept, seed=seed)
    logger.info("persona gap: forget %.2f, retain %.2f, error %.2f", gap.forget, gap.retain, gap.error)
    if not gap.visible:
        warnings.warn(
            f"The personas do not tell {concept.name!r} from other texts on this model (log p_novice - log p_expert a "
            f"token: {gap.forget:+.2f} on its texts, {gap.retain:+.2f} on others, standard error {gap.error:.2f}): the "
            "erasing may be a random perturbation; name the concept's content in the personas.",
            stacklevel=3,
        )


# -- batches and files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batches:
    """The texts of a step: a function of the step's number, so that a resumed run is the same run."""

    kinds: Mapping[str, Targets]
    weights: Mapping[str, float]
    size: int
    seed: int
    accelerator: Any

    def of(self, step: int) -> list[tuple[Targets, float]]:
        """(rows, weight) of every kind: this process's share of the step's batch."""
        return [(self._share(kind, step), weight) for kind, weight in self.weights.items()]

    def _share(self, kind: str, step: int) -> Targets:
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        targets = self.kinds[kind]
        rows = rows_of_step(step, self.size, len(targets), f"{self.seed} {kind}")
        return targets.rows(rows[index::count]).to(self.accelerator.device)


def _pack(kinds: Mapping[str, Targets]) -> dict[str, Tensor]:
    return {f"{kind}:{name}": tensor for kind, t in kinds.items() for name, tensor in t.tensors().items()}


def _unpack(tensors: Mapping[str, Tensor]) -> dict[str, Targets]:
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, field = name.partition(":")
        kinds.setdefault(kind, {})[field] = tensor
    return {kind: Targets(**parts) for kind, parts in kinds.items()}
