"""A wrong input is one clear error, of one sentence, and changes nothing: neither the model nor a file."""

import json
import re
from functools import cached_property

import numpy as np
import pytest
import torch
from hosts import GARDEN, METALS, same, state, tiny, tiny_pipeline
from safetensors.torch import save_file

from conceptx import Concept, Edit, Subspace, cli, load, wrap
from conceptx.attacks.attack import Goal
from conceptx.attacks.textual_inversion import TextualInversion
from conceptx.edit import Dense, LowRank, Rows
from conceptx.evaluation.benchmark import Benchmark
from conceptx.evaluation.image_benchmark import ImageBenchmark
from conceptx.evaluation.report import Report
from conceptx.geometry import ConceptMap
from conceptx.methods import EAR, ELM, ESD, INLP, LEACE, RLACE, UCE, MeanDifference, PCADirections
from conceptx.models.adapters import linear_modules
from conceptx.testbeds import emoji

X = np.random.default_rng(0).normal(size=(12, 4))
Z = np.arange(12) % 2
NAN, INFINITE = X.copy(), X.copy()
NAN[3, 1], INFINITE[2, 2] = np.nan, np.inf
METALS_CONCEPT = Concept("metals", texts=METALS, retain_texts=GARDEN)
UP = "model.layers.0.mlp.up_proj.weight"


class World:
    """A model, for some cases a pipeline, and a folder with what the case writes into it before its error."""

    def __init__(self, folder):
        self.folder, self.model = folder, tiny()
        self.before = [(self.model, state(self.model))]

    @cached_property
    def pipeline(self):
        model = tiny_pipeline()
        self.before.append((model, state(model)))
        return model

    def file(self, name, content=""):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def concept(self, text, **corpora):
        for name, content in corpora.items():
            self.file(f"{name}.jsonl", content)
        return Concept.load(self.file("concept.toml", text))

    def edit(self, **fields):
        return Edit(self.model.fingerprint, **fields)

    def saved(self, change=None, cut=None):
        """A good edit on disk, made bad."""
        folder = self.folder / "edit"
        self.edit(deltas={UP: LowRank(torch.ones(48, 1), torch.ones(1, 32))}).save(folder)
        if change is not None:
            index = json.loads((folder / "edit.json").read_text())
            self.file("edit/edit.json", json.dumps(index | change))
        if cut is not None:
            (path,) = folder.glob("*.safetensors")
            path.write_bytes(path.read_bytes()[:cut])
        return folder

    def checkpoint(self, name="plain"):
        self.model.module.save_pretrained(self.folder / name)
        self.model.tokenizer.save_pretrained(self.folder / name)
        return str(self.folder / name)

    def folder_of_a_pipeline(self, index):
        """What loads it."""
        path = self.file("pipeline/model_index.json", index)
        return lambda: load(str(path.parent))

    def image_benchmark(self, **changes):
        fields = {"kind": "object", "objects": ["cat", "dog"], "templates": ["{object}"]} | changes
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())
        return ImageBenchmark.load(self.file("b.toml", text))

    def files(self):
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


def apply_map(world, site="layers.1.output", d=32):
    removal = Subspace.orthogonal(torch.eye(d)[:, :1]).removal()
    return world.edit(maps={site: (removal,)}).apply(world.model)


def attack(world, pictures=None, **settings):
    images = torch.rand(2, 3, 16, 16) if pictures is None else pictures
    return TextualInversion(steps=1, batch_size=1, **settings).search(world.pipeline, Goal("cat", images))


def command(world, model="smollm2", method="leace", **options):
    concept = world.file("concept.toml", 'name = "x"\ntexts = ["a"]\nretain_texts = ["b"]')
    return lambda: cli.erase(model, concept, world.folder / "out", method, **options)


def score(world, **options):
    return lambda: cli.evaluate("smollm2", **options)


# id -> (what is done, what it raises, what the message says). What is done may first prepare and return a function.
CASES = {
    # concepts
    "concept: no file": (lambda w: Concept.load(w.folder / "no.toml"), FileNotFoundError, "no concept file"),
    "concept: bad TOML": (lambda w: w.concept("name = "), ValueError, "is not a TOML file"),
    "concept: not UTF-8": (lambda w: Concept.load(w.file("c.toml", b'name = "\xff"')), ValueError, "not a TOML file"),
    "concept: unknown field": (lambda w: Concept("x", colour="red"), ValueError, "unknown field 'colour' .*synonyms"),
    "concept: blank name": (lambda w: Concept("  "), ValueError, "name: is blank"),
    "concept: no name": (lambda w: w.concept("texts = []"), ValueError, "without a name.*name: is blank"),
    "concept: unknown kind": (lambda w: Concept("x", kind="mood"), ValueError, "kind: Input should be 'topic'"),
    "concept: blank text": (lambda w: Concept("x", texts=["a", "\n"]), ValueError, r"texts\.1: is blank"),
    "concept: text for a list": (lambda w: Concept("x", texts="abc"), ValueError, "texts: .*tuple"),
    "concept: number for a text": (lambda w: Concept("x", texts=[3]), ValueError, r"texts\.0: .*string"),
    "concept: retains itself": (
        lambda w: Concept("Gold", synonyms=["Au"], retain=["au", "tin"]), ValueError, r"the concept itself: \['au'\]"),
    "concept: text on both sides": (
        lambda w: Concept("x", texts=["a", "b"], retain_texts=["b"]), ValueError, "1 texts are in texts and in retain"),
    "concept: one class": (lambda w: Concept("x", classes={"a": ["b"]}), ValueError, "needs at least two values"),
    "concept: personas without a novice": (
        lambda w: Concept("x", personas={"expert": ["a"]}), ValueError, "personas.novice: Field required"),
    "corpus: outside the folder": (
        lambda w: w.concept('name = "x"\ntexts_file = "../secret.jsonl"'), ValueError, "outside the concept's folder"),
    "corpus: missing": (
        lambda w: w.concept('name = "x"\ntexts_file = "no.jsonl"'), FileNotFoundError, "no corpus file"),
    "corpus: name is a number": (lambda w: w.concept('name = "x"\ntexts_file = 3'),
        ValueError, "must be a text, got 3"),
    "corpus: broken line": (
        lambda w: w.concept('name = "x"\ntexts_file = "a.jsonl"', a='{"text": "ok"}\n{"text": '),
        ValueError, "a.jsonl, line 2: expected"),
    "corpus: line without a text": (
        lambda w: w.concept('name = "x"\ntexts_file = "a.jsonl"', a='{"txt": "ok"}'), ValueError, "line 1: expected"),
    "corpus: not UTF-8": (
        lambda w: w.concept('name = "x"\ntexts_file = "a.jsonl"', a=b"\xff"), ValueError, "not a UTF-8 file"),
    "corpus: beside a text for a list": (
        lambda w: w.concept('name = "x"\ntexts = "abc"\ntexts_file = "a.jsonl"', a='{"text": "ok"}'),
        ValueError, "texts must be a list, got 'abc'"),
    # vectors and labels
    "X: one dimension": (lambda w: LEACE().fit(X[:, 0], Z), ValueError, r"non-empty matrix .*\(12,\)"),
    "X: empty": (lambda w: LEACE().fit(X[:0], Z[:0]), ValueError, r"non-empty matrix .*\(0, 4\)"),
    "X: NaN": (lambda w: RLACE().fit(NAN, Z), ValueError, "X has 1 NaN or infinite entries of 48"),
    "X: infinite": (lambda w: INLP().fit(INFINITE, Z), ValueError, "X has 1 NaN or infinite entries of 48"),
    "z: wrong length": (lambda w: MeanDifference().fit(X, Z[:11]), ValueError, "n = 12 rows, got shape"),
    "z: one class": (lambda w: RLACE().fit(X, np.zeros(12, int)), ValueError, "one class only, 0"),
    "z: constant": (lambda w: LEACE().fit(X, np.ones((12, 1))), ValueError, "the same in every row"),
    "z: NaN": (lambda w: LEACE().fit(X, np.where(Z, np.nan, 1.0)), ValueError, "6 NaN or missing entries of 12"),
    "z: infinite": (lambda w: LEACE().fit(X, np.where(Z, np.inf, 1.5)[:, None]), ValueError, "6 NaN or infinite"),
    "z: continuous for a classifier": (lambda w: INLP().fit(X, X[:, 0]), ValueError, "labels are continuous numbers"),
    "rank above d": (lambda w: PCADirections(rank=5).fit(X, Z), ValueError, "between 1 and the dimension 4, got 5"),
    "rank 0": (lambda w: RLACE(rank=0).fit(X, Z), ValueError, "between 1 and the dimension 4, got 0"),
    "subspace: dependent columns": (lambda w: Subspace.orthogonal(np.ones((4, 2))), ValueError, "linearly dependent"),
    "subspace: other dimension": (
        lambda w: Subspace.orthogonal(X[:4, :1]).remove(X[:, :3]), ValueError, "dimension 4, got 3"),
    "subspace: cut file": (
        lambda w: (w.file("s.safetensors", b"\x10\x00"), lambda: Subspace.load(w.folder / "s.safetensors"))[1],
        ValueError, "not a complete safetensors file"),
    "subspace: other file": (
        lambda w: (save_file({"a": torch.ones(1)}, w.folder / "s"), lambda: Subspace.load(w.folder / "s"))[1],
        ValueError, r"lacks the tensors \['basis', 'dual', 'mean'\]"),
    # the model
    "model: an unknown site": (
        lambda w: LEACE().erase(w.model, METALS_CONCEPT, sites=["layers.0.mlp"]),
        KeyError, "no site 'layers.0.mlp'; sim"),
    "model: no site": (lambda w: LEACE().erase(w.model, METALS_CONCEPT, sites=[]), ValueError, "No site was given"),
    "model: concept without labels": (
        lambda w: LEACE().erase(w.model, Concept("x", texts=METALS)), ValueError, "needs classes, or texts and retain"),
    "model: concept without texts": (
        lambda w: ELM().erase(w.model, Concept("x", retain_texts=GARDEN)), ValueError, "needs the concept's texts"),
    "model: layers out of range": (
        lambda w: ELM(layers=(2, 9)).erase(w.model, METALS_CONCEPT), ValueError, "2..8 are not a range inside"),
    "model: layers reversed": (lambda w: linear_modules(w.model, (2, 1)), ValueError, "not a range inside"),
    "model: empty texts": (lambda w: w.model.encode([]), ValueError, "No text was given"),
    "model: blank prompt": (lambda w: w.model.generate(["a", ""]), ValueError, "1 of 2 texts are blank"),
    "model: no tokenizer": (lambda w: wrap(w.model.module), ValueError, "needs its tokenizer"),
    "model: not a model": (lambda w: wrap("llama"), ValueError, "takes a causal language model .* got str"),
    "model: no folder": (lambda w: load(str(w.folder / "no")), FileNotFoundError, "no model folder"),
    "model: unknown hub name": (lambda w: load("nobody/nothing"), FileNotFoundError, "give a local folder, a hub name"),
    "model: no such device": (
        lambda w: (lambda folder: lambda: load(folder, device="abacus"))(w.checkpoint()),
        ValueError, "device 'abacus' cannot be used"),
    "model: a bare denoiser": (
        lambda w: wrap(w.pipeline.denoiser), ValueError, "a text-to-image pipeline of diffusers, got UNet2DCond"),
    "model: a pipeline's component": (lambda w: wrap(w.pipeline.pipeline.scheduler), ValueError, "got DDIMScheduler"),
    "pipeline: broken index": (lambda w: w.folder_of_a_pipeline("{"), ValueError, "_index.json is not a JSON file"),
    "pipeline: index is a list": (lambda w: w.folder_of_a_pipeline("[]"), ValueError, "names no pipeline class"),
    "pipeline: index without a class": (
        lambda w: w.folder_of_a_pipeline('{"unet": 1}'), ValueError, "names no pipeline class of diffusers"),
    "pipeline: class of another release": (
        lambda w: w.folder_of_a_pipeline('{"_class_name": "NoPipeline"}'), ValueError, "has no pipeline 'NoPipeline'"),
    "pipeline: components missing": (
        lambda w: w.folder_of_a_pipeline(
            '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'),
        FileNotFoundError, "No model .*: give a local folder"),
    "pipeline: no image tokens": (
        lambda w: EAR().erase(w.pipeline, METALS_CONCEPT),
        ValueError, "EAR acts on: ARImageModel; got: DiffusionModel"),
    "pipeline: ELM": (lambda w: ELM().erase(w.pipeline, METALS_CONCEPT), ValueError, "ELM acts on: LanguageModel"),
    "model: UCE": (lambda w: UCE().erase(w.model, METALS_CONCEPT), ValueError, "UCE acts on: DiffusionModel or AR"),
    "model: ESD": (lambda w: ESD().erase(w.model, METALS_CONCEPT), ValueError, "ESD acts on: DiffusionModel; got: L"),
    "pipeline: edit of a language model": (
        lambda w: w.edit(deltas={UP: Dense(torch.ones(48, 32))}).apply(w.pipeline), ValueError, "for another model"),
    "pipeline: edit on a language model": (
        lambda w: Edit(w.pipeline.fingerprint).apply(w.model), ValueError, "made for another model"),
    "pipeline: map of another width": (
        lambda w: Edit(w.pipeline.fingerprint, maps={
            "text": (Subspace.orthogonal(torch.eye(31)[:, :1]).removal(),)}).apply(w.pipeline),
        ValueError, "dimension 31, the site has 32"),
    "pipeline: site of a language model": (
        lambda w: Edit(w.pipeline.fingerprint, maps={
            "layers.1.output": (Subspace.orthogonal(torch.eye(32)[:, :1]).removal(),)}).apply(w.pipeline),
        KeyError, "no site 'layers.1.output'; similar: text_encoder"),
    "pipeline: adapter for peft": (
        lambda w: UCE().erase(w.pipeline, Concept("cat", anchor="dog")).export_peft(w.folder / "lora"),
        ValueError, "fold it first"),
    "attack: initial word without a token": (lambda w: attack(w, initial=""), ValueError, "initial word '' has no tok"),
    "attack: a single picture": (
        lambda w: attack(w, torch.rand(3, 16, 16)), ValueError, r"\(n, 3, height, width\), got \(3, 16, 16\)"),
    "attack: no pictures": (lambda w: attack(w, torch.rand(0, 3, 16, 16)), ValueError, "needs pictures of 'cat'"),
    "emoji: unknown denoiser": (lambda w: emoji.load("c"), ValueError, "no denoiser 'c'; available: a, b"),
    "emoji: no weights": (
        lambda w: emoji.load(source=w.folder), FileNotFoundError, "no weights of the emoji model in .*world"),
    "emoji: no judges": (lambda w: emoji.judges(w.folder), FileNotFoundError, "no file .*judges.safetensors"),
    "emoji: no examples": (lambda w: emoji.examples("cat", w.folder), FileNotFoundError, "no file .*examples.safet"),
    "emoji: unknown object": (lambda w: emoji.find("catt"), KeyError, "no object 'catt'; similar: cat"),
    "emoji: nothing like it": (lambda w: emoji.find(""), KeyError, "no object ''; similar: none"),
    # edits
    "edit: another model": (lambda w: Edit(tiny(seed=1).fingerprint).apply(w.model), ValueError, "for another model"),
    "edit: another architecture": (
        lambda w: Edit(tiny("gpt2").fingerprint).fold(w.model), ValueError, "architecture or parameter shapes differ"),
    "edit: wrong delta shape": (
        lambda w: w.edit(deltas={UP: Dense(torch.ones(32, 48))}).apply(w.model),
        ValueError, r"not fit its shape \(48, 32\)"),
    "edit: row out of range": (
        lambda w: w.edit(deltas={UP: Rows(torch.tensor([48]), torch.ones(1, 32))}).apply(w.model),
        ValueError, "not fit"),
    "edit: row twice": (lambda w: Rows(torch.tensor([1, 1]), torch.ones(2, 3)), ValueError, "may appear once"),
    "edit: pair that does not fit": (lambda w: LowRank(torch.ones(3, 2), torch.ones(1, 3)), ValueError, "do not fit"),
    "edit: NaN": (lambda w: Dense(torch.tensor([1.0, float("nan")])), ValueError, "change has 1 NaN or infinite"),
    "edit: NaN strength": (
        lambda w: w.edit(deltas={UP: Dense(torch.ones(48, 32))}) * float("nan"), ValueError, "NaN or infinite"),
    "edit: unknown parameter": (
        lambda w: w.edit(deltas={"mlp.up": Dense(torch.ones(1))}).apply(w.model), KeyError, "no parameter 'mlp.up'"),
    "edit: unknown site": (lambda w: apply_map(w, "layers.7.output"), KeyError, "no site 'layers.7.output'"),
    "edit: map of another width": (lambda w: apply_map(w, d=31), ValueError, "dimension 31, the site has 32"),
    "edit: unknown gate": (
        lambda w: ConceptMap(torch.ones(2, 1), torch.ones(1, 2), torch.ones(2), "step"),
        ValueError, "Unknown gate 'step'"),
    "edit: stacked on another": (
        lambda w: w.edit() + Edit(tiny(seed=1).fingerprint), ValueError, "different models cannot be stacked"),
    "edit: no folder": (lambda w: Edit.load(w.folder / "no"), FileNotFoundError, "holds no edit"),
    "edit: cut tensors": (
        lambda w: (lambda f: lambda: Edit.load(f))(w.saved(cut=200)), ValueError, "not a complete safetensors file"),
    "edit: index is no JSON": (
        lambda w: (w.saved(), w.file("edit/edit.json", "{"), lambda: Edit.load(w.folder / "edit"))[2],
        ValueError, "is not a JSON file"),
    "edit: index is a list": (
        lambda w: (w.saved(), w.file("edit/edit.json", "[]"), lambda: Edit.load(w.folder / "edit"))[2],
        ValueError, "is not an edit of this version"),
    "edit: of a later version": (
        lambda w: (lambda f: lambda: Edit.load(f))(w.saved({"version": 3})), ValueError, "not an edit of this version"),
    "edit: tensors elsewhere": (
        lambda w: (lambda f: lambda: Edit.load(f))(w.saved({"tensors": "../x.safetensors"})),
        ValueError, "lies outside its folder"),
    "edit: tensors missing": (
        lambda w: (lambda f: lambda: Edit.load(f))(w.saved({"tensors": "x.safetensors"})),
        FileNotFoundError, "no file .*x.safetensors"),
    "edit: peft of maps": (
        lambda w: w.edit(maps={"layers.1.output": (Subspace.orthogonal(torch.eye(32)[:, :1]).removal(),)}).export_peft(
            w.folder / "lora", w.model), ValueError, "fold it first"),
    # settings and the command line
    "settings: unknown": (lambda w: RLACE.from_settings({"ranks": 2}),
        ValueError, "no setting ranks; it has rank, start"),
    "settings: wrong type": (lambda w: RLACE.from_settings({"rank": "two"}), ValueError, "RLACE rank: .*integer"),
    "settings: wrong choice": (
        lambda w: ELM.from_settings({"retain_targets": "firm"}), ValueError, "ELM retain_targets: .*'soft' or 'hard'"),
    "settings: wrong length": (lambda w: ELM.from_settings({"layers": [1]}), ValueError, r"ELM layers\.1: "),
    "settings: UCE form": (
        lambda w: UCE(form="tensor"), ValueError, "one of replace, moderate, orthogonal, debias, got 'tensor'"),
    "settings: UCE tokens": (lambda w: UCE(tokens="first"), ValueError, "tokens must be one of last, last.rest, all"),
    "settings: UCE retain_tokens": (
        lambda w: UCE.from_settings({"retain_tokens": "last+rest"}), ValueError, "retain_tokens: .*'last' or 'all'"),
    "settings: UCE attribute without its weight": (
        lambda w: UCE.from_settings({"form": "debias", "attributes": [["man"]]}), ValueError, r"attributes\.0\.1: "),
    "settings: UCE template for a list": (
        lambda w: UCE.from_settings({"templates": "{}"}), ValueError, "UCE templates: .*tuple"),
    "settings: ESD variant": (
        lambda w: ESD.from_settings({"variant": "xattn"}), ValueError, "ESD variant: .*or 'x-strict'"),
    "settings: ESD half a step": (lambda w: ESD.from_settings({"steps": 1.5}), ValueError, "ESD steps: .*integer"),
    "settings: ESD blank prompt": (
        lambda w: ESD.from_settings({"erase_from": ""}), ValueError, "^ESD: erase_from must be a prompt or None"),
    "settings: ESD rank 0": (lambda w: ESD.from_settings({"rank": 0}), ValueError, "^ESD: rank must be positive"),
    "settings: not positive": (lambda w: ELM.from_settings({"rank": 0}), ValueError, "ELM: rank must be positive"),
    "command: unknown method": (lambda w: command(w, method="lace"),
        ValueError, "Unknown method 'lace'; available: budgeted, directional_ablation, ear, elm"),
    "command: unknown dtype": (lambda w: command(w, dtype="int8"),
        ValueError, "Unknown dtype 'int8'; available: float32"),
    "command: unknown model folder": (lambda w: command(w, model="./no"), FileNotFoundError, "no model folder ./no"),
    "command: no recipe": (lambda w: command(w, recipe=w.folder / "no.toml"), FileNotFoundError, "There is no recipe"),
    "command: broken recipe": (
        lambda w: command(w, recipe=w.file("r.toml", "rank =")), ValueError, "is not a TOML file"),
    "command: setting without a value": (
        lambda w: command(w, setting=["rank"]), ValueError, "--set takes NAME=VALUE, got 'rank'"),
    "command: unknown setting": (
        lambda w: command(w, method="rlace", setting=["ranks=2"]), ValueError, "no setting ranks"),
    "command: edit missing": (lambda w: score(w, edit=w.folder / "no", tasks="a"), FileNotFoundError, "holds no edit"),
    "command: neither tasks nor benchmark": (lambda w: score(w), ValueError, "Give --tasks or --benchmark"),
    "command: benchmark without concept": (
        lambda w: score(w, benchmark=w.file("b.toml")), ValueError, "--benchmark and --concept go together"),
    "command: unknown half": (lambda w: score(w, tasks="a", half="train"), ValueError, "test or dev, got 'train'"),
    "benchmark: no file": (lambda w: Benchmark.load(w.folder / "b.toml"), FileNotFoundError, "no benchmark file"),
    "benchmark: bad TOML": (lambda w: Benchmark.load(w.file("b.toml", "=")), ValueError, "is not a benchmark"),
    "benchmark: no target": (lambda w: Benchmark.load(w.file("b.toml")),
        ValueError, "not a benchmark: target: Field req"),
    "benchmark: unknown field": (
        lambda w: Benchmark.load(w.file("b.toml", 'target = ["a"]\nsize = 3')), ValueError, "not a benchmark: size: "),
    "benchmark: prompt of the corpus": (
        lambda w: Benchmark(target=("a",), prompts=(METALS[0],)).run(w.model, METALS_CONCEPT),
        ValueError, "are texts of"),
    "image benchmark: of a language model": (
        lambda w: ImageBenchmark.load(w.file("b.toml", 'target = ["a"]\nkind = "object"\ntemplates = ["{object}"]')),
        ValueError, "unknown field 'target' .available: guidance"),
    "image benchmark: empty": (lambda w: ImageBenchmark.load(w.file("b.toml")), ValueError, "kind: Field required"),
    "image benchmark: no template": (lambda w: w.image_benchmark(templates=[]), ValueError, "templates: .*at least 1"),
    "image benchmark: text for a list": (
        lambda w: w.image_benchmark(objects="cat"), ValueError, "objects: .*tuple"),
    "image benchmark: blank name": (lambda w: w.image_benchmark(objects=["cat", " "]), ValueError, r"objects\.1: is "),
    "image benchmark: number for a name": (
        lambda w: w.image_benchmark(styles=[3]), ValueError, r"styles\.0: .*string"),
    "image benchmark: negative seed": (lambda w: w.image_benchmark(seed=-1), ValueError, "seed: .*greater than or eq"),
    "image benchmark: positional field": (
        lambda w: w.image_benchmark(templates=["{object} {}"]), ValueError, "has the field ''; available: object"),
    "report: broken": (lambda w: Report.load(w.file("r.json", "{}")), ValueError, "is not a report"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error_and_nothing_changed(case, tmp_path):
    action, error, phrase = CASES[case]
    world = World(tmp_path / "world")
    world.folder.mkdir()
    (tmp_path / "secret.jsonl").write_text('{"text": "not for a concept"}\n')
    written = None
    with pytest.raises(error) as caught:
        prepared = action(world)
        written = world.files()
        prepared()
    assert type(caught.value) is error
    message = str(caught.value.args[0])
    assert re.search(phrase, message) and "\n" not in message and len(message) < 500
    for model, before in world.before:
        assert same(before, state(model)) and not model.applied
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    inputs = {"concept.toml", "c.toml", "a.jsonl", "b.toml", "r.json"}  # what cases without a second step write
    assert world.files() == written if written is not None else {p.name for p in world.files()} <= inputs


def test_there_are_many_cases():
    assert len(CASES) >= 40
