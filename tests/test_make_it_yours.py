"""make-it-yours.md and notebooks.md keep their word: each change works on a copy."""

import importlib
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, apply, blocks, changes, write_mnist
from PIL import Image

from dataset import MNISTDataset

PAGE = ROOT / "docs" / "make-it-yours.md"
CHANGES = changes(PAGE)
ONE = "Labels that begin at 1"
QUICK = ("Another task",)  # the others take a while
(NAMES,) = blocks(PAGE, "python")
NOTEBOOK, KAGGLE = blocks(ROOT / "docs" / "notebooks.md", "python")
FLAGS = {
    "Anything else": ["--model=resnet18", "--no-pretrained"],
    "Another model": ["--model=mlp"],
    "A scheduler that steps once per epoch": ["--no-dry-run", "--epochs=2", "--batch-size=128"],
    "Gradient accumulation": ["--batch-size=64"],
    "Early stopping": ["--batch-size=64", "--no-dry-run", "--epochs=40", "--lr=0.005"],
}


@pytest.fixture
def train_copy(copy, small_data_dir, tmp_path):
    """Train with the copy as it is now; gives the last checkpoint, and the bytes of the log."""

    def start(*flags, data_dir=small_data_dir):
        program = importlib.import_module("train")
        folders = [f"--out-dir={tmp_path / 'runs'}", f"--data-dir={data_dir}"]
        flags = [*folders, "--dry-run", "--batch-size=16", *flags]
        run_dir = program.main(program.parse_args(flags))
        checkpoint = torch.load(run_dir / "last.pt", weights_only=True)
        return checkpoint, b"".join(path.read_bytes() for path in run_dir.glob("*/*tfevents*"))

    return start


@pytest.mark.parametrize(
    "title",
    [
        title if title in QUICK else pytest.param(title, marks=pytest.mark.slow)
        for title in CHANGES
        if title != ONE
    ],
)
def test_a_proposed_change_works(title, copy, train_copy, small_data_dir, tmp_path):
    data_dir = small_data_dir
    if title == "Anything else":
        data_dir = tmp_path / "pictures"
        for name in (f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(20)):
            (data_dir / name).parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 30), 50).convert("RGB").save(data_dir / name)
    apply(CHANGES[title], copy)
    last, log = train_copy(*FLAGS.get(title, []), data_dir=data_dir)
    classes = {"Anything else": 2, "Another task": 1}.get(title, 10)
    assert list(last["weights"].values())[-1].shape == (classes,)
    if title == "A scheduler that steps once per epoch":
        assert last["scheduler"]["last_epoch"] == last["epoch"] == 2
    if title == "Early stopping":
        assert last["epoch"] < 40
    assert (b"step/gradient_norm" in log) == (title == "Logging something per step")


def test_fashion_mnist_needs_only_another_folder(train_copy, small_data_dir, tmp_path):
    shutil.copytree(small_data_dir / "MNIST" / "raw", tmp_path / "data" / "FashionMNIST" / "raw")
    assert train_copy(data_dir=tmp_path / "data" / "FashionMNIST" / "raw")[0]["classes"] == 10


def test_labels_that_begin_at_1(copy, train_copy, tmp_path):
    labels = np.arange(520) % 26 + 1
    write_mnist(tmp_path / "letters", np.zeros((520, 28, 28)), labels)
    apply(CHANGES[ONE], copy)
    assert train_copy(data_dir=tmp_path / "letters")[0]["classes"] == 26


def test_the_digit_recognizer_takes_one_short_program(small_data_dir, tmp_path, monkeypatch):
    assert KAGGLE.count("\n") <= 60
    monkeypatch.chdir(tmp_path)
    mnist, test = (MNISTDataset(small_data_dir, split) for split in ("train", "test"))
    pixels = ",".join(f"pixel{i}" for i in range(784))
    rows = np.c_[mnist.labels, mnist.images.flatten(1)]
    np.savetxt("train.csv", rows, "%d", ",", header=f"label,{pixels}", comments="")
    np.savetxt("test.csv", test.images.flatten(1), "%d", ",", header=pixels, comments="")
    exec(KAGGLE.replace("EPOCHS = 10", "EPOCHS = 3"), {})
    lines = (tmp_path / "submission.csv").read_text().splitlines()
    assert lines[0] == "ImageId,Label"
    numbers, digits = np.array([line.split(",") for line in lines[1:]], dtype=int).T
    assert numbers.tolist() == list(range(1, len(test) + 1))
    assert (digits == test.labels.numpy()).mean() > 0.85


def test_names_become_numbers_and_names_again(capsys):
    exec(NAMES, {"torch": torch})
    said = [line.partition("  # ")[2] for line in NAMES.splitlines() if "print(" in line]
    assert capsys.readouterr().out.splitlines() == said


def test_the_calls_from_a_notebook_work(copy, small_data_dir, capsys):
    shutil.copytree(small_data_dir / "MNIST", copy / "data" / "MNIST", dirs_exist_ok=True)
    exec(NOTEBOOK, {})
    assert capsys.readouterr().out.splitlines()[-1] == "1"


def test_a_diff_applies_though_comments_were_reworded(tmp_path):
    diff = "@@ a.py, f @@\n x = 1\n+y = 2\n-z = 3  # old words\n"
    (tmp_path / "a.py").write_text("# title\n\nx = 1  # new\n# and newer\nz = 3  # words\n")
    apply(diff, tmp_path)
    assert (tmp_path / "a.py").read_text() == "# title\n\nx = 1  # new\ny = 2\n# and newer\n"
