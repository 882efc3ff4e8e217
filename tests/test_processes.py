"""Training in several processes, started by torchrun as the README says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from dataset import MNISTDataset, make_loader
from evaluate import measure, predict
from model import MODELS, build_model
from train import Config, main
from utils import load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture
def torchrun(checkout, small_data_dir, tmp_path):
    """Start train.py in two processes, on few images; `processes` and others are torchrun's."""
    running = []

    def start(*flags, name="run", processes=2, command=(), torchrun_flags=("--standalone",), **env):
        folders = ("--checkpoint-dir", tmp_path / name, "--log-dir", tmp_path / name / "runs")
        parts = [*command, *TORCHRUN, *torchrun_flags, f"--nproc-per-node={processes}"]
        parts += [checkout / "train.py", "--data-dir", small_data_dir, *folders, *flags]
        process = subprocess.Popen(
            [str(part) for part in parts],
            cwd=tmp_path,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | env,
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


def test_together_the_processes_see_every_image_once_and_alike(small_data_dir):
    dataset = MNISTDataset(small_data_dir, "train", seed=3)  # 1,100 images, by 96: 44 in the last
    dataset.set_epoch(2)
    batches = {}
    for processes in (1, 3):
        shares = []
        for rank in range(processes):
            torch.manual_seed(5)
            loader = make_loader(dataset, 96, shuffle=True, rank=rank, processes=processes)
            shares.append(list(loader))
            assert {len(images) for images, _ in shares[-1]} <= {96, 44, 32, 15, 14}
        batches[processes] = [
            torch.cat([images for images, _ in batch]) for batch in zip(*shares, strict=True)
        ]
    for alone, together in zip(batches[1], batches[3], strict=True):
        assert len(alone) == len(together)
        # The same images, augmented alike, whichever process has them; sums may be rounded
        # differently in a batch of another shape.
        distances = torch.cdist(
            together.flatten(1), alone.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
        )
        assert distances.min(dim=1).values.max() < 0.01
        assert distances.argmin(dim=1).unique().numel() == len(alone)


def test_a_last_batch_too_small_to_share_is_refused():
    dataset = torch.utils.data.TensorDataset(torch.zeros(13))
    make_loader(dataset, batch_size=6, rank=1, processes=1)  # 1 image is left for one process
    with pytest.raises(SystemExit, match="--batch-size 6 .* at least 2"):
        make_loader(dataset, batch_size=6, rank=1, processes=2)


TOGETHER = """
import json, sys, time
sys.path.insert(0, {project!r})
import torch
import devices

device, rank, processes = devices.join_processes(torch.device("cpu"))
with devices.one_after_the_other():
    if rank == 0:
        time.sleep(1)  # the other one waits
    order = time.time()
logits, labels = devices.gather(torch.full((rank + 1, 2), float(rank)), torch.tensor([rank]))
sums = devices.sum_over_processes([rank + 1, 10.0], device)
with open({out!r} + str(rank), "w") as file:
    json.dump([order, logits.tolist(), labels.tolist(), sums, processes], file)
devices.leave_processes()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv, which Windows lacks")
def test_processes_wait_gather_and_sum(checkout, tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER.format(project=str(checkout), out=str(tmp_path / "rank")))
    subprocess.run([*TORCHRUN, "--standalone", "--nproc-per-node=2", script], check=True)
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert first[0] < second[0]
    assert first[1:] == second[1:]
    assert first[1:] == [[[0, 0], [1, 1], [1, 1]], [0, 1], [3, 20], 2]


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv, which Windows lacks")
class TestTorchrun:
    def test_two_processes_train_as_one_model(self, torchrun, small_data_dir, tmp_path):
        """Checkpoints, the log and what is printed come from rank 0, and are right for both."""
        out = finish(torchrun("--epochs", 3, "--batch-size", 64))
        assert out.count("Device       cpu, 2 processes") == 1
        rows = re.findall(r"^ +(\d)/3 +([\d.]+) +[\d.]+% +([\d.]+) +([\d.]+%)", out, re.MULTILINE)
        assert [row[0] for row in rows] == ["1", "2", "3"]
        assert float(rows[2][1]) < float(rows[0][1])
        assert len(list((tmp_path / "run" / "runs").iterdir())) == 1

        # One process, with the same weights, measures the same on validation images, to the digit.
        last = load_checkpoint(tmp_path / "run" / "last.pt", MODELS)
        model = build_model("cnn")
        model.load_state_dict(last["weights"])
        validation_set = MNISTDataset(small_data_dir, "validation")
        loader = make_loader(validation_set, batch_size=1_000)
        logits, labels = predict(model, loader, torch.device("cpu"))
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        assert rows[2][2] == f"{loss.item():.4f}"
        assert last["validation_accuracy"] == measure(logits, labels).accuracy
        assert rows[2][3] == f"{last['validation_accuracy']:.2%}"

    @pytest.mark.slow
    def test_a_run_goes_on_in_one_process_and_in_two(self, torchrun, tmp_path, small_data_dir):
        folder = tmp_path / "run"
        config = Config(
            epochs=3, data_dir=small_data_dir, checkpoint_dir=folder, log_dir=folder / "runs"
        )

        class Stop(Exception):
            pass

        def stop_after_an_epoch(*_, **__):
            raise Stop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("utils.save_checkpoint", save_then(stop_after_an_epoch))
            with pytest.raises(Stop):
                main(config)
        assert load_checkpoint(folder / "last.pt", MODELS)["epoch"] == 1
        finish(torchrun("--resume"))
        last = load_checkpoint(folder / "last.pt", MODELS)
        assert last["epoch"] == 3
        assert set(last["weights"]) == set(build_model("cnn").state_dict())  # no prefix of DDP's

    def test_a_batch_that_cannot_be_shared_is_refused(self, torchrun, tmp_path):
        process = torchrun("--batch-size", 33)
        _, err = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "--batch-size 33" in err and "use a multiple of 2" in err
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_a_process_that_dies_ends_the_run(self, torchrun):
        process = torchrun("--epochs", 10_000)
        for line in process.stdout:
            if re.match(r" +2/", line):
                break
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        start = time.monotonic()
        process.communicate(timeout=100)
        assert process.returncode != 0
        assert time.monotonic() - start < 90

    @pytest.mark.slow
    def test_after_ctrl_c_a_run_goes_on_in_one_process(self, torchrun, run, tmp_path):
        process = torchrun("--epochs", 40)
        for line in process.stdout:
            if re.match(r" +2/", line):
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.communicate(timeout=100)
        assert process.returncode != 0
        folder = tmp_path / "run"
        saved = load_checkpoint(folder / "last.pt", MODELS)["epoch"]
        assert 1 <= saved < 40

        result = run("train.py", "--resume", "--checkpoint-dir", folder)
        assert result.returncode == 0, result.stderr
        epochs = re.findall(r"^ +(\d+)/40 ", result.stdout, re.MULTILINE)
        assert epochs == [str(epoch) for epoch in range(saved + 1, 41)]
        assert load_checkpoint(folder / "last.pt", MODELS)["epoch"] == 40

    @pytest.mark.slow
    def test_two_machines(self, torchrun, two_machines, tmp_path):
        port = 29_400
        processes = [
            torchrun(
                *("--epochs", 2, "--batch-size", 64),
                processes=1,
                command=("ip", "netns", "exec", machine),
                torchrun_flags=(
                    *("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=test"),
                    f"--rdzv-endpoint={two_machines[0][1]}:{port}",
                    f"--local-addr={address}",
                    f"--rdzv-conf=is_host={int(address == two_machines[0][1])}",
                ),
                GLOO_SOCKET_IFNAME=cable,
            )
            for machine, address, cable in two_machines
        ]
        outs = [finish(process) for process in processes]
        assert sum("2 processes" in out for out in outs) == 1
        assert load_checkpoint(tmp_path / "run" / "last.pt", MODELS)["epoch"] == 2


def save_then(act):
    """save_checkpoint, but after last.pt is written something happens."""
    from utils import save_checkpoint

    def save(path, checkpoint):
        save_checkpoint(path, checkpoint)
        if path.name == "last.pt":
            act()

    return save


@pytest.fixture
def two_machines():
    """Two network namespaces, joined by a cable: for each its name, address, and end of it."""
    if not shutil.which("ip"):
        pytest.skip("needs the command ip, of Linux")
    name = f"t{os.getpid()}"
    machines = [(f"{name}-{i}", f"10.211.77.{i}", f"{name}e{i}") for i in (1, 2)]
    ends = [end for _, _, end in machines]
    try:
        commands = [["ip", "netns", "add", machine] for machine, _, _ in machines]
        commands += [["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]]
        for machine, address, end in machines:
            commands += [
                ["ip", "link", "set", end, "netns", machine],
                ["ip", "-n", machine, "addr", "add", f"{address}/24", "dev", end],
                ["ip", "-n", machine, "link", "set", end, "up"],
                ["ip", "-n", machine, "link", "set", "lo", "up"],
            ]
        for command in commands:
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces on this machine: {made.stderr.strip()}")
        yield machines
    finally:
        for machine, _, _ in machines:
            subprocess.run(["ip", "netns", "del", machine], capture_output=True)
