"""What goes wrong in real life, really caused: nothing is lost, and one line says what to do."""

import gzip
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import train
import utils
from dataset import MNISTDataset
from model import MODELS
from train import Config, main
from utils import load_checkpoint, save_checkpoint

try:
    import resource
except ImportError:  # Windows
    resource = None


def contents(*folders):
    """All files and folders in some folders, with what the files hold."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def one_line(result, status, *parts):
    assert result.returncode == status, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n"), result.stderr
    for part in parts:
        assert part in result.stderr


# Bad input: {file} is a file where a folder should be, {empty} an empty folder. What follows is
# what the line must name: the flag, and what it allows.

TRAIN = [
    ("--model vgg", 2, "--model", "cnn", "resnet18"),
    ("--model", 2, "--model", "expected one argument"),
    ("--epochs 0", 2, "--epochs", "from 1 to 10,000"),
    ("--epochs -1", 2, "--epochs", "from 1 to 10,000"),
    ("--epochs 1.5", 2, "--epochs", "from 1 to 10,000"),
    ("--epochs many", 2, "--epochs", "'many'", "from 1 to 10,000"),
    ("--epochs 99999999999999999999999", 2, "--epochs", "from 1 to 10,000"),
    ("--batch-size 0", 2, "--batch-size", "from 1 to 55,000"),
    ("--batch-size -128", 2, "--batch-size", "from 1 to 55,000"),
    ("--batch-size 55001", 2, "--batch-size", "from 1 to 55,000"),
    ("--batch-size 0x80", 2, "--batch-size", "from 1 to 55,000"),
    ("--lr 0", 2, "--lr", "above 0"),
    ("--lr -0.01", 2, "--lr", "above 0"),
    ("--lr nan", 2, "--lr", "above 0"),
    ("--lr inf", 2, "--lr", "above 0"),
    ("--lr 1e999", 2, "--lr", "above 0"),
    ("--lr fast", 2, "--lr", "'fast'", "above 0"),
    ("--seed -1", 2, "--seed", "from 0 to 4,294,967,295"),
    ("--seed 4294967296", 2, "--seed", "from 0 to 4,294,967,295"),
    ("--seed 1e3", 2, "--seed", "from 0 to 4,294,967,295"),
    ("--workers -1", 2, "--workers", "from 0 to 256"),
    ("--workers 257", 2, "--workers", "from 0 to 256"),
    ("--device tpu", 2, "--device", "auto", "cuda", "mps", "cpu"),
    ("--device cuda", 1, "--device cuda", "auto", "cpu"),
    ("--device mps", 1, "--device mps", "auto", "cpu"),
    ("--freeze-backbone", 2, "--freeze-backbone", "--model resnet18"),
    ("--data-dir {file}", 2, "--data-dir", "not a folder"),
    ("--data-dir {file}/sub", 1, "--data-dir"),
    ("--data-dir {empty}", 1, "--data-dir"),
    ("--data-dir {empty}/new/data", 1, "--data-dir"),
    ("--checkpoint-dir {file}", 2, "--checkpoint-dir", "not a folder"),
    ("--checkpoint-dir {file}/sub", 1, "--checkpoint-dir"),
    ("--checkpoint-dir {long}", 2, "--checkpoint-dir", "not a folder"),
    ("--log-dir {file}", 2, "--log-dir", "not a folder"),
    ("--log-dir {file}/sub", 1, "--log-dir"),
    ("--resume --checkpoint-dir {empty}", 1, "last.pt", "python train.py"),
    ("--resume --checkpoint-dir {best_as_last}", 1, "last.pt", "best.pt"),
    ("--learning-rate 0.1", 2, "--learning-rate", "--help"),
    ("cnn", 2, "cnn", "--help"),
]
EVALUATE = [
    ("--checkpoint {empty}/best.pt", 1, "best.pt", "python train.py"),
    ("--checkpoint {empty}", 1, "empty", "directory"),
    ("--checkpoint", 2, "--checkpoint", "expected one argument"),
    ("--device tpu", 2, "--device", "auto", "cuda", "mps", "cpu"),
    ("--device cuda --checkpoint {best}", 1, "--device cuda", "auto", "cpu"),
    ("--device mps --checkpoint {best}", 1, "--device mps", "auto", "cpu"),
    ("--data-dir {file} --checkpoint {best}", 2, "--data-dir", "not a folder"),
    ("--data-dir {empty} --checkpoint {best}", 1, "--data-dir"),
    ("--epochs 3", 2, "--epochs", "--help"),
]
CASES = [("train.py", *case) for case in TRAIN] + [("evaluate.py", *case) for case in EVALUATE]


@pytest.fixture(scope="module")
def places(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("places")
    (folder / "file").write_text("text")
    (folder / "empty").mkdir()
    (folder / "best_as_last").mkdir()
    shutil.copy(trained / "best.pt", folder / "best_as_last" / "last.pt")
    names = {name: folder / name for name in ("file", "empty", "best_as_last")}
    return names | {"best": trained / "best.pt", "long": "a" * 5_000}


@pytest.mark.parametrize("script, flags, status, parts", [(s, f, n, p) for s, f, n, *p in CASES])
def test_bad_input_gives_one_line_and_writes_nothing(
    run_here, small_data_dir, checkout, places, tmp_path, offline, script, flags, status, parts
):
    for device in ("cuda", "mps"):
        if f"--device {device}" in flags and getattr(torch, device).is_available():
            pytest.skip(f"this machine has {device}")
    folders = (checkout, places["empty"].parent, small_data_dir)
    before = contents(*folders)
    given = [flag.format(**places) for flag in flags.split()]
    defaults = {"--data-dir": small_data_dir}
    if script == "train.py":
        defaults |= {"--checkpoint-dir": tmp_path / "checkpoints", "--log-dir": tmp_path / "runs"}
    first = [
        part for flag, value in defaults.items() for part in (flag, value) if flag not in given
    ]

    result = run_here(script, *first, *given)

    one_line(result, status, *parts)
    assert contents(*folders) == before
    files = [path for path in contents(tmp_path) if path.is_file() and path.name != ".lock"]
    assert files == []


# Hostile and broken checkpoints


class Attack:
    """Unpickled by an unwary program, this creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "kind, part",
    [
        ("code", "could run code"),
        ("legacy code", "not a PyTorch checkpoint"),
        ("truncated", "cut short"),
        ("half", "cut short"),
        ("damaged", "damaged"),
        ("one bit flipped", "damaged"),
        ("empty", "is empty"),
        ("text", "not a PyTorch checkpoint"),
        ("zip", "damaged"),
        ("folder", "directory"),
        ("missing", "run 'python train.py' first"),
        ("bare weights", "another project"),
        ("tensor", "another project"),
        ("another project", "another project"),
        ("another model", "'vgg'"),
        ("another architecture", "do not fit"),
        ("newer format", "format 99"),
        ("unreadable", "Cannot read"),
    ],
)
@pytest.mark.parametrize("script", ["evaluate.py", "train.py"])
def test_a_bad_checkpoint_gives_a_line_of_its_own_and_runs_no_code(
    run_here, trained, small_data_dir, tmp_path, script, kind, part
):
    path, attacked = tmp_path / "last.pt", tmp_path / "attacked"
    good = torch.load(trained / "last.pt", weights_only=True)
    whole = (trained / "last.pt").read_bytes()
    if kind == "code":
        torch.save(good | {"weights": Attack(attacked)}, path)
        torch.load(path, weights_only=False)
        attacked.rmdir()  # the attack works on those who let it
    elif kind == "legacy code":  # before 2020 torch saved bare pickles
        torch.save(Attack(attacked), path, _use_new_zipfile_serialization=False)
    elif kind == "truncated":
        path.write_bytes(whole[:-100])
    elif kind == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "damaged":
        place = whole.index(b"/data.pkl") + 100
        path.write_bytes(whole[:place] + bytes(200) + whole[place + 200 :])
    elif kind == "one bit flipped":  # in some weight
        content = bytearray(whole)
        content[len(whole) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("The weights of my model\n" * 100)
    elif kind == "zip":
        shutil.make_archive(str(tmp_path / "archive"), "zip", small_data_dir / "MNIST")
        (tmp_path / "archive.zip").rename(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "bare weights":
        torch.save(good["weights"], path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "another project":
        torch.save({"state_dict": good["weights"], "epoch": 3, "arch": "cnn"}, path)
    elif kind == "another model":
        torch.save(good | {"model": "vgg"}, path)
    elif kind == "another architecture":
        torch.save(good | {"weights": {"layer": torch.zeros(3)}, "epoch": 0}, path)
    elif kind == "newer format":
        torch.save(good | {"format": 99}, path)
    elif kind == "unreadable":
        if not Path("/proc/self/mem").exists():
            pytest.skip("needs a file that even an administrator can't read")
        path.symlink_to("/proc/self/mem")
    before = contents(tmp_path) if kind != "unreadable" else None

    if script == "train.py":
        folders = ("--data-dir", small_data_dir, "--log-dir", tmp_path / "runs")
        result = run_here("train.py", "--resume", "--checkpoint-dir", tmp_path, *folders)
    else:
        result = run_here("evaluate.py", "--checkpoint", path, "--data-dir", small_data_dir)

    one_line(result, 1, "last.pt", part)
    assert not attacked.exists()
    if before is not None:
        assert contents(tmp_path) == before


# Resuming


@pytest.fixture
def settings(small_data_dir, tmp_path):
    """Settings of a short run on few images, and the same as flags."""

    def make(name, **changes):
        folders = {"checkpoint_dir": tmp_path / name, "log_dir": tmp_path / name / "runs"}
        return {"epochs": 3, "batch_size": 64, "data_dir": small_data_dir} | folders | changes

    return make


def as_flags(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


@pytest.fixture
def in_epoch(monkeypatch):
    """Let something happen in the middle of an epoch."""
    original = train.train_epoch
    epochs = 0

    def plan(epoch, act):
        nonlocal epochs
        epochs = 0

        def train_epoch(model, batches, *others):
            nonlocal epochs
            epochs += 1

            def batches_and_act():
                for step, batch in enumerate(batches):
                    if (epochs, step) == (epoch, 1):
                        act()
                    yield batch

            return original(model, batches_and_act(), *others)

        monkeypatch.setattr(train, "train_epoch", train_epoch)

    return plan


def resume(folder, **changes):
    last = load_checkpoint(folder / "last.pt", MODELS)
    main(Config(**(last["config"] | {"checkpoint_dir": folder} | changes)), last)


def raise_signal(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def same(a, b):
    """Whether two parts of checkpoints are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(folder, other):
    for name in ("best.pt", "last.pt"):
        a, b = load_checkpoint(folder / name, MODELS), load_checkpoint(other / name, MODELS)
        for key in a.keys() - {"config", "run"}:
            assert same(a[key], b[key]), key


def steps_logged(folder):
    (run_dir,) = (folder / "runs").iterdir()
    steps = {}
    for part in ("training", "validation"):
        log = EventAccumulator(str(run_dir / part)).Reload()
        for tag in log.Tags()["scalars"]:
            steps[part, tag] = [event.step for event in log.Scalars(tag)]
    return steps


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(
    settings, in_epoch, tmp_path, workers
):
    main(Config(**settings("whole", workers=workers)))
    in_epoch(2, raise_signal)
    with pytest.raises(SystemExit):
        main(Config(**settings("resumed", workers=workers)))
    assert load_checkpoint(tmp_path / "resumed" / "last.pt", MODELS)["epoch"] == 1
    torch.rand(3)  # the state of the generator must not matter
    resume(tmp_path / "resumed")
    assert_same_end(tmp_path / "resumed", tmp_path / "whole")
    assert set(map(tuple, steps_logged(tmp_path / "resumed").values())) == {(1, 2, 3)}


def test_a_resumed_run_keeps_a_better_epoch_of_the_time_before(
    settings, in_epoch, tmp_path, capsys
):
    in_epoch(2, raise_signal)
    with pytest.raises(SystemExit):
        main(Config(**settings("run")))
    best, last = tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt"
    save_checkpoint(last, load_checkpoint(last, MODELS) | {"best": (1.0, 1)})
    before = best.read_bytes()
    resume(tmp_path / "run")
    assert "Best validation accuracy: 100.00% (epoch 1)" in capsys.readouterr().out
    assert best.read_bytes() == before
    assert load_checkpoint(last, MODELS)["epoch"] == 3


@pytest.mark.slow
def test_a_frozen_resnet18_is_resumed_without_its_weights_file(
    settings, in_epoch, tmp_path, offline, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    changes = {"model": "resnet18", "pretrained": False, "freeze_backbone": True, "batch_size": 275}
    main(Config(**settings("whole", epochs=2, **changes)))
    in_epoch(2, raise_signal)
    with pytest.raises(SystemExit):
        main(Config(**settings("resumed", epochs=2, **changes)))
    resume(tmp_path / "resumed", pretrained=True)
    assert_same_end(tmp_path / "resumed", tmp_path / "whole")


def test_a_step_logged_twice_is_shown_once(settings, tmp_path, monkeypatch, capsys):
    """The log is written before the checkpoint: a crash between leaves an epoch too many."""

    def fail(path, checkpoint):
        if checkpoint["epoch"] == 2:
            raise OSError(28, "No space left on device")
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr(utils, "save_checkpoint", fail)
    with pytest.raises(SystemExit):
        main(Config(**settings("run")))
    assert set(map(tuple, steps_logged(tmp_path / "run").values())) == {(1, 2)}
    monkeypatch.undo()
    time.sleep(1.1)  # a log file is named after the second: in the same one it would be replaced
    resume(tmp_path / "run")
    assert set(map(tuple, steps_logged(tmp_path / "run").values())) == {(1, 2, 3)}


@pytest.mark.parametrize(
    "flag, stored",
    [
        ("--model=resnet18", "model cnn"),
        ("--epochs=4", "epochs 3"),
        ("--batch-size=65", "batch_size 64"),
        ("--lr=0.02", "lr 0.01"),
        ("--seed=1", "seed 0"),
        ("--dry-run", "dry_run False"),
        ("--no-pretrained", "pretrained True"),
    ],
)
def test_flags_that_contradict_the_run_are_refused(run_here, settings, places, flag, stored):
    folder = places["empty"].parent / "finished"
    if not folder.exists():
        main(Config(**settings("unused", checkpoint_dir=folder)))
    before = contents(folder)
    result = run_here("train.py", "--resume", f"--checkpoint-dir={folder}", flag)
    one_line(result, 2, "--resume", stored.replace("_", "-"))
    assert contents(folder) == before


def test_a_setting_newer_than_the_checkpoint_had_its_default(run_here, settings, tmp_path):
    main(Config(**settings("run")))
    path = tmp_path / "run" / "last.pt"
    last = load_checkpoint(path, MODELS)
    del last["config"]["batch_size"]  # as if --batch-size had come later
    save_checkpoint(path, last)
    folder = f"--checkpoint-dir={tmp_path / 'run'}"
    one_line(run_here("train.py", "--resume", folder, "--batch-size=5"), 2, "batch-size 128")
    assert run_here("train.py", "--resume", folder, "--batch-size=128").returncode == 0


def test_flags_that_agree_or_do_not_matter_are_accepted(run_here, settings, tmp_path):
    given = settings("run")
    main(Config(**given))
    result = run_here("train.py", "--resume", "--lr=0.010", "--workers=2", *as_flags(given))
    assert result.returncode == 0 and "is finished" in result.stdout


def test_a_finished_run_says_so(run_here, settings, tmp_path):
    main(Config(**settings("run")))
    before = contents(tmp_path)
    result = run_here("train.py", "--resume", "--checkpoint-dir", tmp_path / "run")
    assert result.returncode == 0 and result.stderr == ""
    assert "finished" in result.stdout and result.stdout.count("\n") == 1
    assert contents(tmp_path) == before


def test_a_new_run_keeps_the_checkpoints_of_an_earlier_one(run_here, settings, tmp_path):
    flags = as_flags(settings("run"))
    assert run_here("train.py", *flags).returncode == 0
    earlier = {name: (tmp_path / "run" / name).read_bytes() for name in ("best.pt", "last.pt")}
    result = run_here("train.py", "--seed=1", *flags)
    assert result.returncode == 0
    for name, content in earlier.items():
        (kept,) = (tmp_path / "run").glob(f"{name[:4]}-*.pt")
        assert kept.read_bytes() == content
        assert kept.name in result.stdout
        assert (tmp_path / "run" / name).read_bytes() != content


# Signals


@pytest.fixture
def start(settings, checkout, tmp_path):
    """Start train.py in a process of its own, and wait until it has printed some text.

    `before` is Python code to run first.
    """
    processes = []

    def start_training(text, *flags, before=""):
        command = f"import runpy, sys; sys.argv = sys.argv[1:]; {before}\n"
        command += "runpy.run_path(sys.argv[0], run_name='__main__')"
        process = subprocess.Popen(
            [sys.executable, "-c", command, checkout / "train.py", *map(str, flags)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        while text and (line := process.stdout.readline()) and text not in line:
            pass
        return process

    yield start_training
    for process in processes:
        with process:
            process.kill()


def result_of(process):
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(
    "number, status, workers", [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 0)]
)
def test_a_signal_stops_training_after_a_whole_epoch(
    start, settings, tmp_path, number, status, workers
):
    flags = as_flags(settings("run", epochs=10_000, workers=workers))
    process = start(" 2/10000", *flags)
    time.sleep(0.05)
    os.killpg(process.pid, number)  # a terminal sends it to all processes of a command
    result = result_of(process)
    one_line(result, status, "train.py --resume --checkpoint-dir ")
    saved = int(re.search(r"Epoch (\d+) is saved", result.stderr)[1])
    assert saved >= 2
    assert load_checkpoint(tmp_path / "run" / "last.pt", MODELS)["epoch"] == saved
    steps = steps_logged(tmp_path / "run")["validation", "charts/loss"]
    assert steps[:saved] == list(range(1, saved + 1))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_the_step_in_progress_is_finished(settings, in_epoch, monkeypatch, tmp_path):
    """And no other begins."""
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (step(self), steps.append(1)))
    in_epoch(1, raise_signal)
    with pytest.raises(SystemExit) as stop:
        main(Config(**settings("run")))
    assert stop.value.code == 130
    assert len(steps) == 2
    assert not list((tmp_path / "run").glob("*.pt"))


# Faults


@pytest.mark.skipif(resource is None, reason="Windows has no limits on resources")
@pytest.mark.parametrize("limit", [300_000, 600_000])  # best.pt does not fit; only last.pt does not
def test_a_full_disk_while_saving(settings, in_epoch, start, tmp_path, limit):
    folder = tmp_path / "run"
    in_epoch(2, raise_signal)
    with pytest.raises(SystemExit):
        main(Config(**settings("run")))
    before = contents(folder)
    sizes = [(folder / name).stat().st_size for name in ("best.pt", "last.pt")]
    assert 300_000 < sizes[0] < 600_000 < sizes[1]

    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    result = result_of(start("", "--resume", "--checkpoint-dir", folder, before=full))

    one_line(result, 1, "epoch 2", "File too large", "--resume")
    after = contents(folder)
    assert after[folder / "last.pt"] == before[folder / "last.pt"]
    assert load_checkpoint(folder / "best.pt", MODELS)["epoch"] in (1, 2)
    assert {path.name for path in folder.glob("*pt*")} == {"best.pt", "last.pt"}

    resume(folder)  # with room again, to the same end
    main(Config(**settings("whole")))
    assert_same_end(folder, tmp_path / "whole")


@pytest.mark.skipif(resource is None, reason="Windows has no limits on resources")
def test_a_full_disk_while_logging(start, settings, tmp_path):
    limit = "import resource, train; resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))"
    result = result_of(start("", *as_flags(settings("run")), before=limit))
    one_line(result, 1, "File too large")
    assert not list((tmp_path / "run").glob("*.pt"))


def damage(raw, kind):
    """Damage MNIST's files in one way."""
    images = raw / "train-images-idx3-ubyte"
    if kind == "missing":
        shutil.rmtree(raw)
    elif kind == "truncated":
        images.write_bytes(images.read_bytes()[:100_000])
    elif kind == "empty":
        images.write_bytes(b"")
    elif kind == "no header":
        images.write_bytes(b"\xff" * 16 + images.read_bytes()[16:])
    elif kind == "labels truncated":
        labels = raw / "train-labels-idx1-ubyte"
        labels.write_bytes(labels.read_bytes()[:700])
    elif kind == "labels of fewer images":
        shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    elif kind == "archive damaged":
        packed = bytearray(gzip.compress(images.read_bytes()))
        packed[len(packed) // 2] ^= 0xFF
        (raw / "train-images-idx3-ubyte.gz").write_bytes(packed)
        images.unlink()


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "truncated",
        "empty",
        "no header",
        "labels truncated",
        "labels of fewer images",
        "archive damaged",
    ],
)
def test_bad_data_gives_one_line(run_here, settings, small_data_dir, tmp_path, offline, kind):
    shutil.copytree(small_data_dir, tmp_path / "data")
    damage(tmp_path / "data" / "MNIST" / "raw", kind)
    before = contents(tmp_path / "data")
    result = run_here("train.py", *as_flags(settings("run", data_dir=tmp_path / "data")))
    one_line(result, 1, "--data-dir", str(tmp_path / "data"))
    assert not (tmp_path / "run").exists()
    if kind != "archive damaged":
        assert contents(tmp_path / "data") == before


def test_a_learning_rate_far_too_large(run_here, settings, tmp_path):
    assert run_here("train.py", *as_flags(settings("run"))).returncode == 0
    before = contents(tmp_path / "run")
    result = run_here("train.py", "--lr=1e9", *as_flags(settings("run")))
    one_line(result, 1, "step ", "smaller --lr")
    after = contents(tmp_path / "run")
    assert {path: content for path, content in after.items() if path in before} == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_stops_being_a_number_in_a_later_epoch(
    settings, in_epoch, monkeypatch, capsys, tmp_path, bad
):
    step, spoiled = torch.optim.AdamW.step, False

    def step_and_spoil(self):
        step(self)
        if spoiled:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].fill_(bad)

    def spoil():
        nonlocal spoiled
        spoiled = True

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_spoil)
    in_epoch(2, spoil)
    with pytest.raises(SystemExit) as stop:
        main(Config(**settings("run")))
    assert stop.value.code == 1
    assert "Epoch 2: in step 3 the loss became" in capsys.readouterr().err
    for name in ("best.pt", "last.pt"):
        checkpoint = load_checkpoint(tmp_path / "run" / name, MODELS)
        assert checkpoint["epoch"] == 1
        assert all(value.isfinite().all() for value in checkpoint["weights"].values())


def test_a_validation_loss_that_is_not_a_number(settings, monkeypatch, capsys, tmp_path):
    """A batch norm's running averages are used in validation alone, and may overflow alone."""

    def predict(*args):
        logits, labels = evaluate.predict(*args)
        return logits * float("nan"), labels

    monkeypatch.setattr(train, "predict", predict)
    with pytest.raises(SystemExit):
        main(Config(**settings("run")))
    assert "Epoch 1: the validation loss is nan" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_loading_process_that_is_killed(settings, in_epoch, capsys, tmp_path):
    def kill():
        worker = multiprocessing.active_children()[0]
        worker.kill()
        worker.join()

    # Batches of 8, so that more are to come than have been loaded in advance.
    in_epoch(2, kill)
    with pytest.raises(SystemExit) as stop:
        main(Config(**settings("run", workers=2, batch_size=8)))
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "--workers" in line and "Epoch 1 is saved" in line and "--resume" in line
    assert load_checkpoint(tmp_path / "run" / "last.pt", MODELS)["epoch"] == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError("stack expects equal sizes"), OSError("image cut")])
def test_a_bug_in_a_dataset_keeps_its_traceback(settings, monkeypatch, error, workers):
    """It is neither a loading process that has died nor a full disk."""

    def fail(self, indices):
        raise error

    config = Config(**settings("run", workers=workers))
    monkeypatch.setattr(MNISTDataset, "__getitems__", fail)
    with pytest.raises((RuntimeError, OSError)) as stop:
        main(config)
    shown = "".join(traceback.format_exception(stop.value))
    assert str(error) in shown and "in fail" in shown


def test_a_second_run_in_the_same_folder_is_refused(
    start, run_here, settings, tmp_path, monkeypatch
):
    flags = as_flags(settings("run", epochs=10_000))
    first = start(" 1/10000", *flags)
    monkeypatch.setattr(utils, "LOCK_SECONDS", 0.5)
    second = run_here("train.py", *flags)
    one_line(second, 1, "Another run", "--checkpoint-dir")
    assert first.poll() is None  # it still runs
    first.terminate()
    assert result_of(first).returncode == 143
    assert not list((tmp_path / "run").glob("*-*.pt"))
    assert load_checkpoint(tmp_path / "run" / "last.pt", MODELS)["epoch"] >= 1


SLOW_SAVING = """
import os, time, types, utils  # of utils alone: tensorboardX calls fsync too, and often
utils.os = types.SimpleNamespace(**vars(os))
utils.os.fsync = lambda file: (time.sleep(0.5), os.fsync(file))
"""


@pytest.mark.slow
def test_twenty_kills_then_the_same_end(start, settings, tmp_path):
    """SIGKILL can't be handled. Saving takes long here, so that it is hit in the middle."""
    folder, moments = tmp_path / "run", random.Random(0)
    start(" 2/50", *as_flags(settings("run", epochs=50))).kill()  # epoch 1 is saved
    flags = ["--resume", f"--checkpoint-dir={folder}"]
    while_saving = 0
    for _ in range(20):
        process = start("images/s", *flags, before=SLOW_SAVING)
        time.sleep(moments.uniform(0, 2))
        assert process.poll() is None, "it came to its end before it was killed 20 times"
        process.kill()
        process.wait()
        for path in folder.glob("*.partial"):
            while_saving += 1
            path.unlink()  # only to count the next
        for path in folder.glob("*.pt"):
            epoch = load_checkpoint(path, MODELS)["epoch"]  # it is whole
    print(f"{while_saving} of 20 kills while saving, the last in epoch {epoch + 1}")
    assert while_saving >= 3

    assert result_of(start("", *flags)).returncode == 0
    main(Config(**settings("whole", epochs=50)))
    assert_same_end(folder, tmp_path / "whole")
    assert steps_logged(folder)["training", "charts/loss"] == list(range(1, 51))
