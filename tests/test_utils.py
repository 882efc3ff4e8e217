"""Checkpoints: saved whole or not at all; damaged, foreign and hostile ones are refused."""

import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import contents, one_line

import evaluate
import train as script
from utils import InputError, load_checkpoint, save_checkpoint, setup_distributed, short

CHECKPOINT = {"model": "cnn", "classes": 10, "weights": {}, "epoch": 1}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    weights = {"layer.weight": torch.randn(3, 4)}
    save_checkpoint(tmp_path / "best.pt", CHECKPOINT | {"weights": weights, "epoch": 3})
    loaded = load_checkpoint(tmp_path / "best.pt")
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["weights"]["layer.weight"], weights["layer.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch, error):
    path = tmp_path / "best.pt"
    save_checkpoint(path, CHECKPOINT)
    before = contents(tmp_path)

    def fail(descriptor):
        raise error

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(type(error)):
        save_checkpoint(path, CHECKPOINT | {"epoch": 2})
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda n: "1234")
    (tmp_path / "best.pt").symlink_to("precious")
    save_checkpoint(tmp_path / "best.pt", CHECKPOINT)
    (tmp_path / "last.pt.1234").symlink_to("precious")
    with pytest.raises(FileExistsError):
        save_checkpoint(tmp_path / "last.pt", CHECKPOINT)
    assert (tmp_path / "precious").read_text() == "mine"
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 1


class Attack:
    """Unpickled by an unwary program, this creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def edit(**changes):
    """What makes of a good checkpoint one with other entries."""
    return lambda path: torch.save(torch.load(path, weights_only=True) | changes, path)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in some weight
    path.write_bytes(content)


def make_a_pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("Windows has no pipes with a name")
    path.unlink()
    os.mkfifo(path)


def make_a_zip(path):
    path.unlink()
    shutil.make_archive(str(path), "zip", path.parent)
    path.with_name("last.pt.zip").rename(path)


BAD = {  # how a good last.pt becomes a bad one, and what the line about it must say
    "code": (lambda path: torch.save(Attack(path.with_name("attacked")), path), "could run code"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
    "a bit flipped": (flip_a_bit, "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "zip": (make_a_zip, "damaged"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "no file"),
    "pipe": (make_a_pipe, "no file"),
    "missing": (lambda path: path.unlink(), "No such file"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "another project"),
    "another project": (lambda path: torch.save({"arch": "cnn"}, path), "another project"),
    "older format": (edit(format=1), "version"),
    "other weights": (edit(weights={"layer": torch.zeros(3)}), "does not fit"),
    "lacking": (lambda path: torch.save({"format": 3, "model": "cnn"}, path), "lacks"),
    "classes as text": (edit(classes="ten"), "lacks"),
    "many classes": (edit(classes=10**12), "1e+12 classes"),
    "an epoch that never was": (edit(epoch=-1), "lacks"),
    "weights in a list": (edit(weights=[]), "does not fit"),
}


@pytest.fixture(scope="module")
def stopped(small_data_dir, tmp_path_factory):
    """The folder of a run that has one epoch left, of one step."""
    folder, epochs = tmp_path_factory.mktemp("stopped"), [script.train_epoch]
    flags = ["--epochs=2", "--hard-share=0.001", "--batch-size=64", "--device=cpu"]
    flags += [f"--out-dir={folder}", f"--data-dir={small_data_dir}"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(script, "train_epoch", lambda *args: epochs.pop()(*args))
        script.main(script.parse_args(flags))
    return next(folder.iterdir())


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("script", ["evaluate.py", "train.py"])
def test_a_bad_checkpoint_gives_a_line_of_its_own_and_runs_no_code(
    run_here, stopped, small_data_dir, tmp_path, script, kind
):
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    shutil.copy(stopped / "last.pt", path)
    spoil, part = BAD[kind]
    spoil(path)
    before = contents(tmp_path)
    which = ("--resume", path.parent) if script == "train.py" else ("--checkpoint", path)
    one_line(run_here(script, *which, "--data-dir", small_data_dir), 1, part)
    assert contents(tmp_path) == before


def test_the_attack_works_on_those_who_let_it(tmp_path):
    torch.save(Attack(tmp_path / "attacked"), tmp_path / "code.pt")
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert (tmp_path / "attacked").is_dir()


def test_auto_chooses_a_device_that_can_compute(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # left over, without torchrun
    device, rank, world_size = setup_distributed("auto")
    assert torch.ones(2, device=device).sum().item() == 2
    assert (rank, world_size) == (0, 1)


def test_paths_are_shown_as_a_person_would_type_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short(tmp_path / "checkpoints" / "best.pt") == str(Path("checkpoints", "best.pt"))
    assert short(tmp_path.parent) == str(tmp_path.parent)


# Files from strangers


NASTY = [None, True, -1, 0, 10**30, float("nan"), 1e30, "", "\x1b[31m", "--workers=300", [], {}]
NASTY += [(), ((((),),),), torch.zeros(()), torch.zeros(3), torch.full((2, 2), float("nan"))]


def mutate(value, rng):
    """Somewhere in what a checkpoint holds, one thing is another, or missing, or too much."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, kind = rng.choice(keys), rng.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.15 and isinstance(value, dict):
            value[rng.choice(["new", 7])] = value[key]
        else:
            value[key] = mutate(value[key], rng)
        return value
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        changes = [value.double(), value.long(), value[None], value.flatten()[:1], value * 1e30]
        changes += [value / 0, -value, value.expand(2, *value.shape), value.flatten()[:0]]
        return rng.choice(changes)
    return rng.choice(NASTY)


def outcome(main, parse_args, *flags):
    """How a script would end: 0, or with one line, 1; for a bug in a traceback."""
    try:
        main(parse_args([*map(str, flags), "--device=cpu"]))
    except (InputError, OSError, FloatingPointError) as error:
        assert 10 < len(str(error)) < 1_000 and "\x1b" not in str(error)
        return 1
    except SystemExit as stop:  # settings that are refused by the flags' own parser
        return stop.code
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_spoilt_checkpoint_is_refused_or_works(
    stopped, small_data_dir, tmp_path, monkeypatch, seed, capsys
):
    for name in ("log_results", "hardest_figure", "confusion_figure", "mistakes_figure"):
        monkeypatch.setattr(script, name, lambda *_: None, raising=False)
        monkeypatch.setattr(evaluate, name, lambda *_: None)
    monkeypatch.setattr(evaluate, "save_picture", lambda *_: None)
    monkeypatch.setattr(script.SummaryWriter, "add_figure", lambda *_: None)
    rng, ends = random.Random(seed), []
    good = (stopped / "last.pt").read_bytes()
    for i in range(100):
        run_dir = tmp_path / f"copy{i}"
        run_dir.mkdir()
        path = run_dir / "last.pt"
        path.write_bytes(good)
        if i % 4:
            last = torch.load(path, weights_only=True)
            mutate(last, rng)
            torch.save(last, path)
        else:
            content = bytearray(good)
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content[: rng.choice([None, rng.randrange(len(content))])])
        before = contents(tmp_path)
        data = f"--data-dir={small_data_dir}"
        ends.append(outcome(evaluate.main, evaluate.parse_args, f"--checkpoint={path}", data))
        ends.append(outcome(script.main, script.parse_args, f"--resume={run_dir}", data))
        after = contents(tmp_path)
        assert all(path.is_relative_to(run_dir) for path in after.keys() - before.keys())
        assert all(after[p] == before[p] for p in before if not p.is_relative_to(run_dir))
        shutil.rmtree(run_dir)
    assert {0, 1} <= set(ends) <= {0, 1, 2} and ends.count(1) > 60
