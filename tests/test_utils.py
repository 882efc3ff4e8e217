import os
from pathlib import Path

import pytest
import torch

from utils import choose_device, load_checkpoint, save_checkpoint, short


class Attack:
    """Unpickled by an unwary program, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    weights = {"layer.weight": torch.randn(3, 4)}
    save_checkpoint(tmp_path / "new folder" / "best.pt", {"weights": weights, "epoch": 3})
    loaded = load_checkpoint(tmp_path / "new folder" / "best.pt")
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["weights"]["layer.weight"], weights["layer.weight"])
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["best.pt"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises((AttributeError, TypeError)):  # a function in a function can't be saved
        save_checkpoint(path, {"epoch": 2, "weights": torch.zeros(1000), "extra": lambda: None})
    assert load_checkpoint(path) == {"epoch": 1}


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"weights": Attack(tmp_path / "attacked")}, tmp_path / "best.pt")
    torch.load(tmp_path / "best.pt", weights_only=False)
    assert (tmp_path / "attacked").exists()  # the attack works on those who let it
    (tmp_path / "attacked").rmdir()

    with pytest.raises(Exception, match="mkdir"):
        load_checkpoint(tmp_path / "best.pt")
    assert not (tmp_path / "attacked").exists()


def test_auto_chooses_a_device_that_can_compute():
    device = choose_device("auto")
    assert torch.ones(2, device=device).sum().item() == 2
    assert choose_device("cpu") == torch.device("cpu")


def test_paths_are_shown_as_a_person_would_type_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short(tmp_path / "checkpoints" / "best.pt") == str(Path("checkpoints", "best.pt"))
    assert short(tmp_path.parent) == str(tmp_path.parent)
