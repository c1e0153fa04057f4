"""ItD against a loop written from its description; what it needs, what it refuses; the dog of the emoji model."""

import dataclasses
import warnings

import pytest
import torch
from hosts import GARDEN, METALS, same, state, tiny_pipeline
from methods.dictionaries import dictionary_of_tokens

from conceptx import Concept, Edit, load
from conceptx.dictionaries import SAETraining, save_dictionary, train_dictionary
from conceptx.geometry import FeatureMap, SparseDictionary
from conceptx.methods import ItD
from conceptx.methods.itd import own_features, prominent
from conceptx.models import wrap
from conceptx.places import tasks_folder
from conceptx.settings import build, read_recipe
from conceptx.testbeds import emoji

pytestmark = pytest.mark.filterwarnings("ignore:.*have no feature of their own")  # of a random dictionary
SITE = "text_encoder.layers.0"
GOLD = Concept("gold", synonyms=("iron",), prompts=("gold does not rust",), retain=("cat", "bird"))
FORMS = ("{}", "the {} sleeps", "a little {}")


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_dictionary(d=32, width=1500):
    return SparseDictionary(
        normal(d, width, seed=1), normal(width, d, seed=2), normal(width, seed=3), normal(d, seed=4), "topk", k=6
    )


def erased(model=None, concept=GOLD, dictionary=None, **settings):
    settings = {"site": SITE, "templates": FORMS, **settings}
    return ItD(**settings).erase(
        model or tiny_pipeline(), concept, dictionary=dictionary if dictionary is not None else random_dictionary()
    )


def the_map(edit):
    ((site, (found,)),) = edit.maps.items()
    assert site == SITE and isinstance(found, FeatureMap)
    return found


# -- the selection and the threshold -----------------------------------------------------------------------------------


def by_hand(model, dictionary, target, retained, top, strength):
    """Features and least score, prompt by prompt and number by number."""

    def rows(prompt):
        (found,) = model.record([prompt], [SITE])
        return found[SITE]

    def best(prompt):
        largest = {}
        for row in rows(prompt)[1:]:
            for feature, value in enumerate(dictionary.encode(row).tolist()):
                largest[feature] = max(value, largest.get(feature, 0.0))
        active = [feature for feature, value in largest.items() if value > 0]
        return set(sorted(active, key=largest.get, reverse=True)[:top])

    kept = set().union(*map(best, retained))
    own = sorted(set().union(*map(best, target)) - kept)
    scores = {}
    for prompt in target:
        x = rows(prompt)
        total = 0.0
        for token, row in enumerate(x):
            z = dictionary.encode(row)
            if token > 0:
                z[own] *= strength
            total += float((dictionary.decode(z) - row).double().square().sum())
        scores[prompt] = total / x.numel()
    return own, min(scores[prompt] for prompt in target if best(prompt) & set(own))


@pytest.mark.parametrize("top,strength", [(5, -8.0), (128, -2.0), (12, 0.0)])
def test_features_and_threshold_are_those_of_the_loop(top, strength):
    model, dictionary = tiny_pipeline(), random_dictionary()
    target = [form.format(name) for name in ("gold", "iron") for form in FORMS] + ["gold does not rust"]
    retained = ["", *(form.format(name) for name in ("cat", "bird") for form in FORMS), GARDEN[1]]
    own, least = by_hand(model, dictionary, target, retained, top, strength)
    concept = GOLD.model_copy(update={"retain_texts": (GARDEN[1],)})
    edit = erased(model, concept, top=top, strength=strength, margin=0.9)
    found = the_map(edit)
    assert found.features.tolist() == own and own
    assert found.threshold == pytest.approx(0.9 * least, rel=1e-4)  # float32, batches of other sizes
    assert (found.scale, found.skip, found.keep_error, found.dim) == (strength, 1, False, 32)
    (record,) = edit.provenance
    assert record["features"] == len(own) and record["threshold"] == found.threshold and record["site"] == SITE
    assert record["retained_prompts"]["all"] == len(retained)
    low, middle, high = record["scores"]["target"]
    assert low <= middle <= high


def test_a_feature_that_is_zero_is_never_taken():
    dictionary, x = random_dictionary(), normal(3, 32, seed=5)
    active = (dictionary.encode(x) > 0).any(0)
    assert sorted(prominent(dictionary, x, 300).tolist()) == active.nonzero()[:, 0].tolist()
    strongest = dictionary.encode(x).amax(0)
    assert set(prominent(dictionary, x, 4).tolist()) == set(strongest.sort(descending=True).indices[:4].tolist())


def test_own_are_the_features_of_any_target_and_of_no_retained_prompt():
    own = own_features(
        6, [torch.tensor([0, 1]), torch.tensor([1, 2, 5])], [torch.tensor([2]), torch.tensor([], dtype=int)]
    )
    assert own.tolist() == [True, True, False, False, False, True]


# -- the edit ----------------------------------------------------------------------------------------------------------


def test_the_targets_change_and_no_other_prompt_does():
    """With a dictionary that gives every token back exactly, so that scores are those of the features."""
    model = tiny_pipeline()
    others = [*(form.format(name) for name in ("cat", "bird") for form in FORMS), "", GARDEN[0]]
    targets = [form.format("gold") for form in FORMS]
    dictionary = dictionary_of_tokens(model, SITE, [*targets, *others])
    edit = erased(model, Concept("gold", retain=("cat", "bird")), dictionary)
    plain = model.encode([*targets, *others]).states
    with edit.applied(model):
        changed = model.encode([*targets, *others]).states
    moved = [not torch.equal(a, b) for a, b in zip(plain, changed, strict=True)]
    assert moved == [True] * len(targets) + [False] * len(others)
    assert edit.provenance[0]["retained_prompts"]["changed"] == 0


def test_without_a_gate_every_prompt_is_given_the_map():
    model = tiny_pipeline()
    edit = erased(model, gate=False)
    assert the_map(edit).threshold is None
    assert edit.provenance[0]["retained_prompts"] == {"all": 7, "changed": 7}
    plain = model.encode(["cat"]).states
    with edit.applied(model):
        assert not torch.equal(model.encode(["cat"]).states, plain)


def test_several_concepts_are_one_map_with_the_features_of_all():
    model = tiny_pipeline()
    dictionary = dictionary_of_tokens(model, SITE, ["gold", "tin", "cat"])
    gold, tin = (Concept(name, retain=("cat",)) for name in ("gold", "tin"))
    one, other, both = (erased(model, c, dictionary, templates=("{}",)) for c in (gold, tin, [gold, tin]))
    features = [set(the_map(edit).features.tolist()) for edit in (one, other, both)]
    assert features[2] == features[0] | features[1] and features[0] and features[1]
    assert both.provenance[0]["concept"] == "gold, tin"


def test_it_is_an_edit_of_the_text_encoders_alone():
    """It fits a pipeline with the same text encoders and another denoiser."""
    model = tiny_pipeline()
    pipeline = tiny_pipeline().pipeline
    pipeline.unet = tiny_pipeline(seed=1).pipeline.unet
    other, edit = wrap(pipeline), erased(model)
    with edit.applied(other):
        there = other.encode(["gold"]).states
    with edit.applied(model):
        assert torch.equal(model.encode(["gold"]).states, there)


@pytest.mark.parametrize("site,width", [(SITE, 16), ("text_encoder_2.layers.1", 32)])
def test_a_folder_says_its_site(site, width, tmp_path):
    model = tiny_pipeline("sdxl")
    save_dictionary(random_dictionary(width), tmp_path, site=site)
    edit = ItD(dictionary=str(tmp_path)).erase(model, GOLD)
    again = ItD(site=site).erase(model, GOLD, dictionary=random_dictionary(width))
    assert list(edit.maps) == [site]
    assert same(edit.maps[site][0].tensors(), again.maps[site][0].tensors())
    assert edit.provenance[0]["settings"]["dictionary"] == str(tmp_path)


def test_t5_has_no_begin_token_to_spare():
    model = tiny_pipeline("flux")
    edit = ItD(site="text_encoder_2.layers.0").erase(model, GOLD, dictionary=random_dictionary(48))
    ((found,),) = edit.maps.values()
    assert found.skip == 0
    plain = model.encode(["gold"])
    with edit.applied(model):
        changed = model.encode(["gold"])
    assert not torch.equal(plain.states, changed.states) and torch.equal(plain.pooled, changed.pooled)


# -- what it refuses ---------------------------------------------------------------------------------------------------


class OneFeature(SparseDictionary):
    """Every token of every prompt has feature 0 and nothing else."""

    def encode(self, x):
        return torch.nn.functional.pad(torch.ones_like(x[..., :1]), (0, self.width - 1))


def shared():
    return OneFeature(normal(32, 4, seed=1), normal(4, 32, seed=2), normal(4, seed=3), normal(32, seed=4))


WRONG = {
    "ItD needs the folder of a dictionary, which this makes: conceptx dictionary train": lambda m: ItD().erase(m, GOLD),
    "does not say at which site it was trained; set site": lambda m: ItD().erase(
        m, GOLD, dictionary=random_dictionary()
    ),
    "of vectors of dimension 8, the site text_encoder.layers.0 has 32": lambda m: erased(
        m, dictionary=random_dictionary(8)
    ),
    "'the cat sleeps' is to be erased and retained": lambda m: erased(
        m, Concept("cat", retain_texts=("the cat sleeps",))
    ),
    "cannot be retained as well: cat": lambda m: erased(m, [Concept("cat"), Concept("gold", retain=("cat",))]),
    "Every feature of 'gold' and the other prompts to be erased is one of a ret": lambda m: erased(
        m, dictionary=shared()
    ),
    "The site text is not inside a text encoder": lambda m: erased(m, site="text"),
    "acts on: DiffusionModel": lambda m: erased(m.pipeline),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_erased_is_refused_in_one_sentence(message):
    model = tiny_pipeline()
    before = state(model)
    with pytest.raises(ValueError, match=message) as caught:
        WRONG[message](model)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert same(before, state(model))


def test_an_unknown_site_and_a_folder_without_a_dictionary_are_errors(tmp_path):
    with pytest.raises(KeyError, match=r"no site 'text_encoder.layers.9'; similar: text_encoder.layers"):
        erased(site="text_encoder.layers.9")
    with pytest.raises(FileNotFoundError, match="holds no dictionary"):
        ItD(dictionary=str(tmp_path)).erase(tiny_pipeline(), GOLD)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"top": 0}, "top must be at least 1"),
        ({"strength": 1.0}, "finite and not 1"),
        ({"strength": float("nan")}, "finite and not 1"),
        ({"margin": 0.0}, r"margin must lie in \(0, 1\]"),
        ({"margin": 1.5}, "margin must lie"),
        ({"templates": ("a {} {}",)}, "contain {} once"),
        ({"templates": ()}, "contain {} once"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ItD(**settings)


def test_a_prompt_without_a_feature_of_its_own_warns_and_does_not_set_the_threshold():
    model = tiny_pipeline()
    dictionary = dictionary_of_tokens(model, SITE, ["gold", "cat", METALS[0]])
    concept = Concept("gold", prompts=("the cat",), retain=("cat",), retain_texts=("the cat does",))
    with pytest.warns(
        UserWarning, match="1 of the 2 prompts to be erased have no feature of their own .* 'the cat' amo"
    ):
        told = erased(model, concept, dictionary, templates=("{}",), keep_error=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = erased(model, Concept("gold", retain=("cat",)), dictionary, templates=("{}",), keep_error=True)
    assert the_map(told).threshold == pytest.approx(the_map(alone).threshold, rel=1e-4)


# -- the emoji model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load(emoji.NAME)


def dog():
    return Concept.load(tasks_folder() / "concepts" / "dog.toml")


def recipe(**settings):
    return build(ItD, {**read_recipe(tasks_folder() / "recipes" / "emoji" / "itd.toml"), **settings})


def shown(model, edit, prompts, seeds):
    """Shares of pictures that show a dog, before and after, and which pictures are the same bit for bit."""
    before = model.generate(prompts, seeds=seeds, steps=10)
    with edit.applied(model):
        after = model.generate(prompts, seeds=seeds, steps=10)
    number = emoji.OBJECT_NAMES.index("dog")
    dogs = [float((emoji.judges().objects(images).argmax(1) == number).float().mean()) for images in (before, after)]
    return dogs, [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


DOGS = ["a noto dog", "the dog in fluent", "a dog in twemoji style", "a drawing of a dog"]
OTHERS = ["a noto cat", "the owl in fluent", "a castle", "hot dog", ""]


def test_the_dog_goes_and_the_others_are_drawn_bit_for_bit_as_before(model, tmp_path):
    """With the tokens of some captions for a dictionary, which needs no training."""
    names = ("dog", "cat", "wolf", "fox", "hot dog", "owl", "castle")
    captions = ["", *(form.format(name) for name in names for form in recipe().templates)]
    dictionary = dictionary_of_tokens(model, SITE, captions)
    concept = Concept("dog", kind="object", retain=names[1:])
    edit = recipe(site=SITE, margin=0.2, keep_error=True).erase(model, concept, dictionary=dictionary)
    edit.save(tmp_path)
    edit = Edit.load(tmp_path)
    (before, after), equal = shown(model, edit, DOGS, range(4))
    assert before >= 0.75 and after == 0 and not any(equal)
    assert all(shown(model, edit, OTHERS, range(5))[1])


@pytest.mark.slow
def test_with_the_dictionary_of_the_documentation(model):
    settings = SAETraining(width=2048, k=16, batch_size=512, steps=400)
    trained = train_dictionary(model, SITE, list(dict.fromkeys(emoji.every_caption())), settings)
    assert trained.report.unexplained < 0.02
    edit = recipe(site=SITE).erase(model, dog(), dictionary=trained.dictionary)
    (before, after), equal = shown(model, edit, DOGS * 3, range(12))
    assert before >= 0.75 and after <= 0.1 and not any(equal)
    assert all(shown(model, edit, OTHERS, range(5))[1])
    assert edit.provenance[0]["retained_prompts"]["changed"] == 0


def test_the_recipe_is_complete():
    assert dataclasses.asdict(recipe())["top"] == 16 and recipe().dictionary == "runs/emoji-sae"
