"""examples/minimal.py: the first whole program that a newcomer runs."""

import re
import subprocess
import sys

import pytest


def accuracy(result):
    """The accuracy in the last line that the program printed, in %."""
    assert result.returncode == 0, result.stderr
    return float(re.search(r"accuracy: ([\d.]+)%\n$", result.stdout)[1])


def test_a_few_images_are_enough_to_learn_from(run_here, small_data_dir, tmp_path, offline):
    (tmp_path / "data").symlink_to(small_data_dir, target_is_directory=True)
    assert accuracy(run_here("examples/minimal.py")) > 50


@pytest.mark.slow
def test_it_finds_the_data_in_the_projects_folder(checkout, offline):
    command = [sys.executable, "-m", "examples.minimal"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert accuracy(result) > 96.5
