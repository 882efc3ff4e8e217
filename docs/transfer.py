"""How much does a pretrained network help, and how best to fine-tune it? See fine-tuning.md.

    python -m docs.transfer                # prints its table; 12 to 20 minutes on two cores
    python -m docs.transfer --validation   # on validation images, to choose learning rates

First, a ResNet-18 learns the digits 0 to 4. Then another one learns 5 to 9 from a few images of
each, starting from the first one's weights or from scratch.
"""

import sys

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from dataset import MNISTDataset
from evaluate import predict
from model import ResNet18
from train import build_optimizer, train_epoch
from utils import ROOT

SIZE, BATCH_SIZE, SEEDS = 28, 25, 3  # pixels per side, images per step
EPOCHS = {10: 30, 50: 15, 500: 5}  # images of each digit: epochs
RATES = {  # peak learning rates; we tried 2 to 4 each, and these did best on validation images
    "from random weights": 0.002,
    "all weights, one rate": 0.002,
    "all weights, two rates": 0.01,  # for the head; the backbone gets a tenth of it
    "frozen backbone": 0.03,
    "frozen, batch norm not in eval": 0.03,
}
CPU = torch.device("cpu")


def five_digits(split: str, first: int, count: int | None = None) -> MNISTDataset:
    """Five digits, starting with `first`, as classes 0 to 4: `count` images of each, or all."""
    dataset = MNISTDataset(ROOT / "data", split)
    order = torch.randperm(len(dataset))
    digits = [order[dataset.labels[order] == digit][:count] for digit in range(first, first + 5)]
    chosen = torch.cat(digits)
    dataset.images, dataset.labels = dataset.images[chosen], dataset.labels[chosen] - first
    return dataset


def learn(way: str, dataset: MNISTDataset, epochs: int, backbone=None) -> ResNet18:
    """Train a new model on five digits in the given `way`; `backbone` has learnt the other five."""
    model = ResNet18(5, freeze_backbone="frozen" in way, size=SIZE)
    if way != "from random weights":
        model.backbone.load_state_dict(backbone.state_dict())
    if "not in eval" in way:
        model.freeze_backbone = False  # train() now reaches the batch norm; the weights stay frozen

    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True)
    lr, steps = RATES[way], epochs * len(loader)
    optimizer, scheduler = build_optimizer(model, lr, steps)
    if "two rates" in way:  # parameter groups, each with its own learning rate
        parts = [(model.backbone, lr / 10), (model.head, lr)]
        groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in parts]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        scheduler = OneCycleLR(optimizer, [lr / 10, lr], total_steps=steps, pct_start=0.4)
    loss_function = nn.CrossEntropyLoss(reduction="none")
    for _ in range(epochs):
        train_epoch(model, loader, loss_function, optimizer, scheduler, CPU)
    return model


if __name__ == "__main__":
    held_out = five_digits("validation" if "--validation" in sys.argv else "test", first=5)
    accuracies = {way: dict.fromkeys(EPOCHS, 0.0) for way in RATES}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        known = learn("from random weights", five_digits("train", first=0), epochs=1).backbone
        for count, epochs in EPOCHS.items():
            few = five_digits("train", 5, count)
            for way, row in accuracies.items():
                model = learn(way, few, epochs, known)
                logits, labels = predict(model, held_out, CPU)
                accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
                print(f"seed {seed}, {count} images per digit, {way}: {accuracy:.2%}", flush=True)
                row[count] += accuracy / SEEDS
    for way, row in accuracies.items():
        print(f"| {way} | " + " | ".join(f"{mean:.1%}" for mean in row.values()) + " |")
