"""What it costs to start, in seconds of CPU of a child process, the least of five."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmark


def cpu(*command):
    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(5))


def test_help_takes_less_than_three_tenths_of_a_second():
    seconds = cpu(str(Path(sys.executable).with_name("conceptx")), "--help")
    print(f"\nconceptx --help: {seconds:.3f} s")
    assert seconds < 0.3


def test_import_costs_no_more_than_that_of_torch():
    ours, torch = cpu(sys.executable, "-c", "import conceptx"), cpu(sys.executable, "-c", "import torch")
    print(f"\nimport conceptx: {ours:.3f} s, import torch: {torch:.3f} s")
    assert ours <= 1.2 * torch
    assert ours < 0.1 * torch  # lazy: nothing of it is torch
