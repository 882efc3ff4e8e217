"""Train a classifier of handwritten digits. START HERE: read this file from the top.

    python train.py          # all defaults
    python train.py --help   # every setting

The story: settings, data, model, optimizer and schedule, log; then for each epoch train, validate,
log, save. What an import brings in is one file away: dataset.py, model.py, evaluate.py, utils.py.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path

import torch
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from tqdm import tqdm

from dataset import MNISTDataset, make_loader
from evaluate import predict
from model import MODELS, build_model, parameter_groups
from utils import DEVICES, choose_device, save_checkpoint, seed_epoch, short

ROOT = Path(__file__).resolve().parent


def setting(default, help, **for_argparse):
    """A field of Config that is also a flag on the command line: `--help` shows its text."""
    return field(default=default, metadata={"help": help, **for_argparse})


# What suits each model, where no flag says otherwise. Weights that are nearly right want smaller
# steps, and fewer of them, than weights that start at random.
RECIPES = {
    "cnn": {"epochs": 5, "lr": 0.01},
    "resnet18": {"epochs": 2, "lr": 0.002},
}


@dataclass
class Config:
    """Every setting, with its unit and the reason for its default."""

    model: str = setting("cnn", "network to train", choices=MODELS)
    pretrained: bool = setting(True, "start resnet18 from random weights, not ImageNet's")
    freeze_backbone: bool = setting(False, "train only the last layer of resnet18, its head")
    epochs: int = setting(None, "passes over the training images", type=int)
    lr: float = setting(None, "peak learning rate, of the head if there is one", type=float)
    batch_size: int = setting(128, "images a step; fewer are noisy, more waste a pass")
    seed: int = setting(0, "decides all that is random: same seed, same weights")
    device: str = setting("auto", "where to compute; auto: the fastest there is", choices=DEVICES)
    workers: int = setting(0, "processes that load data; MNIST is quick without")
    compile: bool = setting(False, "torch.compile the model; pays off on a GPU and long runs")
    dry_run: bool = setting(False, "a few batches of one epoch: try the whole path in seconds")
    data_dir: Path = setting(ROOT / "data", "folder of the MNIST files")
    checkpoint_dir: Path = setting(ROOT / "checkpoints", "folder for best.pt and last.pt")
    log_dir: Path = setting(ROOT / "runs", "folder for TensorBoard logs")

    def __post_init__(self):
        for name, value in RECIPES[self.model].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


def main(config: Config) -> None:
    device = choose_device(config.device)

    # Data: a Dataset knows single samples, a DataLoader makes shuffled batches of them.
    train_set = MNISTDataset(config.data_dir, "train", config.seed)
    validation_set = MNISTDataset(config.data_dir, "validation")
    train_loader = make_loader(train_set, config.batch_size, shuffle=True, workers=config.workers)
    validation_loader = make_loader(validation_set, batch_size=1_000)
    epochs, steps = config.epochs, len(train_loader)
    if config.dry_run:
        epochs, steps = 1, min(steps, 10)

    # Model: its first weights are random too. channels_last keeps a pixel's channels side by side
    # in memory, which convolutions are faster with.
    torch.manual_seed(config.seed)
    options = {"pretrained": config.pretrained, "freeze_backbone": config.freeze_backbone}
    model = build_model(config.model, **options)
    model.to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if config.compile else model

    # Loss, optimizer, schedule. Label smoothing asks for 91 % certainty, not 100: it keeps the
    # logits small. The one-cycle schedule warms the learning rate up, then lets it sink to zero.
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    groups = parameter_groups(model, config.lr)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=epochs * steps, pct_start=0.25
    )

    # Log: TensorBoard shows it with `tensorboard --logdir runs`.
    run_dir = config.log_dir / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.model}"
    writer = SummaryWriter(str(run_dir))
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    threads = torch.get_num_threads()
    print(f"Device       {device} ({threads} CPU threads, PyTorch {torch.__version__})")
    print(f"Data         {len(train_set):,} training and {len(validation_set):,} validation images")
    print(f"Model        {config.model}, {total:,} parameters, {trained:,} to train")
    print(f"Training     {epochs} epochs of {steps} steps of {config.batch_size} images")
    print(f"             learning rate up to {' and '.join(f'{rate:g}' for rate in rates)}")
    print(f"Log          {short(run_dir)}")
    print(f"Checkpoints  {short(config.checkpoint_dir)}")
    print("\n          --- training ---   -- validation --")
    print("  epoch   loss    accuracy   loss    accuracy   images/s")

    best_accuracy, best_epoch = 0.0, 0
    for epoch in range(1, epochs + 1):
        seed_epoch(config.seed, epoch)
        train_set.set_epoch(epoch)
        batches = islice(train_loader, steps)
        bar = tqdm(batches, f"epoch {epoch}/{epochs}", steps, leave=False, disable=None)
        start = time.perf_counter()
        train_loss, train_accuracy, images = train_epoch(
            network, bar, loss_function, optimizer, schedule, device
        )
        speed = images / (time.perf_counter() - start)

        logits, labels = predict(network, validation_loader, device)
        loss = loss_function(logits, labels).item()
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        print(
            f"{epoch:3}/{epochs:<3}   {train_loss:.4f}  {train_accuracy:8.2%}   "
            f"{loss:.4f}  {accuracy:8.2%}   {speed:8,.0f}"
        )
        writer.add_scalar("loss/training", train_loss, epoch)
        writer.add_scalar("loss/validation", loss, epoch)
        writer.add_scalar("accuracy/training", train_accuracy, epoch)
        writer.add_scalar("accuracy/validation", accuracy, epoch)
        writer.add_scalar("learning_rate", schedule.get_last_lr()[0], epoch)
        writer.add_scalar("images_per_second", speed, epoch)

        # best.pt holds what evaluate.py needs, last.pt what training would need to go on.
        checkpoint = {
            "model": config.model,
            "weights": model.state_dict(),
            "epoch": epoch,
            "validation_accuracy": accuracy,
            "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
            "torch": str(torch.__version__),
        }
        if accuracy >= best_accuracy:
            best_accuracy, best_epoch = accuracy, epoch
            save_checkpoint(config.checkpoint_dir / "best.pt", checkpoint)
        checkpoint |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        save_checkpoint(config.checkpoint_dir / "last.pt", checkpoint)

    # Where to look next.
    writer.close()
    best = short(config.checkpoint_dir / "best.pt")
    print(f"\nBest validation accuracy: {best_accuracy:.2%} (epoch {best_epoch}), saved in {best}")
    is_default = config.checkpoint_dir == Config.checkpoint_dir
    print(f"Next: python evaluate.py{'' if is_default else f' --checkpoint {best}'}")


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_function: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> tuple[float, float, int]:
    """Show the model each batch once, and correct its weights after each.

    Returns:
        The mean loss, the share of images classified correctly (0 to 1), both while the weights
        were changing and on augmented images, and the number of images.
    """
    model.train()  # batch norm uses this batch's own mean and variance
    images_seen = 0
    total_loss = torch.zeros((), device=device)  # sums stay on the device: reading one would make
    total_correct = torch.zeros((), device=device)  # the CPU wait for the GPU in each step
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)

        logits = model(images)  # forward: records the graph
        loss = loss_function(logits, labels)  # one number: how wrong
        optimizer.zero_grad()  # forget the last step's gradients
        loss.backward()  # walk the graph back: a gradient for each weight
        optimizer.step()  # move each weight against its gradient

        schedule.step()
        images_seen += len(images)
        total_loss += loss.detach() * len(images)
        total_correct += (logits.detach().argmax(dim=1) == labels).sum()
    return total_loss.item() / images_seen, total_correct.item() / images_seen, images_seen


def parse_args() -> Config:
    """Read the command line: a flag for each field of Config."""
    parser = argparse.ArgumentParser(description="Train a classifier of handwritten digits.")
    for f in fields(Config):
        flag, options = f.name.replace("_", "-"), dict(f.metadata)
        if f.type is bool:  # a switch: --compile turns it on, --no-pretrained off
            flag = f"no-{flag}" if f.default else flag
            action = "store_false" if f.default else "store_true"
            parser.add_argument(f"--{flag}", action=action, dest=f.name, **options)
            continue
        default = f.default.name if f.type is Path else f.default
        if default is None:
            default = ", ".join(f"{recipe[f.name]} for {name}" for name, recipe in RECIPES.items())
        options = {"type": f.type, "default": f.default} | options
        options["help"] += f" (default: {default})"
        parser.add_argument(f"--{flag}", **options)
    config = Config(**vars(parser.parse_args()))
    if config.freeze_backbone and config.model == "cnn":
        parser.error("--freeze-backbone needs a model with a backbone: --model resnet18")
    return config


if __name__ == "__main__":
    main(parse_args())
