"""Training in several processes, started by torchrun as the README says."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import CPU

from dataset import MNISTDataset
from evaluate import predict
from model import build_model
from utils import load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")


@pytest.fixture
def torchrun(checkout, small_data_dir, tmp_path):
    """Start train.py in two processes, on few images."""
    running = []

    def start(*flags):
        parts = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]
        parts += [
            checkout / "train.py",
            "--data-dir",
            small_data_dir,
            "--out-dir",
            tmp_path / "runs",
        ]
        process = subprocess.Popen(
            [str(part) for part in (*parts, "--device=cpu", "--batch-size=64", *flags)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        with process:
            process.terminate()  # torchrun ends its processes, which have sessions of their own


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_two_processes_train_as_one_model(torchrun, small_data_dir, tmp_path):
    """Checkpoints, the log and what is printed come from rank 0, which validates on all images."""
    out = finish(torchrun("--epochs=3"))
    rows = re.findall(
        r"^ +(\d)/3 +[\d,]+ +([\d.]+) +[\d.]+% +([\d.]+) +([\d.]+)%", out, re.MULTILINE
    )
    assert [row[0] for row in rows] == list("123")
    assert float(rows[-1][2]) < float(rows[0][2])
    (run_dir,) = (tmp_path / "runs").iterdir()
    last = load_checkpoint(run_dir / "last.pt")
    assert last["losses"].min() > 0  # of the images of both processes
    model = build_model("cnn", last["classes"])
    model.load_state_dict(last["weights"])
    logits, labels = predict(model, MNISTDataset(small_data_dir, "validation"), CPU)
    assert rows[-1][2] == f"{torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels):.4f}"
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    assert rows[-1][3] == f"{100 * accuracy:.2f}" == f"{100 * last['accuracy']:.2f}"


@pytest.mark.slow
def test_in_two_processes_a_resumed_run_equals_an_uninterrupted_one(torchrun, tmp_path):
    finish(torchrun("--epochs=8"))
    (run_dir,) = (tmp_path / "runs").iterdir()
    whole = run_dir.rename(tmp_path / "whole")
    process = torchrun("--epochs=8")
    for line in process.stdout:
        if " 2/8" in line:
            break
    process.terminate()
    process.communicate(timeout=100)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert 1 <= load_checkpoint(run_dir / "last.pt")["epoch"] < 8
    finish(torchrun(f"--resume={run_dir}"))
    last, again = (load_checkpoint(folder / "last.pt") for folder in (whole, run_dir))
    for name, value in last["weights"].items():
        assert torch.equal(value, again["weights"][name]), name


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(torchrun, run, small_data_dir, tmp_path):
    process = torchrun("--epochs=40")
    for line in process.stdout:
        if re.match(r" +2/", line):
            break
    process.terminate()
    process.communicate(timeout=100)
    assert process.returncode != 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    saved = load_checkpoint(run_dir / "last.pt")["epoch"]
    assert 1 <= saved < 40
    result = run("train.py", f"--resume={run_dir}", "--data-dir", small_data_dir)
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(run_dir / "last.pt")["epoch"] == 40


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(torchrun):
    process = torchrun("--epochs=10000")
    for line in process.stdout:
        if re.match(r" +2/", line):
            break
    children = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    pids = subprocess.run(children, capture_output=True, text=True).stdout.split()
    os.kill(int(pids[-1]), 9)
    process.communicate(timeout=90)
    assert process.returncode != 0
