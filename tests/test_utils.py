"""Checkpoints: saved whole or not at all; damaged, foreign and hostile ones are refused."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import contents, one_line

from utils import load_checkpoint, save_checkpoint, setup_distributed, short

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
    "folder": (lambda path: (path.unlink(), path.mkdir()), "directory"),
    "missing": (lambda path: path.unlink(), "No such file"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "another project"),
    "another project": (lambda path: torch.save({"arch": "cnn"}, path), "another project"),
    "older format": (edit(format=1), "version"),
    "other weights": (edit(weights={"layer": torch.zeros(3)}), "does not fit"),
    "lacking": (lambda path: torch.save({"format": 2, "model": "cnn"}, path), "lacks"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("script", ["evaluate.py", "train.py"])
def test_a_bad_checkpoint_gives_a_line_of_its_own_and_runs_no_code(
    run_here, trained, small_data_dir, tmp_path, script, kind
):
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    torch.save(torch.load(trained / "last.pt", weights_only=True) | {"epoch": 1}, path)
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


def test_auto_chooses_a_device_that_can_compute():
    device, rank, world_size = setup_distributed("auto")
    assert torch.ones(2, device=device).sum().item() == 2
    assert (rank, world_size) == (0, 1)


def test_paths_are_shown_as_a_person_would_type_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short(tmp_path / "checkpoints" / "best.pt") == str(Path("checkpoints", "best.pt"))
    assert short(tmp_path.parent) == str(tmp_path.parent)
