import re

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dataset import MNISTDataset
from evaluate import Metrics, measure, predict, report
from model import MODELS, build_model
from utils import load_checkpoint


def test_predict_keeps_the_order_and_leaves_the_model_as_it_is():
    torch.manual_seed(0)
    model = build_model("cnn").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = torch.randn(10, 1, 28, 28), torch.arange(10)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)

    logits, returned_labels = predict(model, loader, torch.device("cpu"))

    assert torch.equal(returned_labels, labels)
    torch.testing.assert_close(logits, model.eval()(images).detach(), atol=1e-5, rtol=1e-4)
    assert not logits.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # batch norm's averages above all


def test_measure_equals_a_count_by_hand():
    # Three classes; predicted 0, 1, 1, 2, 0 where 0, 1, 2, 2, 1 would be right.
    labels = torch.tensor([0, 1, 2, 2, 1])
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0]])
    metrics = measure(logits, labels)

    assert (metrics.correct, metrics.total, metrics.accuracy) == (3, 5, 0.6)
    assert metrics.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    right, wrong = 0.2395448, 2.2395448  # -log(e²/(e²+2)) and -log(1/(e²+2))
    assert metrics.loss == pytest.approx((3 * right + 2 * wrong) / 5, abs=1e-6)


@pytest.mark.parametrize("correct, total", [(9_965, 10_000), (10_000, 10_000), (0, 50), (25, 50)])
def test_interval_holds_the_accuracies_that_would_not_surprise(correct, total):
    """Wilson's interval: all p from which the observed share lies within 1.96 standard errors."""
    p = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    plausible = p[(p - correct / total).abs() <= 1.96 * (p * (1 - p) / total).sqrt()]
    low, high = Metrics(0.0, correct, total, torch.zeros(10, 10)).interval()
    assert low == pytest.approx(plausible.min().item(), abs=2e-6)
    assert high == pytest.approx(plausible.max().item(), abs=2e-6)


def test_report_names_the_confusions_and_ends_with_the_accuracy(capsys):
    confusion = torch.diag(torch.full((10,), 99))
    confusion[4, 9], confusion[7, 1] = 7, 3
    report(Metrics(loss=0.5, correct=990, total=1_000, confusion=confusion), 0.0321)
    lines = capsys.readouterr().out.splitlines()
    assert "Most frequent confusions  4 as 9 (7), 7 as 1 (3)" in lines
    assert "Calibration error         3.21%" in lines
    assert lines[-1] == "Test accuracy: 99.00% (10 of 1,000 wrong)"
    rows = [line.split() for line in lines]
    assert ["4", "106", "99", "93.40%"] in rows
    assert all(len(line) <= 80 for line in lines)


def test_printed_accuracy_equals_a_count_by_hand(run_here, trained, data_dir):
    flags = ("--checkpoint", trained / "best.pt", "--data-dir", data_dir)
    result = run_here("evaluate.py", *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""

    model = build_model("cnn")
    model.load_state_dict(load_checkpoint(trained / "best.pt", MODELS)["weights"])
    model.eval()
    test_set = MNISTDataset(data_dir, "test")
    wrong = 0
    with torch.no_grad():
        for start in range(0, 10_000, 100):
            images = torch.stack([test_set[i][0] for i in range(start, start + 100)])
            labels = [test_set[i][1].item() for i in range(start, start + 100)]
            predictions = model(images).argmax(dim=1).tolist()
            wrong += sum(p != y for p, y in zip(predictions, labels, strict=True))
    last_line = result.stdout.splitlines()[-1]
    assert last_line == f"Test accuracy: {100 - wrong / 100:.2f}% ({wrong:,} of 10,000 wrong)"
    correct_by_digit = re.findall(r"^ +\d +[\d,]+ +([\d,]+) +[\d.]+%$", result.stdout, re.MULTILINE)
    assert sum(int(count.replace(",", "")) for count in correct_by_digit) == 10_000 - wrong
