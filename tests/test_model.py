"""Both models: shapes, gradients, what is frozen, and ImageNet weights from a file."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU
from torchvision import models
from torchvision.transforms import functional

from dataset import MNISTDataset
from model import CNN, build_model
from train import RECIPES, build_optimizer, train_epoch
from utils import UserError

WEIGHTS = models.ResNet18_Weights.DEFAULT


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("classes", [3, 10])
def test_an_image_gets_the_same_logits_whatever_else_is_in_the_batch(name, classes):
    model = build_model(name, classes)
    images = torch.rand(6, 1, 28, 28)
    logits = model(images)
    assert logits.shape == (6, classes) and logits.dtype == torch.float32
    model.eval()
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_reach_every_parameter(name):
    model = build_model(name, classes=10)
    F.cross_entropy(model(torch.rand(8, 1, 28, 28)), torch.arange(8)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 3, 28, 28), (2, 1, 32, 32), (2, 784)])
def test_images_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(UserError, match="1×28×28"):
        CNN(classes=10)(torch.zeros(shape))


def test_resnet_takes_colour_images_of_any_size():
    model = build_model("resnet18", classes=5).eval()
    assert model(torch.rand(2, 3, 40, 32)).shape == (2, 5)


def test_the_cnn_normalises_with_the_mean_and_std_of_mnists_60_000_images(data_dir):
    images = torch.cat([MNISTDataset(data_dir, s).images for s in ("train", "validation")]).double()
    model = CNN(classes=10)
    assert round(images.mean().item() / 255, 4) == pytest.approx(model.mean.item())
    assert round(images.std().item() / 255, 4) == pytest.approx(model.std.item())
    seen = []
    model.block1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images[:2_000].float() / 255)
    assert abs(seen[0].mean()) < 0.1 and abs(seen[0].std() - 1) < 0.1


def test_the_backbone_gets_images_normalised_as_in_pretraining(data_dir):
    images = MNISTDataset(data_dir, "validation").images[:3] / 255
    model = build_model("resnet18", classes=10).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    pixels = F.interpolate(images.repeat(1, 3, 1, 1), size=seen[0].shape[-2:], mode="bilinear")
    preset = WEIGHTS.transforms()
    expected = functional.normalize(pixels, preset.mean, preset.std)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


def test_a_frozen_backbone_builds_no_graph_and_stays_in_eval_mode():
    model = build_model("resnet18", classes=10, freeze_backbone=True).train()
    assert model.head.training
    assert not any(module.training for module in model.backbone.modules())
    features = []
    model.backbone.register_forward_hook(lambda _, __, output: features.append(output))
    assert model(torch.rand(4, 1, 28, 28)).requires_grad
    assert features[0].grad_fn is None
    model = build_model("resnet18", classes=10).eval().train()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_changes_the_head_and_an_unfrozen_backbone(frozen):
    model = build_model("resnet18", classes=10, freeze_backbone=frozen)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, scheduler = build_optimizer(model, lr=1e-3, total_steps=5)
    batch = torch.rand(8, 1, 28, 28), torch.arange(8)
    train_epoch(
        model, [batch], torch.nn.CrossEntropyLoss(reduction="none"), optimizer, scheduler, CPU
    )
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    head, preset = {"head.weight", "head.bias"}, {"mean", "std"}
    assert changed == (head if frozen else set(before) - preset)


# ImageNet weights


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file of random weights, where torchvision would put its download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tmp_path / "torch" / "hub" / "checkpoints" / Path(WEIGHTS.url).name
    path.parent.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), path)
    return path


def test_pretrained_weights_reach_the_backbone(weights):
    saved = torch.load(weights, weights_only=True)
    loaded = build_model("resnet18", classes=10, pretrained=True).backbone.state_dict()
    assert set(saved) - set(loaded) == {"fc.weight", "fc.bias"}
    for name, value in loaded.items():
        assert torch.equal(value, saved[name]), name


def test_the_error_says_what_to_do_offline_without_the_file(weights, offline):
    weights.unlink()
    with pytest.raises(UserError) as stop:
        build_model("resnet18", classes=10, pretrained=True)
    message = str(stop.value)
    assert WEIGHTS.url in message and str(weights.parent) in message
    assert "--no-pretrained" in message
    assert "\n" not in message
    assert not list(weights.parent.iterdir())


class Attack:
    """Unpickled by an unwary program, this creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


WAYS_TO_DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1_000_000]),
    "another model": lambda path: torch.save({"classifier.weight": torch.zeros(3)}, path),
    "no weights": lambda path: torch.save([1, 2, 3], path),
    "code": lambda path: torch.save(Attack(), path),
}


@pytest.mark.parametrize("damage", WAYS_TO_DAMAGE)
def test_a_damaged_or_wrong_file_is_named(weights, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    WAYS_TO_DAMAGE[damage](weights)
    with pytest.raises(UserError) as stop:
        build_model("resnet18", classes=10, pretrained=True)
    assert str(weights.parent) in str(stop.value) and "\n" not in str(stop.value)
    assert not Path("attacked").exists()
