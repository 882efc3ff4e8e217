"""What would interrupt the story in train.py: device and processes, checkpoints, a clean end."""

import argparse
import atexit
import io
import os
import pickle
import signal
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

DEVICES = ("auto", "cpu", "cuda", "mps")
FORMAT = 2  # of checkpoints: count up when old programs could not read new ones
FOLDERS = {"data_dir", "out_dir", "resume", "run_dir"}  # not in a checkpoint: a run may be moved
MAY_CHANGE = {"device", "workers", "compile"}  # when a run is resumed


class InputError(ValueError):
    """Something that the user can mend; its text says in one line what is wrong and what to do."""


def setup_distributed(name: str) -> tuple[torch.device, int, int]:
    """Choose a device ("auto": the fastest), and meet the processes that torchrun has started.

    Returns the device, this process's rank (0 in the first), and the number of processes.
    """
    together = dist.is_torchelastic_launched()  # that is, by torchrun
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or (together and found.type != "cuda"):
        found = torch.device("cpu")
    device = found if name == "auto" else torch.device(name)
    if device.type not in ("cpu", found.type):
        raise InputError(f"--device {name}: there is none here; use auto, or {found.type}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # one for each process
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # try which convolution is fastest: shapes stay
    if device.type == "cpu":
        # Linux's C library keeps freed memory for the next step only in blocks no larger than one
        # that was freed before; else each step has to ask for it anew. See "man 3 mallopt".
        torch.empty(31 * 2**20, dtype=torch.uint8)
    if not together:
        return device, 0, 1
    dist.init_process_group(device_id=device if device.type == "cuda" else None)  # nccl, or gloo
    atexit.register(dist.destroy_process_group)
    return device, dist.get_rank(), dist.get_world_size()


@contextmanager
def main_process_first():
    """Let the first process on each machine do something, and only then all others."""
    waits = dist.is_initialized() and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        dist.barrier()
    yield
    if dist.is_initialized() and not waits:
        dist.barrier()


def all_gather(values: torch.Tensor, mine: torch.Tensor, device: torch.device) -> None:
    """Let each process know the `values` of all, where only those at its own indices are right."""
    if dist.is_initialized():
        known = torch.zeros_like(values)
        known[mine] = values[mine]
        known = known.to(device)  # nccl takes no other
        dist.all_reduce(known)  # the sum over all processes
        values.copy_(known)


def new_run_dir(args: argparse.Namespace) -> Path:
    """Make a folder for a run, named after the time and the model; no other run has it."""
    name = f"{args.model}-dry-run" if args.dry_run else args.model
    while True:
        run_dir = args.out_dir / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            time.sleep(0.1)  # another run has started in this very second


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint, so that at no moment a file of that name holds half of one.

    The bytes go to a file beside it and down to the disk; only then does that file take the name,
    which the operating system does in one go. A crash before leaves the old checkpoint.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, content)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()  # from Python to the operating system
            os.fsync(file.fileno())  # from there to the disk
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path, *also: str) -> dict:
    """Read a checkpoint, to the CPU; `also` are entries that it must have, besides a best.pt's.

    `weights_only` lets torch.load build tensors and plain Python values alone: a checkpoint that
    somebody sends you can't run code. Raises InputError or OSError, if it can't be used or read.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes
            if archive.testzip():  # the first part with a wrong checksum: torch.load checks none
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a file of another kind makes zipfile and torch raise
        code = isinstance(error, pickle.UnpicklingError)
        what = "could run code" if code else "is damaged, or no checkpoint"
        raise InputError(f"{short(path)} {what}: take another") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"{short(path)} is of another project, or version: take another")
    if missing := {"model", "classes", "weights", "epoch", *also} - checkpoint.keys():
        raise InputError(f"{short(path)} lacks {', '.join(sorted(missing))}: take another")
    return checkpoint


def load_states(checkpoint, model, optimizer=None, scheduler=None, image_losses=None) -> None:
    """Put a checkpoint's weights and states into their places; InputError, if they do not fit."""
    try:
        model.load_state_dict(checkpoint["weights"])
        if optimizer is not None:
            new, saved = optimizer.state_dict()["param_groups"], checkpoint["optimizer"]
            if [group.keys() for group in new] != [group.keys() for group in saved["param_groups"]]:
                raise KeyError("the state of another kind of optimizer")
            optimizer.load_state_dict(saved)
            for weight, state in optimizer.state.items():
                for key in state.keys() - {"step"}:  # a fused one trusts their size and layout
                    state[key] = torch.empty_like(weight).copy_(state[key].view_as(weight))
            if checkpoint["scheduler"]["total_steps"] != scheduler.state_dict()["total_steps"]:
                raise ValueError("another number of images, or of processes")
            scheduler.load_state_dict(checkpoint["scheduler"])
            image_losses.copy_(checkpoint["losses"].view_as(image_losses))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            "The checkpoint does not fit: the model, optimizer, scheduler, data or number of "
            "processes was changed. Undo that, or train anew"
        ) from error


def as_flags(args: argparse.Namespace) -> list[str]:
    """Settings as a command line, for last.pt."""
    settings = {k.replace("_", "-"): v for k, v in vars(args).items() if k not in FOLDERS}
    switches = {True: "--{}", False: "--no-{}"}
    return [
        switches[value].format(name) if isinstance(value, bool) else f"--{name}={value}"
        for name, value in settings.items()
    ]


def parse_and_resume(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """parser.parse_args; with --resume on top of the settings of the run, whose folder it is."""
    given = parser.parse_args(argv)
    if not given.resume:
        return given
    named = Path(given.resume) if Path(given.resume).is_dir() else given.out_dir / given.resume
    newest_first = sorted(given.out_dir.glob("*/last.pt"), reverse=True)
    for path in newest_first if given.resume == "newest" else [named / "last.pt"]:
        last = load_checkpoint(path, "optimizer", "scheduler", "best", "settings", "losses")
        began = parser.parse_args(last["settings"])
        if last["epoch"] >= (began.epochs or 0):
            continue  # it is finished
        args = parser.parse_args(argv, argparse.Namespace(**vars(began)))
        for name in vars(args).keys() - FOLDERS - MAY_CHANGE:
            if getattr(args, name) != getattr(began, name):
                parser.error(f"--resume: this run has {name} {getattr(began, name)}, for good")
        args.resume, args.data_dir, args.out_dir = path.parent, given.data_dir, given.out_dir
        return args
    raise InputError("--resume: there is no run that has begun and is not finished")


def run_script(parse_args, main) -> None:
    """Run a script. What its user can mend ends in one line, and a bug in its traceback.

    The exit status is 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    args, signals = argparse.Namespace(), []

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    def end(error: BaseException) -> None:
        line = "Stopped." if signals else " ".join(str(error).split())
        run_dir = getattr(args, "run_dir", None)  # of train.py, once it has one
        if run_dir and (run_dir / "last.pt").exists() and (signals or isinstance(error, OSError)):
            line += f" Go on with: python {short(Path(sys.argv[0]))} --resume {short(run_dir)}"
            if args.data_dir.resolve() != Path(sys.argv[0]).resolve().parent / "data":
                line += f" --data-dir {short(args.data_dir)}"
        print("\n" * sys.stderr.isatty() + line, file=sys.stderr)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(128 + signals[0] if signals else 1)  # clean-up might wait for a full disk for ever

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    threading.excepthook = lambda failure: end(failure.exc_value)  # tensorboardX writes in a thread
    try:
        args = parse_args()
        main(args)
    except (Exception, KeyboardInterrupt) as error:
        if not signals and not isinstance(error, (InputError, OSError, FloatingPointError)):
            raise
        end(error)


def short(path: Path) -> str:
    """A path as a person would type it: relative to the current folder where it lies inside."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
