"""How much is each ingredient of train.py worth? This prints the two tables in results.md.

    python -m docs.ablation                # twenty minutes on two cores
    python -m docs.ablation --validation   # on validation images, to choose learning rates

The first table starts with a small network and SGD with momentum, and adds one ingredient per row
until it arrives at train.py (and then one more). In the second, each row leaves one ingredient out.
"""

import math
import sys
import time
from statistics import mean, median
from unittest.mock import patch

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR
from torch.utils.data import ConcatDataset, DataLoader

import utils
from dataset import MNISTDataset
from evaluate import predict
from model import CNN, conv_block
from train import RECIPES, build_optimizer, train_epoch

EPOCHS, SHARE, LR = RECIPES["cnn"].values()
IMAGES, BATCH_SIZE = 55_000, 128
SIZES = [IMAGES] + (EPOCHS - 1) * [round(SHARE * IMAGES)]
device = utils.choose_device("cpu")
is_fast = utils.is_bfloat16_fast(device)
# Each ingredient's name in the code and in the table, the learning rate once we've added it, and
# the learning rate of train.py without it.
INGREDIENTS = [
    ("cnn", "a CNN", 0.02, 0.01),
    ("batch_norm", "batch norm", 0.02, 0.008),
    ("augment", "augmentation", 0.02, LR),
    ("at_once", "whole batches at once", 0.02, LR),
    ("adamw", "AdamW", 0.002, 0.2),
    ("one_cycle", "one cycle", LR, 0.002),
    ("smooth", "label smoothing", LR, LR),
    ("hard", "hard examples", LR, LR),
    ("bfloat16", "bfloat16", LR, LR),
    ("crop", "a crop to the middle (not in train.py)", LR, LR),
]


class Network(CNN):
    """train.py's CNN, with or without batch norm, looking at the whole image or only its middle."""

    def __init__(self, batch_norm: bool, crop: bool):
        super().__init__(classes=10)
        self.inside = slice(2, -2) if crop else slice(None)
        if crop:
            self.block4 = conv_block(64, 128, kernel_size=2)  # so the output is still 2×2
        for block in () if batch_norm else (self.block1, self.block2, self.block3, self.block4):
            block[0] = nn.Conv2d(block[0].in_channels, block[0].out_channels, block[0].kernel_size)
            block[2] = nn.Identity()

    def forward(self, images):
        x = (images[:, :, self.inside, self.inside] - self.mean) / self.std
        return self.classifier(self.block4(self.block3(self.block2(self.block1(x)))).flatten(1))


def train(seed: int, has: dict[str, bool], lr: float, sizes: list[int]) -> tuple[nn.Module, float]:
    """Train on `sizes` images per epoch. Returns the model and how many seconds the loop took."""
    utils.seed_everything(seed)
    train_set = MNISTDataset(utils.ROOT / "data", "train")
    train_set.augment = has["augment"]
    if not has["at_once"]:
        train_set = ConcatDataset([train_set])  # has no __getitems__, so images come one by one
    if has["cnn"]:
        model = Network(has["batch_norm"], has["crop"])
    else:
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    model.to(memory_format=torch.channels_last)
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1 * has["smooth"], reduction="none")
    if not has["hard"]:  # the same number of images, in passes over the whole set
        sizes = [min(IMAGES, sum(sizes) - i) for i in range(0, sum(sizes), IMAGES)]
    steps = sum(math.ceil(size / BATCH_SIZE) for size in sizes)
    optimizer, scheduler = build_optimizer(model, lr, steps)
    if not has["adamw"]:
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        scheduler = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.4)
    if not has["one_cycle"]:
        # Undo the learning rate that OneCycleLR set. Its momentum of 0.95 stays.
        optimizer.param_groups[0] |= {"lr": lr, "initial_lr": lr}
        scheduler = ConstantLR(optimizer, factor=1)
    image_losses, seconds = torch.zeros(IMAGES), 0.0
    for epoch, size in enumerate(sizes, start=1):
        utils.seed_everything(seed, epoch)
        chosen = image_losses.topk(size).indices if has["hard"] else torch.randperm(IMAGES)[:size]
        order = chosen[torch.randperm(size)].tolist()
        batches = DataLoader(train_set, BATCH_SIZE, sampler=order)
        start = time.perf_counter()
        with patch("utils.is_bfloat16_fast", lambda device: has["bfloat16"] and is_fast):
            losses, _ = train_epoch(model, batches, loss_function, optimizer, scheduler, device)
        seconds += time.perf_counter() - start
        image_losses[order] = losses
    return model, seconds


def measure(name: str, has: dict[str, bool], lr: float) -> None:
    """Train with five seeds and print a row of the table."""
    runs = [train(seed, has, lr, SIZES) for seed in range(30, 35)]
    answers = [predict(model, held_out, device) for model, _ in runs]
    accuracies = [(logits.argmax(1) == labels).float().mean().item() for logits, labels in answers]
    took = median(seconds for _, seconds in runs)
    row = f"| {name} | {took:.1f} | {sum(SIZES) / took:,.0f} | {mean(accuracies):.2%} "
    print(f"{row}| {min(accuracies):.2%} to {max(accuracies):.2%} |", flush=True)


if __name__ == "__main__":
    held_out = MNISTDataset(utils.ROOT / "data", "validation" if sys.argv[1:] else "test")
    header = f"| seconds | images/s | accuracy | lowest to highest |\n|{' --- |' * 5}"
    print(f"| with {header}")
    has = {ingredient: False for ingredient, *_ in INGREDIENTS}
    measure("(two linear layers, SGD with momentum)", has, lr=0.05)
    for ingredient, name, lr, _ in INGREDIENTS:
        has[ingredient] = True
        measure(name, has, lr)
    print(f"\n| train.py without {header}")
    for ingredient, name, _, lr in INGREDIENTS[:-1]:
        measure(name, has | {ingredient: False, "crop": False}, lr)
