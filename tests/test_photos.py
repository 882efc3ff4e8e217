"""examples/photos.py learns from people's own photos, however untidy their folders."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import utils
from examples import photos

COLOURS = {"cat": (230, 60, 60), "dog": (60, 60, 230)}


def write(folder, **counts):
    """Write photos of several sizes, with a colour per class and a lot of noise."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            photo = rng.normal(0, 40, (*rng.integers(60, 100, 2), 3)) + COLOURS[name]
            Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.jpg")
    return folder


def start(*flags):
    photos.main(photos.parse_args([*map(str, flags), "--no-pretrained"]))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A folder that a network was trained on, with files in it that aren't photos."""
    folder = write(tmp_path_factory.mktemp("photos") / "my.photos", cat=12, dog=12)
    (folder / "dog" / "cut.jpg").write_bytes((folder / "dog" / "0.jpg").read_bytes()[:500])
    (folder / "dog" / "notes.txt").write_text("not a photo")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(parts)))
        patch.setattr(photos.tqdm, "write", lines.append)
        start(folder, "--epochs=2", "--lr=0.002")
    return folder, "\n".join(lines)


@pytest.fixture
def untrained(monkeypatch):
    """Skip the training, for tests of everything around it."""
    monkeypatch.setattr(photos, "train_epoch", lambda *_: (torch.zeros(1), 0.0))


def test_it_learns_and_leaves_out_what_cannot_be_read(learnt):
    folder, output = learnt
    assert "cut.jpg" in output and "notes.txt" in output
    assert f"{folder}.pt got 100.0%" in output
    with Image.open(folder.with_name("my.photos-mistakes.png")) as picture:
        assert picture.width > 500


def test_a_missing_file_does_not_stop_other_photos_being_classified(learnt, tmp_path, capsys):
    write(tmp_path, cat=1, dog=1)
    cat, dog, missing = tmp_path / "cat" / "0.jpg", tmp_path / "dog" / "0.jpg", tmp_path / "no.jpg"
    with pytest.raises(utils.UserError, match="1 of 3"):
        start(learnt[0], cat, missing, dog)
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith(f"{cat}: cat (") and second.startswith(f"{dog}: dog (")
    assert str(missing) in err


def test_evaluate_refuses_a_photo_network_and_photos_refuses_any_other(learnt, tmp_path):
    from evaluate import load_model

    with pytest.raises(utils.UserError, match="photos"):
        load_model(Path(f"{learnt[0]}.pt"))
    utils.save_checkpoint(tmp_path / "photos.pt", {"model": "cnn", "classes": 10, "epoch": 1})
    with pytest.raises(utils.UserError, match="wasn't made by this program"):
        start(tmp_path / "photos", tmp_path / "new.jpg")


def counts(output):
    """How many photos of each class the program trains on, and holds out."""
    words = [line.split() for line in output.splitlines() if line.endswith(" held out")]
    return {name.strip(":"): (int(first), int(second)) for name, first, *_, second, _, _ in words}


@pytest.mark.usefixtures("untrained")
def test_hidden_folders_are_not_classes_and_hidden_files_are_not_photos(tmp_path, capsys):
    folder = write(tmp_path / "photos", cat=3, dog=3)
    for hidden in (".ipynb_checkpoints", "__MACOSX", "cat/.ipynb_checkpoints"):
        (folder / hidden).mkdir()
        (folder / hidden / "1.jpg").write_bytes((folder / "cat" / "1.jpg").read_bytes())
    (folder / "dog" / "._1.jpg").write_bytes(b"not a photo")
    start(folder, "--epochs=1")
    output = capsys.readouterr().out
    assert {name: sum(parts) for name, parts in counts(output).items()} == {"cat": 3, "dog": 3}
    assert "Skipped" not in output


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", ["val", "valid", "test", "Validation"])
def test_photos_already_split_stay_that_way(tmp_path, capsys, name):
    write(tmp_path / "photos" / "train", cat=3, dog=2)
    write(tmp_path / "photos" / name, cat=1, dog=2)
    start(tmp_path / "photos", "--epochs=1")
    assert counts(capsys.readouterr().out) == {"cat": (3, 1), "dog": (2, 2)}


@pytest.mark.usefixtures("untrained")
def test_a_contests_test_photos_without_classes_are_left_alone(tmp_path, capsys):
    write(tmp_path / "photos" / "train", cat=3, dog=3)
    write(tmp_path / "photos", cat=2)
    (tmp_path / "photos" / "cat").rename(tmp_path / "photos" / "test")
    start(tmp_path / "photos", "--epochs=1")
    found = counts(capsys.readouterr().out)
    assert {name: sum(parts) for name, parts in found.items()} == {"cat": 3, "dog": 3}


def test_a_fifth_is_held_out_in_each_class_and_adding_photos_moves_at_most_one():
    moved = 0
    for case in range(100):
        few = {Path(f"photos/cat/{case}-{i}.jpg"): i for i in range(2 + case % 9)}
        many = few | {Path(f"photos/cat/{case}-{i}.jpg"): i for i in range(len(few), 100)}
        (training, held_out), (training_later, held_out_later) = map(photos.hold_out, (few, many))
        assert training and held_out and sorted(training + held_out) == list(range(len(few)))
        assert 5 <= len(held_out_later) <= 35
        changed = set(training) & set(held_out_later) | set(held_out) & set(training_later)
        assert len(changed) <= 1
        moved += len(changed)
        (_, held_out_again) = photos.hold_out(dict(reversed(many.items())))
        assert held_out_again == held_out_later
        more = many | {Path(f"photos/cat/{case}-{i}.jpg"): i for i in range(100, 200)}
        assert set(held_out_later) <= set(photos.hold_out(more)[1])
    assert moved < 40


@pytest.mark.parametrize(
    "kinds, part",
    [
        ({}, "isn't a folder"),
        ({"cat": 2}, "at least two"),
        ({"cat": 3, "dog": 1}, "dog needs at least 1"),
    ],
)
def test_what_a_folder_lacks_is_named(tmp_path, kinds, part):
    write(tmp_path / "photos", **kinds)
    with pytest.raises(utils.UserError, match=part):
        start(tmp_path / "photos")


def test_transparent_pictures_are_laid_on_white(tmp_path):
    Image.new("RGBA", (80, 60), (0, 0, 0, 0)).save(tmp_path / "logo.png")
    assert photos.read_photo(tmp_path / "logo.png").eq(255).all()


def test_the_saved_network_is_that_of_the_best_epoch(tmp_path, monkeypatch):
    epochs, answers = iter([1, 2, 3]), {1: [0, 0], 2: [0, 1], 3: [1, 0]}

    def train_epoch(model, *_):
        torch.nn.init.constant_(model.head.bias, next(epochs))
        return torch.zeros(1), 0.0

    def predict(model, *_):
        epoch = int(model.head.bias[0])
        return torch.eye(2)[answers[epoch]], torch.tensor([0, 1])

    monkeypatch.setattr(photos, "train_epoch", train_epoch)
    monkeypatch.setattr(photos, "predict", predict)
    start(write(tmp_path / "photos", cat=2, dog=2), "--epochs=3")
    checkpoint = utils.load_checkpoint(tmp_path / "photos.pt")
    assert checkpoint["epoch"] == 2 and checkpoint["weights"]["head.bias"].tolist() == [2, 2]


def test_the_mistakes_are_shown_with_the_predicted_class():
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    samples = [(torch.rand(3, 128, 128), label) for label in (0, 1, 1)]
    (axes,) = photos.mistakes_figure(["cat", "dog"], samples, logits).axes
    assert axes.get_title().startswith("1 of 3")
    assert [text.get_text() for text in axes.texts] == ["dog as cat, 100%"]
    shown = torch.as_tensor(axes.images[0].get_array())  # in the photo's own colours
    assert torch.allclose(shown, samples[1][0].movedim(0, 2), atol=0.01)


@pytest.mark.usefixtures("untrained")
def test_where_the_network_is_saved(tmp_path, monkeypatch):
    folder = write(tmp_path / "photos", cat=2, dog=2)
    monkeypatch.setattr(photos, "read_photos", None)  # it stops before it reads photos
    with pytest.raises(utils.UserError, match="Can't write to .*missing.*--output"):
        start(folder, f"--output={tmp_path / 'missing' / 'photos.pt'}")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert photos.parse_args(["."]).output == tmp_path / "photos.pt"
    assert photos.parse_args([".", f"--output={folder}"]).output == folder / "photos.pt"
    assert photos.parse_args([".", "--output=a.pt", "new.jpg"]).photos == [Path("new.jpg")]


@pytest.mark.slow
def test_examples_also_run_as_scripts(tmp_path):
    """One interpreter for both, because importing torch takes seconds."""
    code = """if True:
        import runpy, sys
        path = sys.path[:]
        for script in sys.argv[1:]:
            for ours in ("utils", "dataset", "model", "evaluate", "train", "examples"):
                sys.modules.pop(ours, None)
            sys.path[:] = [script.rpartition("/")[0], *path]  # as python does with a file
            runpy.run_path(script)
    """
    scripts = [str(ROOT / "examples" / name) for name in ("photos.py", "look_inside.py")]
    command = [sys.executable, "-P", "-c", code, *scripts]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": ""})
