"""Measure train.py and pytorch/examples' mnist, for the tables in README.md and docs/.

    python -m docs.benchmark                              # eight minutes on two cores
    python -m docs.benchmark ../examples/mnist/main.py    # a quarter of an hour

The second command also runs the program that you name, with its own settings: 14 epochs and its
default seed. (To get it, run `git clone https://github.com/pytorch/examples ../examples`.) Half of
our default runs come before it and half after, so if the machine slows down, it hits both. This
works on Linux and macOS. Close other programs first.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision import datasets, transforms

import utils
from dataset import MNISTDataset
from model import build_model
from train import build_optimizer, parse_args, train_epoch

SEEDS = range(20, 30)
BATCH_SIZE = parse_args([]).batch_size
FLOAT32 = (  # what `python train.py` does on a CPU that isn't fast at bfloat16
    "import sys, utils; utils.is_bfloat16_fast = lambda device: False; "
    "import train; train.main(train.parse_args(sys.argv[1:]))"
)
CPU = utils.choose_device("cpu")


def main() -> None:
    print(f"{platform.platform(terse=True)}, {os.cpu_count()} cores,", end=" ")
    print(f"{torch.backends.cpu.get_cpu_capability()}; PyTorch {torch.__version__};", end=" ")
    print(f"bfloat16 is {'on' if utils.is_bfloat16_fast(CPU) else 'off'}")
    half = len(SEEDS) // 2
    runs = [whole_run(seed) for seed in SEEDS[:half]]
    peer = peer_run(Path(sys.argv[1])) if sys.argv[1:] else None
    runs += [whole_run(seed) for seed in SEEDS[half:]]
    float32 = [whole_run(seed, "-c", FLOAT32) for seed in SEEDS]
    quick = [whole_run(seed, "train.py", "--epochs=1") for seed in SEEDS[:3]]

    table("program", "seconds", "test accuracy", "lowest to highest", "memory, GB")
    programs = {
        f"`python train.py`, {len(runs)} seeds": runs,
        f"the same in float32, {len(float32)} seeds": float32,
        f"`python train.py --epochs 1`, {len(quick)} seeds": quick,
    }
    if peer:
        programs["pytorch/examples' mnist, 1 seed"] = [peer]
        programs["the same, until it gets 99% of the test images right"] = [peer["to 99"]]
    for name, results in programs.items():
        accuracies = [result["accuracy"] for result in results]
        spread = f"{min(accuracies):.2f}% to {max(accuracies):.2f}%"
        memory = f"{max(result['memory'] for result in results) / 1e9:.2f}"
        row(name, f"{typical(results):.1f}", f"{mean(accuracies):.3f}%", spread, memory)
    if peer:
        table("run", "our time / the other program's")
        row("whole run", f"1/{peer['seconds'] / typical(runs):.1f}")
        row("whole run in float32", f"1/{peer['seconds'] / typical(float32):.1f}")
        row("to 99% (ours: one epoch)", f"1/{peer['to 99']['seconds'] / typical(quick):.1f}")

    table("loading alone", "images per second")
    for name, speed in loading_speeds().items():
        row(name, f"{speed:,.0f}")
    table("training on 2,560 images", "seconds")
    row("ResNet-18, all of it", f"{training_seconds('resnet18'):.2f}")
    row("ResNet-18, its head alone", f"{training_seconds('resnet18', freeze_backbone=True):.2f}")
    row("the CNN", f"{training_seconds('cnn'):.2f}")
    with patch("utils.is_bfloat16_fast", lambda device: False):
        row("the CNN in float32", f"{training_seconds('cnn'):.2f}")


def typical(results: list[dict]) -> float:
    return median(result["seconds"] for result in results)


def table(*titles: str) -> None:
    print(f"\n| {' | '.join(titles)} |\n| --- |{' ---: |' * (len(titles) - 1)}")


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def run(
    *command: object, folder: Path = utils.ROOT
) -> tuple[list[tuple[float, str]], float, float]:
    """Run a Python command. Returns (time, line) pairs, the duration, and the peak memory."""
    start, lines = time.perf_counter(), []
    command = [sys.executable, "-u", *map(str, command)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return lines, time.perf_counter() - start, unit * usage.ru_maxrss


def whole_run(seed: int, *command: str) -> dict[str, float]:
    """Run `python train.py`, or another command, from start to finish, and then evaluate it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--seed={seed}", f"--out-dir={folder}", "--device=cpu"
        _, seconds, memory = run(*(command or ("train.py",)), *flags)
        (best,) = Path(folder).glob("*/best.pt")
        report, *_ = run("evaluate.py", f"--checkpoint={best}")
    accuracy = float(re.search(r"Test accuracy: ([\d.]+)%", report[-1][1])[1])
    return {"seconds": seconds, "accuracy": accuracy, "memory": memory}


def peer_run(program: Path) -> dict:
    """The same for pytorch/examples' mnist, in a folder with the data where that program looks."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(utils.ROOT / "data", Path(folder) / "data")
        (Path(folder) / "mnist").mkdir()
        lines, seconds, memory = run(
            program.absolute(), "--no-accel", folder=Path(folder) / "mnist"
        )
    pattern = re.compile(r"Accuracy: (\d+)/10000")
    epochs = [(at, int(found[1]) / 100) for at, line in lines if (found := pattern.search(line))]
    first = next((at, accuracy) for at, accuracy in epochs if accuracy >= 99)
    to_99 = {"seconds": first[0], "accuracy": first[1], "memory": memory}
    return {"seconds": seconds, "accuracy": epochs[-1][1], "memory": memory, "to 99": to_99}


def loading_speeds() -> dict[str, float]:
    """Images per second from a DataLoader alone: with our Dataset, and the usual way."""
    normalise = transforms.Normalize((0.1307,), (0.3081,))
    usual = datasets.MNIST(
        utils.ROOT / "data",
        download=True,
        transform=transforms.Compose([transforms.ToTensor(), normalise]),
    )
    ours = MNISTDataset(utils.ROOT / "data", "train")
    one_by_one = ConcatDataset([ours])  # it has no __getitems__

    def speed(dataset) -> float:
        part = Subset(dataset, range(12_800)) if dataset is usual else dataset
        loader = DataLoader(part, BATCH_SIZE, shuffle=True)
        return len(part) / median(seconds(lambda: sum(1 for _ in loader)) for _ in range(5))

    return {
        "MNISTDataset, augmented, whole batches": speed(ours),
        "MNISTDataset, augmented, one by one": speed(one_by_one),
        "torchvision's MNIST, ToTensor and Normalize": speed(usual),
    }


def seconds(task: Callable) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def training_seconds(name: str, **options: bool) -> float:
    """Seconds that train_epoch takes for 2,560 images: the median of five, after a warm-up."""
    model = build_model(name, 10, **options).to(memory_format=torch.channels_last)
    optimizer, scheduler = build_optimizer(model, 0.001, total_steps=1_000)
    part = Subset(MNISTDataset(utils.ROOT / "data", "train"), range(2_560))
    loader = DataLoader(part, BATCH_SIZE, shuffle=True)
    loss_function = nn.CrossEntropyLoss(reduction="none")
    epoch = partial(train_epoch, model, loader, loss_function, optimizer, scheduler, CPU)
    return median([seconds(epoch) for _ in range(6)][1:])


if __name__ == "__main__":
    main()
