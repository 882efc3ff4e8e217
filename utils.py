"""What would interrupt the story in train.py: device and processes, checkpoints, a clean end."""

import argparse
import atexit
import io
import os
import pickle
import secrets
import signal
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path

import torch
import torch.distributed as dist

DEVICES = ("auto", "cpu", "cuda", "mps")
FORMAT = 3  # of checkpoints: count up when old programs could not read new ones
FOLDERS = {"data_dir", "out_dir", "resume", "run_dir"}  # not in a checkpoint: a run may be moved
MAY_CHANGE = {"device", "workers", "compile"}  # when a run is resumed
MISFIT = """The checkpoint does not fit: the model, optimizer, scheduler, data or number of
processes was changed. Undo that, or train anew"""  # in the one line that run_script makes of it


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

    The bytes go to a new file beside it and down to the disk; only then does that take the name,
    which the operating system does in one go. A crash before leaves the old checkpoint.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, content)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:  # x: not through a link, nor over another file
            file.write(content.getbuffer())
            file.flush()  # from Python to the operating system
            os.fsync(file.fileno())  # from there to the disk
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint, to the CPU.

    `weights_only` lets torch.load build tensors and plain Python values alone: a checkpoint that
    somebody sends you can't run code. Raises InputError or OSError, if it can't be used or read.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError("it is no file")  # and a pipe would let us wait for ever
        with zipfile.ZipFile(path) as archive:  # what torch.save writes
            if archive.testzip():  # the first part with a wrong checksum: torch.load checks none
                raise InputError("it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
            raise InputError("it is of another project, or version")
        kinds = [type(checkpoint.get(name)) for name in ("model", "classes", "epoch")]
        if kinds != [str, int, int] or checkpoint["epoch"] < 1:
            raise InputError("it lacks the model's name, classes or epoch")
        if not 1 < checkpoint["classes"] <= 10_000:
            raise InputError(f"it has {checkpoint['classes']:.3g} classes")
        return checkpoint
    except OSError:
        raise
    except Exception as error:  # also whatever a file of another kind makes zipfile and torch raise
        reason = str(error) if isinstance(error, InputError) else "it is damaged, or no checkpoint"
        reason = "it could run code" if isinstance(error, pickle.UnpicklingError) else reason
        raise InputError(f"{short(path)} can't be used: {reason}. Take another") from error


def alike(saved, new):
    """A copy of what a file holds, if it is like `new` in types, keys, lengths, shapes and dtypes.

    Else, or if a tensor has numbers that are immense or none (NaN), InputError. Optimizers check
    none of it, and a fused one would write beyond the end of a smaller state.
    """
    same = type(saved) is type(new)
    if same and isinstance(new, torch.Tensor):
        kinds = [(tensor.shape, tensor.dtype, tensor.layout) for tensor in (saved, new)]
        if saved.device.type == "cpu" and kinds[0] == kinds[1] and (saved.abs() < 1e18).all():
            return torch.empty_like(new).copy_(saved)  # memory of its own, laid out like new's
    elif same and isinstance(new, dict):
        if saved.keys() == new.keys():
            return type(new)((key, alike(saved[key], new[key])) for key in new)
    elif same and isinstance(new, list):
        if len(saved) == len(new):
            return list(map(alike, saved, new))
    elif same and (not isinstance(new, float) or isfinite(saved)):
        return saved
    raise InputError(MISFIT)


def load_states(saved, model, optimizer=None, scheduler=None, image_losses=None, step=0) -> None:
    """Put what a checkpoint holds into its places; InputError, if it does not fit.

    `step` is how many steps there were until then: the learning rate follows from that.
    """
    weights = alike(saved.get("weights"), model.state_dict())
    if optimizer is not None:
        for weight in (w for group in optimizer.param_groups for w in group["params"]):
            weight.grad = torch.zeros_like(weight)
        optimizer.step()  # only to have states to compare with
        optimizer.zero_grad()
        new = optimizer.state_dict()
        optimizer.load_state_dict(new | {"state": alike(saved.get("optimizer"), new["state"])})
        image_losses.copy_(alike(saved.get("losses"), image_losses))
        if alike(saved.get("step"), step) != step:
            raise InputError(MISFIT)
        for _ in range(step):
            scheduler.step()
    model.load_state_dict(weights)


def resume(run_dir: Path, model, optimizer, scheduler, image_losses, steps) -> tuple[int, float]:
    """Put what a run's last.pt holds into its places; `steps` has the steps of each epoch.

    Returns how many epochs are done, and the best validation accuracy in them.
    """
    last = load_checkpoint(run_dir / "last.pt")
    best = alike(last.get("best"), 0.0)
    load_states(last, model, optimizer, scheduler, image_losses, sum(steps[: last["epoch"]]))
    return last["epoch"], best


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
        last = load_checkpoint(path)
        flags = alike(last.get("settings"), as_flags(given))  # a list of as many texts
        if not "".join(flags).isprintable() or any(p.is_symlink() for p in path.parent.rglob("*")):
            raise InputError(f"{short(path.parent)} is odd, with links or control characters in it")
        began = parser.parse_args(flags)
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
        if signals:
            os._exit(128 + number)  # the second time without a word
        signals.append(number)
        raise KeyboardInterrupt

    def end(error: BaseException) -> None:
        line = "Stopped." if signals else " ".join(str(error).split())
        run_dir = getattr(args, "run_dir", None)  # of train.py, once it has one
        if run_dir and (run_dir / "last.pt").exists() and (signals or isinstance(error, OSError)):
            line += f" Go on with: python {short(Path(sys.argv[0]))} --resume {short(run_dir)}"
            if args.data_dir.resolve() != Path(sys.argv[0]).resolve().parent / "data":
                line += f" --data-dir {short(args.data_dir)}"
        with suppress(OSError):
            print("\n" * sys.stderr.isatty() + line, file=sys.stderr)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(128 + signals[0] if signals else 1)  # clean-up might wait for a full disk for ever

    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 (it is None, if closed)
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that it has no letters for
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    sys.unraisablehook = lambda failure: signals or sys.__unraisablehook__(failure)
    threading.excepthook = lambda failure: end(failure.exc_value)  # tensorboardX writes in a thread
    try:
        try:
            args = parse_args()
            main(args)
        finally:
            sys.stdout.flush()  # here an error can still be told
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python cleans up
    except (Exception, KeyboardInterrupt) as error:
        if "InvalidCxxCompiler" in str(error):  # of torch.compile, deep inside
            end(InputError("--compile needs a C++ compiler, as g++: install it, or go without"))
        if not signals and not isinstance(error, (InputError, OSError, FloatingPointError)):
            raise
        end(error)


def short(path: Path) -> str:
    """A path as a person would type it: relative to the current folder where it lies inside."""
    path = path.absolute()
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return "".join(c if c.isprintable() else "?" for c in str(path))
