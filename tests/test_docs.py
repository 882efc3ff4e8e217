"""What pages in docs/ promise: exported programs, ways of fine-tuning, errors and their texts."""

import io
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from dataset import MNISTDataset
from docs import transfer
from evaluate import newest_checkpoint
from model import CNN, ResNet18, build_model
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


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch 2.10 itself
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


def twice():
    loss = nn.Linear(1, 1)(torch.ones(1)).exp()
    loss.backward()
    loss.backward()


def in_place():
    probability = torch.ones(3, requires_grad=True).sigmoid()
    probability += 1
    probability.sum().backward()


def whole_model():
    torch.save(nn.Linear(1, 1), "model.pt")
    torch.load("model.pt")


ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
ERRORS = {  # what the page says an error is about: a way to get it
    "mat1 and mat2 shapes": lambda: nn.Sequential(nn.Flatten(), nn.Linear(512, 10))(IMAGES),
    "Given groups=1": lambda: CNN(10).block1(IMAGES.expand(4, 3, 28, 28)),
    "stack expects": lambda: default_collate([torch.zeros(1, 28, 28), torch.zeros(1, 32, 28)]),
    "Target 10": lambda: F.cross_entropy(torch.zeros(1, 10), torch.tensor([10])),
    "Expected more than 1 value": lambda: nn.BatchNorm1d(3)(torch.ones(1, 3)),
    "expected scalar type": lambda: CNN(10).block1(IMAGES.byte()),
    "mat1 and mat2 must": lambda: nn.Linear(28, 10)(IMAGES.byte()),
    "Expected all tensors": lambda: nn.Linear(1, 1)(torch.ones(1, device=ACCELERATOR)),
    "Can't call numpy()": lambda: nn.Linear(1, 1)(torch.ones(1)).numpy(),
    "Trying to backward": twice,
    "element 0": lambda: torch.ones(3).sum().backward(),
    "one of the variables": in_place,
    "grad can be": lambda: CNN(10)(IMAGES).backward(),
    "Error(s) in loading": lambda: CNN(10).load_state_dict(CNN(26).state_dict()),
    "Weights only": whole_model,
    "No run in checkpoints": lambda: newest_checkpoint(Path("checkpoints")),
}
IMAGES = torch.ones(4, 1, 28, 28)
QUESTIONS = re.findall(
    r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_errors_that_are_explained_read_like_that(question, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (provoke,) = [way for start, way in ERRORS.items() if question.startswith(start)]
    if question.startswith("Expected all tensors") and ACCELERATOR is None:
        pytest.skip("needs a GPU")
    with pytest.raises(Exception) as error:
        provoke()
    assert question in str(error.value)


def test_each_way_to_err_is_explained():
    assert len(QUESTIONS) == len(ERRORS)
