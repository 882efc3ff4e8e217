"""What several test files need. No test needs the internet or writes into the project itself."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def write_mnist(folder, images, labels, prefixes=("train", "t10k")):
    """Write images (N, H, W) and labels (N,) as files in MNIST's format."""
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
    unpacked = shutil.ignore_patterns("*-ubyte", "__pycache__")
    for name in ("examples", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=unpacked)
    return folder


@pytest.fixture(scope="session")
def data_dir(checkout):
    """A copy of the real MNIST files."""
    return checkout / "data"


@pytest.fixture(scope="session")
def small_data_dir(data_dir, tmp_path_factory):
    """MNIST's first 1,200 training and 500 test images, for tests that need to be quick."""
    from dataset import read_idx

    folder, raw = tmp_path_factory.mktemp("small_data"), data_dir / "MNIST" / "raw"
    for prefix, n in (("train", 1_200), ("t10k", 500)):
        images, labels = (
            read_idx(raw / f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
        )
        write_mnist(folder, images[:n], labels[:n], [prefix])
    return folder


@pytest.fixture
def train(small_data_dir, tmp_path):
    """Train on a few images in this process; returns the run's folder, in tmp_path / name."""
    import train as script

    def start(*flags, name="runs"):
        defaults = [f"--out-dir={tmp_path / name}", f"--data-dir={small_data_dir}", "--device=cpu"]
        if not any(str(flag).startswith("--resume") for flag in flags):
            defaults += ["--epochs=3", "--batch-size=64"]
        return script.main(script.parse_args([*defaults, *map(str, flags)]))

    return start


@pytest.fixture(scope="session")
def trained(small_data_dir, tmp_path_factory):
    """The folder of a finished run on a few images."""
    from train import main, parse_args

    folder = tmp_path_factory.mktemp("trained")
    flags = [f"--out-dir={folder}", f"--data-dir={small_data_dir}", "--device=cpu"]
    return main(parse_args([*flags, "--epochs=3", "--batch-size=32"]))


@pytest.fixture(scope="session")
def default_run(data_dir, tmp_path_factory):
    """The folder of a full run of `python train.py`."""
    from train import main, parse_args

    folder = tmp_path_factory.mktemp("default")
    return main(parse_args([f"--out-dir={folder}", f"--data-dir={data_dir}", "--device=cpu"]))


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
    """Like `run`, but in this process, which saves the time it takes to start Python and torch."""

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

    return run_script


@pytest.fixture
def offline(monkeypatch):
    """No internet, even where there's a connection."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("urllib.request._opener", None)  # it would remember the proxies


def contents(*folders):
    """All files and folders in some folders, with what the files hold."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def one_line(result, status, *parts):
    """Check a script's exit status, and that its one line on standard error contains the parts."""
    assert result.returncode == status, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, result.stderr  # argparse prints its usage first
    for part in parts:
        assert part in lines[0]


# The changes that pages propose, as diffs


def blocks(page, language):
    """A list of a page's code blocks in one language, including the indented ones."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


def changes(page):
    """The diffs of a page, by the title above each."""
    found, text = {}, page.read_text(encoding="utf-8")
    for diff in re.finditer(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        titles = re.findall(r"^(?:#+ |\*\*)([^*\n]+)", text[: diff.start()], re.MULTILINE)
        found[titles[-1].strip(".")] = diff[1]
    return found


def code_of(line):
    """A line without its comment."""
    return re.sub(r"(^|  )\s*#.*", "", line).rstrip()


def apply(diff, folder):
    """Change a copy of the project as a diff says; "@@ file, place @@" begins each of its parts.

    Comments and blank lines needn't match, so rewording one doesn't break a test.
    """
    for name, part in re.findall(r"^@@ (\S+?\.py).*? @@\n((?:[-+ ].*\n|\n)+)", diff, re.MULTILINE):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        numbers = [number for number, line in enumerate(lines) if code_of(line)]
        code = [code_of(lines[number]) for number in numbers]
        edits = [(line[:1], line[1:]) for line in part.splitlines()]
        old = [code_of(line) for sign, line in edits if sign != "+" and code_of(line)]
        places = [i for i in range(len(code)) if code[i : i + len(old)] == old]
        assert len(places) == 1, f"found {len(places)} times in {name}:\n{part}"

        at, new = numbers[places[0]], []
        numbers = iter(numbers[places[0] :])
        new += lines[:at]
        for sign, line in edits:
            if sign == "+":
                new.append(line)
            elif code_of(line):
                number = next(numbers)
                new += lines[at:number] + ([] if sign == "-" else [lines[number]])
                at = number + 1
        new += lines[at:]
        (folder / name).write_text("\n".join(new) + "\n", encoding="utf-8")


@pytest.fixture
def copy(checkout, tmp_path, monkeypatch):
    """A copy of the project to change; imports come from it."""
    folder = tmp_path / "copy"
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns("MNIST", "checkpoints"))
    names = [path.stem for path in ROOT.glob("*.py")]
    ours = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(ours)
