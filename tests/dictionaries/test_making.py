"""Dictionaries that are computed: planted sources come back, and reading and writing are dual."""

import logging

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from conceptx.dictionaries import contrast, ica, pca
from conceptx.geometry import reconstruction


def planted(n=4000, d=12, k=6, seed=0):
    """(sources (n, k) with long tails to one side, mixing (k, d), states)"""
    random = np.random.default_rng(seed)
    sources = random.exponential(size=(n, k)) * (random.uniform(size=(n, k)) < 0.2)
    mixing = random.normal(size=(k, d)) * np.array([5, 3, 2, 1, 1, 0.5])[:, None]
    return sources, mixing, sources @ mixing + random.normal(size=d)


def test_ica_finds_planted_sources_with_their_signs():
    sources, mixing, states = planted()
    found = ica(states, 6)
    z = found.encode(torch.from_numpy(states)).numpy()
    fit = np.corrcoef(z.T, sources.T)[:6, 6:]
    assert sorted(fit.argmax(1)) == list(range(6)) and fit.max(1).min() > 0.98
    written = found.write.numpy()[fit.argmax(0)]
    cosine = (written * mixing).sum(1) / np.linalg.norm(written, axis=1) / np.linalg.norm(mixing, axis=1)
    assert cosine.min() > 0.98
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(z.T, ddof=0), np.eye(6), atol=1e-4)  # float32


@pytest.mark.parametrize("make", [ica, pca])
def test_what_is_read_is_what_was_written(make):
    *_, states = planted(1000)
    states = states + np.random.default_rng(1).normal(size=states.shape)
    whole, part = make(states, 12), make(states, 5)
    for dictionary in (whole, part):
        torch.testing.assert_close(dictionary.write @ dictionary.read, torch.eye(dictionary.width), rtol=0, atol=1e-5)
    x = torch.from_numpy(states).float()
    torch.testing.assert_close(whole.decode(whole.encode(x)), x, rtol=0, atol=1e-4)
    reference = PCA(5).fit(states).explained_variance_ratio_.sum()  # both keep the same five dimensions
    assert reconstruction(part, x).unexplained == pytest.approx(1 - reference, abs=1e-5)


def test_the_seed_decides(caplog):
    noise = np.random.default_rng(1).normal(size=(500, 12))
    with caplog.at_level(logging.INFO, "conceptx"):
        first, again, other = (ica(noise, 12, seed=seed) for seed in (0, 0, 1))  # Gaussian: it will not converge
    assert torch.equal(first.read, again.read) and not torch.allclose(first.read, other.read, atol=0.1)
    assert "40 iterations" in caplog.text


def test_a_contrast_reads_how_far_a_state_is_from_one_mean_towards_the_other():
    *_, states = planted(200)
    away = np.arange(12.0)
    found = contrast(states + away, states)
    torch.testing.assert_close(found.write, found.read.T, rtol=0, atol=0)
    torch.testing.assert_close(
        found.write[0].double(), torch.from_numpy(away / np.linalg.norm(away)), rtol=0, atol=1e-6
    )
    means = torch.from_numpy(np.stack([states.mean(0), (states + away).mean(0)]))
    torch.testing.assert_close(
        found.encode(means)[:, 0].double(), torch.tensor([0, np.linalg.norm(away)]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda x: ica(x, 7), "The 50 states vary in 6 dimensions only; 7 components were asked for."),
        (lambda x: ica(x[:5], 6), "The 5 states vary in 4 dimensions only"),
        (lambda x: ica(x, 13), "between 1 and the 12 dimensions, got 13"),
        (lambda x: pca(x, 0), "between 1 and the 12 dimensions, got 0"),
        (lambda x: ica(np.full_like(x, np.nan), 2), "states has 600 NaN or infinite entries of 600"),
        (lambda x: contrast(x, x), "the same mean"),
        (lambda x: contrast(x, x[:, 1:]), "negative has 11 columns where 12 are expected"),
    ],
)
def test_states_that_cannot_do_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(planted(50)[2])
    assert str(caught.value).endswith(".")
