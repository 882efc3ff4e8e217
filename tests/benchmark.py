"""Measure train.py against the run that nearly every tutorial shows, in one sitting.

    python tests/benchmark.py              # about eight minutes on two cores
    python tests/benchmark.py --seeds 5    # accuracy as a mean over seeds 0 to 4

The textbook run is 14 epochs of a network with two convolutions, batches of 64, Adadelta, images
converted one by one, no augmentation. It is trained until its test accuracy is 99 %, and the time
of an epoch multiplied by 14. Close other programs first; times are wall-clock, ratios compare what
ran within the same few minutes.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.profiler
import torch.utils.flop_counter
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import MNISTDataset  # noqa: E402
from evaluate import predict  # noqa: E402
from model import build_model, parameter_groups  # noqa: E402
from train import parse_args, train_epoch  # noqa: E402
from utils import save_checkpoint, setup_distributed  # noqa: E402

TEXTBOOK_EPOCHS = 14
CPU = torch.device("cpu")
BATCH_SIZE = parse_args([]).batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure train.py against a textbook run.")
    parser.add_argument("--seeds", type=int, default=1, help="default runs to average (default: 1)")
    seeds = parser.parse_args().seeds

    print(
        f"Machine: {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"{platform.system()}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"torchvision {torchvision.__version__}\n"
    )
    first_step, imports = start_up()
    textbook = textbook_run()
    runs = [default_run(seed) for seed in range(seeds)]
    whole = statistics.median(run["seconds"] for run in runs)
    accuracies = [run["accuracy"] for run in runs]
    textbook_whole = imports + TEXTBOOK_EPOCHS * textbook["epoch"]
    loader, plain_loader = loader_speed(), textbook["loader"]
    step, bare_step, share_of_peak = steps()
    shortest = [default_run(0, "--epochs", "1") for _ in range(3)]
    quick = sorted(shortest, key=lambda run: run["seconds"])[1]
    size, plain_size = checkpoint_size(build_model("cnn", 10)), checkpoint_size(textbook["model"])
    ours, theirs = inference_speed(build_model("cnn", 10)), inference_speed(textbook["model"])

    quick_test = 10_000 / ours  # the textbook's time includes its tests too
    quick_steps = 55_000 / quick["speed"] + quick_test
    plain_99 = textbook["to_99"]

    seen = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    memory = max(run["memory"] for run in runs)
    rows = [
        ("whole run", f"{whole:.0f} s", f"{textbook_whole:.0f} s", textbook_whole / whole),
        (
            f"test accuracy ({seeds} seeds: {seen})",
            f"{statistics.mean(accuracies):.2f} %",
            f"{textbook['accuracy']:.2f} % after {textbook['epochs']} epochs",
            None,
        ),
        (
            "99 % of test images right, from the start (1 epoch)",
            f"{quick['seconds'] + quick_test:.0f} s ({quick['accuracy']:.2f} %)",
            f"{imports + plain_99:.0f} s",
            (imports + plain_99) / (quick["seconds"] + quick_test),
        ),
        (
            "the same, from the first step",
            f"{quick_steps:.1f} s (validation {quick['validation']:.2f} %)",
            f"{plain_99:.0f} s",
            plain_99 / quick_steps,
        ),
        ("an epoch of training", f"{step:.1f} s", f"{textbook['epoch']:.1f} s", None),
        (
            "loader alone, images/s",
            f"{loader:,.0f}",
            f"{plain_loader:,.0f}",
            loader / plain_loader,
        ),
        ("loader's share of an epoch", f"{55_000 / loader / step:.1%}", "", None),
        ("an epoch against a bare loop", f"{step / bare_step:.2f}", "", None),
        ("share of peak arithmetic in a step", f"{share_of_peak:.0%}", "", None),
        (
            "start to first step, against imports",
            f"{first_step:.1f} s, {first_step / imports:.2f}",
            f"{imports:.1f} s",
            None,
        ),
        ("peak memory", f"{memory:.2f} GB", "", None),
        ("weights in a file", f"{size / 1e6:.2f} MB", f"{plain_size / 1e6:.2f} MB", None),
        ("inference, images/s", f"{ours:,.0f}", f"{theirs:,.0f}", ours / theirs),
    ]
    print("| what | this project | textbook | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for name, mine, other, ratio in rows:
        print(f"| {name} | {mine} | {other} | {f'{ratio:.1f}' if ratio else ''} |")

    print("\n| images | s an epoch | µs an image |   | batch | s an epoch | µs an image |")
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    by_images = [(n, *growth(n, 128)) for n in (5_000, 10_000, 20_000, 40_000, 55_000)]
    by_batch = [(b, *growth(20_000, b)) for b in (32, 64, 128, 256, 1_024)]
    for (n, seconds, each), (batch, other_seconds, other_each) in zip(
        by_images, by_batch, strict=True
    ):
        print(
            f"| {n:,} | {seconds:.1f} | {each:.0f} "
            f"|   | {batch:,} | {other_seconds:.1f} | {other_each:.0f} |"
        )

    print("\n| in a training step | share of the time |\n| --- | ---: |")
    for name, share in step_shares().items():
        print(f"| {name} | {share:.0%} |")

    print("\n| training | s an epoch | of full fine-tuning |\n| --- | ---: | ---: |")
    full, frozen, cnn = fine_tuning()
    for name, seconds in (("all of it", full), ("frozen backbone", frozen), ("the CNN", cnn)):
        print(f"| {name} | {seconds:.0f} | {seconds / full:.2f} |")


def textbook_run() -> dict:
    """Train the textbook network until 99 % of the test images are right, 6 epochs at most."""
    to_tensor = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    data = {
        train: datasets.MNIST(ROOT / "data", train=train, download=True, transform=to_tensor)
        for train in (True, False)
    }
    loader = DataLoader(data[True], batch_size=64, shuffle=True)
    start = time.perf_counter()
    images = sum(len(labels) for _, labels in islice(loader, 200))
    loader_speed = images / (time.perf_counter() - start)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    times, accuracy = [], 0.0
    start = time.perf_counter()
    while accuracy < 0.99 and len(times) < 6:
        epoch_start = time.perf_counter()
        model.train()
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
        scheduler.step()
        times.append(time.perf_counter() - epoch_start)
        logits, labels = predict(model, data[False], CPU)
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    return {
        "model": model,
        "loader": loader_speed,
        "epoch": statistics.median(times),
        "epochs": len(times),
        "accuracy": 100 * accuracy,
        "to_99": time.perf_counter() - start,
    }


def run(*command: str | Path) -> tuple[float, float, str]:
    """Run a Python command: its seconds, its peak resident memory in GB, and what it printed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return seconds, usage.ru_maxrss * unit / 1e9, output


def default_run(seed: int, *flags: str) -> dict[str, float]:
    """`python train.py`, then `python evaluate.py`: what they take, and what they print.

    Returns:
        Seconds and peak memory (GB) of train.py, its images a second in the last epoch, its best
        accuracy on validation images, and the accuracy on test images (both in %).
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--seed", str(seed), "--out-dir", folder, *flags)
        seconds, memory, output = run(ROOT / "train.py", *flags)
        (best,) = Path(folder).glob("*/best.pt")
        _, _, report = run(ROOT / "evaluate.py", "--checkpoint", best)
    speeds = re.findall(r"^ +\d+/\d+ .* ([\d,]+)$", output, re.MULTILINE)
    return {
        "seconds": seconds,
        "memory": memory,
        "speed": int(speeds[-1].replace(",", "")),
        "validation": float(re.search(r"Best validation accuracy: ([\d.]+)%", output)[1]),
        "accuracy": float(re.search(r"Test accuracy: ([\d.]+)%", report)[1]),
    }


def start_up() -> tuple[float, float]:
    """Seconds to the first training step of train.py, and to import torch and torchvision."""
    to_first_step = (
        "import sys, train; train.train_epoch = lambda *args: sys.exit(); "
        "train.main(train.parse_args([f'--out-dir={sys.argv[1]}']))"
    )
    ours, imports = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(5):
            imports.append(run("-c", "import torch, torchvision")[0])
            ours.append(run("-c", to_first_step, folder)[0])
    return statistics.median(ours), statistics.median(imports)


def loader_speed() -> float:
    """Augmented images a second that the loader alone hands out."""
    dataset = MNISTDataset(ROOT / "data", "train")
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        images = sum(len(labels) for _, labels in loader)
        times.append(time.perf_counter() - start)
    return images / statistics.median(times)


def training(name: str = "cnn", **resnet_options: bool) -> tuple:
    """What train.py trains, by default the CNN, ready for train_epoch."""
    setup_distributed("cpu")
    model = build_model(name, 10, **resnet_options).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.001, pretrained=True), fused=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    return model, nn.CrossEntropyLoss(label_smoothing=0.1), optimizer, scheduler


def steps() -> tuple[float, float, float]:
    """An epoch by train.py's loop, loading included; by a bare loop; the share of peak arithmetic.

    The bare loop does forward, backward and step alone, on tensors prepared beforehand. The two
    take turns, a fifth of an epoch at a time. Peak is what a large matrix product reaches; a step
    takes three times the arithmetic of its forward pass.
    """
    dataset = Subset(MNISTDataset(ROOT / "data", "train"), range(11_000))
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True)
    batches = list(loader)
    model, loss_function, optimizer, scheduler = training()
    matrix = torch.randn(2_048, 2_048)
    ours, bare, product = [], [], []
    for _ in range(7):
        start = time.perf_counter()
        train_epoch(model, loader, loss_function, optimizer, scheduler, CPU)
        ours.append(time.perf_counter() - start)

        start = time.perf_counter()
        for images, labels in batches:
            loss = loss_function(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bare.append(time.perf_counter() - start)

        start = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        product.append((time.perf_counter() - start) / 5)

    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        loss_function(model(batches[0][0]), batches[0][1]).backward()
    flops_an_image = counter.get_total_flops() / len(batches[0][0])
    epoch, bare_epoch, product = (5 * statistics.median(t[2:]) for t in (ours, bare, product))
    peak = 2 * 2_048**3 / (product / 5)
    return epoch, bare_epoch, 55_000 * flops_an_image / bare_epoch / peak


def step_shares() -> dict[str, float]:
    """Where a training step's time goes, by kind of operation, as torch.profiler sees it."""
    kinds = {  # by what the name of an operation contains
        "convolutions": ("convolution",),
        "batch norm": ("batch_norm",),
        "pooling, and clearing its gradients": ("max_pool", "aten::fill_", "aten::zero_"),
        "ReLU": ("clamp_min", "threshold"),
        "optimizer": ("adamw", "AdamW"),
    }
    model, loss_function, optimizer, scheduler = training()
    batch = torch.randn(BATCH_SIZE, 1, 28, 28), torch.randint(10, (BATCH_SIZE,))
    others = (loss_function, optimizer, scheduler, CPU)
    train_epoch(model, [batch] * 5, *others)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_epoch(model, [batch] * 50, *others)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(times.values())
    shares = {
        kind: sum(t for name, t in times.items() if any(part in name for part in parts)) / total
        for kind, parts in kinds.items()
    }
    return shares | {"all else": 1 - sum(shares.values())}


def checkpoint_size(model: nn.Module) -> int:
    """Bytes of a checkpoint with a model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pt")
        save_checkpoint(path, {"weights": model.state_dict()})
        return path.stat().st_size


@torch.inference_mode()
def inference_speed(model: nn.Module) -> float:
    """Images a second that a model classifies, 1,000 at a time."""
    model.eval().to(memory_format=torch.channels_last)
    images = torch.randn(1_000, 1, 28, 28)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return 1_000 / statistics.median(times[2:])


def growth(images: int, batch_size: int) -> tuple[float, float]:
    """Seconds for an epoch of so many images, and microseconds for each of them."""
    dataset = Subset(MNISTDataset(ROOT / "data", "train"), range(images))
    loader = DataLoader(dataset, batch_size, shuffle=True)
    model, loss_function, optimizer, scheduler = training()
    warm_up = DataLoader(Subset(dataset, range(min(images, 3 * batch_size))), batch_size)
    train_epoch(model, warm_up, loss_function, optimizer, scheduler, CPU)
    start = time.perf_counter()
    train_epoch(model, loader, loss_function, optimizer, scheduler, CPU)
    seconds = time.perf_counter() - start
    return seconds, 1e6 * seconds / images


def fine_tuning() -> tuple[float, float, float]:
    """Seconds for an epoch of ResNet-18, of its head alone, and of the CNN: they take turns."""
    dataset = MNISTDataset(ROOT / "data", "train")
    loader = DataLoader(Subset(dataset, range(5 * BATCH_SIZE)), BATCH_SIZE)
    trainings = [
        training("resnet18"),
        training("resnet18", freeze_backbone=True),
        training("cnn"),
    ]
    times = [[], [], []]
    for _ in range(6):
        for kind, seconds in zip(trainings, times, strict=True):
            start = time.perf_counter()
            train_epoch(kind[0], loader, *kind[1:], CPU)
            seconds.append(time.perf_counter() - start)
    scale = len(dataset) / (5 * BATCH_SIZE)
    return tuple(scale * statistics.median(seconds[1:]) for seconds in times)


def processor() -> str:
    """The name of the processor, where the operating system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
