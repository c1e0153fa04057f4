"""Memory of folding on the disk and editing in memory: `python tests/benchmarks/fold_memory.py --quick`, see there."""

import pytest
from benchmarks.fold_memory import HEAD, MARGIN, QUICK, line, results

pytestmark = pytest.mark.benchmark


def test_peak_memory_stays_within_what_is_allowed(tmp_path, capsys):
    too_much = []
    with capsys.disabled():
        print(f"\n{HEAD}")
        for result in results(QUICK, tmp_path):
            print(line(result))
            too_much += [result] if result.ratio > MARGIN else []
    assert not too_much
