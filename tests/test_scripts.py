"""How scripts end: in a notebook, a prompt or a profiler; after Ctrl-C, a bug or a full disk."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, one_line
from test_resume import assert_same_end

import utils
from utils import UserError, choose_device, load_checkpoint, save_checkpoint

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and limits")


@pytest.fixture
def start(checkout, small_data_dir, tmp_path):
    """Start train.py in its own Python process, and return the process."""
    processes = []
    # Programs that a shell starts in the background may ignore Ctrl-C. Those we start must not.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start_python(*command, flags=(), before="", **environment):
        script = [checkout / "train.py", f"--data-dir={small_data_dir}", "--device=cpu"]
        script += [f"--out-dir={tmp_path / 'runs'}", "--batch-size=64", *flags]
        if before:  # Python code to run first
            code = f"import runpy, sys; sys.argv = sys.argv[1:]; {before}\n"
            command = ["-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')"]
        process = subprocess.Popen(
            [sys.executable, *command, *map(str, script)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(checkout)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start_python
    signal.signal(signal.SIGINT, handler)
    for process in processes:
        with process:
            process.kill()


def wait_for(process, text):
    while text not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


def finish(process, typed=None):
    out, err = process.communicate(typed, timeout=300)
    return subprocess.CompletedProcess([], process.returncode, out, err)


# The script isn't alone in its process


NOTEBOOK = """
import sys, threading, signal
before = (sys.stdout, sys.stderr, sys.excepthook, threading.excepthook, sys.unraisablehook)
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
%run {train} --dry-run --device=cpu --data-dir={data} --out-dir=runs
%run {train} --data-dir=nowhere
print("still here", handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])
print("unchanged", before == (sys.stdout, sys.stderr, sys.excepthook, threading.excepthook,
    sys.unraisablehook))
"""


@pytest.mark.slow
def test_in_a_notebook_train_py_trains_explains_errors_and_leaves_no_trace(
    checkout, small_data_dir, tmp_path
):
    pytest.importorskip("IPython", reason="IPython isn't among our requirements")
    code = NOTEBOOK.format(train=checkout / "train.py", data=small_data_dir)
    (tmp_path / "cells.ipy").write_text(code)
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=nocolor", "cells.ipy"]
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "IPYTHONDIR": str(tmp_path)}
    environment["https_proxy"] = environment["http_proxy"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "Best validation accuracy" in result.stdout, result.stderr
    assert "Can't find MNIST in nowhere" in result.stdout + result.stderr
    assert "still here True" in result.stdout and "unchanged True" in result.stdout


SHELL = """
class Shell:  # all that IDLE's sys.stdout can do
    encoding = "utf-8"
    def write(self, text): return sys.__stdout__.write(text)
    def flush(self): pass
    def isatty(self): return True
sys.stdout = sys.stderr = Shell()
"""


@pytest.mark.slow
def test_it_trains_where_stdout_is_not_a_real_file(start):
    result = finish(start(before=f"exec({SHELL!r})", flags=["--epochs=1"]))
    assert result.returncode == 0, result.stderr
    assert "Best validation accuracy" in result.stdout


@needs_posix
@pytest.mark.parametrize(
    "command",
    [
        [],
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in (["-i"], ["-m", "cProfile", "-oprofile"])
        ),
    ],
)
def test_ctrl_c_stops_training_but_keeps_the_prompt_and_the_profile(start, tmp_path, command):
    process = start(*command, flags=["--epochs=10000"])
    wait_for(process, " 1/10000")
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    result = finish(process, "print('prompt', 6 * 7)\n" if command == ["-i"] else None)
    assert "Stopped." in result.stderr
    if not command:
        assert result.returncode == 130 and result.stderr == "\nStopped.\n"
    elif command == ["-i"]:
        assert "prompt 42" in result.stdout
    else:
        assert (tmp_path / "profile").stat().st_size > 10_000
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(run_dir / "last.pt")["epoch"] >= 1


def test_utils_run_ends_with_a_line_or_a_traceback_and_restores_the_thread_hook(capsys):
    def fail(error):
        def main(args):
            raise error

        return lambda: utils.run(lambda: None, main)

    hook = threading.excepthook
    for error, status, text in (
        (UserError("do this"), 1, "do this\n"),
        (KeyboardInterrupt(), 130, "\nStopped.\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            fail(error)()
        assert stop.value.code == status and capsys.readouterr().err == text
    for error in (TimeoutError(), FloatingPointError(), KeyError("x"), FileNotFoundError("notes")):
        with pytest.raises(type(error)):
            fail(error)()
    assert threading.excepthook is hook


# A bug keeps its traceback


OPEN_NOTES = """
import dataset
def getitems(self, indices): open("my_notes.txt")
dataset.MNISTDataset.__getitems__ = getitems
"""


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_missing_file_in_a_dataset_shows_its_traceback(start, workers):
    result = finish(start(before=f"exec({OPEN_NOTES!r})", flags=[f"--workers={workers}"]))
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "in getitems" in result.stderr
    assert "my_notes.txt" in result.stderr


FAIL_IN_A_THREAD = """
import dataset, threading
real = dataset.MNISTDataset.__getitems__
def getitems(self, indices):
    threading.Thread(target=lambda: {}["my key"]).start()
    return real(self, indices)
dataset.MNISTDataset.__getitems__ = getitems
"""


@pytest.mark.slow
def test_a_bug_in_a_side_thread_is_shown_and_training_goes_on(start):
    result = finish(start(before=f"exec({FAIL_IN_A_THREAD!r})", flags=["--epochs=1"]))
    assert result.returncode == 0, result.stderr
    assert "KeyError: 'my key'" in result.stderr and "Best validation" in result.stdout


# Checkpoints: saved whole or not at all; damaged, foreign and hostile ones are refused


class Attack:
    """Unpickled by an unwary program, this creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def make_a_pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("Windows has no mkfifo")
    path.unlink()
    os.mkfifo(path)


BAD = {  # how a good checkpoint becomes a bad one, and what the line about it must say
    "code": (lambda path: torch.save(Attack(path.with_name("attacked")), path), "mkdir"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "Can't read"),
    "empty": (lambda path: path.write_bytes(b""), "Can't read"),
    "text": (lambda path: path.write_text("weights"), "Can't read"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "isn't a file"),
    "pipe": (make_a_pipe, "isn't a file"),
    "missing": (lambda path: path.unlink(), "doesn't exist"),
    "another project": (lambda path: torch.save({"arch": "cnn"}, path), "another project"),
    "older format": (lambda path: torch.save({"format": 3}, path), "another version"),
    "other weights": (
        lambda path: save_checkpoint(path, load_checkpoint(path) | {"weights": {}}),
        "doesn't match",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_gives_one_line_and_runs_no_code(run_here, trained, tmp_path, kind):
    path = tmp_path / "best.pt"
    path.write_bytes((trained / "best.pt").read_bytes())
    spoil, part = BAD[kind]
    spoil(path)
    before = contents(tmp_path)
    result = run_here("evaluate.py", "--checkpoint", path)
    one_line(result, 1, "best.pt", part)
    assert "weights_only" not in result.stderr  # no advice to turn it off
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path / "best.pt", {"epoch": 1})
    before = contents(tmp_path)

    def fail(descriptor):
        raise error

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path / "best.pt", {"epoch": 2})
    assert contents(tmp_path) == before


@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("limit", [50, 50_000])
def test_a_full_disk_while_logging_ends_the_program(start, tmp_path, limit):
    """tensorboardX writes in a thread. If that died, the next add_scalar would wait forever."""
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    result = finish(start(before=full, flags=["--epochs=50"]))
    assert result.returncode == 1 and "File too large" in result.stderr


SLOW_SAVING = """
import os, time, types, utils  # only in utils: tensorboardX calls fsync too
utils.os = types.SimpleNamespace(**vars(os))
utils.os.fsync = lambda file: (time.sleep(0.2), os.fsync(file))
"""


@pytest.mark.slow
@needs_posix
def test_a_run_killed_ten_times_while_saving_ends_like_any_other(start, train, tmp_path):
    slow = f"exec({SLOW_SAVING!r})"
    process = start(before=slow, flags=["--epochs=4"])
    wait_for(process, " 2/")
    (run_dir,) = (tmp_path / "runs").iterdir()
    for _ in range(10):
        while not (saving := run_dir / "last.pt.tmp").exists():
            assert process.poll() is None, "the run finished before we could kill it"
            time.sleep(0.01)
        process.kill()
        process.wait()
        for path in (run_dir / "best.pt", run_dir / "last.pt"):
            load_checkpoint(path)  # it is whole
        saving.unlink()  # so that we notice the next one
        process = start(before=slow, flags=["--resume"])
    assert finish(process).returncode == 0
    # The last second of a log may be lost with the process, so we compare the checkpoints alone.
    assert_same_end(run_dir, train("--epochs=4", name="whole"), parts=())


# Devices and commands


def test_auto_chooses_a_device_that_can_compute(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # left over, without torchrun
    assert torch.ones(2, device=choose_device("auto")).sum().item() == 2


def test_under_torchrun_train_py_points_to_the_example(run_here, small_data_dir, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    result = run_here("train.py", f"--data-dir={small_data_dir}")
    one_line(result, 1, "examples.distributed")


def test_paths_are_shown_as_a_person_would_type_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert utils.relative(tmp_path / "runs" / "best.pt") == str(Path("runs", "best.pt"))
    assert utils.relative(tmp_path.parent) == str(tmp_path.parent)
    assert utils.command("python", Path("my runs")) == 'python "my runs"'


def test_everything_random_follows_from_seed_and_epoch():
    import random

    def draw(*seed):
        utils.seed_everything(*seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(0, 1), draw(1, 0), draw(1, 1), draw(10**9, 3)}) == 4
