import os
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
import torch.nn.functional as F
from torchvision import models
from torchvision.transforms import functional

import dataset
import model as model_module
from model import MODELS, build_model, parameter_groups
from train import train_epoch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODELS)
def test_logits_have_one_row_an_image(name):
    model = build_model(name)
    for n in (2, 5):
        logits = model(torch.randn(n, 1, 28, 28))
        assert logits.shape == (n, 10) and logits.dtype == torch.float32
    model.eval()
    assert model(torch.randn(1, 1, 28, 28)).shape == (1, 10)
    assert build_model(name, classes=3).eval()(torch.randn(4, 1, 28, 28)).shape == (4, 3)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_an_image_do_not_depend_on_its_batch(name):
    model = build_model(name).eval()
    images = torch.randn(6, 1, 28, 28)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name):
    model = build_model(name)
    F.cross_entropy(model(torch.randn(8, 1, 28, 28)), torch.arange(8)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28), (2, 3, 28, 28), (2, 1, 32, 32), (2, 784)])
def test_a_wrong_shape_is_named(name, shape):
    with pytest.raises(ValueError) as error:
        build_model(name)(torch.zeros(shape))
    assert str(shape) in str(error.value) and "(N, 1, 28, 28)" in str(error.value)


def test_resnet18_learns_from_random_weights():
    model = build_model("resnet18")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(20, 1, 28, 28), torch.arange(20) % 10
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="'cnn' or 'resnet18'"):
        build_model("resnet50")


# Fine-tuning. No test needs the network: the weights are random ones that the test makes.


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty cache for pretrained weights, and no network to fill it from."""

    def no_network(*args, **kwargs):
        raise URLError("no\nnetwork")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    return tmp_path


@pytest.fixture
def weights(torch_home):
    """The file that torchvision would download, with random numbers inside."""
    torch.manual_seed(42)
    path = torch_home / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), path)
    return path


def frozen_resnet():
    return build_model("resnet18", freeze_backbone=True)


def test_pretrained_weights_reach_the_backbone(weights):
    saved = torch.load(weights, weights_only=True)
    model = build_model("resnet18", pretrained=True)
    loaded = model.backbone.state_dict()
    assert set(saved) - set(loaded) == {"fc.weight", "fc.bias"}
    for name, value in loaded.items():
        assert torch.equal(value, saved[name]), name


def test_backbone_sees_colours_as_in_its_own_training(data_dir):
    """The data set's normalisation is undone, and that of the weights applied, once."""
    assert (model_module.MNIST_MEAN, model_module.MNIST_STD) == (dataset.MEAN, dataset.STD)

    images, _ = dataset.MNISTDataset(data_dir, "validation").__getitems__([0, 1, 2])
    model = build_model("resnet18").eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)

    pixels = (images * dataset.STD + dataset.MEAN).repeat(1, 3, 1, 1)
    pixels = F.interpolate(pixels, size=seen[0].shape[-2:], mode="bilinear")
    preset = models.ResNet18_Weights.DEFAULT.transforms()
    expected = functional.normalize(pixels, preset.mean, preset.std)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


def test_frozen_backbone_builds_no_graph_and_stays_in_eval_mode():
    model = frozen_resnet().train()
    assert model.head.training
    assert not any(module.training for module in model.backbone.modules())
    features = []
    model.backbone.register_forward_hook(lambda _, __, output: features.append(output))
    logits = model(torch.randn(4, 1, 28, 28))
    assert logits.requires_grad
    assert features[0].grad_fn is None and not features[0].requires_grad

    model = build_model("resnet18").train()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_changes_the_head_and_the_backbone_if_it_is_not_frozen(frozen):
    model = build_model("resnet18", freeze_backbone=frozen)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, pretrained=False))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    batch = torch.randn(8, 1, 28, 28), torch.arange(8)
    loss_function = torch.nn.CrossEntropyLoss()
    train_epoch(model, [batch], loss_function, optimizer, schedule, torch.device("cpu"))

    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"head.weight", "head.bias"} <= changed
    assert changed == ({"head.weight", "head.bias"} if frozen else set(before))


def test_backbone_and_head_learn_at_different_rates(weights):
    model = build_model("resnet18", pretrained=True)
    backbone, head = parameter_groups(model, lr=0.01, pretrained=True)
    assert head["lr"] == 0.01 and backbone["lr"] == pytest.approx(0.001)
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()}

    (everything,) = parameter_groups(build_model("resnet18"), lr=0.01, pretrained=False)
    assert len(list(everything["params"])) == len(list(model.parameters()))
    assert everything["lr"] == 0.01


def one_line(stop):
    message = str(stop.value)
    assert "\n" not in message
    return message


def test_without_network_and_weights_it_says_the_ways_on(torch_home):
    with pytest.raises(SystemExit) as stop:
        build_model("resnet18", pretrained=True)
    message = one_line(stop)
    assert models.ResNet18_Weights.DEFAULT.url in message
    assert str(torch_home / "hub" / "checkpoints") in message
    assert "--model cnn" in message and "--no-pretrained" in message
    assert [path for path in torch_home.rglob("*") if path.is_file()] == []


def test_a_download_that_arrives_damaged_leaves_no_file(torch_home, monkeypatch):
    monkeypatch.setattr(
        torch.hub, "urlopen", lambda request: urlopen("data:application/octet-stream,half a file")
    )
    with pytest.raises(SystemExit) as stop:
        build_model("resnet18", pretrained=True)
    assert "Cannot download" in one_line(stop)
    assert [path for path in torch_home.rglob("*") if path.is_file()] == []


def make_empty(path):
    path.write_bytes(b"")


def make_text(path):
    path.write_text("<html>404</html>")


def make_truncated(path):
    path.write_bytes(path.read_bytes()[:1_000_000])


def make_another_model(path):
    torch.save({"classifier.weight": torch.zeros(3)}, path)


def make_no_state_dict(path):
    torch.save([1, 2, 3], path)


class Attack:
    """Unpickled by an unwary program, this creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def make_code(path):
    torch.save(Attack(), path)


@pytest.mark.parametrize(
    "damage",
    [make_empty, make_text, make_truncated, make_another_model, make_no_state_dict, make_code],
)
def test_a_damaged_or_wrong_file_is_named(weights, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(weights)
    with pytest.raises(SystemExit) as stop:
        build_model("resnet18", pretrained=True)
    message = one_line(stop)
    assert str(weights) in message and "delete" in message
    assert not Path("attacked").exists()
