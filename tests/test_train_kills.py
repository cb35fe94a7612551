"""A part of tests/kill_matrix.py, which by hand goes through a hundred kills."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_ten_kills_lose_nothing():
    command = [sys.executable, "tests/kill_matrix.py", "--kills", "10", "--settings", "2", "--seed", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kills in" in done.stdout
