"""What several test files need."""

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


@pytest.fixture(scope="session")
def default_run(data_dir, tmp_path_factory):
    """A folder with the checkpoints of a whole `python train.py`; it takes about a minute."""
    from train import Config, main

    folder = tmp_path_factory.mktemp("default_run")
    main(Config(data_dir=data_dir, checkpoint_dir=folder, log_dir=folder))
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


@pytest.fixture(autouse=True)
def the_tests_go_on(monkeypatch):
    """After a full disk train.py ends its process at once; here that is this one."""
    this, leave = os.getpid(), os._exit
    monkeypatch.setattr(
        os, "_exit", lambda status: sys.exit(status) if os.getpid() == this else leave(status)
    )


@pytest.fixture
def run_here(checkout, tmp_path, monkeypatch, capfd):
    """Like `run`, but in this process: no seconds go into starting Python and importing torch."""
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in signals}

    def run_script(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        monkeypatch.chdir(tmp_path)
        status, message = 0, ""
        capfd.readouterr()
        try:
            runpy.run_path(str(checkout / name), run_name="__main__")
        except SystemExit as stop:  # as Python does at its end: a text is printed, and means 1
            status = 1 if isinstance(stop.code, str) else stop.code or 0
            message = f"{stop.code}\n" if isinstance(stop.code, str) else ""
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err + message)

    yield run_script
    threading.excepthook = threading.__excepthook__
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def offline(monkeypatch):
    """No network, also where there is one."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
