"""examples/photos.py learns the user's own photos, and says in a line what is wrong with them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image

from examples import photos

KINDS = ("checks", "disc", "stripes")


@pytest.fixture(scope="module", autouse=True)
def small():
    """Small images, for time; and with those a second thread would wait more than work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "SIZE", 32)
        yield
    torch.set_num_threads(threads)


def draw(kind, rng):
    """A photo (H, W, 3) uint8: two random colours in a pattern, somewhere, turned, with noise."""
    height, width = rng.integers(80, 120, 2)
    y, x = np.mgrid[:height, :width]
    x, y = x - rng.uniform(0.3, 0.7) * width, y - rng.uniform(0.3, 0.7) * height
    angle, wave = rng.uniform(0, np.pi), 2 * np.pi / rng.uniform(24, 44)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    pattern = {
        "checks": np.sin(wave * along) * np.sin(wave * across),
        "disc": np.hypot(x, y) - rng.uniform(25, 40),
        "stripes": np.sin(wave * along),
    }[kind]
    colour = rng.uniform(0, 255, 3)
    photo = np.where(pattern[:, :, None] > 0, colour, (colour + 128) % 256)
    return (photo + rng.normal(0, 12, photo.shape)).clip(0, 255).astype(np.uint8)


def write(folder, count, seed=0, kinds=KINDS):
    """Write photos of each kind; gives mean colours (N, 3) and labels (N,)."""
    rng, means, labels = np.random.default_rng(seed), [], []
    for label, kind in enumerate(kinds):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            photo = draw(kind, rng)
            Image.fromarray(photo).save(folder / kind / f"{i}.jpg")
            means.append(photo.mean(axis=(0, 1)))
            labels.append(label)
    return np.array(means), np.array(labels)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A folder that was trained on in small, with two files that are no photos; what it printed."""
    folder = tmp_path_factory.mktemp("photos") / "my.photos"
    write(folder, 90)
    cut = (folder / "disc" / "0.jpg").read_bytes()[:2_000]
    (folder / "disc" / "cut.jpg").write_bytes(cut)
    (folder / "stripes" / "notes.txt").write_text("no photo")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *parts, **_: lines.append(" ".join(parts)))
        photos.train(photos.parse_args([str(folder), "--no-pretrained", "--epochs=6"]))
    return folder, lines


def test_mean_colours_do_not_tell_these_photos_apart(tmp_path):
    """Else the next test would show little."""
    (means, labels), (new, truth) = (write(tmp_path / str(i), 200, i) for i in range(2))
    design, new = (np.c_[m, m**2, np.ones(len(m))] for m in (means / 255, new / 255))
    weights = np.linalg.lstsq(design, np.eye(3)[labels], rcond=None)[0]
    assert ((new @ weights).argmax(axis=1) == truth).mean() < 0.45


def test_it_learns_from_random_weights_and_leaves_out_what_is_no_photo(learnt):
    folder, lines = learnt
    for line, path in zip(lines, ("disc/cut.jpg", "stripes/notes.txt"), strict=False):
        assert line.startswith(f"Left out: {folder / path}: this can't be read")
    training, held_out = map(int, re.findall(r"^(\d+) photos .*, (\d+) held out", lines[2])[0])
    assert training + held_out == 270 and 30 < held_out < 80
    assert lines[2].endswith("checks, disc, stripes")
    assert [line.split(":")[0] for line in lines[3:-1]] == [f"epoch {i}" for i in range(1, 7)]
    assert float(re.search(r"validation ([\d.]+)%", lines[-2])[1]) > 60  # by chance 33
    assert lines[-1] == f"Saved {folder}.pt"


def test_other_programs_refuse_its_checkpoint(learnt, run_here):
    """They would scale photos to another size, and give wrong answers."""
    flags = [f"--checkpoint={learnt[0]}.pt", f"--data-dir={learnt[0]}"]
    one_line(run_here("evaluate.py", *flags), 1, "no model 'photos'")


def test_no_epochs_are_refused(run_here):
    one_line(run_here("examples/photos.py", "photos", "--epochs=0"), 2, "--epochs: use 1 or more")


def test_new_photos_are_called_by_their_names(learnt, tmp_path, capsys):
    write(tmp_path / "new", 12, seed=1)
    paths = sorted((tmp_path / "new").glob("*/*.jpg"))
    photos.classify(photos.parse_args([str(learnt[0]), *map(str, paths)]))
    lines = capsys.readouterr().out.splitlines()
    answers = [re.fullmatch(r"(.+): '(\w+)' \(([\d.]+)%\)", line).groups() for line in lines]
    assert [answer[0] for answer in answers] == [str(path) for path in paths]
    kinds = [path.parent.name for path in paths]
    assert np.mean(np.array(kinds) == [name for _, name, _ in answers]) > 0.6
    assert all(33 < float(percent) <= 100 for _, _, percent in answers)


def test_a_photo_stays_in_its_part_when_others_come(tmp_path):
    folder, before = tmp_path / "photos", []
    write(folder, 10)
    for part in (False, True):
        before.append({path for path, _ in photos.read_folder(folder, part).samples})
    for kind in KINDS:
        shutil.copytree(folder / kind, folder / kind / "more")
        for i, path in enumerate((folder / kind / "more").iterdir()):
            path.rename(folder / kind / f"new-{i}.jpg")
    training, held_out = (
        {path for path, _ in photos.read_folder(folder, part).samples} for part in (False, True)
    )
    assert before[0] < training and before[1] < held_out
    assert not training & held_out and len(training | held_out) == 60


@pytest.mark.slow
def test_training_again_gives_the_same_weights(tmp_path):
    write(tmp_path / "photos", 8)
    weights = []
    for _ in range(2):
        args = photos.parse_args([str(tmp_path / "photos"), "--no-pretrained", "--epochs=1"])
        photos.train(args)
        checkpoint = torch.load(tmp_path / "photos.pt", weights_only=True)
        weights.append(checkpoint["weights"]["head.weight"])
    assert weights[0].equal(weights[1])


def take_away(folder):
    shutil.rmtree(folder)


def empty_a_class(folder):
    for path in (folder / "disc").iterdir():
        path.write_bytes(b"")


def leave_one_class(folder):
    shutil.rmtree(folder / "disc")


def take_away_the_held_out(folder):
    for path, _ in photos.read_folder(folder, held_out=True).samples:
        Path(path).unlink()


@pytest.mark.parametrize(
    "spoil, part",
    [
        (take_away, "No such file or directory: 'photos'"),
        (empty_a_class, "photos lacks a photo to train on in disc"),
        (leave_one_class, "photos lacks two kinds"),
        (take_away_the_held_out, "one photo in five is held out"),
    ],
)
def test_a_folder_that_will_not_do_is_told_in_one_line(run_here, tmp_path, spoil, part):
    write(tmp_path / "photos", 10, kinds=("disc", "stripes"))
    spoil(tmp_path / "photos")
    one_line(run_here("examples/photos.py", "photos", "--no-pretrained"), 1, part)
    assert not (tmp_path / "photos.pt").exists()


def test_new_photos_that_cannot_be_told_end_in_one_line(run_here, learnt, trained, tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "new.jpg")
    (tmp_path / "bad.jpg").write_text("no photo")
    one_line(
        run_here("examples/photos.py", "photos", "new.jpg"),
        1,
        "No such file or directory: 'photos.pt'",
    )
    for content in (b"PK", (trained / "best.pt").read_bytes()):  # damaged; of train.py
        (tmp_path / "photos.pt").write_bytes(content)
        one_line(run_here("examples/photos.py", "photos", "new.jpg"), 1)
    shutil.copy(f"{learnt[0]}.pt", tmp_path / "photos.pt")
    assert run_here("examples/photos.py", "photos", "new.jpg").returncode == 0
    one_line(run_here("examples/photos.py", "photos", "bad.jpg"), 1, "bad.jpg: this can't be read")
    one_line(run_here("examples/photos.py", "photos", "gone.jpg"), 1, "gone.jpg: this can't")


def test_no_network_is_told_in_one_line(run_here, offline, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    write(tmp_path / "photos", 10, kinds=("disc", "stripes"))
    one_line(run_here("examples/photos.py", "photos"), 1, "use --no-pretrained")


def test_it_runs_as_the_readme_says(checkout):
    command = [sys.executable, "-m", "examples.photos", "missing"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    one_line(result, 1, "missing")
