"""FeatureMap: what a flagged prompt becomes, what leaves all others alone, and what the score must not depend on."""

from dataclasses import replace

import pytest
import torch
from geometry.spaces import random, seeds
from hypothesis import given
from hypothesis import strategies as st

from conceptx.geometry import AffineDictionary, ConceptMap, FeatureMap, SparseDictionary, feature_change

D, F = 6, 12
CLOSE = {"rtol": 0, "atol": 1e-10}  # float64, numbers up to about 1e2


def sparse(seed=0, **options):
    parts = random(seed, D, F), random(seed + 1, F, D), random(seed + 2, F), random(seed + 3, D)
    return SparseDictionary(*parts, **options)


def affine(seed=0):
    read = random(seed, D, 5)
    return AffineDictionary(read, torch.linalg.pinv(read), random(seed + 1, D))


KINDS = {
    "topk": lambda seed=0: sparse(seed, activation="topk", k=4),
    "relu": sparse,
    "jumprelu": lambda seed=0: sparse(seed, activation="jumprelu", threshold=random(seed + 4, F).abs()),
    "affine": affine,
}
kinds = st.sampled_from(sorted(KINDS))


def a_map(dictionary=None, features=(1, 4), **settings):
    return FeatureMap(dictionary or KINDS["topk"](), torch.tensor(features), **{"scale": -8.0, **settings})


def by_hand(found, x):
    """T(x) of one prompt (tokens, d), number by number."""
    rows = []
    for token, row in enumerate(x):
        z = found.dictionary.encode(row)
        error = row - found.dictionary.decode(z)
        for feature in found.features.tolist():
            if token >= found.skip:
                z[feature] = found.scale * z[feature]
        rows.append(found.dictionary.decode(z) + (error if found.keep_error else 0))
    return torch.stack(rows)


def score_by_hand(found, x):
    return float((by_hand(found, x) - x).square().sum()) / x.numel()


# -- what it does ------------------------------------------------------------------------------------------------------


@given(seeds, kinds, st.booleans(), st.integers(0, 2))
def test_a_flagged_prompt_becomes_what_the_changed_features_decode_to(seed, kind, keep_error, skip):
    found = a_map(KINDS[kind](seed), keep_error=keep_error, skip=skip)
    x = random(seed + 5, 3, 4, D)
    for one, there in zip(x, found(x), strict=True):
        torch.testing.assert_close(there, by_hand(found, one), **CLOSE)
    wanted = torch.tensor([score_by_hand(found, one) for one in x], dtype=torch.float64)
    torch.testing.assert_close(found.score(x), wanted, rtol=1e-9, atol=1e-10)


@given(seeds, kinds, st.booleans())
def test_the_threshold_parts_the_prompts_and_the_others_stay_bit_for_bit(seed, kind, keep_error):
    x = random(seed + 5, 6, 4, D)
    always = a_map(KINDS[kind](seed), keep_error=keep_error)
    scores = always.score(x)
    gated = replace(always, threshold=float(scores.sort().values[3]))
    flagged = scores >= gated.threshold
    assert torch.equal(gated(x)[flagged], always(x)[flagged])
    assert torch.equal(gated(x)[~flagged], x[~flagged])
    assert 1 <= int(flagged.sum()) <= 6
    if gated.threshold > 0:  # where no prompt has the features and the error is kept, all scores are zero
        assert bool((gated(x)[flagged] != x[flagged]).any())


@given(seeds, kinds)
def test_with_the_error_kept_a_prompt_without_the_features_is_left_alone(seed, kind):
    """Its score is zero; without the error it is that of the reconstruction alone."""
    dictionary, x = KINDS[kind](seed), random(seed + 5, 1, 4, D)
    z = dictionary.encode(x)
    absent = (z == 0).all(1)[0].nonzero()[:, 0]
    if len(absent):
        found = FeatureMap(dictionary, absent, -8.0, keep_error=True)
        assert torch.equal(found(x), x) and float(found.score(x)) == 0
        lost = float((dictionary.decode(z) - x).square().mean())
        assert float(replace(found, keep_error=False).score(x)) == pytest.approx(lost, rel=1e-9)


@given(seeds, kinds)
def test_the_first_tokens_keep_their_features_and_count_in_the_score(seed, kind):
    found, x = a_map(KINDS[kind](seed), skip=2), random(seed + 5, 1, 4, D)
    reconstructed = found.dictionary.decode(found.dictionary.encode(x))
    torch.testing.assert_close(found(x)[:, :2], reconstructed[:, :2], **CLOSE)
    each = (by_hand(found, x[0]) - x[0]).square().mean(1)
    assert float(found.score(x)) == pytest.approx(float(each.mean()), rel=1e-9)


# -- what the score must not depend on ---------------------------------------------------------------------------------


@given(seeds, kinds, st.integers(1, 4))
def test_a_prompt_is_judged_by_itself(seed, kind, length):
    """Not by what stands beside it in a batch, nor by what pads it: also where the padding is huge."""
    found, x = a_map(KINDS[kind](seed)), random(seed + 5, 1, length, D)
    padded = torch.cat([x, 1e3 * random(seed + 6, 1, 5, D)], 1)
    others = 1e3 * random(seed + 7, 2, length + 5, D)
    real = torch.arange(length + 5) < length
    batch, kept = torch.cat([others[:1], padded, others[1:]]), torch.stack([real, real, torch.ones_like(real)])
    alone = found.score(x)
    torch.testing.assert_close(found.score(batch, kept)[1:2], alone, rtol=1e-9, atol=0)
    gated = replace(found, threshold=float(alone) * 0.99)
    torch.testing.assert_close(gated(batch, kept)[1, :length], gated(x)[0], **CLOSE)
    shut = replace(found, threshold=float(alone) * 1.01)
    assert torch.equal(shut(batch, kept)[1], batch[1]) and torch.equal(shut(x), x)


# -- what an edit asks of a map ----------------------------------------------------------------------------------------


@given(seeds, kinds, st.floats(-2, 2))
def test_the_strength_scales_the_change_and_not_the_gate(seed, kind, strength):
    x = random(seed + 5, 6, 4, D)
    found = a_map(KINDS[kind](seed))
    found = replace(found, threshold=float(found.score(x).median()))
    torch.testing.assert_close((found * strength)(x), x + strength * (found(x) - x), **CLOSE)
    assert torch.equal((found * 0.0)(x), x) and torch.equal((1.0 * found)(x), found(x))
    torch.testing.assert_close((found * 2.0 * strength)(x), (2.0 * strength * found)(x), **CLOSE)
    assert torch.equal((found * strength).score(x), found.score(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold,keep_error", [(None, False), (0.25, True)])
def test_settings_and_tensors_are_all_of_it(kind, threshold, keep_error):
    found = a_map(KINDS[kind](), threshold=threshold, keep_error=keep_error, skip=0) * 0.5
    again = FeatureMap.of(found.settings(), found.tensors())
    x = random(9, 2, 4, D)
    assert torch.equal(again(x), found(x)) and again.settings() == found.settings()
    assert (found.dim, found.rank, found.affine) == (D, 2, False)


def test_the_dtype_of_the_prompts_goes_in_and_out_and_gradients_pass():
    found, x = a_map(), random(9, 2, 4, D)
    assert found(x.bfloat16()).dtype == torch.bfloat16
    moving = x.clone().requires_grad_()
    found(moving).square().sum().backward()
    assert bool(moving.grad.any()) and found.to(torch.device("cpu")) is found


def test_no_map_is_taken_to_commute_with_it():
    plain = ConceptMap(random(0, D, 1), random(1, 1, D), random(2, D))
    assert not a_map().commutes_with(plain) and not plain.commutes_with(a_map()) and not a_map().commutes_with(a_map())


@given(seeds, kinds)
def test_feature_change_is_encode_replace_decode_with_the_error_added_back(seed, kind):
    dictionary, x = KINDS[kind](seed), random(seed + 5, 7, D)
    z, new = dictionary.encode(x), random(seed + 6, 7, 2)
    changed = z.clone()
    changed[:, [3, 1]] = new
    expected = dictionary.decode(changed) - dictionary.decode(z)
    torch.testing.assert_close(feature_change(dictionary, z[:, [3, 1]], new, [3, 1]), expected, **CLOSE)


BAD = {
    "a row of different whole numbers": lambda: a_map(features=(1, 1)),
    "some of the dictionary's 12": lambda: a_map(features=(1, 12)),
    "some of the dictionary's": lambda: FeatureMap(sparse(), torch.zeros(0, dtype=torch.long), 0.0),
    "must be finite": lambda: a_map(scale=float("nan")),
    "threshold and strength must be finite": lambda: a_map(threshold=float("inf")),
    "and skip not negative": lambda: a_map(skip=-1),
    r"acts on prompts \(n, tokens, 6\), got \(1, 4, 5\)": lambda: a_map()(random(0, 1, 4, 5)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_makes_no_sense_is_refused(message):
    with pytest.raises(ValueError, match=message) as caught:
        BAD[message]()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
