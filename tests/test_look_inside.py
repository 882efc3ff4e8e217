"""What examples/look_inside.py shows of a network is what the network computes."""

import pytest
import torch
from torch import nn

import utils
from dataset import MNISTDataset
from examples import look_inside
from model import CNN, ResNet18, conv_block


class Deeper(CNN):
    """The CNN with a fifth block."""

    def __init__(self, classes):
        super().__init__(classes)
        del self.classifier
        self.block5 = conv_block(128, 256, kernel_size=1)
        self.classifier = nn.Linear(256 * 2 * 2, classes)

    def forward(self, images):
        x = (images - self.mean) / self.std
        for block in (self.block1, self.block2, self.block3, self.block4, self.block5):
            x = block(x)
        return self.classifier(x.flatten(1))


@pytest.fixture
def start(tmp_path, small_data_dir, monkeypatch):
    """Look inside a model, and return the figure."""

    def look_inside_model(model, name):
        figures = []
        monkeypatch.setattr(utils, "save_picture", lambda figure, path: figures.append(figure))
        monkeypatch.setattr(look_inside, "load_model", lambda path: (model.eval(), {"model": name}))
        flags = [f"--checkpoint={tmp_path / 'best.pt'}", f"--data-dir={small_data_dir}"]
        look_inside.main(look_inside.parse_args(flags))
        return figures[0]

    return look_inside_model


@pytest.mark.parametrize("kind, blocks", [(CNN, 4), (Deeper, 5)])
def test_any_number_of_blocks_can_be_shown(start, kind, blocks, capsys):
    torch.manual_seed(0)
    titles = [axes.get_title() for axes in start(kind(10), "cnn").axes]
    names = [f"block{i}" for i in range(1, blocks + 1)] + ["classifier"]
    assert [title.split(":")[0] for title in titles[2:]] == names
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[: blocks + 1]] == names


def test_the_most_active_channels_come_first(start, small_data_dir):
    model = CNN(10)
    axes = start(model, "cnn").axes[2]  # below the input and the filters
    shown = [int(number) for number in axes.get_title().split(": ")[-1].split(", ")]
    outputs = look_inside.record_outputs(model, MNISTDataset(small_data_dir, "test")[0][0])
    activity = outputs["block1"].mean(dim=(1, 2))
    assert activity[shown].tolist() == sorted(activity.tolist(), reverse=True)
    strip = axes.images[0].get_array()  # 16 channels side by side
    assert strip[:, :13].mean() > strip[:, -13:].mean()


def test_outputs_are_what_the_parts_compute(small_data_dir):
    model = CNN(10).eval()
    image, _ = MNISTDataset(small_data_dir, "test")[0]
    outputs = look_inside.record_outputs(model, image)
    with torch.inference_mode():
        x = (image[None] - model.mean) / model.std
        for name in ("block1", "block2", "block3", "block4"):
            x = getattr(model, name)(x)
            assert torch.equal(outputs[name], x[0])
        assert torch.equal(outputs["classifier"], model(image[None])[0])


def test_a_model_without_channels_to_show_gets_an_explanation(start):
    with pytest.raises(utils.UserError, match="resnet18"):
        start(ResNet18(10), "resnet18")
