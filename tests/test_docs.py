"""The pages in docs/ keep their word, too."""

import io
import re
import shutil
from contextlib import redirect_stdout

import pytest
import torch
from conftest import ROOT
from PIL import Image

from dataset import MNISTDataset
from docs import transfer
from model import ResNet18, build_model
from utils import save_checkpoint


def python_blocks(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch, small_data_dir):
    """Where a user has a picture of a seven."""
    monkeypatch.chdir(tmp_path)
    seven = MNISTDataset(small_data_dir, "test").images[0, 0].numpy()
    Image.fromarray(255 - seven).save("digit.png")
    return tmp_path


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_an_exported_program_computes_the_same_for_batches_of_any_size(folder, trained, name):
    if name == "cnn":
        shutil.copy(trained / "best.pt", folder)
    else:
        weights = build_model(name, 10).state_dict()
        checkpoint = {"model": name, "classes": 10, "epoch": 1, "weights": weights}
        save_checkpoint(folder / "best.pt", checkpoint)
    names = {}
    with redirect_stdout(io.StringIO()) as output:
        for block in python_blocks("deploy.md"):
            exec(block, names)
    digit, shape = output.getvalue().splitlines()
    assert shape == "torch.Size([300, 10])"
    if name == "cnn":
        assert digit == "7"
    for size in (1, 3, 64):
        images = torch.rand(size, 1, 28, 28)
        with torch.inference_mode():
            expected, logits = names["model"](images), names["exported"](images)
        assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("way", transfer.RATES)
def test_the_ways_of_fine_tuning_do_what_they_are_called(way, monkeypatch, data_dir):
    monkeypatch.setattr(transfer, "ROOT", data_dir.parent)
    torch.manual_seed(0)
    known = ResNet18(5, size=transfer.SIZE).backbone
    few = transfer.five_digits("validation", 5, count=2)
    assert len(few) == 10 and few.labels.unique().tolist() == [0, 1, 2, 3, 4]
    learnt = transfer.learn(way, known, few, epochs=6).backbone
    moved = (learnt.conv1.weight - known.conv1.weight).abs().max().item()
    averages_moved = not torch.equal(learnt.bn1.running_mean, known.bn1.running_mean)
    assert averages_moved == (way != "frozen backbone")
    if way.startswith("frozen"):
        assert moved == 0
    elif way == "from random weights":
        assert moved > 0.05
    else:
        assert 0 < moved < 0.05


def test_links_lead_somewhere():
    for page in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if not link.startswith(("https://", "#")):
                assert (page.parent / link).exists(), (page.name, link)
