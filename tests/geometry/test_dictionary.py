"""Dictionaries as maps: projections, what is active, and what a feature adds."""

import pytest
import torch
from geometry.spaces import random, seeds
from hypothesis import given
from hypothesis import strategies as st

from conceptx.geometry import AffineDictionary, Dictionary, SparseDictionary, reconstruction

CLOSE = {"rtol": 0, "atol": 1e-8}  # float64, condition numbers up to about 1e3


def affine(seed, d, k):
    read = random(seed, d, k)
    return AffineDictionary(read, torch.linalg.pinv(read), random(seed + 1, d))


def sparse(seed=0, d=6, f=20, **options):
    if options.get("activation") == "jumprelu":
        options["threshold"] = random(seed + 4, f).abs()
    parts = random(seed, d, f), random(seed + 1, f, d), random(seed + 2, f), random(seed + 3, d)
    return SparseDictionary(*parts, **options)


ACTIVATIONS = [{}, {"activation": "jumprelu"}, {"activation": "topk", "k": 3}]


@given(seeds, st.integers(1, 6))
def test_an_affine_dictionary_projects(seed, k):
    """Onto the mean plus the span of what is written, and along directions that no feature reads."""
    dictionary, x = affine(seed, 6, k), random(seed + 2, 2, 5, 6)
    there = dictionary.decode(dictionary.encode(x))
    torch.testing.assert_close(dictionary.decode(dictionary.encode(there)), there, **CLOSE)
    torch.testing.assert_close(dictionary.encode(there), dictionary.encode(x), **CLOSE)
    torch.testing.assert_close((x - there) @ dictionary.read, torch.zeros(2, 5, k, dtype=x.dtype), **CLOSE)
    if k == 6:
        torch.testing.assert_close(there, x, **CLOSE)


@given(seeds, st.sampled_from([(affine, {}), *((sparse, options) for options in ACTIVATIONS)]))
def test_a_feature_adds_its_direction(seed, kind):
    make, options = kind
    dictionary = make(seed, 6, 4, **options)
    z, change = random(seed + 1, 3, 4), random(seed + 2, 3, 4)
    moved = dictionary.decode(z + change) - dictionary.decode(z)
    torch.testing.assert_close(moved, change @ dictionary.write, **CLOSE)


@given(seeds, st.integers(1, 20), st.booleans())
def test_topk_keeps_the_k_largest_as_they_are(seed, k, centred):
    dictionary, x = sparse(seed, activation="topk", k=k, centred=centred), random(seed + 5, 7, 6)
    before = (x - centred * dictionary.write_bias) @ dictionary.read + dictionary.read_bias
    z = dictionary.encode(x)
    assert bool(((z != 0).sum(1) == torch.minimum((before > 0).sum(1), torch.tensor(k))).all())
    smallest = before.sort(1, descending=True).values[:, k - 1 : k]
    assert torch.equal(z, torch.where((before >= smallest) & (before > 0), before, 0.0))


@given(seeds)
def test_jumprelu_is_relu_above_its_threshold_and_nothing_below(seed):
    dictionary, x = sparse(seed, activation="jumprelu"), random(seed + 5, 7, 6)
    plain = SparseDictionary(dictionary.read, dictionary.write, dictionary.read_bias, dictionary.write_bias)
    z, relu = dictionary.encode(x), plain.encode(x)
    assert torch.equal(z, torch.where(relu > dictionary.threshold, relu, 0.0))
    negative = SparseDictionary(*(dictionary.read, dictionary.write, dictionary.read_bias, dictionary.write_bias),
                                activation="jumprelu", threshold=-dictionary.threshold)  # fmt: skip
    assert torch.equal(negative.encode(x), relu)


@pytest.mark.parametrize("options", ACTIVATIONS)
def test_any_leading_shape_and_any_dtype_go_in(options):
    dictionary, x = sparse(**options), random(9, 4, 6)
    assert isinstance(dictionary, Dictionary) and (dictionary.dim, dictionary.width) == (6, 20)
    rows = dictionary.encode(x)
    assert torch.equal(dictionary.encode(x.reshape(2, 2, 6)).reshape(4, 20), rows)
    torch.testing.assert_close(dictionary.encode(x[0]), rows[0], **CLOSE)
    assert dictionary.encode(x.bfloat16()).dtype == torch.float64


def test_reconstruction_is_the_share_of_variance_that_is_lost():
    """Of k principal axes it is the rest of the spectrum; whatever the chunks."""
    x = random(0, 3000, 5) * torch.tensor([5.0, 3, 2, 1, 0.5], dtype=torch.float64) + 7
    variances, axes = torch.linalg.eigh(torch.cov(x.T))
    kept = axes[:, 3:]
    found = reconstruction(AffineDictionary(kept, kept.T, x.mean(0)), x)
    assert found.unexplained == pytest.approx(float(variances[:3].sum() / variances.sum()), rel=1e-9)
    assert found.active == 2
    assert reconstruction(sparse(d=5, activation="topk", k=3, centred=False), x).active <= 3


BAD = {
    "read and write must be": lambda: AffineDictionary(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3)),
    "mean must have shape": lambda: AffineDictionary(torch.ones(3, 2), torch.ones(2, 3), torch.ones(2)),
    "are not independent": lambda: AffineDictionary(torch.ones(2, 3), torch.ones(3, 2), torch.ones(2)),
    "mean has 1 NaN": lambda: AffineDictionary(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([float("nan")])),
    "Unknown activation 'tanh'; available: relu": lambda: sparse(activation="tanh"),
    "jumprelu needs a threshold": lambda: SparseDictionary(*tensors(), activation="jumprelu"),
    "threshold must have shape": lambda: SparseDictionary(*tensors(), "jumprelu", torch.ones(3)),
    "topk needs k": lambda: sparse(activation="topk"),
    "topk needs k and": lambda: sparse(k=3),
    "k must lie between 1 and the 20": lambda: sparse(activation="topk", k=21),
    "read_bias must have shape": lambda: SparseDictionary(*tensors()[:2], torch.ones(3), torch.ones(2)),
    "two different vectors": lambda: reconstruction(sparse(), torch.ones(4, 6)),
}


def tensors():
    return torch.ones(2, 4), torch.ones(4, 2), torch.ones(4), torch.ones(2)


@pytest.mark.parametrize("message", BAD)
def test_what_makes_no_sense_is_refused(message):
    with pytest.raises(ValueError, match=message) as caught:
        BAD[message]()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
