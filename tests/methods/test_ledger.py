"""An edit of UCE kept open: after any additions and removals it is the edit of the concepts that are in it."""

import json

import pytest
import torch
from hosts import same, state, tiny, tiny_pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conceptx import Concept, Edit, load
from conceptx.methods import UCE
from conceptx.methods.ledger import Ledger
from conceptx.testbeds import emoji

# Concepts with anchors and retained names of their own, some of them shared. With fewer than ten retained names the
# weight of all retained rows follows from their number.
CONCEPTS = [
    Concept("cat", anchor="apple tree", retain=("bird", "iron")),
    Concept("gold", retain=("bird", "soup", "cheese")),
    Concept("grandmother", anchor="bread", synonyms=("gold ring",)),
    Concept("tin", anchor="iron", retain=("roses", "beans", "ball", "house", "roof and rain")),
    Concept("lead", retain=("bird", "zinc", "copper", "brass", "bronze", "furnace")),
]
# Float64 rows of norm 6, up to 600 of them against a ridge of 0.5: 1e-16 times 4e4, and as much again for each update
CLOSE = {"rtol": 0, "atol": 1e-9}
ERASERS = [UCE(), UCE(form="moderate", tokens="last", retain_tokens="last"), UCE(retain_weight=0.7, synonyms=True)]
MODEL = tiny_pipeline("sd1")
MODEL.pipeline.to(torch.float64)  # so that rows do not depend on what is encoded with them


def matrix(edit):
    (found,) = edit.maps["text"]
    return found.write @ found.read


def assert_same_edit(ledger, eraser, concepts):
    """The edit and the record are a refit's; the concepts may stand in another order."""
    expected, found = eraser.erase(MODEL, concepts), ledger.edit()
    torch.testing.assert_close(matrix(found), matrix(expected), **CLOSE)
    assert found.maps["text"][0].rank == expected.maps["text"][0].rank
    mine, theirs = ({**r, "concept": {*r["concept"].split(", ")}} for e in (found, expected) for r in e.provenance)
    assert mine == theirs


@pytest.mark.parametrize("eraser", ERASERS, ids=("published", "one row, moderate", "fixed weight, synonyms"))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.permutations(range(5)), start=st.integers(1, 4), taken=st.integers(1, 4))
def test_whatever_comes_and_goes_it_is_the_refit_with_what_is_left(eraser, order, start, taken):
    concepts = [CONCEPTS[number] for number in order]
    ledger = eraser.open(MODEL, concepts[:start])
    assert_same_edit(ledger, eraser, concepts[:start])
    for concept in concepts[start:]:
        ledger = ledger.add(MODEL, concept)
    assert_same_edit(ledger, eraser, concepts)
    for concept in concepts[:taken]:
        ledger = ledger.remove(concept.name)
    assert_same_edit(ledger, eraser, concepts[taken:])


def test_a_retained_name_stays_as_long_as_one_concept_retains_it():
    ledger = UCE().open(MODEL, CONCEPTS[:2])
    assert set(ledger.retained) == {"", "bird", "iron", "soup", "cheese"}
    assert set(ledger.remove("CAT").retained) == {"", "bird", "soup", "cheese"}
    assert set(ledger.remove("gold").remove("cat").retained) == {""}


def test_what_all_have_left_can_be_filled_again():
    former = UCE().open(MODEL, CONCEPTS[0])
    empty = former.remove("cat")
    with pytest.raises(ValueError, match="The ledger holds no concept"):
        empty.edit()
    assert_same_edit(empty.add(MODEL, CONCEPTS[1:3]), UCE(), CONCEPTS[1:3])
    assert_same_edit(former, UCE(), CONCEPTS[:1])  # frozen


def test_saved_and_loaded_it_goes_on(tmp_path):
    ledger = UCE().open(MODEL, CONCEPTS[:3])
    ledger.edit().save(tmp_path)
    ledger.save(tmp_path)
    ledger.save(tmp_path)  # over itself
    assert len(list(tmp_path.iterdir())) == 4  # the edit and the ledger, a JSON file and tensors each
    loaded = Ledger.load(tmp_path)
    assert loaded.eraser == UCE() and loaded.concepts == CONCEPTS[:3]
    assert torch.equal(matrix(loaded.edit()), matrix(Edit.load(tmp_path)))
    more = loaded.remove("gold").add(MODEL, CONCEPTS[3])
    assert_same_edit(more, UCE(), [CONCEPTS[0], CONCEPTS[2], CONCEPTS[3]])


def test_rows_of_a_float32_model_are_saved_as_such(tmp_path):
    model = tiny_pipeline("sd1")
    UCE().open(model, CONCEPTS[0]).save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    kinds = {name.partition(":")[0]: tensor.dtype for name, tensor in load_file(file).items()}
    assert kinds["keys"] == kinds["targets"] == kinds["retained"] == torch.float32
    assert kinds["inverse"] == kinds["moved"] == torch.float64
    assert Ledger.load(tmp_path).add(model, CONCEPTS[1]).edit().maps["text"][0].write.dtype == torch.float64


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "sd3", "flux"])
def test_other_architectures(kind):
    """Float32 rows depend on what else is encoded by 1e-6 of their size, which the solve multiplies by up to 1e2."""
    model = tiny_pipeline(kind)
    before = state(model)
    ledger = UCE().open(model, CONCEPTS[0]).add(model, CONCEPTS[1])
    expected = matrix(UCE().erase(model, CONCEPTS[:2]))
    torch.testing.assert_close(matrix(ledger.edit()), expected, rtol=0, atol=1e-3)
    assert expected.abs().max() > 0.05 and same(before, state(model))


# -- what cannot be ------------------------------------------------------------------------------------------------


def refused(match, error=ValueError):
    return pytest.raises(error, match=match)


def test_what_is_to_be_erased_and_what_is_retained_must_agree():
    ledger = UCE().open(MODEL, CONCEPTS[0])
    with refused("more than once: cat"):
        ledger.add(MODEL, Concept("Cat", anchor="ball"))
    with refused("retained as well: bird"):  # the ledger retains it
        ledger.add(MODEL, Concept("bird"))
    with refused("retained as well: CAT"):  # the ledger erases it
        ledger.add(MODEL, Concept("ball", retain=("CAT",)))
    with refused("an anchor as well: apple tree"):
        ledger.add(MODEL, Concept("apple tree"))
    with refused("has 42 tokens"):
        ledger.add(MODEL, Concept("gold " * 40))


def test_a_wrong_model_form_or_name_is_one_sentence():
    ledger = UCE().open(MODEL, CONCEPTS[:2])
    with refused("The ledger was made for another model: text_encoder: "):
        ledger.add(tiny_pipeline("sd1", seed=1), CONCEPTS[2])
    with refused("UCE acts on: DiffusionModel or ARImageModel; got: LanguageModel"):
        ledger.add(tiny(), CONCEPTS[2])
    with ledger.edit().applied(MODEL), refused("An edit is in force"):
        ledger.add(MODEL, CONCEPTS[2])
    with refused("'orthogonal' has targets of its own in every layer"):
        UCE(form="orthogonal").open(MODEL, CONCEPTS[0])
    with refused("no concept 'owl' in the ledger; it holds cat, gold", KeyError):
        ledger.remove("owl")
    with refused("No concept was given"):
        UCE().open(MODEL, [])


def test_a_damaged_ledger_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no ledger \(ledger.json is missing\)"):
        Ledger.load(tmp_path)
    UCE().open(MODEL, CONCEPTS[0]).save(tmp_path)
    index = json.loads((tmp_path / "ledger.json").read_text())
    (tmp_path / "ledger.json").write_text(json.dumps(index | {"concepts": index["concepts"] * 2}))
    with refused("does not hold what ledger.json says: 'keys:1'"):
        Ledger.load(tmp_path)
    (tmp_path / "ledger.json").write_text(json.dumps(index | {"version": 2}))
    with refused("is not a ledger of this version: version"):
        Ledger.load(tmp_path)


def test_a_concept_added_to_ten_on_the_emoji_model():
    model = load(emoji.NAME)
    names = [thing.name for thing in emoji.OBJECTS]
    concepts = [Concept(name, kind="object", anchor=names[30], retain=tuple(names[20:60])) for name in names[:11]]
    whole = matrix(UCE().erase(model, concepts))
    ledger = UCE().open(model, concepts[:10])
    added = ledger.add(model, concepts[10])
    # float32 rows of 40 retained names, encoded once and never again: a new one differs by 1e-6 from the same in a
    # larger batch
    torch.testing.assert_close(matrix(added.edit()), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(matrix(added.remove(names[10]).edit()), matrix(ledger.edit()), rtol=0, atol=1e-8)
    assert whole.abs().max() > 0.05
