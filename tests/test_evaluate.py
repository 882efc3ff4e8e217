"""Evaluating a checkpoint on the test set."""

import numpy as np
import pytest
import torch
from conftest import CPU, one_line, write_mnist
from PIL import Image
from torch.utils.data import TensorDataset

from dataset import MNISTDataset
from evaluate import load_model, newest_checkpoint, predict, report
from model import build_model
from utils import UserError, confusion_matrix, draw_mistakes, load_checkpoint, save_checkpoint


def test_predict_keeps_the_order_and_changes_no_weights():
    torch.manual_seed(0)
    model = build_model("cnn", classes=10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = torch.rand(1_010, 1, 28, 28), torch.arange(1_010) % 10
    logits, returned_labels = predict(model, TensorDataset(images, labels), CPU)
    assert torch.equal(returned_labels, labels)
    torch.testing.assert_close(logits, model.eval()(images).detach(), atol=1e-5, rtol=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # batch norm's averages above all


# Three classes; predicted 0, 1, 1, 2, 0 where 0, 1, 2, 2, 1 would be right.
LABELS = torch.tensor([0, 1, 2, 2, 1])
LOGITS = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0]])


def test_the_report_matches_a_count_by_hand(capsys):
    assert confusion_matrix(LOGITS, LABELS).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    report(LOGITS, LABELS)
    lines = capsys.readouterr().out.splitlines()
    right, wrong = 0.2395448, 2.2395448  # -log(e²/(e²+2)) and -log(1/(e²+2))
    assert any(f"{(3 * right + 2 * wrong) / 5:.4f}" in line for line in lines)
    assert lines[-1] == "Test accuracy: 60.00% (2 of 5 wrong)"
    assert ["2", "2", "1", "50.00%"] in [line.split() for line in lines]


def test_mistakes_are_shown_most_confident_first(tmp_path):
    """Each image is as grey as its number: 2 and 4 are wrong, and 4 is the more confident."""
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 28, 28) / 5
    logits = LOGITS.clone()
    logits[4, 0] = 9
    figure = draw_mistakes(TensorDataset(images, LABELS), logits, LABELS)
    figure.savefig(tmp_path / "mistakes.png")
    pixels = np.asarray(Image.open(tmp_path / "mistakes.png").convert("RGB"), dtype=int)
    greys = [round(255 * (1 - i / 5)) for i in range(5)]
    columns = {i: np.nonzero((abs(pixels - greys[i]) < 2).all(axis=2))[1] for i in (1, 2, 3, 4)}
    assert len(columns[4]) > 1_000 and len(columns[2]) > 1_000
    assert len(columns[1]) < 200 and len(columns[3]) < 200  # these were right
    assert columns[4].mean() < columns[2].mean()


def test_the_printed_accuracy_matches_a_count_by_hand(run_here, trained, small_data_dir):
    result = run_here(
        "evaluate.py", f"--checkpoint={trained}/best.pt", "--data-dir", small_data_dir
    )
    assert result.returncode == 0 and result.stderr == ""
    model, _ = load_model(trained / "best.pt")
    test_set = MNISTDataset(small_data_dir, "test")
    wrong = sum(model(image[None]).argmax().item() != label for image, label in test_set)
    line = f"Test accuracy: {100 - wrong / 5:.2f}% ({wrong} of 500 wrong)"
    assert result.stdout.splitlines()[-1] == line
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(trained / f"best-{name}") as picture:
            assert min(picture.size) >= 100 and len(picture.getcolors(1 << 24)) > 10


def test_a_perfect_score_and_a_missing_class_can_be_reported(
    run_here, trained, tmp_path, small_data_dir
):
    """A test set of sevens, and a model that always says seven."""
    checkpoint = load_checkpoint(trained / "best.pt")
    checkpoint["weights"]["classifier.bias"][7] = 1e6
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    test_set = MNISTDataset(small_data_dir, "test")
    sevens = test_set.labels == 7
    write_mnist(tmp_path, test_set.images[sevens, 0], test_set.labels[sevens])
    result = run_here("evaluate.py", "--checkpoint=best.pt", f"--data-dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert f"Test accuracy: 100.00% (0 of {sevens.sum()} wrong)" in result.stdout
    assert "8 classes" in result.stdout  # that's not what the model was trained on


def test_data_with_more_classes_than_the_model_is_refused(run_here, trained, tmp_path):
    write_mnist(tmp_path, np.zeros((3, 28, 28)), [0, 1, 25])
    flags = (f"--checkpoint={trained}/best.pt", f"--data-dir={tmp_path}")
    one_line(run_here("evaluate.py", *flags), 1, "26 classes")


def test_evaluation_goes_on_when_pictures_cannot_be_saved(
    run_here, trained, tmp_path, small_data_dir
):
    save_checkpoint(tmp_path / "best.pt", load_checkpoint(trained / "best.pt"))
    for name in ("best-confusion.png", "best-mistakes.png"):
        (tmp_path / name).mkdir()  # nothing can be written under this name
    result = run_here("evaluate.py", "--checkpoint=best.pt", f"--data-dir={small_data_dir}")
    assert result.returncode == 0 and len(result.stderr.splitlines()) == 2
    assert "Test accuracy" in result.stdout


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


def test_without_a_trained_model_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.ROOT", tmp_path)
    with pytest.raises(UserError, match="python .*train.py"):
        newest_checkpoint()
