"""docs/ keeps its word: exercises' checks hold; ablation.py and transfer.py do what they say."""

import importlib
import re
import sys

import pytest
import torch
from conftest import CPU, ROOT, apply, changes

import evaluate
import train
from docs import ablation, transfer
from model import ResNet18

EXERCISES = changes(ROOT / "docs" / "exercises.md")


@pytest.fixture
def solve(copy):
    """Apply an exercise's solution to a copy of the project, and import a module of the copy."""

    def apply_and_import(title, module):
        apply(EXERCISES[title], copy)
        return importlib.import_module(module)

    return apply_and_import


@pytest.fixture
def start(small_data_dir, tmp_path):
    """Train on a few images with a `train` module; returns the last checkpoint."""

    def train_and_load(module, *flags, data_dir=small_data_dir):
        folders = [f"--data-dir={data_dir}", f"--out-dir={tmp_path / 'runs'}", "--device=cpu"]
        run_dir = module.main(module.parse_args([*folders, *flags]))
        return torch.load(run_dir / "last.pt", weights_only=True)

    return train_and_load


@pytest.mark.slow
def test_forget_to_forget(start, solve):
    flags = ["--epochs=1", "--batch-size=32"]
    before = start(train, *flags)
    after = start(solve("1. Forget to forget", "train"), *flags)
    assert after["image_losses"].mean() > before["image_losses"].mean()
    assert after["accuracy"] < before["accuracy"]


@pytest.mark.slow
def test_walk_the_graph(start, solve, capsys):
    start(solve("2. Walk the graph yourself", "train"), "--dry-run")
    nodes = re.findall(r"^(\S+) torch.Size\((.*)\)$", capsys.readouterr().out, re.MULTILINE)
    assert nodes[0][0] == "MeanBackward0" and "SoftmaxBackward" in str(nodes)
    assert nodes[-1][0].endswith("AccumulateGrad") and nodes[-1][1] == "[10]"


@pytest.mark.slow
def test_another_optimizer(start, solve, data_dir):
    module = solve("3. Another optimizer", "train")
    best = start(module, "--epochs=3", "--lr=0.1", data_dir=data_dir)["best_accuracy"]
    assert best > 0.992


def test_forget_to_switch(solve, copy, trained, small_data_dir):
    def digits(program):
        model, _ = program.load_model(trained / "best.pt")
        test_set = program.MNISTDataset(small_data_dir, "test")
        logits, _ = program.predict(model, test_set, CPU)
        return logits.argmax(dim=1)

    switched = digits(evaluate)
    in_fives = digits(solve("1. Forget to switch", "evaluate"))
    diff = "@@ evaluate.py, predict @@\n-{0}batch_size=5)\n+{0}batch_size=100)\n"
    apply(diff.format("    loader = DataLoader(dataset, "), copy)
    in_hundreds = digits(importlib.reload(sys.modules["evaluate"]))
    changed = (in_fives != switched).float().mean()
    neighbours = (in_fives != in_hundreds).float().mean()
    assert changed > 0.02 and neighbours > 0.02


def test_does_it_know_what_it_does_not_know(solve, trained, small_data_dir, capsys):
    program = solve("2. Does it know what it does not know?", "evaluate")
    flags = [f"--checkpoint={trained / 'best.pt'}", f"--data-dir={small_data_dir}"]
    program.main(program.parse_args(flags))
    output = capsys.readouterr().out
    least, overall = re.findall(r"(?:least certain|Test accuracy): ([\d.]+)%", output)
    assert float(least) < float(overall) - 20


def test_pale_ink(solve, small_data_dir):
    dataset = solve("2. Pale ink", "dataset").MNISTDataset(small_data_dir, "train")
    darkest = torch.stack([image.max() for image, _ in dataset.__getitems__(range(100))])
    assert darkest.min() < 0.6 and darkest.max() > 0.9


@pytest.mark.parametrize(
    "title", ["1. One by one", "2. Pooling where everyone else puts it", "3. Deeper"]
)
def test_another_dataset_or_model_trains(title, start, solve):
    weights = start(solve(title, "train"), "--dry-run")["weights"]
    assert weights["classifier.weight"].shape == (10, 256 if title == "3. Deeper" else 512)


def test_all_ingredients_but_the_crop_make_train_py(data_dir, tmp_path, monkeypatch):
    """With every ingredient but the crop, both end up with exactly the same weights."""
    monkeypatch.setattr("utils.ROOT", data_dir.parent)
    everything = {ingredient: ingredient != "crop" for ingredient, *_ in ablation.INGREDIENTS}
    sizes = [1_280, round(ablation.SHARE * 1_280)]
    model, _ = ablation.train(0, everything, lr=ablation.LR, sizes=sizes)
    folders = [f"--data-dir={data_dir}", f"--out-dir={tmp_path}"]
    args = train.parse_args([*folders, "--device=cpu", "--dry-run"])
    args.epochs = 2
    expected = torch.load(train.main(args) / "last.pt", weights_only=True)["weights"]
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ingredient", [ingredient for ingredient, *_ in ablation.INGREDIENTS])
def test_each_ingredient_can_be_left_out_and_matters(ingredient, data_dir, monkeypatch):
    monkeypatch.setattr("utils.ROOT", data_dir.parent)
    monkeypatch.setattr(ablation, "is_fast", True)
    everything = {ingredient: True for ingredient, *_ in ablation.INGREDIENTS}
    with_it, _ = ablation.train(0, everything, lr=0.01, sizes=[256, 128])
    without, _ = ablation.train(0, everything | {ingredient: False}, lr=0.01, sizes=[256, 128])
    before, after = with_it.state_dict(), without.state_dict()
    same = list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert not same


@pytest.mark.slow
@pytest.mark.parametrize("way", transfer.RATES)
def test_each_way_of_fine_tuning_does_what_its_name_says(way, monkeypatch, data_dir):
    monkeypatch.setattr(transfer, "ROOT", data_dir.parent)
    torch.manual_seed(0)
    known = ResNet18(5, size=transfer.SIZE).backbone
    few = transfer.five_digits("validation", 5, count=2)
    assert len(few) == 10 and few.labels.unique().tolist() == [0, 1, 2, 3, 4]
    learnt = transfer.learn(way, few, 6, known).backbone
    moved = (learnt.conv1.weight - known.conv1.weight).abs().max().item()
    averages_moved = not torch.equal(learnt.bn1.running_mean, known.bn1.running_mean)
    assert averages_moved == (way != "frozen backbone")
    if way.startswith("frozen"):
        assert moved == 0
    elif way == "from random weights":
        assert moved > 0.05
    else:
        assert 0 < moved < 0.05
