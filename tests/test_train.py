"""Training: the loop, a run's folder, the log, bad input, and what people change."""

import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, contents, one_line, write_mnist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import models

import train as script
from dataset import MNISTDataset
from evaluate import load_model, predict
from model import build_model
from train import train_epoch
from utils import UserError, load_checkpoint


def read_log(folder):
    return EventAccumulator(str(folder), {"images": 0, "histograms": 0}).Reload()  # 0 keeps all


# The loop


def test_a_network_can_learn_one_batch_by_heart(small_data_dir):
    torch.manual_seed(0)
    dataset = MNISTDataset(small_data_dir, "train")
    batch = dataset.images[:128] / 255, dataset.labels[:128]
    model = build_model("cnn", classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), 0.005)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    loss_function = nn.CrossEntropyLoss(reduction="none")
    losses, _ = train_epoch(model, [batch] * 60, loss_function, optimizer, scheduler, CPU)
    first, *_, last = losses.view(60, -1).mean(dim=1)
    assert last < first / 10
    logits, labels = predict(model, TensorDataset(*batch), CPU)
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.97


def test_train_epoch_returns_one_loss_per_image_and_the_accuracy(monkeypatch):
    """With a learning rate of 0 the weights stand still, so we can compute both by hand."""
    monkeypatch.setattr("utils.is_bfloat16_fast", lambda device: False)  # bfloat16 is too coarse
    torch.manual_seed(0)
    images, labels = torch.rand(10, 1, 28, 28), torch.arange(10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step)
    batches = [(images[:7], labels[:7]), (images[7:], labels[7:])]
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    losses, accuracy = train_epoch(model, batches, loss_function, optimizer, scheduler, CPU)
    torch.testing.assert_close(losses, loss_function(model(images), labels).detach())
    right = model(images).argmax(dim=1) == labels
    assert accuracy == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_training_computes_in_bfloat16_where_that_is_fast(fast, dtype, monkeypatch):
    """Layers do; weights, their gradients and the losses keep their 32 bits."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    batches = [(torch.rand(10, 1, 28, 28), torch.arange(10))]
    loss_function = nn.CrossEntropyLoss(reduction="none")
    losses, _ = train_epoch(model, batches, loss_function, optimizer, scheduler, CPU)
    assert seen == [dtype] and losses.dtype == torch.float32
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())


def test_after_the_first_epoch_the_hardest_images_are_practised(train, monkeypatch, capsys):
    """Training is faked: image i gets a loss of i at first, and 0 when it's seen again."""
    epochs = []

    def train_epoch(model, batches, *others):
        seen = torch.cat([images[:, 0, 0, 0].long() for images, _ in batches])
        known = torch.isin(seen, torch.cat([torch.tensor([-1]), *epochs]))
        epochs.append(seen)
        return torch.where(known, 0, seen).float(), 1.0

    def getitems(self, indices):
        return [(torch.full((1, 28, 28), float(i)), torch.tensor(0)) for i in indices]

    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr(MNISTDataset, "__getitems__", getitems)
    train("--hard-share=0.1")
    first, second, third = (epoch.tolist() for epoch in epochs)
    assert sorted(first) == list(range(1_100)) and first != sorted(first)
    assert sorted(second) == list(range(990, 1_100)) and second != sorted(second, reverse=True)
    assert sorted(third) == list(range(880, 990))  # 990 to 1,099 have a loss of 0 by now
    rows = re.findall(r"^ \d/3 +([\d,]+) ", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["1,100", "110", "110"]


def test_the_seed_decides_the_weights_bit_for_bit(train):
    weights = []
    for seed in (0, 0, 1):
        run_dir = train("--epochs=1", f"--seed={seed}")
        weights.append(load_checkpoint(run_dir / "last.pt")["weights"])
        torch.rand(3)  # the generator's state between two runs must not matter
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["classifier.weight"], weights[2]["classifier.weight"])


def test_best_pt_comes_from_the_epoch_with_the_best_validation_accuracy(train, monkeypatch):
    shifts = iter([0, 1, 0, 1])  # after a first look: all wrong, all right, all wrong

    def predict(model, dataset, device):
        labels = torch.stack([label for _, label in dataset])
        said = (labels + next(shifts)) % 10
        return nn.functional.one_hot(said, 10).float(), labels

    monkeypatch.setattr(script, "predict", predict)
    run_dir = train()
    assert load_checkpoint(run_dir / "best.pt")["epoch"] == 2
    last = load_checkpoint(run_dir / "last.pt")
    assert (last["epoch"], last["best_accuracy"]) == (3, 1)


# Runs as people start them


def test_both_scripts_run_from_another_folder_without_any_paths(run, checkout):
    """As a newcomer runs them: default paths lie beside the scripts. Dry runs aren't evaluated."""
    result = run("train.py", "--dry-run", "--device=cpu")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no bar, no warning
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 or str(checkout) in line for line in lines)
    (run_dir,) = (checkout / "checkpoints").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-cnn-dry-run", run_dir.name)
    row = r"^ +1/1 +1,280( +[\d.]+ +[\d.]+%){2} +[\d,]+$"
    assert re.search(row, result.stdout, re.MULTILINE)
    for command in (  # with the scripts' paths, because they aren't in this folder
        f"python {checkout / 'train.py'} --resume {run_dir}",
        f"tensorboard --logdir {run_dir.parent}",
        f"python {checkout / 'evaluate.py'} --checkpoint {run_dir / 'best.pt'}",
    ):
        assert command in lines

    earlier, newest = (run_dir.with_name(f"2020010{i}-000000-cnn") for i in (1, 2))
    for folder in (newest, earlier):
        shutil.copytree(run_dir, folder)
    result = run("evaluate.py", "--device=cpu")
    assert result.returncode == 0 and result.stderr == ""
    assert str(newest / "best.pt") in result.stdout
    last_line = result.stdout.splitlines()[-1]
    assert re.fullmatch(r"Test accuracy: \d+\.\d\d% \([\d,]+ of 10,000 wrong\)", last_line)
    assert not (earlier / "best-mistakes.png").exists()
    assert (newest / "best-mistakes.png").exists()


def test_printed_commands_name_the_data_and_are_quoted(train, small_data_dir, capsys, monkeypatch):
    monkeypatch.chdir(small_data_dir)
    run_dir = train("--epochs=1", "--data-dir=.", name="my runs & more")
    *_, evaluate = capsys.readouterr().out.splitlines()
    assert evaluate.endswith(f'--checkpoint "{run_dir / "best.pt"}" --data-dir .')


def test_every_run_gets_its_own_folder(train, monkeypatch):
    clock = iter(["20260101-000000", "20260101-000000", "20260101-000001"])  # the same second
    monkeypatch.setattr(time, "strftime", lambda form: next(clock))
    folders = [train("--epochs=1").name for _ in "ab"]
    assert folders == ["20260101-000000-cnn", "20260101-000001-cnn"]


BAD_INPUT = [  # {file} is a file where a folder should be, {empty} an empty folder
    ("--model vgg", 2, "--model"),
    ("--epochs 0", 2, "--epochs"),
    ("--epochs many", 2, "invalid int value: 'many'"),
    ("--batch-size 0", 2, "--batch-size"),
    ("--lr 0", 2, "--lr"),
    ("--lr nan", 2, "--lr"),
    ("--lr inf", 2, "--lr"),
    ("--hard-share 2", 2, "--hard-share"),
    ("--seed -1", 2, "--seed"),
    ("--workers -1", 2, "--workers"),
    ("--device cuda", 1, "use --device auto"),
    ("--freeze-backbone", 2, "--model resnet18"),
    ("--data-dir {empty}", 1, "--data-dir"),
    ("--out-dir {file}", 1, "--out-dir"),
    ("--out-dir {link}", 1, "--out-dir"),
    ("--resume --out-dir {empty}", 1, "no unfinished run"),
    ("--resume nothing", 1, "nothing"),
    ("--resume=", 1, "empty"),
    ("--learning-rate 0.1", 2, "--learning-rate"),
]


@pytest.mark.parametrize("flags, status, part", BAD_INPUT)
def test_bad_input_gives_one_line_and_writes_nothing(
    run_here, small_data_dir, tmp_path, offline, flags, status, part
):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    if "link" in flags:
        if sys.platform == "win32":
            pytest.skip("creating links needs special rights on Windows")
        (tmp_path / "link").symlink_to("nowhere")
    before = contents(tmp_path)
    given = flags.format(**{name: tmp_path / name for name in ("file", "empty", "link")}).split()
    defaults = [f"--data-dir={small_data_dir}", f"--out-dir={tmp_path / 'runs'}"]
    one_line(run_here("train.py", *defaults, *given), status, part)
    assert contents(tmp_path) == before


def test_images_that_the_model_cannot_take_are_refused_before_anything_is_written(train, tmp_path):
    rng = np.random.default_rng(0)
    write_mnist(tmp_path / "data", rng.integers(0, 256, (60, 32, 32)), np.arange(60) % 3)
    with pytest.raises(UserError, match="1×32×32"):
        train(f"--data-dir={tmp_path / 'data'}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("images, classes", [(2, 2), (13, 3), (240, 26)])
def test_training_works_with_few_images_and_any_number_of_classes(train, tmp_path, images, classes):
    rng = np.random.default_rng(0)
    write_mnist(tmp_path, rng.integers(0, 256, (images, 28, 28)), np.arange(images) % classes)
    last = load_checkpoint(train(f"--data-dir={tmp_path}") / "last.pt")
    assert (last["epoch"], last["classes"]) == (3, classes)


def test_a_far_too_large_learning_rate_is_reported(train, tmp_path):
    with pytest.raises(UserError, match="smaller --lr"):
        train("--lr=1e9")
    assert not list(tmp_path.rglob("*.pt"))


# The log


def test_the_log_has_curves_while_training_and_after_each_epoch(trained):
    training, validation = read_log(trained / "training"), read_log(trained / "validation")
    last = load_checkpoint(trained / "last.pt")
    steps = [35, (35 + last["step"]) // 2, last["step"]]  # 1,100 images, then the hardest, twice
    every_tenth = list(range(10, last["step"] + 1, 10))
    assert [event.step for event in training.Scalars("step/loss")] == every_tenth
    rates = [event.value for event in training.Scalars("step/learning_rate")]
    assert rates[0] < max(rates) > rates[-1] > 0
    for log in (training, validation):
        for tag in ("epoch/loss", "epoch/accuracy"):
            assert [event.step for event in log.Scalars(tag)] == steps
    accuracies = [event.value for event in validation.Scalars("epoch/accuracy")]
    assert max(accuracies) == pytest.approx(last["best_accuracy"])
    for name, _ in build_model("cnn", last["classes"]).named_parameters():
        for tag in (f"weights/{name}", f"gradients/{name}"):
            assert [event.step for event in training.Histograms(tag)] == steps
    for log, tag, count in (
        (training, "augmented", 3),
        (training, "hardest", 1),
        (validation, "confusion", 1),
        (validation, "mistakes", 1),
    ):
        assert len(log.Images(tag)) == count
        assert min(log.Images(tag)[-1].width, log.Images(tag)[-1].height) >= 100


# What people change


def test_a_model_needs_only_forward_and_a_dataset_may_return_arrays(train, monkeypatch):
    own = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(784, 10))
    monkeypatch.setattr(script, "build_model", lambda *_: own)

    def getitems(self, indices):
        return [(self.images[i].float().numpy() / 255, int(self.labels[i])) for i in indices]

    monkeypatch.setattr(MNISTDataset, "__getitems__", getitems)
    run_dir = train("--epochs=1")
    assert load_checkpoint(run_dir / "best.pt")["weights"].keys() == own.state_dict().keys()
    assert read_log(run_dir / "training").Images("augmented")


def test_an_epoch_is_saved_before_its_images_are_logged(train, monkeypatch, tmp_path):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr("utils.log_images_and_weights", fail)
    with pytest.raises(ZeroDivisionError):
        train()
    assert load_checkpoint(next(tmp_path.glob("runs/*/last.pt")))["epoch"] == 1


@pytest.mark.parametrize("freeze", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fine_tuning_from_a_weights_file(train, tmp_path, monkeypatch, freeze):
    """The file holds random numbers, but sits where torchvision would have put its download."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    weights = models.resnet18().state_dict()
    torch.save(weights, cache / Path(models.ResNet18_Weights.DEFAULT.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = ["--model=resnet18", "--dry-run", "--batch-size=4"] + freeze * ["--freeze-backbone"]
    model, checkpoint = load_model(train(*flags) / "best.pt")
    assert checkpoint["model"] == "resnet18"
    trained = model.backbone.conv1.weight
    assert torch.equal(trained, weights["conv1.weight"]) == freeze
    assert (trained - weights["conv1.weight"]).abs().max() < 0.1  # it did start there


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU torch.compile needs a C++ compiler")
def test_a_compiled_model_learns_just_as_well(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    runs = [train("--epochs=2", flag) for flag in ("--no-compile", "--compile")]
    assert list((tmp_path / "cache").rglob("*.so"))
    eager, compiled = (load_checkpoint(run_dir / "last.pt") for run_dir in runs)
    assert eager["weights"].keys() == compiled["weights"].keys()
    losses = [read_log(run_dir / "validation").Scalars("epoch/loss")[-1].value for run_dir in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)  # bfloat16 rounds differently when fused


@pytest.mark.slow
def test_the_default_run_reaches_the_accuracy_that_the_readme_promises(default_run, data_dir):
    model, _ = load_model(default_run / "best.pt")
    logits, labels = predict(model, MNISTDataset(data_dir, "test"), CPU)
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.995
