from pathlib import Path

import pytest
import torch

from utils import earlier_checkpoints, load_checkpoint, save_checkpoint, short

MODELS = ("cnn", "other")
CHECKPOINT = {"model": "cnn", "weights": {}, "epoch": 1, "config": {}}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    weights = {"layer.weight": torch.randn(3, 4)}
    save_checkpoint(tmp_path / "best.pt", CHECKPOINT | {"weights": weights, "epoch": 3})
    loaded = load_checkpoint(tmp_path / "best.pt", MODELS)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["weights"]["layer.weight"], weights["layer.weight"])
    assert loaded["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_until_it_is_whole_and_on_the_disk_a_checkpoint_has_another_name(tmp_path, monkeypatch):
    path = tmp_path / "best.pt"
    save_checkpoint(path, CHECKPOINT)
    seen = []

    def fsync(descriptor):
        epoch = load_checkpoint(path, MODELS)["epoch"]  # the old one, while the new is written
        (other,) = set(tmp_path.iterdir()) - {path}
        seen.append((epoch, load_checkpoint(other, MODELS)["epoch"]))  # flushed already

    monkeypatch.setattr("os.fsync", fsync)
    save_checkpoint(path, CHECKPOINT | {"epoch": 2})
    assert seen == [(1, 2)]
    assert load_checkpoint(path, MODELS)["epoch"] == 2


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, CHECKPOINT)
    with pytest.raises((AttributeError, TypeError)):  # a function in a function can't be saved
        save_checkpoint(path, {"epoch": 2, "weights": torch.zeros(1000), "extra": lambda: None})
    assert load_checkpoint(path, MODELS)["epoch"] == 1


def test_earlier_checkpoints_get_names_that_do_not_clash(tmp_path):
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    assert earlier_checkpoints(best, last) == {}
    best.touch()
    ((path, kept),) = earlier_checkpoints(best, last).items()
    assert path == best and kept != best and kept.parent == tmp_path and kept.suffix == ".pt"
    kept.touch()
    ((_, kept_too),) = earlier_checkpoints(best, last).items()
    assert kept_too not in (best, kept)


def test_paths_are_shown_as_a_person_would_type_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short(tmp_path / "checkpoints" / "best.pt") == str(Path("checkpoints", "best.pt"))
    assert short(tmp_path.parent) == str(tmp_path.parent)
