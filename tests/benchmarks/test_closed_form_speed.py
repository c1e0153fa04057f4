"""Closed forms against their published loops; the same as `python tests/benchmarks/closed_form.py` and
`closed_form_family.py`, see there.
"""

import pytest
import torch
from benchmarks import closed_form_family
from benchmarks.closed_form import HEAD, line, missed, results

pytestmark = pytest.mark.benchmark


def test_the_shared_map_is_as_much_faster_as_promised(capsys):
    torch.set_num_threads(1)
    problems = []
    with capsys.disabled():
        print(f"\n{HEAD}")
        for result in results(quick=False):
            print(line(result))
            problems.append(missed(result))
    assert not any(problems), problems


@pytest.mark.parametrize("case", closed_form_family.CASES, ids=lambda case: f"{case.method}, {case.setting}")
def test_one_solve_for_all_layers_is_faster_than_the_loop(case, capsys):
    torch.set_num_threads(1)
    found = case.measure(case.sizes)
    with capsys.disabled():
        print(f"\n{closed_form_family.line(case, found)}")
    assert found.loop >= case.needed * found.ours
