"""Measure train.py beside the run that nearly every tutorial shows, in one sitting.

    python tests/benchmark.py          # under ten minutes on two cores
    python tests/benchmark.py --full   # the textbook run to its end, and five seeds of ours

The textbook run is 14 epochs of a network with two convolutions: batches of 64, Adadelta, images
converted one by one, no augmentation. Without --full it ends when 99 % of the test images are
right, and 14 times its median epoch stands for the whole. For Linux. Close other programs first.
"""

import argparse
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
import torch.utils.flop_counter
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import MNISTDataset  # noqa: E402
from evaluate import predict  # noqa: E402
from model import build_model  # noqa: E402
from train import parse_args, train_epoch  # noqa: E402
from utils import choose_device  # noqa: E402

CPU = torch.device("cpu")
BATCH_SIZE = parse_args([]).batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure train.py beside a textbook run.")
    parser.add_argument("--full", action="store_true", help="14 textbook epochs, 5 seeds of ours")
    full = parser.parse_args().full
    choose_device("cpu")
    train_set = MNISTDataset(ROOT / "data", "train")
    loader = DataLoader(train_set, BATCH_SIZE, shuffle=True)

    print(f"{platform.platform(terse=True)}, {os.cpu_count()} cores,", end=" ")
    print(f"{torch.backends.cpu.get_cpu_capability()}; PyTorch {torch.__version__}")
    imports, first_step = start_up()
    textbook = textbook_run(full)
    runs = [default_run(seed) for seed in range(5 if full else 1)]
    memory = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest
    quick = sorted((default_run(0, "--epochs=1") for _ in range(3)), key=lambda r: r["seconds"])[1]
    load = median(seconds(lambda: sum(1 for _ in loader)) for _ in range(5))
    epoch, bare, share_of_peak = steps(train_set)

    whole, accuracies = median(run["seconds"] for run in runs), [run["accuracy"] for run in runs]
    table("what", "this project", "textbook", "ratio")
    row("whole run, s", *against(whole, imports + textbook["whole"]))
    row(f"test accuracy, % {accuracies}", f"{mean(accuracies):.3f}", textbook["accuracy"], "")
    row("99 % of test images right, s", *against(quick["seconds"], imports + textbook["to 99"]))
    name = f"from the first step, s ({quick['accuracy']} %; {textbook['99']:.2f} %)"
    row(name, *against(len(train_set) / quick["speed"], textbook["to 99"]))
    row("an epoch of all images, s", *against(epoch, textbook["epoch"]))
    row("loader alone, images/s", *against(len(train_set) / load, textbook["loader"]))
    row("start to first step; imports, s", *against(first_step, imports))
    row("peak memory, GB", memory / 1e9, "", "")
    row("loader's share of an epoch, %", 100 * load / epoch, "", "")
    row("epoch, against a bare loop", epoch / bare, "", "")
    row("arithmetic, % of what a matrix product reaches", 100 * share_of_peak, "", "")

    table("images", "s an epoch", "µs an image")
    for n in (5_000, 10_000, 20_000, 40_000, 55_000):
        row(n, took := epoch_seconds(n), 1e6 * took / n)
    table("batch", "s for 20,000 images", "µs an image")
    for batch_size in (32, 64, 128, 256, 1_024):
        row(batch_size, took := epoch_seconds(20_000, batch_size), 1e6 * took / 20_000)
    table("training", "s for 2,560 images")
    row("ResNet-18, all of it", epoch_seconds(2_560, name="resnet18"))
    row("its head alone", epoch_seconds(2_560, name="resnet18", freeze_backbone=True))
    row("the CNN", epoch_seconds(2_560))
    table("in a training step", "% of the time")
    for name, share in step_shares().items():
        row(name, share)


def table(*titles: str) -> None:
    print(f"\n| {' | '.join(titles)} |\n|{' ---: |' * len(titles)}")


def row(*cells: str | float) -> None:
    texts = [c if isinstance(c, str) else f"{c:,.2f}" if c < 100 else f"{c:,.0f}" for c in cells]
    print(f"| {' | '.join(texts)} |", flush=True)


def against(ours: float, other: float) -> tuple[float, float, float]:
    return ours, other, max(ours, other) / min(ours, other)


def seconds(task: Callable) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def run(*command: object) -> tuple[float, str]:
    """Run a Python command: its seconds, and what it printed."""
    start = time.perf_counter()
    command = [sys.executable, *map(str, command)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True).stdout
    return time.perf_counter() - start, output


def start_up() -> tuple[float, float]:
    """Seconds to import torch and torchvision, and to train.py's first step: medians of 5 turns."""
    code = "import sys, train; train.train_epoch = lambda *args: sys.exit(); train.main("
    code += "train.parse_args([f'--out-dir={sys.argv[1]}']))"
    with tempfile.TemporaryDirectory() as folder:
        commands = [("import torch, torchvision",), (code, folder)]
        turns = [[run("-c", *command)[0] for command in commands] for _ in range(5)]
    imports, ours = zip(*turns, strict=True)
    return median(imports), median(ours)


def textbook_run(full: bool) -> dict[str, float]:
    """Train the textbook network; seconds are those since its first step."""
    normalise = transforms.Normalize((0.1307,), (0.3081,))
    transform = transforms.Compose([transforms.ToTensor(), normalise])
    data = [datasets.MNIST(ROOT / "data", t, transform, download=True) for t in (True, False)]
    loader = DataLoader(data[0], batch_size=64, shuffle=True)
    part = DataLoader(Subset(data[0], range(12_800)), batch_size=64)
    result = {"loader": 12_800 / seconds(lambda: sum(1 for _ in part))}
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()]
    pooling = [nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()]
    linear = [nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
    model = nn.Sequential(*convolutions, *pooling, *linear)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    times = []
    for result["epochs"] in range(1, 15):
        start = time.perf_counter()
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        scheduler.step()
        logits, labels = predict(model, data[1], CPU)
        times.append(time.perf_counter() - start)
        result["accuracy"] = 100 * (logits.argmax(dim=1) == labels).float().mean().item()
        if result["accuracy"] >= 99 and "99" not in result:
            result |= {"99": result["accuracy"], "to 99": sum(times)}
            if not full:
                break
    whole = sum(times) if full else 14 * median(times)
    return result | {"epoch": median(times), "whole": whole}


def default_run(seed: int, *flags: str) -> dict[str, float]:
    """`python train.py`, then `python evaluate.py`: what train.py takes, and what both print."""
    with tempfile.TemporaryDirectory() as folder:
        took, output = run("train.py", f"--seed={seed}", f"--out-dir={folder}", *flags)
        (best,) = Path(folder).glob("*/best.pt")
        _, report = run("evaluate.py", f"--checkpoint={best}")
    speed = int(re.search(r"^ +1/\d+ .* ([\d,]+)$", output, re.MULTILINE)[1].replace(",", ""))
    accuracy = float(re.search(r"Test accuracy: ([\d.]+)%", report)[1])
    return {"seconds": took, "speed": speed, "accuracy": accuracy}


def training(name: str = "cnn", **resnet_options: bool) -> tuple:
    """What train.py trains, ready for train_epoch: model, loss function, optimizer, scheduler."""
    model = build_model(name, 10, **resnet_options).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], fused=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    return model, nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"), optimizer, scheduler


def steps(train_set: MNISTDataset) -> tuple[float, float, float]:
    """Seconds of an epoch by train.py's loop, loading included, and by a bare loop; share of peak.

    The bare loop does forward, backward and step alone, on tensors prepared beforehand. The two
    take turns, a fifth of an epoch at a time. Peak is what a large matrix product reaches.
    """
    part = DataLoader(Subset(train_set, range(len(train_set) // 5)), BATCH_SIZE, shuffle=True)
    batches = list(part)
    model, loss_function, optimizer, scheduler = training()
    matrix = torch.randn(2_048, 2_048)

    def bare_loop() -> None:
        for images, labels in batches:
            loss = loss_function(model(images), labels).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    loop = partial(train_epoch, model, part, loss_function, optimizer, scheduler, CPU)
    turns = [[seconds(f) for f in (loop, bare_loop, lambda: matrix @ matrix)] for _ in range(7)]
    epoch, bare, product = (median(times) for times in zip(*turns[2:], strict=True))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        loss_function(model(batches[0][0]), batches[0][1]).mean().backward()
    flops = counter.get_total_flops() * len(batches)
    return 5 * epoch, 5 * bare, flops / bare / (2 * 2_048**3 / product)


def step_shares() -> dict[str, float]:
    """Where a step's time goes, by torch.profiler; and the page faults that come with it."""
    kinds = {  # by what the name of an operation contains
        "convolutions": ("convolution",),
        "batch norm": ("batch_norm",),
        "pooling, and clearing its gradients": ("max_pool", "aten::fill_", "aten::zero_"),
        "ReLU": ("clamp_min", "threshold"),
        "optimizer": ("adamw", "AdamW"),
    }
    model, *rest = training()
    batches = 50 * [(torch.randn(BATCH_SIZE, 1, 28, 28), torch.randint(10, (BATCH_SIZE,)))]

    def page_faults() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        train_epoch(model, batches, *rest, CPU)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / len(batches)

    page_faults()  # to warm up
    result = {"(page faults a step without the profiler)": page_faults()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result["(page faults a step with it)"] = page_faults()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = left = sum(times.values())
    for kind, parts in kinds.items():
        took = sum(t for name, t in times.items() if any(part in name for part in parts))
        result[kind], left = 100 * took / total, left - took
    return result | {"all else": 100 * left / total}


def epoch_seconds(images: int, batch_size=BATCH_SIZE, name="cnn", **options: bool) -> float:
    """Seconds of train_epoch for so many images, after three batches to warm up."""
    model, *rest = training(name, **options)
    train_set = MNISTDataset(ROOT / "data", "train")
    train_epoch(model, DataLoader(Subset(train_set, range(3 * batch_size)), batch_size), *rest, CPU)
    loader = DataLoader(Subset(train_set, range(images)), batch_size, shuffle=True)
    return seconds(partial(train_epoch, model, loader, *rest, CPU))


if __name__ == "__main__":
    main()
