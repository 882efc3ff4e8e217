"""Train a classifier of handwritten digits. START HERE: read this file from the top.

    python train.py          # all defaults: half a minute on two CPU cores
    python train.py --help   # every setting

The story is `main`: device, data, model, optimizer, log; then for each epoch train, validate,
print, log, save. In `train_epoch` stand the five statements that make up all training in PyTorch.
"""

import signal

if __name__ == "__main__":  # the imports below take seconds; Ctrl-C ends them without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import time
from math import ceil
from pathlib import Path

import torch
from tensorboardX import SummaryWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from dataset import MNISTDataset
from evaluate import hardest_figure, log_epoch, log_results, predict
from model import build_model

ROOT = Path(__file__).resolve().parent
# What suits each model. ResNet-18's learning rate is the best of those tried in docs/transfer.py.
RECIPES = {
    "cnn": {"epochs": 9, "hard_share": 0.25, "lr": 0.014},
    "resnet18": {"epochs": 2, "hard_share": 1.0, "lr": 0.002},
}
LIMITS = {"epochs": (1, 10_000), "hard_share": (0, 1), "lr": (1e-9, 1e9)}
LIMITS |= {"batch_size": (1, 60_000), "seed": (0, 2**32 - 1), "workers": (0, 256)}


def main(args: argparse.Namespace) -> None:
    """Train a model, with the settings that parse_args returns."""
    device, rank, world_size = utils.setup_distributed(args.device)  # 0 and 1 without torchrun

    # Data: of several processes each has its share of the images, and of a batch.
    with utils.main_process_first():  # it downloads and unpacks what the others then find
        train_set = MNISTDataset(args.data_dir, "train")
        validation_set = MNISTDataset(args.data_dir, "validation")
    used = min(len(train_set), 10 * args.batch_size) if args.dry_run else len(train_set)
    mine = torch.arange(rank, used - used % world_size, world_size)
    batch_size = ceil(args.batch_size / world_size)

    # Practise what is still hard: the first epoch is of all images, and most are learnt in it.
    # Later ones are of those with the highest losses.
    counts = [len(mine)] + (args.epochs - 1) * [max(1, round(args.hard_share * len(mine)))]
    steps = [ceil(count / batch_size) for count in counts]  # of each epoch
    image_losses = torch.zeros(len(train_set))  # when each was last seen

    # Model: its weights start at random, or as ImageNet has taught them.
    torch.manual_seed(args.seed)
    with utils.main_process_first():
        pretrained = args.pretrained and not args.resume  # a checkpoint brings its own weights
        model = build_model(args.model, train_set.classes, pretrained, args.freeze_backbone)
    model.to(device, memory_format=torch.channels_last)  # how convolutions like images to lie
    network = DistributedDataParallel(model) if world_size > 1 else model  # averages gradients
    network = torch.compile(network) if args.compile else network

    # Loss: label smoothing asks for 0.91 on the right class and 0.01 on the others, not 1 and 0,
    # so that logits stay small. Just that answer costs 0.50, its entropy: no loss gets below.
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")  # of each image
    optimizer, scheduler = build_optimizer(model, args.lr, total_steps=sum(steps))

    # The run's folder and its log; with --resume also the states to go on from.
    done, best = 0, 0.0  # epochs, and the best validation accuracy in them
    if args.resume:
        done, best = utils.resume(args.resume, model, optimizer, scheduler, image_losses, steps)
    step = sum(steps[:done])
    if rank == 0:
        run_dir = args.run_dir = args.resume or utils.new_run_dir(args)
        options = {"purge_step": step + 1 if done else None, "filename_suffix": f".{done}"}
        options["flush_secs"] = 1
        train_log = SummaryWriter(str(run_dir / "training"), **options)
        validation_log = SummaryWriter(str(run_dir / "validation"), **options)
        print(f"{args.model} on {device}; in {utils.short(run_dir)}\n")
        print("epoch   images: training loss, accuracy   validation loss, accuracy   images/s")

    for epoch in range(done + 1, args.epochs + 1):
        # A number for each seed, epoch, process: order, augmentation, dropout follow from it.
        torch.manual_seed((args.seed * 10_000 + epoch) * 1_000 + rank)
        hardest = mine[image_losses[mine].topk(counts[epoch - 1]).indices]
        order = hardest[torch.randperm(len(hardest))].tolist()
        loader = DataLoader(train_set, batch_size, sampler=order, num_workers=args.workers)
        batches = tqdm(loader, f"epoch {epoch}", leave=False, disable=rank > 0 or None)
        start = time.perf_counter()
        losses, rates, train_accuracy = train_epoch(
            network, batches, loss_function, optimizer, scheduler, device
        )
        speed = world_size * len(order) / (time.perf_counter() - start)
        image_losses[order] = losses
        utils.all_gather(image_losses, mine, device)
        if rank > 0:
            continue  # rank 0 alone validates, prints, logs, saves; others wait at their next step

        logits, labels = predict(model, validation_set, device)
        loss = loss_function(logits, labels).mean().item()
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        row = f"{epoch:2}/{args.epochs:<2}{world_size * len(order):10,}"
        row += f" {losses.mean():14.4f} {train_accuracy:8.2%} {loss:17.4f} {accuracy:9.2%}"
        print(f"{row} {speed:10,.0f}", flush=True)

        step += len(rates)
        train_log.add_scalar("charts/accuracy", train_accuracy, step)
        validation_log.add_scalar("charts/loss", loss, step)
        validation_log.add_scalar("charts/accuracy", accuracy, step)
        # Curves by step, some images, all weights and gradients
        log_epoch(train_log, step, losses.split(batch_size), rates, train_set, order[:40], model)

        # best.pt holds what evaluate.py needs, last.pt also what training needs to go on.
        checkpoint = {"model": args.model, "classes": train_set.classes, "epoch": epoch}
        checkpoint |= {"accuracy": accuracy, "weights": model.state_dict()}
        if accuracy >= best:
            best = accuracy
            utils.save_checkpoint(run_dir / "best.pt", checkpoint)
        checkpoint |= {"optimizer": optimizer.state_dict()["state"], "losses": image_losses}
        checkpoint |= {"step": step, "best": best, "settings": utils.as_flags(args)}
        train_log.flush()  # a run that is resumed from last.pt does not log this epoch again
        validation_log.flush()
        utils.save_checkpoint(run_dir / "last.pt", checkpoint)

    if rank == 0:
        train_log.add_figure("images/hardest", hardest_figure(train_set, image_losses), step)
        log_results(validation_log, step, validation_set, logits, labels)
        settings = {k: v for k, v in vars(args).items() if k not in utils.FOLDERS}
        train_log.add_hparams(settings, {"final/best_accuracy": best}, name="..")
        train_log.close()
        validation_log.close()
        print(f"\nBest validation accuracy: {best:.2%}. To see it all, and to test it:")
        print(f"tensorboard --logdir {utils.short(run_dir.parent)}")
        print(f"python evaluate.py --checkpoint {utils.short(run_dir / 'best.pt')}")


def build_optimizer(model: nn.Module, lr: float, total_steps: int) -> tuple:
    """Who changes the weights, and by how much in each of the training's `total_steps`."""
    # Adam gives each weight a step size of its own, from the gradients of the last 50 steps or so
    # (0.98; by default it would be 1,000, our whole training). The W is for weight decay apart from
    # the gradient: each step pulls all weights a little towards 0.
    weights = [w for w in model.parameters() if w.requires_grad]  # a frozen backbone's want none
    optimizer = torch.optim.AdamW(weights, lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    # One-cycle schedule: the learning rate rises from low, while gradients are wild, to its peak,
    # to get far, and sinks to 0, to settle. Momentum, Adam's first beta or an SGD's, goes from 0.95
    # to 0.85 and back meanwhile, whatever you set; cycle_momentum=False would leave it alone.
    total_steps = max(5, total_steps)  # in fewer there is no room for a cycle
    return optimizer, OneCycleLR(optimizer, lr, total_steps=total_steps, pct_start=0.4)


def train_epoch(model, batches, loss_function, optimizer, scheduler, device):
    """Show a model each batch of images and labels once, and correct its weights after each.

    `loss_function` gives the loss of each image. Returns those, (N,) float32 on the CPU, in the
    order of the batches; the learning rate of each step, a list; and the share of images that were
    classified correctly, while the weights were still changing.
    """
    model.train()  # batch norm takes this batch's mean and variance, and dropout is on
    # Mixed precision: where it does no harm, 16 bits a number; bfloat16 has float32's range.
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    kept, rates, correct = [], [], []  # tensors stay on the device: reading one means waiting
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)  # forward: records the graph
            losses = loss_function(logits, labels)  # how wrong, image by image
            loss = losses.mean()  # and in one number
        optimizer.zero_grad()  # forget the last step's gradients: backward() adds to them
        loss.backward()  # walk the graph back: a gradient for each weight
        optimizer.step()  # move each weight against its gradient

        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
        kept.append(losses.detach())
        correct.append(logits.argmax(dim=1) == labels)
    return torch.cat(kept).cpu(), rates, torch.cat(correct).float().mean().item()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings, from a list of flags, by default the command line's."""
    parser = argparse.ArgumentParser(description="Train a classifier of handwritten digits.")
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    flag("--model", choices=RECIPES, default="cnn", help="network to train (cnn)")
    flag("--pretrained", action=switch, default=True, help="resnet18 starts from ImageNet (yes)")
    flag("--freeze-backbone", action=switch, default=False, help="train resnet18's head alone (no)")
    flag("--epochs", type=int, metavar="N", help="the first is of all images (9, resnet18: 2)")
    flag("--hard-share", type=float, metavar="X", help="of images in later epochs (0.25, 1)")
    flag("--lr", type=float, metavar="X", help="peak learning rate (0.014, resnet18: 0.002)")
    flag("--batch-size", type=int, default=128, metavar="N", help="images a step (128)")
    flag("--seed", type=int, default=0, metavar="N", help="decides all that is random (0)")
    flag("--device", choices=utils.DEVICES, default="auto", help="where to compute (the fastest)")
    flag("--workers", type=int, default=0, metavar="N", help="more processes to load data (0)")
    flag("--compile", action=switch, default=False, help="torch.compile; for long runs, GPUs (no)")
    flag("--dry-run", action=switch, default=False, help="ten steps, to see if all works (no)")
    flag("--data-dir", type=Path, default=ROOT / "data", help="folder of the MNIST files (data)")
    flag("--out-dir", type=Path, default=ROOT / "checkpoints", help="folder of runs (checkpoints)")
    flag("--resume", nargs="?", const="newest", metavar="RUN", help="go on with a stopped run")
    args = utils.parse_and_resume(parser, argv)
    for name, value in RECIPES[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.epochs = 1 if args.dry_run else args.epochs
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')}: use a number from {low} to {high:,}")
    if args.freeze_backbone and args.model != "resnet18":
        parser.error("--freeze-backbone needs a model that has one: --model resnet18")
    return args


if __name__ == "__main__":
    utils.run_script(parse_args, main)
