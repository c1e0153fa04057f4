"""UCE's shared map against its published loop; the same as `python tests/benchmarks/closed_form.py`, see there."""

import pytest
import torch
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
