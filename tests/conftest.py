"""What several test files need. No test needs a network, and none writes into the checkout."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def write_mnist(folder, images, labels, prefixes=("train", "t10k")):
    """Write images (N, H, W) and labels (N,) as files that torchvision's MNIST reads."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        values = np.asarray(values, dtype=np.uint8)
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
        for prefix in prefixes:
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + values.tobytes())


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the project in a temporary folder: what scripts write by default lands there."""
    folder = tmp_path_factory.mktemp("checkout")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "benchmark.py", folder / "tests")
    unpacked = shutil.ignore_patterns("*-ubyte")
    shutil.copytree(ROOT / "data", folder / "data", ignore=unpacked)
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
    for prefix, n in (("train", 1_200), ("t10k", 500)):
        mnist = MNIST(data_dir, train=prefix == "train", download=True)
        write_mnist(folder, mnist.data[:n], mnist.targets[:n], [prefix])
    return folder


@pytest.fixture
def train(small_data_dir, tmp_path):
    """Train on few images in this process, in tmp_path / name; gives the new run's folder."""
    from train import main, parse_args

    def start(*flags, name="runs"):
        args = parse_args(
            [f"--out-dir={tmp_path / name}", f"--data-dir={small_data_dir}", "--device=cpu"]
            + ["--epochs=3", "--batch-size=64", *map(str, flags)]
        )
        main(args)
        return args.run_dir

    return start


@pytest.fixture(scope="session")
def trained(small_data_dir, tmp_path_factory):
    """The folder of a finished run on few images."""
    from train import main, parse_args

    folder = tmp_path_factory.mktemp("trained")
    flags = [f"--out-dir={folder}", f"--data-dir={small_data_dir}", "--epochs=2", "--batch-size=32"]
    args = parse_args(flags)
    main(args)
    return args.run_dir


@pytest.fixture(scope="session")
def default_run(data_dir, tmp_path_factory):
    """The folder of a whole `python train.py`; it takes half a minute."""
    from train import main, parse_args

    args = parse_args([f"--out-dir={tmp_path_factory.mktemp('default')}", f"--data-dir={data_dir}"])
    main(args)
    return args.run_dir


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


@pytest.fixture
def run_here(checkout, tmp_path, monkeypatch, capfd):
    """Like `run`, but in this process: no seconds go into starting Python and importing torch."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def run_script(name, *flags):
        monkeypatch.setattr(sys, "argv", [str(checkout / name), *map(str, flags)])
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(checkout / name), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    yield run_script
    threading.excepthook = threading.__excepthook__
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def offline(monkeypatch):
    """No network, also where there is one."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("urllib.request._opener", None)  # it would remember the proxies


def contents(*folders):
    """All files and folders in some folders, with what the files hold."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def one_line(result, status, *parts):
    """Check that a script ended with a status and one line on standard error that has the parts."""
    assert result.returncode == status, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, result.stderr  # argparse puts its usage before
    for part in parts:
        assert part in lines[0]
