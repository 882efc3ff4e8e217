"""Train on several GPUs or machines at once: train.py's `main` with DistributedDataParallel (DDP).

    torchrun --nproc-per-node=2 -m examples.distributed    # two GPUs, or two processes on the CPU
    torchrun --nproc-per-node=2 -m examples.distributed --help

torchrun starts this program several times over. Each process has its own copy of the model and
learns from its own share of every batch, and before any copy takes a step, all of them average
their gradients. So they all take the same step, and their weights stay identical.

The lines marked `# DDP` were added or changed. Nothing else in `main` differs from train.py's, and
a test makes sure of it. docs/several-machines.md explains them one by one.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to import from the folder above
import utils
from dataset import MNISTDataset
from evaluate import predict
from model import build_model
from train import build_optimizer, parse_args, train_epoch

# The start of the command that resumes a run.
PROGRAM = ("torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), Path(__file__))


def main(args: argparse.Namespace) -> Path | None:  # DDP
    """Train a model with the settings from `parse_args`. Returns the run's folder."""
    # Use a GPU if there is one. Seed the random numbers, so that a run can be repeated.
    device, rank, world_size = join_processes(args.device)  # DDP
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
    # DDP: all processes must take the same number of steps, or one would wait for the rest forever.
    batch_size = math.ceil(args.batch_size / world_size)  # DDP
    epoch_sizes = [max(1, size // world_size) * world_size for size in epoch_sizes]  # DDP

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
    model = DistributedDataParallel(model)  # DDP: averages the gradients of all processes
    options = {"purge_step": step + 1, "flush_secs": 1}  # hide what an interrupted epoch logged
    train_log = None  # DDP
    if rank == 0:  # DDP: only the first process prints, logs and saves
        run_dir = utils.open_run_dir(args, device, PROGRAM)  # DDP
        train_log = SummaryWriter(str(run_dir / "training"), **options)  # DDP
        validation_log = SummaryWriter(str(run_dir / "validation"), **options)  # DDP
        print("epoch   images  train loss  accuracy  validation loss  accuracy  images/s")  # DDP

    for epoch in range(first_epoch, args.epochs + 1):
        # Use the hardest images, in random order. Reseed, so resumed runs draw the same numbers.
        utils.seed_everything(args.seed, epoch)
        hardest = image_losses.topk(epoch_sizes[epoch - 1]).indices
        order = hardest[torch.randperm(len(hardest))].tolist()
        share = order[rank::world_size]  # DDP: every process drew the same order
        if rank > 0:  # DDP: now each draws its own distortions
            utils.seed_everything(args.seed + 1_000_000 * rank, epoch)  # DDP
        loader = DataLoader(train_set, batch_size, sampler=share, **loading)  # DDP
        batches = tqdm(loader, f"epoch {epoch}", leave=False, disable=rank > 0 or None)  # DDP
        start = time.perf_counter()
        losses, train_accuracy = train_epoch(
            model, batches, loss_function, optimizer, scheduler, device, train_log, step
        )
        speed = len(order) / (time.perf_counter() - start)
        losses = all_gather(losses, device)  # DDP
        train_accuracy = all_gather(torch.tensor([train_accuracy]), device).mean().item()  # DDP
        image_losses[order] = losses
        step += len(loader)
        if rank > 0:  # DDP: rank 0 validates and saves; the others wait at their next step
            continue  # DDP

        # Validate: how well does the model do on images that it doesn't learn from?
        logits, labels = predict(model.module, validation_set, device)  # DDP
        train_loss, loss = losses.mean().item(), loss_function(logits, labels).mean().item()
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        row = f"{epoch:2}/{args.epochs:<2} {len(order):8,} {train_loss:11.4f} {train_accuracy:9.2%}"
        print(f"{row} {loss:16.4f} {accuracy:9.2%} {speed:9,.0f}", flush=True)
        validation_log.add_scalar("epoch/loss", loss, step)
        validation_log.add_scalar("epoch/accuracy", accuracy, step)

        # Save: evaluate.py needs best.pt, and --resume needs last.pt.
        checkpoint = {"model": args.model, "classes": train_set.classes, "epoch": epoch}
        checkpoint |= {"accuracy": accuracy, "weights": model.module.state_dict()}  # DDP
        if accuracy >= best_accuracy:
            best_accuracy = accuracy
            utils.save_checkpoint(run_dir / "best.pt", checkpoint)
        checkpoint |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        checkpoint |= {"step": step, "image_losses": image_losses, "best_accuracy": best_accuracy}
        checkpoint |= {"settings": utils.plain_settings(args)}
        utils.save_checkpoint(run_dir / "last.pt", checkpoint)
        utils.log_images_and_weights(train_log, train_set, order[:40], model.module, step)  # DDP

    dist.barrier()  # DDP: wait for rank 0, because nobody may leave while messages are in flight
    dist.destroy_process_group()  # DDP
    if rank > 0:  # DDP
        return None  # DDP

    # Draw some pictures for TensorBoard, and say what to do next.
    train_log.add_figure("hardest", utils.draw_hardest(train_set, image_losses), step)
    validation_log.add_figure("confusion", utils.draw_confusion(logits, labels), step)
    validation_log.add_figure("mistakes", utils.draw_mistakes(validation_set, logits, labels), step)
    train_log.close()
    validation_log.close()
    utils.print_next_steps(run_dir, args.data_dir, best_accuracy)
    return run_dir


def join_processes(name: str) -> tuple[torch.device, int, int]:
    """Choose this process's device, and connect to the others that torchrun started.

    Returns the device, this process's number, counting from 0 (its *rank*), and how many
    processes there are (the *world size*).
    """
    if not dist.is_torchelastic_launched():
        raise utils.UserError("Start this with torchrun --nproc-per-node=2 -m examples.distributed")
    gpus, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "cpu" or (name == "auto" and gpus == 0):
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    elif name != "mps" and processes <= gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # each process has its own GPU
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        found = f"processes: {processes}, NVIDIA or AMD GPUs: {gpus}"
        raise utils.UserError(f"Each process needs its own GPU ({found}). Or use --device cpu")
    return device, dist.get_rank(), dist.get_world_size()


def all_gather(share: Tensor, device: torch.device) -> Tensor:
    """Collect every process's share into one tensor on the CPU, the same in each of them.

    `share` is (N / world_size,): process r has items r, r + world_size, r + 2 * world_size, ... of
    the whole. Returns all N items, in their original order.
    """
    share = share.to(device)  # NCCL can only send from GPU to GPU
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, share)
    return torch.stack(shares, dim=1).flatten().cpu()


if __name__ == "__main__":
    utils.run(parse_args, main)
