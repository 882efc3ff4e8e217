"""What is shown of a network is what it computes."""

import pytest
import torch
from conftest import ROOT
from PIL import Image

from dataset import MNISTDataset
from examples import look_inside
from model import build_model
from utils import InputError, load_checkpoint, save_checkpoint


def start(checkpoint, *flags):
    look_inside.main(look_inside.parse_args([f"--checkpoint={checkpoint}", *map(str, flags)]))


def test_outputs_are_those_of_the_members(small_data_dir):
    model = build_model("cnn", 10).eval()
    image, _ = MNISTDataset(small_data_dir, "test")[0]
    with torch.inference_mode():
        x = (image[None] - model.mean) / model.std
        expected = [x := getattr(model, f"block{i}")(x) for i in (1, 2, 3, 4)] + [
            model(image[None])
        ]
    outputs = look_inside.record_outputs(model, image)
    assert list(outputs) == ["block1", "block2", "block3", "block4", "classifier"]
    for output, of_a_batch in zip(outputs.values(), expected, strict=True):
        assert torch.equal(output, of_a_batch[0])


@pytest.mark.parametrize("image", [None, ROOT / "docs" / "digits" / "felt_pen.png"])
def test_the_picture_and_the_shapes(trained, small_data_dir, tmp_path, capsys, image):
    save_checkpoint(tmp_path / "best.pt", load_checkpoint(trained / "best.pt"))
    start(tmp_path / "best.pt", f"--data-dir={small_data_dir}", *[image] * bool(image))
    first, *_, last = capsys.readouterr().out.splitlines()
    assert " ".join(first.split()) == "block1 16 × 12 × 12"
    assert last.endswith("best-inside.png")
    with Image.open(tmp_path / "best-inside.png") as picture:
        assert min(picture.size) > 500 and len(picture.getcolors(1 << 24)) > 100


def test_another_model_is_refused_in_a_line(tmp_path):
    model = build_model("resnet18", 10)
    checkpoint = {"model": "resnet18", "classes": 10, "epoch": 1, "weights": model.state_dict()}
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    with pytest.raises(InputError, match="no cnn"):
        start(tmp_path / "best.pt")
