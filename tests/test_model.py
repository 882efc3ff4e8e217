import pytest
import torch
import torch.nn.functional as F

from model import MODELS, build_model


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
