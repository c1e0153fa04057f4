"""ELM on the trained model, as the demo runs it: the topic goes, its neighbours and the rest stay."""

from __future__ import annotations

import pytest

from conceptx.demo.language import PROMPTS, erase_concept, fast_dtype, recipe
from conceptx.methods import ELM
from conceptx.models import load


def test_the_recipe_is_a_valid_setting_of_elm() -> None:
    assert recipe() != ELM()
    assert recipe().layers == (4, 8)


@pytest.mark.slow
def test_the_elements_go_and_the_rest_stays() -> None:
    """Measured over three seeds (docs/elm.md): target .81 to .38-.42, near .78 to .77-.78, perplexity +1 to +8 %."""
    result = erase_concept(load("smollm2", dtype=fast_dtype()))
    target = result.report["cx_chemical_elements"]
    assert result.gap.visible
    assert target.unedited is not None and target.unedited > 0.75
    assert target.value < target.unedited - 0.3
    for kept in ("cx_chemistry", "cx_physics", "cx_capitals"):
        score = result.report[kept]
        # N is 32 to 81: two standard errors of a difference are about .1
        assert score.unedited is not None and score.value > score.unedited - 0.15
    perplexity = result.report["cx_perplexity"]
    assert perplexity.unedited is not None and perplexity.value < 1.1 * perplexity.unedited
    prompt, before, after = result.answers[0]
    assert prompt == PROMPTS[0] and "Fe" in before and "Fe" not in after
