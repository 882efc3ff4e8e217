"""Teach a small network to read handwritten digits. This is the file to start with.

    python train.py          # all defaults: about 15 seconds on two CPU cores
    python train.py --help   # everything you can change

Read it from the top. `main` tells the whole story: get the data, build a model, choose a loss and
an optimizer, and then loop, epoch after epoch. (An *epoch* is one pass over the training images.
By default, later epochs skip the images that have become easy.)
`train_epoch`, right below it, is the heart of it all: a handful of lines that you'll meet again in
nearly every PyTorch project.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tensorboardX import SummaryWriter
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import utils
from dataset import MNISTDataset
from evaluate import predict
from model import build_model

# Good settings for each model. We chose ResNet-18's learning rate with docs/transfer.py.
RECIPES = {
    "cnn": {"epochs": 8, "hard_share": 0.25, "lr": 0.014},
    "resnet18": {"epochs": 2, "hard_share": 1.0, "lr": 0.002},
}


def main(args: argparse.Namespace) -> Path:
    """Train a model with the settings from `parse_args`. Returns the run's folder."""
    # Use a GPU if there is one. Seed the random numbers, so that a run can be repeated.
    device = utils.choose_device(args.device)
    utils.seed_everything(args.seed)

    # Data: images to learn from, and others, held back, to check that the model isn't memorising.
    train_set = MNISTDataset(args.data_dir, "train")
    validation_set = MNISTDataset(args.data_dir, "validation")
    # Pinned memory lets copies to a GPU happen in the background, while it computes.
    loading = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}

    # Model: a function with many adjustable numbers, its weights, which start random or pretrained.
    pretrained = args.pretrained and not args.resume  # a resumed run brings its own weights
    model = build_model(args.model, train_set.classes, pretrained, args.freeze_backbone).to(device)
    if device.type != "mps":  # channels_last gave wrong gradients there (PyTorch issue 175189)
        model.to(memory_format=torch.channels_last)  # the layout in which convolutions run faster
    predict(model, Subset(validation_set, [0]), device)  # try one image: better to fail now

    # Loss: how wrong is the model? Label smoothing (be 91% sure, not 100%) curbs overconfidence.
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")  # one loss per image

    # Hard example mining: the first epoch shows every image, and later epochs show only the ones
    # that the model found hardest. Why practise what you already know?
    image_losses = torch.zeros(len(train_set))  # each image's loss when the model last saw it
    used = min(len(train_set), 10 * args.batch_size) if args.dry_run else len(train_set)
    epoch_sizes = [used] + (args.epochs - 1) * [max(1, round(args.hard_share * used))]

    # Optimizer: moves the weights. Scheduler: sets the learning rate, which is how far they move.
    steps = sum(math.ceil(size / args.batch_size) for size in epoch_sizes)
    optimizer, scheduler = build_optimizer(model, args.lr, steps)

    # Each run has its own folder. To resume a run, restore everything that it saved.
    first_epoch, step, best_accuracy = 1, 0, 0.0
    if args.resume:
        checkpoint = utils.load_checkpoint(args.resume)
        with utils.must_fit(checkpoint, model, image_losses):
            model.load_state_dict(checkpoint["weights"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scheduler.load_state_dict(checkpoint["scheduler"])
        image_losses, step = checkpoint["image_losses"], checkpoint["step"]
        first_epoch, best_accuracy = checkpoint["epoch"] + 1, checkpoint["best_accuracy"]
    if args.compile:
        model.compile()
    options = {"purge_step": step + 1, "flush_secs": 1}  # hide what an interrupted epoch logged
    run_dir = utils.open_run_dir(args, device)
    train_log = SummaryWriter(str(run_dir / "training"), **options)
    validation_log = SummaryWriter(str(run_dir / "validation"), **options)
    print("epoch   images  train loss  accuracy  validation loss  accuracy  images/s")

    for epoch in range(first_epoch, args.epochs + 1):
        # Use the hardest images, in random order. Reseed, so resumed runs draw the same numbers.
        utils.seed_everything(args.seed, epoch)
        hardest = image_losses.topk(epoch_sizes[epoch - 1]).indices
        order = hardest[torch.randperm(len(hardest))].tolist()
        loader = DataLoader(train_set, args.batch_size, sampler=order, **loading)
        batches = tqdm(loader, f"epoch {epoch}", leave=False, disable=None)
        start = time.perf_counter()
        losses, train_accuracy = train_epoch(
            model, batches, loss_function, optimizer, scheduler, device, train_log, step
        )
        speed = len(order) / (time.perf_counter() - start)
        image_losses[order] = losses
        step += len(loader)

        # Validate: how well does the model do on images that it doesn't learn from?
        logits, labels = predict(model, validation_set, device)
        train_loss, loss = losses.mean().item(), loss_function(logits, labels).mean().item()
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        row = f"{epoch:2}/{args.epochs:<2} {len(order):8,} {train_loss:11.4f} {train_accuracy:9.2%}"
        print(f"{row} {loss:16.4f} {accuracy:9.2%} {speed:9,.0f}", flush=True)
        validation_log.add_scalar("epoch/loss", loss, step)
        validation_log.add_scalar("epoch/accuracy", accuracy, step)

        # Save: evaluate.py needs best.pt, and --resume needs last.pt.
        checkpoint = {"model": args.model, "classes": train_set.classes, "epoch": epoch}
        checkpoint |= {"accuracy": accuracy, "weights": model.state_dict()}
        if accuracy >= best_accuracy:
            best_accuracy = accuracy
            utils.save_checkpoint(run_dir / "best.pt", checkpoint)
        checkpoint |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        checkpoint |= {"step": step, "image_losses": image_losses, "best_accuracy": best_accuracy}
        checkpoint |= {"settings": utils.plain_settings(args)}
        utils.save_checkpoint(run_dir / "last.pt", checkpoint)
        utils.log_images_and_weights(train_log, train_set, order[:40], model, step)

    # Draw some pictures for TensorBoard, and say what to do next.
    train_log.add_figure("hardest", utils.draw_hardest(train_set, image_losses), step)
    validation_log.add_figure("confusion", utils.draw_confusion(logits, labels), step)
    validation_log.add_figure("mistakes", utils.draw_mistakes(validation_set, logits, labels), step)
    train_log.close()
    validation_log.close()
    utils.print_next_steps(run_dir, args.data_dir, best_accuracy)
    return run_dir


def train_epoch(model, batches, loss_function, optimizer, scheduler, device, log=None, step=0):
    """Show the model every batch once, and move its weights a little after each.

    `loss_function` returns one loss per image. Every tenth step, the mean loss and the learning
    rate go into `log`; `step` is the number of steps taken in earlier epochs.

    Returns the losses, (N,) float32 on the CPU in the order of the batches, and the accuracy: the
    share of images classified correctly while the weights were still changing.
    """
    model.train()  # batch norm uses this batch's statistics (and dropout, if any, is on)
    # Mixed precision: do most of the maths in 16 bits (bfloat16), not 32, where that is faster.
    bfloat16 = utils.is_bfloat16_fast(device)
    all_losses, all_correct = [], []
    for images, labels in batches:
        step += 1
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)  # forward pass; autograd takes notes for backward()
            losses = loss_function(logits, labels)  # one loss per image
            loss = losses.mean()  # the number that training makes smaller
        optimizer.zero_grad()  # clear the last step's gradients, or backward() will add to them
        loss.backward()  # backpropagation: which way should each weight move?
        optimizer.step()  # gradient descent: move each weight a little that way
        if log and step % 10 == 0:
            log.add_scalar("step/loss", loss.item(), step)  # item() waits for the GPU: do it rarely
            log.add_scalar("step/learning_rate", optimizer.param_groups[0]["lr"], step)
        scheduler.step()  # the next step's learning rate
        all_losses.append(losses.detach())  # keep the numbers, drop autograd's notes
        all_correct.append(logits.argmax(dim=1) == labels)  # the highest logit is the answer
    losses, accuracy = torch.cat(all_losses).cpu(), torch.cat(all_correct).float().mean().item()
    if log:
        log.add_scalar("epoch/loss", losses.mean().item(), step)
        log.add_scalar("epoch/accuracy", accuracy, step)
    return losses, accuracy


def build_optimizer(model: nn.Module, lr: float, total_steps: int):
    """Create the optimizer and its learning-rate schedule. `lr` is the schedule's peak."""
    # Adam divides each weight's step by the typical size of its recent gradients, here from
    # the last 50 steps or so (beta2 = 0.98). The usual 1,000 would be most of our training.
    # The W in AdamW is for weight decay, a steady pull on every weight towards 0.
    weights = [w for w in model.parameters() if w.requires_grad]  # leaves out a frozen backbone
    optimizer = torch.optim.AdamW(weights, lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    # One cycle: start slowly while the gradients are wild, speed up to cover the ground, and
    # then slow down almost to 0 to settle. Momentum (Adam's beta1) does the opposite: OneCycleLR
    # takes it from 0.95 down to 0.85 and back, so the 0.9 above doesn't count.
    total_steps = max(5, total_steps)  # OneCycleLR needs a few steps to go up and down
    return optimizer, OneCycleLR(optimizer, lr, total_steps=total_steps, pct_start=0.4)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the settings from the command line, or from a list of flags."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Train a digit classifier.", formatter_class=form)
    add, switch, number = parser.add_argument, argparse.BooleanOptionalAction, utils.number
    add("--model", choices=RECIPES, default="cnn", help="network to train; sets other defaults too")
    add("--pretrained", action=switch, default=True, help="start resnet18 from ImageNet weights")
    add("--freeze-backbone", action=switch, default=False, help="train only resnet18's last layer")
    add("--epochs", type=number(int, 1), metavar="N", help="number of epochs")
    add("--hard-share", type=number(float, 0, 1), metavar="X", help="share of data from epoch 2 on")
    add("--lr", type=number(float, 1e-12), metavar="X", help="peak learning rate")
    add("--batch-size", type=number(int, 1), default=128, metavar="N", help="images per step")
    add("--seed", type=number(int, 0, 10**12), default=0, metavar="N", help="random seed")
    add("--device", choices=utils.DEVICES, default="auto", help="device to run on")
    add("--workers", type=number(int, 0), default=0, metavar="N", help="processes that load data")
    add("--compile", action=switch, default=False, help="use torch.compile; pays off in long runs")
    add("--dry-run", action=switch, default=False, help="try ten steps, to see if everything works")
    add("--data-dir", type=Path, default=utils.ROOT / "data", help="folder with the MNIST files")
    add("--out-dir", type=Path, default=utils.ROOT / "checkpoints", help="folder for runs")
    add("--resume", nargs="?", const="newest", metavar="RUN", help="resume an unfinished run")

    # Later settings win: first the model's recipe, then the resumed run's, then the command line.
    # We parse twice because --model and --resume decide what the other flags' defaults are.
    parser.set_defaults(**RECIPES["cnn"])
    args = parser.parse_args(argv)
    checkpoint, settings = utils.find_run(args.resume, args.out_dir)
    parser.set_defaults(**RECIPES[args.model] | settings)
    args = parser.parse_args(argv)
    args.resume = checkpoint
    utils.check_unchanged(args, settings)
    args.epochs = 1 if args.dry_run else args.epochs
    if args.freeze_backbone and args.model != "resnet18":
        parser.error("--freeze-backbone needs a model that has a backbone: --model resnet18")
    return args


if __name__ == "__main__":
    utils.run(parse_args, main)
