"""What would interrupt the story in train.py: the device, the seeds, checkpoints."""

import sys
from pathlib import Path

import numpy as np
import torch

DEVICES = ("auto", "cuda", "mps", "cpu")


def choose_device(name: str) -> torch.device:
    """The device to compute on: the one asked for, or for "auto" the first there is.

    Raises:
        SystemExit: with one line of advice, where the machine has no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),  # NVIDIA, and AMD through ROCm
        "mps": torch.backends.mps.is_available(),  # Apple
        "cpu": True,
    }
    usable = [device for device, is_available in available.items() if is_available]
    if name == "auto":
        name = usable[0]
    if name not in usable:
        sys.exit(f"--device {name}: not available here; use auto or {' or '.join(usable)}")
    return torch.device(name)


def seed_epoch(seed: int, epoch: int) -> None:
    """Make all that is random in an epoch (order, dropout) follow from these two numbers alone.

    SeedSequence mixes them, so that epoch 1 of seed 0 has nothing in common with epoch 0 of seed 1.
    """
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint under its name only when it is whole: a crash leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(checkpoint, partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint into memory of the CPU, whatever device it was saved from.

    `weights_only` lets torch.load build tensors and plain Python values alone: a checkpoint that
    somebody sends you can't run code.

    Raises:
        SystemExit: with one line of advice, where there is none.
    """
    if not path.is_file():
        sys.exit(f"No checkpoint at {short(path)}: run 'python train.py' first")
    return torch.load(path, map_location="cpu", weights_only=True)


def short(path: Path) -> str:
    """A path as a person would type it: relative to the current folder where it lies inside."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
