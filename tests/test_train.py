import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dataset import MNISTDataset, make_loader
from evaluate import measure, predict
from model import build_model
from train import Config, main, train_epoch
from utils import load_checkpoint

CPU = torch.device("cpu")


def small_training(images, labels, steps, lr=0.005):
    """A CNN, trained on one batch for some steps by train.py's own loop."""
    torch.manual_seed(0)
    model = build_model("cnn")
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    batches = [(images, labels)] * steps
    return model, train_epoch(model, batches, nn.CrossEntropyLoss(), optimizer, schedule, CPU)


@pytest.fixture(scope="module")
def batch(data_dir):
    return MNISTDataset(data_dir, "train").__getitems__(list(range(0, 55_000, 430)))


def test_a_step_lowers_the_loss(batch):
    images, labels = batch
    _, (loss_before, _, _) = small_training(images, labels, steps=1)
    model, _ = small_training(images, labels, steps=1)
    loss_after = nn.functional.cross_entropy(model.train()(images), labels).item()
    assert loss_after < loss_before


def test_a_small_set_can_be_learnt_by_heart(batch):
    images, labels = batch
    model, _ = small_training(images, labels, steps=60)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)
    assert measure(*predict(model, loader, CPU)).accuracy == 1


def test_epoch_metrics_equal_a_count_by_hand():
    """With a learning rate of 0 the weights stand still: a second pass gives the same numbers."""
    torch.manual_seed(0)
    images, labels = torch.randn(10, 1, 28, 28), torch.arange(10)
    model = build_model("cnn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    batches = [(images[:7], labels[:7]), (images[7:], labels[7:])]  # of unequal size
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)

    loss, accuracy, seen = train_epoch(model, batches, loss_function, optimizer, schedule, CPU)

    logits = torch.cat([model.train()(x) for x, _ in batches])
    assert seen == 10
    assert loss == pytest.approx(loss_function(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item())


def test_a_seed_decides_the_weights_bit_for_bit(data_dir, tmp_path):
    weights = {}
    for name, seed, workers in [("a", 0, 0), ("again", 0, 0), ("helped", 0, 2), ("other", 1, 0)]:
        folder = tmp_path / name
        main(
            Config(
                dry_run=True,
                seed=seed,
                workers=workers,
                data_dir=data_dir,
                checkpoint_dir=folder,
                log_dir=folder,
            )
        )
        weights[name] = load_checkpoint(folder / "last.pt")["weights"]
        torch.rand(3)  # the generator's state between runs must not matter
    for key, value in weights["a"].items():
        assert torch.equal(value, weights["again"][key]), key
        assert torch.equal(value, weights["helped"][key]), key
    assert not torch.equal(weights["a"]["classifier.weight"], weights["other"]["classifier.weight"])


def test_both_scripts_from_another_folder_with_no_paths_given(run, checkout):
    """As a newcomer runs them: default paths lie beside the scripts."""
    result = run("train.py", "--dry-run", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no bar, no warning
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 or str(checkout) in line for line in lines)
    assert "55,000 training and 5,000 validation images" in result.stdout
    assert re.search(r"^  1/1( +[\d.]+ +[\d.]+%){2} +[\d,]+$", result.stdout, re.MULTILINE)
    assert lines[-1] == "Next: python evaluate.py"
    assert list((checkout / "runs").glob("*-cnn/events*"))

    best = load_checkpoint(checkout / "checkpoints" / "best.pt")
    last = load_checkpoint(checkout / "checkpoints" / "last.pt")
    assert f"{best['validation_accuracy']:.2%}" in result.stdout
    assert best["model"] == "cnn" and best["epoch"] == 1
    assert {"optimizer", "schedule"} <= set(last)

    result = run("evaluate.py", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(
        r"Test accuracy: \d+\.\d\d% \([\d,]+ of 10,000 wrong\)", result.stdout.splitlines()[-1]
    )


def test_logs_can_be_read_by_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run_dir,) = trained.glob("*-cnn")
    log = EventAccumulator(str(run_dir)).Reload()
    checkpoint = load_checkpoint(trained / "best.pt")
    (accuracy,) = log.Scalars("accuracy/validation")
    assert accuracy.step == 1
    assert accuracy.value == pytest.approx(checkpoint["validation_accuracy"])
    for tag in ("loss/training", "loss/validation", "accuracy/training", "images_per_second"):
        assert log.Scalars(tag)[0].value > 0
    assert 0 < log.Scalars("learning_rate")[0].value < Config.lr


def test_resnet18_takes_the_same_path(run, data_dir, tmp_path):
    result = run(
        "train.py",
        *("--model", "resnet18", "--dry-run", "--batch-size", 16, "--data-dir", data_dir),
        *("--checkpoint-dir", tmp_path, "--log-dir", tmp_path / "runs"),
    )
    assert result.returncode == 0, result.stderr
    assert f"Next: python evaluate.py --checkpoint {'best.pt'}" in result.stdout
    result = run("evaluate.py", "--checkpoint", tmp_path / "best.pt", "--data-dir", data_dir)
    assert result.returncode == 0, result.stderr
    assert "resnet18" in result.stdout


def test_help_shows_each_setting_with_its_default(run):
    result = run("train.py", "--help")
    text = " ".join(result.stdout.split())
    for name, default in vars(Config()).items():
        assert f"--{name.replace('_', '-')}" in text
        if not isinstance(default, bool):
            shown = default.name if hasattr(default, "name") else default
            assert f"(default: {shown})" in text


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_gives_one_line(run, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    result = run("train.py", "--device", device)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and f"--device {device}" in result.stderr
    assert "auto" in result.stderr and "cpu" in result.stderr


@pytest.mark.slow
def test_the_default_run_gets_the_accuracy_that_the_readme_promises(run, data_dir, tmp_path):
    result = run(
        "train.py",
        *("--data-dir", data_dir, "--checkpoint-dir", tmp_path, "--log-dir", tmp_path),
    )
    assert result.returncode == 0, result.stderr
    model = build_model("cnn")
    model.load_state_dict(load_checkpoint(tmp_path / "best.pt")["weights"])
    loader = make_loader(MNISTDataset(data_dir, "test"), batch_size=1_000)
    assert measure(*predict(model, loader, CPU)).accuracy > 0.995
