"""What would interrupt the story in train.py: flags, seeds, checkpoints, interruptions."""

import argparse
import errno
import io
import math
import os
import pickle
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

FORMAT = 1  # of checkpoints: count up when old programs could not read new ones
LOCK_SECONDS = 10  # the loading processes of a killed run keep its lock for about 5


# Flags: an error is one line that names the flag and what it allows.


class Parser(argparse.ArgumentParser):
    """argparse, without the lines on usage that it puts before an error."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from low to high."""

    def convert(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            message = f"{text!r} is not a whole number from {low:,} to {high:,}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return convert


def positive(text: str) -> float:
    """An argparse type: numbers above 0, infinity excluded."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def folder(text: str) -> Path:
    """An argparse type: a folder that exists, or that can still be made."""
    path = Path(text)
    try:
        usable = text != "" and (path.is_dir() or not path.exists())
    except OSError:  # a name that is too long, for example
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def flags_of(settings: type, description: str, defaults: dict[str, str]) -> Parser:
    """A parser with a flag for each field of a dataclass; it returns only those that were given.

    Args:
        settings: the dataclass; the metadata of its fields is what `add_argument` takes.
        description: for --help.
        defaults: for --help, where a field's own default does not say it.
    """
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    for f in fields(settings):
        flag, options = f.name.replace("_", "-"), dict(f.metadata)
        if f.type is bool:  # a switch: --compile turns it on, --no-pretrained off
            flag = f"no-{flag}" if f.default else flag
            options["action"] = "store_false" if f.default else "store_true"
            del options["type"]
        else:
            default = f.default.name if f.type is Path else defaults.get(f.name, f.default)
            options["help"] += f" (default: {default})"
        parser.add_argument(f"--{flag}", dest=f.name, **options)
    return parser


# Seeds


def seed_epoch(seed: int, epoch: int) -> None:
    """Make all that is random in an epoch (order, dropout) follow from these two numbers alone.

    SeedSequence mixes them, so that epoch 1 of seed 0 has nothing in common with epoch 0 of seed 1.
    """
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))


# Checkpoints


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint, so that at no moment a file of that name holds half of one.

    The bytes go to a file beside it and down to the disk; only then does that file take the name,
    which the operating system does in one go. A crash before leaves the old checkpoint.

    Raises:
        OSError: if it can't be written; the old checkpoint is still there.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT, "torch": str(torch.__version__), **checkpoint}, content)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()  # from Python to the operating system
            os.fsync(file.fileno())  # from there to the disk
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path, models: tuple[str, ...]) -> dict:
    """Read a checkpoint into memory of the CPU, whatever device it was saved from.

    `weights_only` lets torch.load build tensors and plain Python values alone: a checkpoint that
    somebody sends you can't run code.

    Args:
        path: the file.
        models: names of models that can be built.

    Raises:
        SystemExit: with one line of advice, where there is none, or none that can be used.
    """
    name = short(path)
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except FileNotFoundError:
        sys.exit(f"No checkpoint at {name}: run 'python train.py' first")
    except OSError as error:
        sys.exit(f"Cannot read {name} as a checkpoint: {error.strerror}")
    if not start:
        sys.exit(f"{name} is empty: it was not written by train.py")
    if start != b"PK":  # torch.save writes zip archives
        sys.exit(f"{name} is not a PyTorch checkpoint: give a file that train.py saved")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # the first part with a wrong checksum: torch.load checks none
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        sys.exit(f"{name} is cut short: copy it again, or take another checkpoint")
    except pickle.UnpicklingError:
        sys.exit(f"{name} holds more than tensors and plain values, and could run code: not loaded")
    except Exception:  # whatever else a damaged file makes torch raise
        sys.exit(f"{name} is damaged: copy it again, or take another checkpoint")

    parts = {"format", "model", "weights", "epoch", "config"}
    if not isinstance(checkpoint, dict) or not parts <= checkpoint.keys():
        sys.exit(f"{name} belongs to another project: give a file that this train.py saved")
    if checkpoint["format"] != FORMAT:
        sys.exit(f"{name} has format {checkpoint['format']}, not {FORMAT}: update this project")
    if checkpoint["model"] not in models:
        sys.exit(
            f"{name} holds a {checkpoint['model']!r}: model.py has only {' and '.join(models)}"
        )
    return checkpoint


def load_weights(model: nn.Module, checkpoint: dict, path: Path) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        SystemExit: with one line of advice, where they do not fit.
    """
    try:
        model.load_state_dict(checkpoint["weights"])
    except (RuntimeError, TypeError):
        sys.exit(
            f"The weights in {short(path)} do not fit the {checkpoint['model']!r} of model.py: "
            "undo the change to that file, or train anew"
        )


def earlier_checkpoints(*paths: Path) -> dict[Path, Path]:
    """Those of the paths where an earlier run left a file, each with a dated name to keep it by."""
    names = {}
    for path in paths:
        if path.is_file():
            date = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
            names[path] = unused(path.with_stem(f"{path.stem}-{date}"))
    return names


def unused(path: Path) -> Path:
    """A path where nothing is yet: this one, or one with a number."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def lock_folder(folder: Path) -> FileLock:
    """Make a folder, and keep other runs out of it until this process ends, however it ends.

    Raises:
        SystemExit: with one line of advice, where that can't be.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        sys.exit(f"Another run saves to {short(folder)}: wait, or choose another --checkpoint-dir")
    except OSError as error:
        sys.exit(f"--checkpoint-dir {short(folder)} can't be written to: {error.strerror}")
    return lock


def new_run_dir(log_dir: Path, model: str) -> Path:
    """A new folder for a run's log, named after the time and the model.

    Raises:
        SystemExit: with one line of advice, where it can't be made.
    """
    path = unused(log_dir / f"{time.strftime('%Y%m%d-%H%M%S')}-{model}")
    try:
        path.mkdir(parents=True)
    except OSError as error:
        sys.exit(f"--log-dir {short(log_dir)} can't be written to: {error.strerror}")
    return path


# Interruptions


class Interrupted(Exception):
    """A signal has asked the program to stop."""


def cannot_write(error: BaseException | None) -> bool:
    """Whether a disk is full, a folder not writable, or the like; other errors may be a bug."""
    names = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "EPIPE")
    return isinstance(error, OSError) and errno.errorcode.get(error.errno) in names


class Guard:
    """Whatever stops training costs the epoch in progress at most, and ends in one line.

    Ctrl-C and SIGTERM are noted when they come, and obeyed between two steps; Python alone would
    stop in the middle of one. A second signal does not wait.

        with guard:
            for batch in guard.steps(loader): ...

    Attributes:
        resume: the command that goes on with the run.
        saved: the last epoch whose checkpoint is on the disk; 0 if there is none.
    """

    def __init__(self, resume: str, saved: int = 0):
        self.resume = resume
        self.saved = saved
        self.signal = 0
        self.in_steps = False
        self.ending = threading.Lock()
        self.old_handlers = {
            number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        threading.excepthook = self.end_with_thread

    def note(self, number: int, frame: object) -> None:
        """Handle a signal."""
        if self.signal or not self.in_steps:
            sys.exit(128 + number)  # the status that shells expect: 130 or 143
        self.signal = number

    def steps(self, batches: Iterable) -> Iterator:
        """Hand on batches until a signal has come."""
        self.in_steps = True
        for batch in batches:
            if self.signal:
                raise Interrupted
            yield batch

    def end_with_thread(self, failure: threading.ExceptHookArgs) -> None:
        """tensorboardX writes in a thread: an error there would leave the main one waiting."""
        if not cannot_write(failure.exc_value):
            return threading.__excepthook__(failure)
        self.end_at_once(failure.exc_value)

    def end_at_once(self, error: OSError) -> None:
        """Say what happened and leave, without the clean-up that would fail for the same reason."""
        self.ending.acquire()  # if both threads come here, one waits for the end
        print(self.explain(error), file=sys.stderr)
        sys.stdout.flush()
        os._exit(1)

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, kind: type, error: BaseException | None, traceback: object) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if cannot_write(error):
            self.end_at_once(error)
        if self.signal and isinstance(error, Exception):
            error = Interrupted()  # whatever else the signal has broken on its way
        threading.excepthook = threading.__excepthook__
        line = self.explain(error)
        if line:
            of_all = isinstance(error, (FloatingPointError, Interrupted))
            if not of_all or os.environ.get("RANK", "0") == "0":  # of several processes one speaks
                print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr)
            sys.exit(128 + self.signal if self.signal else 1)

    def explain(self, error: BaseException | None) -> str | None:
        """One line on what happened and how to go on; None for a bug, which keeps its traceback."""
        epoch = self.saved + 1
        if isinstance(error, FloatingPointError):
            kept = f"; best.pt and last.pt are still those of epoch {self.saved}"
            return f"Epoch {epoch}: {error}. Try a smaller --lr{kept if self.saved else ''}"
        if isinstance(error, Interrupted):
            what = f"Stopped in epoch {epoch}"
        elif cannot_write(error):
            what = f"Stopped in epoch {epoch}, cannot write: {error.strerror}"
        elif isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            what = f"Stopped in epoch {epoch}, a process that loads data (--workers) has died"
        else:
            return None
        if not self.saved:
            return f"{what}. No epoch is saved yet: start again"
        return f"{what}. Epoch {self.saved} is saved; go on with: {self.resume}"


def short(path: Path) -> str:
    """A path as a person would type it: relative to the current folder where it lies inside."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
