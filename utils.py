"""The plumbing: device, settings, run folders, checkpoints, pictures, and how a script ends.

None of it is deep learning, and all of it would get in the way of the story in train.py.
"""

import argparse
import math
import os
import random
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parent
DEVICES = ("auto", "cpu", "cuda", "mps")
FORMAT = 4  # our checkpoint format; goes up when older code can't read the new files


class UserError(Exception):
    """Something the user can fix. Its text says in one line what is wrong and what to do."""


def run(parse_args: Callable, main: Callable) -> None:
    """Run `main(parse_args())`. A UserError ends the script with one line, Ctrl-C with "Stopped.".

    Everything else is a bug, and a bug keeps its whole traceback.
    """
    show_traceback = threading.excepthook

    def thread_failed(failure):
        show_traceback(failure)
        # tensorboardX writes its log in a thread. If that thread dies (on a full disk, say), the
        # queue soon fills up and add_scalar waits forever, so we end the program.
        if type(failure.thread).__module__.startswith("tensorboardX"):
            os._exit(1)

    threading.excepthook = thread_failed
    try:
        main(parse_args())
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        threading.excepthook = show_traceback


def choose_device(name: str = "auto") -> torch.device:
    """The device to compute on. "auto" takes a GPU if there is one, and the CPU if there isn't."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this process
        raise UserError("This script runs in one process; try torchrun -m examples.distributed")
    gpu = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(name) if name != "auto" else gpu or torch.device("cpu")
    if device.type not in ("cpu", gpu and gpu.type):
        usable = f"auto, cpu or {gpu.type}" if gpu else "auto or cpu"
        raise UserError(f"--device {name} is not available on this machine; use --device {usable}")
    if device.type == "cpu":
        # Linux's C library hands a large block of memory back to the system when it's freed, unless
        # one at least as large was freed before. So we free one first, and then
        # training can reuse its memory.
        torch.empty(31 * 2**20, dtype=torch.uint8)
    return device


def is_bfloat16_fast(device: torch.device) -> bool:
    """Whether a device computes faster in bfloat16 (16 bits) than in float32.

    Most recent GPUs do. CPUs do if they have instructions for it, which Intel calls
    AVX512_BF16 and AMX. Without them, bfloat16 would be many times slower. docs/results.md has our
    measurements; we have none for Arm, so it stays off there.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed the random generators of Python, NumPy and PyTorch, differently for each epoch.

    A resumed run then draws the same numbers as one that was never stopped.
    """
    number = seed * 10_000 + epoch
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def number(kind: type, low: float, high: float = math.inf) -> Callable:
    """A type for argparse: a finite int or float from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            allowed = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; use a number {allowed}")
        return value

    parse.__name__ = kind.__name__  # so that argparse can say "invalid int value"
    return parse


def plain_settings(args: argparse.Namespace) -> dict:
    """A run's settings as values that a checkpoint can hold, so paths become strings."""
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "out_dir")}
    return {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in settings.items()}


def check_unchanged(args: argparse.Namespace, settings: dict) -> None:
    """Refuse flags that contradict a resumed run's settings. Where and how it runs may differ."""
    now = plain_settings(args)
    for name in sorted(settings.keys() - {"device", "workers", "compile", "data_dir"}):
        if now[name] != settings[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"A resumed run can't change {flag}; it began with {settings[name]}")


def find_run(name: str | None, out_dir: Path) -> tuple[Path | None, dict]:
    """The last.pt that `--resume name` refers to, and its run's settings (None, {} without a name).

    `name` is a run's folder or its last.pt; "newest" is the newest unfinished run that can be read.
    """
    if name is None:
        return None, {}
    if not name:
        raise UserError("--resume: the name is empty; give a run's folder, or no name at all")
    named = [Path(name) if Path(name).exists() else out_dir / name]
    for path in sorted(out_dir.glob("*/last.pt"))[::-1] if name == "newest" else named:
        path = path / "last.pt" if path.is_dir() else path
        try:
            checkpoint = load_checkpoint(path)
            if "settings" not in checkpoint:
                raise UserError(f"{relative(path)} can't be resumed; only a run's last.pt can")
            if checkpoint["epoch"] < checkpoint["settings"]["epochs"]:
                return path, checkpoint["settings"]
        except UserError as error:
            if name != "newest":
                raise
            print(f"Skipped a run: {error}", file=sys.stderr)
    where = f"in {out_dir} (see --out-dir)"
    finished = f"{name} is finished" if name != "newest" else f"no unfinished run {where}"
    raise UserError(f"--resume: {finished}; start a new run without --resume")


def open_run_dir(args, device: torch.device, program=("python", ROOT / "train.py")) -> Path:
    """The run's folder: a new one, named after the time and the model, or the one we're resuming.

    Also prints the command that would resume the run, which is `program` with --resume.
    """
    run_dir = args.resume and args.resume.parent
    try:
        while run_dir is None:
            args.out_dir.mkdir(parents=True, exist_ok=True)
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{args.model}{'-dry-run' * args.dry_run}"
            try:
                (args.out_dir / name).mkdir()
                run_dir = args.out_dir / name
            except FileExistsError:
                time.sleep(0.1)  # another run started in the same second
    except OSError as error:
        raise UserError(f"Can't create a folder for this run (see --out-dir): {error}") from error
    print(f"Training {args.model} on {device}. If it's interrupted after epoch 1, resume it with:")
    print(command(*program, "--resume", run_dir), end="\n\n")
    return run_dir


def print_next_steps(run_dir: Path, data_dir: Path, best_accuracy: float) -> None:
    """Say how well a run went, and which commands to try next."""
    data = [] if data_dir.absolute() == ROOT / "data" else ["--data-dir", data_dir]
    print(f"\nBest validation accuracy: {best_accuracy:.2%}. See the curves or test the model:")
    print(command("tensorboard", "--logdir", run_dir.parent))
    print(command("python", ROOT / "evaluate.py", "--checkpoint", run_dir / "best.pt", *data))


def relative(path: Path | str) -> str:
    """A path the way you'd type it: relative if it's inside the working directory."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def command(*words: str | Path) -> str:
    """A command line to paste into a terminal, with quotes around words that need them."""
    texts = [relative(word) if isinstance(word, Path) else word for word in words]
    return " ".join(f'"{t}"' if re.search(r"[^\w./\\:-]", t) else t for t in texts)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint. There is no moment at which `path` is half of anything.

    We write to a temporary file, wait until it's on the disk, and then give it the real name,
    which the operating system does in a single step. Until then the old checkpoint is still there.

    Raises TypeError, naming the entry, if something could be saved but never loaded again.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()  # from Python to the operating system
            os.fsync(file.fileno())  # from the operating system to the disk
        if not is_loadable(temporary):
            broken = []
            for key, value in checkpoint.items():
                torch.save(value, temporary)
                broken += [key] if not is_loadable(temporary) else []
            advice = "store only tensors and plain Python values, such as float(x)"
            raise TypeError(f"{broken} in the checkpoint couldn't be loaded again; {advice}")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_loadable(path: Path) -> bool:
    """Whether load_checkpoint can read a file. It's quick, because "meta" tensors have no data."""
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception:
        return False
    return True


def load_checkpoint(path: Path | str) -> dict:
    """Load a checkpoint onto the CPU. Raises UserError if it can't be read.

    With `weights_only`, torch.load builds nothing but tensors and plain Python values, so a
    stranger's checkpoint is far safer to open. (Do keep PyTorch up to date: holes in it have been
    found before.)
    """
    path = Path(path)
    if not path.is_file():  # opening a named pipe, say, would wait forever
        missing = "doesn't exist (a run saves it after every epoch)"
        reason = "isn't a file" if path.exists() else missing
        raise UserError(f"{relative(path)} {reason}; see --checkpoint and --resume")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds of error for damaged or foreign files
        # The last line says what's wrong. The rest is advice to turn weights_only off: drop it.
        lines = str(error).partition("Check the documentation")[0].strip().splitlines() or ["empty"]
        reason = f"{type(error).__name__}: {lines[-1].partition(' Please use')[0].strip()}"
        raise UserError(f"Can't read the checkpoint {relative(path)} ({reason})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{relative(path)} is from another project, or another version of this one")
    return checkpoint


@contextmanager
def must_fit(checkpoint: dict, model: nn.Module, image_losses: Tensor):
    """While a run's state is being loaded, turn any failure into a UserError that says why.

    We check two things here that PyTorch doesn't. An optimizer finds a weight's state by its
    position, so two layers that swapped places would silently swap states. And we keep one loss
    per image, so a different number of images means different data.
    """
    try:
        if list(checkpoint["weights"]) != list(model.state_dict()):
            raise ValueError("the model's layers have different names or a different order")
        if checkpoint["image_losses"].shape != image_losses.shape:
            raise ValueError(f"there are now {len(image_losses):,} training images; see --data-dir")
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise UserError(f"This run no longer fits the program or the data: {reason}") from error


def save_picture(figure: Figure, path: Path) -> None:
    """Save a figure and say where. If that fails, say so and go on: it's only a picture."""
    try:
        figure.savefig(path)
        print(f"Picture      {relative(path)}")
    except OSError as error:
        print(f"Couldn't save a picture: {error}", file=sys.stderr)


def draw_images(title: str, images: list[Tensor], captions: list[str], columns=10) -> Figure:
    """A figure of images (C, H, W) from 0 to 1, dark ink on white, with a caption below each."""
    rows = max(1, math.ceil(len(images) / columns))
    figure = Figure(figsize=(10, 0.5 + rows * 13 / columns), layout="constrained")
    axes = figure.subplots()
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns, i // columns * 1.3
        edges = (x + 0.04, x + 0.96, y + 0.96, y + 0.04)
        # Matplotlib wants the channels last, and 1 minus a pixel makes ink dark.
        pixels = 1 - torch.as_tensor(image).movedim(0, -1).numpy()
        axes.imshow(pixels, extent=edges, cmap="grey", vmin=0, vmax=1)
        axes.text(x + 0.5, y + 1, caption, ha="center", va="top", fontsize=9, parse_math=False)
    axes.set(title=title, xlim=(0, columns), ylim=(rows * 1.3, 0))
    axes.axis("off")
    return figure


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Confusion matrix, int64: entry (i, j) counts the images of class i predicted as j."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=1)  # one number per (true, predicted) pair
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def draw_confusion(logits: Tensor, labels: Tensor) -> Figure:
    """A figure of the confusion matrix, in which colour marks the mistakes."""
    confusion = confusion_matrix(logits, labels)
    mistakes = confusion.clone().fill_diagonal_(0)
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mistakes.numpy(), cmap="Blues", vmax=max(mistakes.max().item(), 1) * 1.3)
    for true, predicted in confusion.nonzero().tolist():
        style = {"color": "#666666"} if true == predicted else {"weight": "bold"}
        count = str(confusion[true, predicted].item())
        axes.text(predicted, true, count, ha="center", va="center", **style)
    axes.set(xlabel="predicted digit", xticks=range(len(confusion)))
    axes.set(ylabel="true digit", yticks=range(len(confusion)))
    axes.set_title(f"{mistakes.sum():,} of {len(labels):,} wrong (right answers in grey)")
    return figure


def draw_mistakes(dataset: Dataset, logits: Tensor, labels: Tensor) -> Figure:
    """A figure of up to 100 misclassified images, the most confident mistakes first."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:100].tolist()
    captions = [f"{labels[i]} as {predicted[i]}, {confidence[i]:.0%}" for i in worst]
    title = f"{len(wrong):,} of {len(labels):,} wrong: true digit, prediction, confidence"
    return draw_images(title, [dataset[i][0] for i in worst], captions)


def draw_hardest(dataset: Dataset, image_losses: Tensor) -> Figure:
    """A figure of the 20 images with the highest losses: some are hard, some wrongly labelled."""
    worst = image_losses.topk(min(20, len(image_losses))).indices.tolist()
    captions = [f"label {dataset[i][1]}, loss {image_losses[i]:.1f}" for i in worst]
    title = "The hardest training images: label, and loss when last seen"
    return draw_images(title, [dataset[i][0] for i in worst], captions)


def log_images_and_weights(log, dataset: Dataset, indices: list[int], model, step: int) -> None:
    """Log some images as the dataset augments them, and histograms of weights and gradients."""
    images = torch.stack([torch.as_tensor(dataset[i][0]) for i in indices])
    log.add_images("augmented", images, step)
    for name, weight in model.named_parameters():
        log.add_histogram(f"weights/{name}", weight, step)
        if weight.grad is not None:
            log.add_histogram(f"gradients/{name}", weight.grad, step)
