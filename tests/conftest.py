"""What several test files need."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the project in a temporary folder: what scripts write by default lands there."""
    folder = tmp_path_factory.mktemp("checkout")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(
        ROOT / "data",
        folder / "data",
        ignore=lambda _, names: [n for n in names if "." not in n and "ubyte" in n],
    )
    return folder


@pytest.fixture(scope="session")
def data_dir(checkout):
    """The real MNIST files, to be unpacked outside the checkout."""
    return checkout / "data"


@pytest.fixture(scope="session")
def small_data_dir(data_dir, tmp_path_factory):
    """The first 1,200 training and 500 test images of MNIST, for what would take too long."""
    from torchvision.datasets import MNIST

    folder = tmp_path_factory.mktemp("small_data")
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for prefix, n in (("train", 1_200), ("t10k", 500)):
        mnist = MNIST(data_dir, train=prefix == "train", download=True)
        for kind, values in (("images-idx3", mnist.data), ("labels-idx1", mnist.targets)):
            values = values[:n].numpy().astype("uint8")
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
            path = folder / "MNIST" / "raw" / f"{prefix}-{kind}-ubyte"
            path.write_bytes(header + values.tobytes())
    return folder


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """A folder with the checkpoints and the log of a dry run."""
    from train import Config, main

    folder = tmp_path_factory.mktemp("trained")
    main(Config(dry_run=True, data_dir=data_dir, checkpoint_dir=folder, log_dir=folder))
    return folder


@pytest.fixture
def run(checkout, tmp_path):
    """Run a script of the copied checkout as a user would, from another working directory."""

    def run_script(name, *flags, **environment):
        return subprocess.run(
            [sys.executable, str(checkout / name), *map(str, flags)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )

    return run_script
