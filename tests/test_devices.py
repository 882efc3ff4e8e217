"""What a GPU brings is tried as far as a CPU can: the numbers, not the speed."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

import devices
from devices import MixedPrecision, choose_device
from model import MODELS, build_model
from train import Config, main
from utils import load_checkpoint

CPU = torch.device("cpu")


def test_auto_chooses_a_device_that_can_compute():
    device = choose_device("auto")
    assert torch.ones(2, device=device).sum().item() == 2
    assert choose_device("cpu") == CPU


STEPS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from devices import prepare
from model import build_model
from train import train_epoch

def faults_of(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batch = torch.randn(128, 1, 28, 28), torch.zeros(128, dtype=torch.int64)
    train_epoch(network, [batch] * steps, torch.nn.CrossEntropyLoss(), optimizer, schedule, cpu)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cpu = torch.device("cpu")
network = prepare(build_model("cnn"), cpu, compile=False)
optimizer = torch.optim.AdamW(network.parameters(), fused=True)
schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
faults_of(5)
print(faults_of(10))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about Linux's C library")
def test_the_memory_of_a_step_is_kept_for_the_next(checkout):
    """A page fault means that the operating system has to hand out memory, and clear it."""
    command = [sys.executable, "-c", STEPS, checkout]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(output) < 5_000  # in most runs it is three times as many, if it is not kept


def test_mixed_precision_learns_the_same(small_data_dir, tmp_path, monkeypatch):
    weights, accuracies = {}, {}
    for name, precision in (("float32", None), ("mixed", torch.bfloat16)):
        monkeypatch.setattr(devices, "low_precision", lambda device, dtype=precision: dtype)
        folder = tmp_path / name
        folders = {"checkpoint_dir": folder, "log_dir": folder, "data_dir": small_data_dir}
        main(Config(epochs=3, device="cpu", **folders))
        last = load_checkpoint(folder / "last.pt", MODELS)
        weights[name], accuracies[name] = last["weights"], last["validation_accuracy"]
    for key, value in weights["float32"].items():
        assert weights["mixed"][key].dtype == value.dtype  # what is saved has 32 bits
    key = "classifier.weight"
    assert not torch.equal(weights["mixed"][key], weights["float32"][key])
    assert accuracies["mixed"] > 0.8
    assert abs(accuracies["mixed"] - accuracies["float32"]) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolutions_take_16_bits_and_logits_have_32(dtype):
    model = build_model("cnn")
    seen = []
    model.block2[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    logits = MixedPrecision(model, CPU, dtype)(torch.randn(2, 1, 28, 28))
    assert seen == [dtype]
    assert logits.dtype == torch.float32


class TestFloat16:
    """A linear layer, and gradients too small or too large for float16 (6e-8 to 65,504)."""

    def gradient(self, factor, dtype=torch.float16):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3).requires_grad_()
        layer.bias.requires_grad_(False)
        network = MixedPrecision(layer, CPU, dtype)
        (network(torch.rand(5, 4)) * factor).mean().backward()
        return layer.weight.grad

    def test_small_gradients_do_not_vanish(self):
        expected = self.gradient(1e-6, torch.bfloat16)
        assert expected.abs().min() > 0
        torch.testing.assert_close(self.gradient(1e-6), expected, rtol=0.02, atol=0)

    def test_a_gradient_that_overflows_counts_as_none(self):
        assert self.gradient(1e3).tolist() == [[0] * 4] * 3
