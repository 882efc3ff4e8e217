"""examples/distributed.py: train.py's main in several processes, which torchrun starts."""

import difflib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CPU, ROOT, code_of

import train
import utils
from dataset import MNISTDataset
from evaluate import load_model, predict
from examples import distributed

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="on Windows, torchrun needs libuv")


@pytest.fixture
def torchrun():
    """Start torchrun with some arguments, and return the process."""
    running = []

    def start(*words):
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(words, cwd=ROOT, env=environment, **pipes))
        return running[-1]

    yield start
    for process in running:
        with process:
            process.terminate()  # torchrun then ends the processes that it started


@pytest.fixture
def flags(small_data_dir):
    return ["--device=cpu", "--batch-size=64", f"--data-dir={small_data_dir}"]


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def load(folder):
    """The only run in a folder, and what has to be equal bit for bit in its last.pt."""
    (path,) = folder.glob("*/last.pt")
    checkpoint = utils.load_checkpoint(path)
    state = checkpoint["optimizer"]["state"]
    return path.parent, [checkpoint["weights"], state, checkpoint["image_losses"]]


def assert_equal(folder, other):
    torch.testing.assert_close(load(folder)[1], load(other)[1], rtol=0, atol=0)


def test_every_line_of_main_that_differs_from_train_py_is_marked():
    theirs, ours = (inspect.getsource(module.main).splitlines() for module in (train, distributed))
    changes = difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes()
    for kind, _, _, start, end in changes:
        assert kind != "delete"
        assert kind == "equal" or all("# DDP" in line for line in ours[start:end] if line)


def test_the_page_shows_every_difference():
    page = (ROOT / "docs" / "several-machines.md").read_text("utf-8")
    shown = "".join(re.findall(r"^```diff\n(.*?)^```$", page, re.M | re.S)).splitlines()
    theirs, ours = (inspect.getsource(module.main).splitlines() for module in (train, distributed))
    sides = {"-": list(map(code_of, theirs)), "+": list(map(code_of, ours))}
    sides[" "] = sides["+"]
    assert all(code_of(line[1:]) in sides[line[0]] for line in shown)
    marked = [
        [code_of(x) for x in lines if "# DDP" in x] for lines in ([s[1:] for s in shown], ours)
    ]
    assert list(filter(None, marked[0])) == list(filter(None, marked[1]))


def test_one_process_gives_exactly_the_weights_of_train_py(flags, tmp_path, monkeypatch):
    train.main(train.parse_args([*flags, "--epochs=2", f"--out-dir={tmp_path / 'one'}"]))
    names = ("RANK", "LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name, value in zip(names, "00011", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a test")
    distributed.main(train.parse_args([*flags, "--epochs=2", f"--out-dir={tmp_path / 'ddp'}"]))
    assert_equal(tmp_path / "ddp", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_train_one_model(torchrun, flags, tmp_path, small_data_dir):
    """The first process validates with the model it saves, and it alone prints and logs."""
    program = ["--nproc-per-node=2", "-m", "examples.distributed"]
    out = finish(torchrun(*program, *flags, "--epochs=1", f"--out-dir={tmp_path}"))
    ((_, _, _, accuracy),) = re.findall(r"^ 1/1 +1,100 +(\S+) +(\S+) +(\S+) +(\S+)%", out, re.M)
    (run_dir,) = tmp_path.iterdir()
    _, (_, _, image_losses) = load(tmp_path)
    model, _ = load_model(run_dir / "best.pt")
    logits, labels = predict(model, MNISTDataset(small_data_dir, "train"), CPU)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    # Each loss was stored for the right image, so it correlates with the saved model's loss.
    assert torch.corrcoef(torch.stack([image_losses, losses]))[0, 1] > 0.2
    logits, labels = predict(model, MNISTDataset(small_data_dir, "validation"), CPU)
    assert accuracy == f"{100 * (logits.argmax(dim=1) == labels).float().mean():.2f}"
    assert out.count("--resume") == len(list(run_dir.glob("training/*"))) == 1


@pytest.mark.slow
def test_a_killed_run_resumes_exactly_in_two_processes_and_ends_in_one(torchrun, flags, tmp_path):
    program = ["--nproc-per-node=2", "-m", "examples.distributed", *flags, "--epochs=8"]
    finish(torchrun(*program, f"--out-dir={tmp_path / 'whole'}"))
    process = torchrun(*program, f"--out-dir={tmp_path / 'killed'}")
    _, resume = process.stdout.readline(), process.stdout.readline()
    for line in process.stdout:
        if line.startswith(" 2/8"):
            break
    children = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    pids = subprocess.run(children, capture_output=True, text=True).stdout.split()
    os.kill(int(pids[-1]), 9)
    process.communicate(timeout=90)
    assert process.returncode != 0
    run_dir, _ = load(tmp_path / "killed")
    assert 1 <= utils.load_checkpoint(run_dir / "last.pt")["epoch"] < 8
    copy = shutil.copytree(run_dir, tmp_path / "copy")

    finish(torchrun(*shlex.split(resume)[1:]))
    assert_equal(tmp_path / "killed", tmp_path / "whole")
    train.main(train.parse_args([f"--resume={copy}"]))
    assert utils.load_checkpoint(copy / "last.pt")["epoch"] == 8
