"""What a GPU brings is tried as far as a CPU can: the numbers, not the speed."""

import pytest
import torch
from torch import nn

import devices
from devices import choose_device, prepare, scale_gradients
from model import MODELS, build_model
from train import Config, main
from utils import load_checkpoint

CPU = torch.device("cpu")


def test_auto_chooses_a_device_that_can_compute():
    device = choose_device("auto")
    assert torch.ones(2, device=device).sum().item() == 2
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_learns_the_same(dtype, small_data_dir, tmp_path, monkeypatch):
    """Of 16 bits are the convolutions alone; weights, logits and what is saved have 32."""
    weights, accuracies = {}, {}
    for name, precision in (("float32", None), ("mixed", dtype)):
        monkeypatch.setattr(devices, "low_precision", lambda device, dtype=precision: dtype)
        folder = tmp_path / name
        folders = {"checkpoint_dir": folder, "log_dir": folder, "data_dir": small_data_dir}
        main(Config(epochs=3, device="cpu", **folders))
        last = load_checkpoint(folder / "last.pt", MODELS)
        weights[name], accuracies[name] = last["weights"], last["validation_accuracy"]
    for key, value in weights["mixed"].items():
        assert value.dtype == weights["float32"][key].dtype
    assert not torch.equal(
        weights["mixed"]["classifier.weight"], weights["float32"]["classifier.weight"]
    )
    assert accuracies["mixed"] > 0.8
    assert abs(accuracies["mixed"] - accuracies["float32"]) < 0.05


def test_convolutions_take_16_bits_and_logits_have_32(monkeypatch):
    monkeypatch.setattr(devices, "low_precision", lambda device: torch.bfloat16)
    model = build_model("cnn")
    seen = []
    model.block2[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    logits = prepare(model, CPU, compile=False)(torch.randn(2, 1, 28, 28))
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32


class TestScaledGradients:
    def step(self, scaled, factor=1.0):
        """A linear layer after a step, and the gradient as backward() left it."""
        torch.manual_seed(0)
        layer, loss_function = nn.Linear(4, 3), nn.CrossEntropyLoss()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        if scaled:
            scale_gradients(loss_function, optimizer, CPU)
        loss = loss_function(layer(torch.randn(5, 4)) * factor, torch.tensor([0, 1, 2, 0, 1]))
        loss.backward()
        gradient = layer.weight.grad.clone()
        optimizer.step()
        return loss.item(), gradient, layer.weight.detach()

    def test_backward_works_on_larger_numbers_and_the_step_stays_the_same(self):
        loss, gradient, weight = self.step(scaled=False)
        scaled_loss, scaled_gradient, scaled_weight = self.step(scaled=True)
        assert scaled_loss == loss
        assert torch.equal(scaled_gradient, gradient * 1024)
        assert torch.equal(scaled_weight, weight)

    def test_a_gradient_that_overflows_does_no_harm(self):
        _, gradient, weight = self.step(scaled=True, factor=1e37)
        assert not gradient.isfinite().all()
        assert weight.isfinite().all()
