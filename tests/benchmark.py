"""Measure train.py against the run that nearly every tutorial shows, in one sitting.

    python tests/benchmark.py              # about four minutes on two cores
    python tests/benchmark.py --seeds 5    # accuracy as a mean over seeds 0 to 4

The textbook run is 14 epochs of a network with two convolutions, batches of 64, Adadelta, images
converted one by one, no augmentation. One of its epochs is timed and multiplied by 14. Close other
programs first; times are wall-clock, ratios compare what ran within the same few minutes.
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
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dataset import MNISTDataset, make_loader  # noqa: E402
from model import build_model  # noqa: E402
from train import Config, train_epoch  # noqa: E402

TEXTBOOK_EPOCHS = 14
CPU = torch.device("cpu")


def textbook_epoch() -> float:
    """Seconds that one epoch of the textbook run takes."""
    to_tensor = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    images = datasets.MNIST(ROOT / "data", train=True, download=True, transform=to_tensor)
    loader = DataLoader(images, batch_size=64, shuffle=True)
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
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    start = time.perf_counter()
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    schedule.step()
    return time.perf_counter() - start


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


def default_run(seed: int) -> tuple[float, float, float]:
    """`python train.py`, then `python evaluate.py`: seconds and GB of the first, test accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--checkpoint-dir", folder, "--log-dir", folder]
        seconds, memory, _ = run(ROOT / "train.py", "--seed", str(seed), *flags)
        _, _, report = run(ROOT / "evaluate.py", "--checkpoint", Path(folder, "best.pt"))
    accuracy = float(re.search(r"Test accuracy: ([\d.]+)%", report)[1])
    return seconds, memory, accuracy


def start_up() -> tuple[float, float]:
    """Seconds to the first training step of train.py, and to import torch and torchvision."""
    to_first_step = (
        "import sys, train; train.train_epoch = lambda *args: sys.exit(); train.main(train.Config("
        "checkpoint_dir=sys.argv[1], log_dir=sys.argv[1]))"
    )
    ours, imports = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(5):
            imports.append(run("-c", "import torch, torchvision")[0])
            ours.append(run("-c", to_first_step, folder)[0])
    return statistics.median(ours), statistics.median(imports)


def loader_epoch() -> tuple[float, int]:
    """Seconds in which the loader alone hands out all training images, and their number."""
    dataset = MNISTDataset(ROOT / "data", "train")
    loader = make_loader(dataset, Config.batch_size, shuffle=True)
    times = []
    for epoch in range(5):
        start = time.perf_counter()
        dataset.set_epoch(epoch)
        images = sum(len(labels) for _, labels in loader)
        times.append(time.perf_counter() - start)
    return statistics.median(times), images


def loop_overhead() -> tuple[float, float]:
    """Seconds for an epoch by train.py's loop, loading included, and by a bare one.

    The bare loop does forward, backward and step alone, on tensors prepared beforehand. The two
    take turns, a fifth of an epoch at a time.
    """
    dataset = MNISTDataset(ROOT / "data", "train")
    dataset = torch.utils.data.Subset(dataset, range(11_000))
    loader = make_loader(dataset, Config.batch_size, shuffle=True)
    batches = list(loader)
    model = build_model(Config.model).to(memory_format=torch.channels_last)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), Config().lr, fused=True)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    ours, bare = [], []
    for _ in range(7):
        start = time.perf_counter()
        train_epoch(model, loader, loss_function, optimizer, schedule, CPU)
        ours.append(time.perf_counter() - start)

        start = time.perf_counter()
        for images, labels in batches:
            loss = loss_function(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bare.append(time.perf_counter() - start)
    return 5 * statistics.median(ours[2:]), 5 * statistics.median(bare[2:])  # the first two warm up


def processor() -> str:
    """The name of the processor, where the operating system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


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
    loader_seconds, images = loader_epoch()
    epoch, bare_epoch = loop_overhead()
    runs = [default_run(seed) for seed in range(seeds)]
    textbook = TEXTBOOK_EPOCHS * textbook_epoch() + imports
    whole = statistics.median(seconds for seconds, _, _ in runs)
    memory = max(memory for _, memory, _ in runs)
    accuracies = [accuracy for _, _, accuracy in runs]

    print("| what | measured | target |")
    print("| --- | --- | --- |")
    print(f"| textbook run, {TEXTBOOK_EPOCHS} epochs (one timed) | {textbook:.0f} s | |")
    print(
        f"| whole `python train.py` | {whole:.0f} s, 1/{textbook / whole:.1f} of the textbook run "
        "| at most 1/12 |"
    )
    print(
        f"| test accuracy, mean of {seeds} seeds | {statistics.mean(accuracies):.2f} % "
        f"({', '.join(f'{accuracy:.2f}' for accuracy in accuracies)}) | 99.65 % |"
    )
    print(
        f"| loader with augmentation | {images / loader_seconds:,.0f} images/s "
        "| at least 60,000 images/s |"
    )
    print(f"| loader's share of an epoch | {loader_seconds / epoch:.1%} | at most 8 % |")
    print(
        f"| epoch against a bare loop | {epoch / bare_epoch:.2f} ({epoch:.1f} s) | at most 1.10 |"
    )
    print(
        f"| start-up against `import torch, torchvision` | {first_step / imports:.2f} "
        f"({first_step:.1f} s) | at most 1.5 |"
    )
    print(f"| peak memory | {memory:.2f} GB | at most 1.5 GB |")


if __name__ == "__main__":
    main()
