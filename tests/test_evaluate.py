"""Measuring on the test set, and reading pictures."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU, one_line, write_mnist
from PIL import Image, ImageOps
from torch.utils.data import TensorDataset

from dataset import MNISTDataset, read_digit
from evaluate import confusion_matrix, mistakes_figure, predict, report
from model import build_model
from utils import load_checkpoint, save_checkpoint


def test_predict_keeps_the_order_and_leaves_the_model_as_it_is():
    torch.manual_seed(0)
    model = build_model("cnn", classes=10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = torch.rand(1_010, 1, 28, 28), torch.arange(1_010) % 10
    logits, returned_labels = predict(model, TensorDataset(images, labels), CPU)
    assert torch.equal(returned_labels, labels)
    torch.testing.assert_close(logits, model.eval()(images).detach(), atol=1e-5, rtol=1e-4)
    assert not logits.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # batch norm's averages above all


# Three classes; predicted 0, 1, 1, 2, 0 where 0, 1, 2, 2, 1 would be right.
LABELS = torch.tensor([0, 1, 2, 2, 1])
LOGITS = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0]])


def test_the_report_equals_a_count_by_hand(capsys):
    assert confusion_matrix(LOGITS, LABELS).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    report(LOGITS, LABELS)
    lines = capsys.readouterr().out.splitlines()
    right, wrong = 0.2395448, 2.2395448  # -log(e²/(e²+2)) and -log(1/(e²+2))
    assert f"Loss (cross-entropy): {(3 * right + 2 * wrong) / 5:.4f}" in lines
    assert lines[-1] == "Test accuracy: 60.00% (2 of 5 wrong)"
    assert ["2", "2", "1", "50.00%"] in [line.split() for line in lines]


def drawn(figure, path):
    """The pixels of a figure, (H, W, 3)."""
    figure.savefig(path)
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def test_the_mistakes_are_shown_the_most_confident_first(tmp_path):
    """Each in ink as dark as its number: 2 and 4 are wrong, and 4 is the more confident."""
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 28, 28) / 5
    logits = LOGITS.clone()
    logits[4, 0] = 9
    pixels = drawn(
        mistakes_figure(TensorDataset(images, LABELS), logits, LABELS), tmp_path / "m.png"
    )
    greys = [round(255 * (1 - i / 5)) for i in range(5)]
    columns = {i: np.nonzero((abs(pixels - greys[i]) < 2).all(axis=2))[1] for i in (1, 2, 3, 4)}
    assert len(columns[4]) > 1_000 and len(columns[2]) > 1_000
    assert len(columns[1]) < 100 and len(columns[3]) < 100
    assert columns[4].mean() < columns[2].mean()


def test_the_printed_accuracy_equals_a_count_by_hand(run_here, trained, small_data_dir):
    """From a checkpoint of another process, image by image."""
    result = run_here(
        "evaluate.py", f"--checkpoint={trained}/best.pt", "--data-dir", small_data_dir
    )
    assert result.returncode == 0 and result.stderr == ""
    model = build_model("cnn", classes=10)
    model.load_state_dict(load_checkpoint(trained / "best.pt")["weights"])
    model.eval()
    test_set = MNISTDataset(small_data_dir, "test")
    wrong = sum(model(image[None]).argmax().item() != label for image, label in test_set)
    line = f"Test accuracy: {100 - wrong / 5:.2f}% ({wrong} of 500 wrong)"
    assert result.stdout.splitlines()[-1] == line
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(trained / f"best-{name}") as picture:
            assert min(picture.size) >= 100 and len(picture.getcolors(1 << 24)) > 10


def test_no_mistakes_at_all(run_here, trained, tmp_path, small_data_dir):
    """A test set of the only digit that the model was made to say."""
    checkpoint = load_checkpoint(trained / "best.pt")
    checkpoint["weights"]["classifier.bias"][7] = 1e6
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    test_set = MNISTDataset(small_data_dir, "test")
    sevens = test_set.labels == 7
    write_mnist(tmp_path, test_set.images[sevens, 0], test_set.labels[sevens])
    result = run_here("evaluate.py", "--checkpoint=best.pt", f"--data-dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert f"Test accuracy: 100.00% (0 of {sevens.sum()} wrong)" in result.stdout
    assert (tmp_path / "best-mistakes.png").is_file()


def test_more_classes_than_the_model_has(run_here, trained, tmp_path):
    write_mnist(tmp_path, np.zeros((3, 28, 28)), [0, 1, 25])
    flags = (f"--checkpoint={trained}/best.pt", f"--data-dir={tmp_path}")
    one_line(run_here("evaluate.py", *flags), 1, "26 classes")


@pytest.mark.parametrize(
    "flags, status, part",
    [
        ("--checkpoint {empty}/best.pt", 1, "best.pt"),
        ("--device tpu", 2, "--device"),
        ("--data-dir {empty} --checkpoint {trained}/best.pt", 1, "--data-dir"),
        ("--epochs 3", 2, "--epochs"),
    ],
)
def test_bad_input_gives_one_line(run_here, trained, tmp_path, offline, flags, status, part):
    (tmp_path / "empty").mkdir()
    flags = flags.format(empty=tmp_path / "empty", trained=trained)
    one_line(run_here("evaluate.py", *flags.split()), status, part)


# Pictures


def enlarged(image):
    """An MNIST image (1, 28, 28) uint8 as black ink on white paper."""
    return ImageOps.invert(Image.fromarray(image[0].numpy())).resize((224, 224))


def test_it_names_the_digits_and_shows_what_it_saw(run_here, trained, small_data_dir, tmp_path):
    images = MNISTDataset(small_data_dir, "test").images
    save_checkpoint(tmp_path / "best.pt", load_checkpoint(trained / "best.pt"))
    for i in range(2):
        enlarged(images[i]).save(tmp_path / f"digit {i}.png")
    result = run_here("evaluate.py", "digit 0.png", "digit 1.png", "--checkpoint=best.pt")
    assert result.returncode == 0 and result.stderr == ""
    model = build_model("cnn", classes=10)
    model.load_state_dict(load_checkpoint(tmp_path / "best.pt")["weights"])
    seen = torch.stack([read_digit(tmp_path / f"digit {i}.png") for i in range(2)])
    for i, row in enumerate(model.eval()(seen).softmax(dim=1)):
        (first, second), (digit, other) = (best.tolist() for best in row.topk(2))
        line = f"digit {i}.png: {digit} ({first:.1%}), then {other} ({second:.1%})"
        assert line in result.stdout.splitlines()
    with Image.open(tmp_path / "best-predictions.png") as picture:
        assert min(picture.size) >= 200 and len(picture.getcolors(1 << 24)) > 10


def test_a_file_that_cannot_be_read_gets_one_line_and_the_others_are_done(
    run_here, trained, small_data_dir, tmp_path
):
    save_checkpoint(tmp_path / "best.pt", load_checkpoint(trained / "best.pt"))
    enlarged(MNISTDataset(small_data_dir, "test").images[0]).save(tmp_path / "good.png")
    Image.new("L", (300, 200), 250).save(tmp_path / "empty.png")
    noise = np.random.default_rng(0).normal(230, 8, (300, 300)).clip(0, 255)
    Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "noise.png")
    Image.new("RGBA", (100, 100)).save(tmp_path / "transparent.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("seven")
    (tmp_path / "nothing.png").touch()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n"
    (tmp_path / "program.eps").write_bytes(program)
    if hasattr(os, "mkfifo"):  # Windows has none
        os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    expected = {
        "empty.png": "the page is empty",
        "noise.png": "the page is empty",
        "transparent.png": "the page is empty",
        "huge.png": "scale it down",
        "bomb.png": "scale it down",
        "cut.png": "not an image",
        "program.eps": "not an image",
        "text.png": "not an image",
        "nothing.png": "not an image",
        "folder.png": "no file",
        "pipe.png": "no file" if hasattr(os, "mkfifo") else "No such file",
        "missing.png": "No such file",
    }
    result = run_here("evaluate.py", *expected, "good.png", "--checkpoint=best.pt")
    assert result.returncode == 1
    *lines, last = result.stderr.splitlines()
    assert last.startswith(f"{len(expected)} of {len(expected) + 1} ")
    for line, (name, part) in zip(lines, expected.items(), strict=True):
        assert line.startswith(name) and part in line
    assert re.search(r"^good\.png: \d \(", result.stdout, re.MULTILINE)
    assert (tmp_path / "best-predictions.png").is_file()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_picture_of_the_user_s_is_never_written_over(run_here, trained, tmp_path, small_data_dir):
    save_checkpoint(tmp_path / "best.pt", load_checkpoint(trained / "best.pt"))
    picture = tmp_path / "predictions.png"
    enlarged(MNISTDataset(small_data_dir, "test").images[0]).save(picture)
    answers, other = tmp_path / "best-predictions.png", tmp_path / "other.png"
    shutil.copy(picture, other)
    answers.symlink_to(other)
    before = picture.read_bytes()
    assert run_here("evaluate.py", picture, "--checkpoint=best.pt").returncode == 0
    assert picture.read_bytes() == other.read_bytes() == before
    shutil.copy(picture, answers)
    one_line(run_here("evaluate.py", answers, "--checkpoint=best.pt"), 1, "rename it")
    assert answers.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows forbids such names")
def test_many_pictures_with_names_of_all_kinds(run_here, trained, tmp_path, small_data_dir):
    save_checkpoint(tmp_path / "best.pt", load_checkpoint(trained / "best.pt"))
    image = enlarged(MNISTDataset(small_data_dir, "test").images[0])
    names = ["$x_1$.png", "数字.png", "\x1b[31mred\n.png", os.fsdecode(b"\xff.png"), "-7.png"]
    names += [f"{i}.png" for i in range(35)]
    for name in names:
        image.save(tmp_path / name)
    result = run_here("evaluate.py", "--checkpoint=best.pt", "--", *names)
    assert result.returncode == 0 and result.stderr == ""
    assert len(re.findall(r": \d \(", result.stdout)) == len(names) == 40
    assert "\x1b" not in result.stdout and "数字.png: " in result.stdout


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_spoilt_pictures_get_a_line_each(run_here, trained, tmp_path, small_data_dir, seed):
    save_checkpoint(tmp_path / "best.pt", load_checkpoint(trained / "best.pt"))
    image = enlarged(MNISTDataset(small_data_dir, "test").images[0])
    rng, names = np.random.default_rng(seed), []
    for kind in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm", "pdf"):
        image.save(tmp_path / f"good.{kind}")
        content = np.fromfile(tmp_path / f"good.{kind}", dtype=np.uint8)
        for i in range(15):
            spoilt = content.copy()
            where = rng.integers(0, [60, len(content)][i % 2], 3)  # in the header, or anywhere
            spoilt[where] = rng.integers(0, 256, 3)
            names.append(f"{i}.{kind}")
            end = rng.integers(1, len(content) + 1) if i % 3 == 0 else None
            spoilt[:end].tofile(tmp_path / names[-1])
    result = run_here("evaluate.py", "--checkpoint=best.pt", *names)
    *lines, last = result.stderr.splitlines()
    assert result.returncode == 1 and "could not be read" in last
    answers = re.findall(r"^\d+\.\w+: \d \(", result.stdout, re.MULTILINE)
    assert len(lines) + len(answers) == len(names) and len(answers) > 10
    assert all(re.match(r"\d+\.\w+: ", line) for line in lines)
