import re
import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

import train
from dataset import MNISTDataset, make_loader
from evaluate import measure, predict
from model import MODELS, build_model
from train import RECIPES, Config, main, train_epoch
from utils import load_checkpoint, seed_epoch

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
        weights[name] = load_checkpoint(folder / "last.pt", MODELS)["weights"]
        torch.rand(3)  # the generator's state between runs must not matter
    for key, value in weights["a"].items():
        assert torch.equal(value, weights["again"][key]), key
        assert torch.equal(value, weights["helped"][key]), key
    assert not torch.equal(weights["a"]["classifier.weight"], weights["other"]["classifier.weight"])


def test_an_epoch_is_random_in_its_own_way_whatever_came_before(data_dir, tmp_path, monkeypatch):
    augmented, set_epoch = [], MNISTDataset.set_epoch

    def note(self, epoch):
        augmented.append(epoch)
        set_epoch(self, epoch)

    monkeypatch.setattr(MNISTDataset, "set_epoch", note)

    def random_numbers_of_three_epochs(drawn_before):
        numbers = []

        def draw(*_):
            numbers.append(torch.rand(()).item())
            torch.rand(drawn_before)
            return 1.0, 0.5, 1

        monkeypatch.setattr(train, "train_epoch", draw)
        config = Config(epochs=3, data_dir=data_dir, checkpoint_dir=tmp_path, log_dir=tmp_path)
        main(config)
        return numbers

    numbers = random_numbers_of_three_epochs(drawn_before=0)
    assert len(set(numbers)) == 3
    assert [epoch for epoch in augmented if epoch > 0] == [1, 2, 3]
    assert random_numbers_of_three_epochs(drawn_before=7) == numbers


def test_seed_and_epoch_are_mixed():
    numbers = set()
    for seed in range(3):
        for epoch in range(3):
            seed_epoch(seed, epoch)
            numbers.add(torch.rand(()).item())
    assert len(numbers) == 9


def test_both_scripts_from_another_folder_with_no_paths_given(run, checkout):
    """As a newcomer runs them: default paths lie beside the scripts."""
    result = run("train.py", "--dry-run", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no bar, no warning
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 or str(checkout) in line for line in lines)
    assert "55,000 training, 5,000 validation images" in result.stdout
    assert re.search(r"^  1/1( +[\d.]+ +[\d.]+%){2} +[\d,]+$", result.stdout, re.MULTILINE)
    assert lines[-1] == f"Next: python {checkout / 'evaluate.py'}"
    assert list((checkout / "runs").glob("*-cnn/events*"))

    best = load_checkpoint(checkout / "checkpoints" / "best.pt", MODELS)
    last = load_checkpoint(checkout / "checkpoints" / "last.pt", MODELS)
    assert f"{best['validation_accuracy']:.2%}" in result.stdout
    assert best["model"] == "cnn" and best["epoch"] == 1
    assert {"optimizer", "schedule"} <= set(last)

    result = run("evaluate.py", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(
        r"Test accuracy: \d+\.\d\d% \([\d,]+ of 10,000 wrong\)", result.stdout.splitlines()[-1]
    )


@pytest.mark.parametrize("freeze", [[], ["--freeze-backbone"]])
def test_fine_tuning_from_a_weights_file(run_here, small_data_dir, tmp_path, monkeypatch, freeze):
    """The file holds random numbers, but lies where torchvision's download would."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    weights = models.resnet18().state_dict()
    torch.save(weights, cache / "resnet18-f37072fd.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = run_here(
        "train.py",
        *("--model", "resnet18", *freeze, "--dry-run", "--batch-size", 8),
        *("--data-dir", small_data_dir, "--checkpoint-dir", tmp_path, "--log-dir", tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert "11,181,642 parameters, " in result.stdout
    assert f"{5_130 if freeze else 11_181_642:,} to train" in result.stdout
    saved = load_checkpoint(tmp_path / "best.pt", MODELS)
    kept = torch.equal(saved["weights"]["backbone.conv1.weight"], weights["conv1.weight"])
    assert kept == bool(freeze)
    assert saved["config"]["epochs"] == 2 and saved["config"]["lr"] == 0.002

    # The checkpoint alone says what to build: no flag, and no weights file to start from.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing here"))
    result = run_here(
        "evaluate.py",
        *("--checkpoint", tmp_path / "best.pt", "--data-dir", small_data_dir),
    )
    assert result.returncode == 0, result.stderr
    assert "resnet18" in result.stdout
    assert not (tmp_path / "nothing here").exists()


def test_without_weights_it_stops_with_one_line_and_writes_nothing(
    run_here, small_data_dir, tmp_path, offline, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folders = ("--checkpoint-dir", tmp_path / "checkpoints", "--log-dir", tmp_path / "runs")
    result = run_here("train.py", "--model", "resnet18", "--data-dir", small_data_dir, *folders)
    assert result.returncode == 1
    *announced, line = result.stderr.splitlines()
    assert "--no-pretrained" in line
    assert all(line.startswith("Downloading") for line in announced)  # by older versions of torch
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_help_shows_each_setting_with_its_default(run_here):
    result = run_here("train.py", "--help")
    text = " ".join(result.stdout.split())
    for name, default in vars(Config()).items():
        flag = "no-pretrained" if name == "pretrained" else name.replace("_", "-")
        assert f"--{flag} " in text
        if name in RECIPES["cnn"]:
            assert f"(default: {default} for cnn, " in text
        elif not isinstance(default, bool):
            shown = default.name if hasattr(default, "name") else default
            assert f"(default: {shown})" in text


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU torch.compile needs a C++ compiler")
def test_a_compiled_model_learns_the_same(run, small_data_dir, tmp_path):
    losses = {}
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        folders = ("--checkpoint-dir", tmp_path / name, "--log-dir", tmp_path / name)
        cache = tmp_path / f"cache-{name}"
        result = run(
            *("train.py", "--dry-run", *flags, "--data-dir", small_data_dir, *folders),
            TORCHINDUCTOR_CACHE_DIR=str(cache),
        )
        assert result.returncode == 0, result.stderr
        losses[name] = float(re.search(r"^ +1/1 +([\d.]+)", result.stdout, re.MULTILINE)[1])
        last = load_checkpoint(tmp_path / name / "last.pt", MODELS)
        assert set(last["weights"]) == set(build_model("cnn").state_dict())
        assert bool(list(cache.rglob("*.so"))) == (name == "compiled")
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=0.02)


@pytest.mark.slow
def test_the_default_run_gets_the_accuracy_that_the_readme_promises(default_run, data_dir):
    model = build_model("cnn")
    model.load_state_dict(load_checkpoint(default_run / "best.pt", MODELS)["weights"])
    loader = make_loader(MNISTDataset(data_dir, "test"), batch_size=1_000)
    assert measure(*predict(model, loader, CPU)).accuracy > 0.995
