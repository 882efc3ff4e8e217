"""Train a classifier of handwritten digits. START HERE: read this file from the top.

    python train.py          # all defaults
    python train.py --help   # every setting

The story: settings, data, model, optimizer and schedule, log; then for each epoch train, validate,
log, save. What an import brings in is one file away: dataset.py, model.py, evaluate.py and so on.
"""

import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

import devices
import utils
from dataset import MNISTDataset, make_loader
from evaluate import measure, predict
from model import MODELS, build_model, parameter_groups
from pictures import log_end, log_epoch, log_start

ROOT = Path(__file__).resolve().parent


def setting(default, allowed, help):
    """A field of Config that is also a flag on the command line: `--help` shows its text."""
    kind = "choices" if isinstance(allowed, tuple) else "type"
    return field(default=default, metadata={"help": help, kind: allowed})


FOLDERS = ("data_dir", "checkpoint_dir", "log_dir")
MAY_CHANGE = {"device", "workers", "compile", *FOLDERS}  # when a run is resumed

# What suits each model, where no flag says otherwise. Weights that are nearly right want smaller
# steps, and fewer of them, than weights that start at random.
RECIPES = {
    "cnn": {"epochs": 5, "lr": 0.01},
    "resnet18": {"epochs": 2, "lr": 0.002},
}


@dataclass
class Config:
    """Every setting, with a line on what it is and, where there is one, why its default."""

    model: str = setting("cnn", MODELS, "network to train")
    # A field that is True has a flag that turns it off, here --no-pretrained, and help for that.
    pretrained: bool = setting(True, bool, "start resnet18 from random weights, not ImageNet's")
    freeze_backbone: bool = setting(False, bool, "train only the last layer of resnet18, its head")
    epochs: int = setting(None, utils.whole(1, 10_000), "passes over the training images")
    lr: float = setting(None, utils.positive, "peak learning rate, of the head if there is one")
    batch_size: int = setting(128, utils.whole(1, 55_000), "images a step, in all processes")
    seed: int = setting(0, utils.whole(0, 2**32 - 1), "decides all that is random")
    device: str = setting("auto", devices.NAMES, "where to compute; auto: the fastest there is")
    workers: int = setting(0, utils.whole(0, 256), "processes that load data; 0: this one")
    compile: bool = setting(False, bool, "torch.compile the model; pays off on a GPU and long runs")
    dry_run: bool = setting(False, bool, "a few batches of one epoch: the whole path in seconds")
    data_dir: Path = setting(ROOT / "data", utils.folder, "for the MNIST files")
    checkpoint_dir: Path = setting(ROOT / "checkpoints", utils.folder, "for best.pt and last.pt")
    log_dir: Path = setting(ROOT / "runs", utils.folder, "for TensorBoard logs")

    def __post_init__(self):
        for name, value in RECIPES[self.model].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in FOLDERS:
            setattr(self, name, Path(getattr(self, name)).resolve())

    def to_save(self) -> dict[str, str | float | bool]:
        """The settings for a checkpoint, without default folders: a project may be moved."""
        settings = {name: value for name, value in asdict(self).items() if name not in FOLDERS}
        own = {name: getattr(self, name) for name in FOLDERS}
        return settings | {n: str(v) for n, v in own.items() if v != getattr(Config, n)}


def main(config: Config, last: dict | None = None) -> None:
    """Train a model; with the checkpoint `last` go on where that run stopped."""
    best_path, last_path = config.checkpoint_dir / "best.pt", config.checkpoint_dir / "last.pt"
    resume_command = f"python {utils.short(ROOT / 'train.py')} --resume"
    evaluate_command = f"python {utils.short(ROOT / 'evaluate.py')}"
    if config.checkpoint_dir != Config.checkpoint_dir:
        resume_command += f" --checkpoint-dir {utils.short(config.checkpoint_dir)}"
        evaluate_command += f" --checkpoint {utils.short(best_path)}"

    # On a first reading pass over guard, rank and processes. The guard turns Ctrl-C and a full disk
    # into one line. Where torchrun has started several processes, they share the work, and rank 0
    # has the say; usually there is one, and its share is everything.
    guard = utils.Guard(resume_command, saved=last["epoch"] if last else 0)
    device, rank, processes = devices.join_processes(devices.choose_device(config.device))

    # Data: a Dataset knows single samples, a DataLoader makes shuffled batches of them.
    with devices.one_after_the_other():  # the first process unpacks what the others then find
        train_set = MNISTDataset(config.data_dir, "train", config.seed)
        validation_set = MNISTDataset(config.data_dir, "validation")
    train_loader = make_loader(
        train_set,
        config.batch_size,
        shuffle=True,
        workers=config.workers,
        rank=rank,
        processes=processes,
        pin_memory=device.type == "cuda",
    )
    share = torch.arange(len(validation_set)).tensor_split(processes)[rank].tolist()
    validation_loader = make_loader(Subset(validation_set, share), batch_size=1_000)
    epochs, steps = config.epochs, len(train_loader)
    if config.dry_run:
        epochs, steps = 1, min(steps, 10)
    if guard.saved >= epochs:
        print(f"The run in {utils.short(last_path)} is finished. Next: {evaluate_command}")
        return devices.leave_processes()

    # Model: its first weights are random too.
    torch.manual_seed(config.seed)
    pretrained = config.pretrained and not last  # a checkpoint has weights of its own
    with devices.one_after_the_other():  # the first process downloads the weights
        model = build_model(
            config.model, pretrained=pretrained, freeze_backbone=config.freeze_backbone
        )
    if last:
        utils.load_weights(model, last, last_path)
    network = devices.prepare(model, device, config.compile)  # model's weights, made fast

    # Loss, optimizer, schedule. Label smoothing asks for 91 % certainty, not 100: it keeps the
    # logits small. The one-cycle schedule warms the learning rate up, then lets it sink to zero.
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
    groups = parameter_groups(model, config.lr, config.pretrained)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=epochs * steps, pct_start=0.25
    )
    if last:
        optimizer.load_state_dict(last["optimizer"])
        schedule.load_state_dict(last["schedule"])

    # Places to write to. The log is for TensorBoard: `tensorboard --logdir runs`.
    if rank == 0:
        lock = utils.lock_folder(config.checkpoint_dir)
        new = None if last else utils.new_run_dir(config.log_dir, config.model)
        run_dir = new or config.log_dir / last["run"]
        earlier = {} if last else utils.earlier_checkpoints(best_path, last_path)

        total = sum(weight.numel() for weight in model.parameters())
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        by = "1 process" if processes == 1 else f"{processes} processes"
        times = "1 epoch" if epochs == 1 else f"{epochs} epochs"
        sizes = f"{len(train_set):,} training, {len(validation_set):,} validation"
        print(f"Device       {device}, {by} (PyTorch {torch.__version__})")
        print(f"Data         {sizes} images")
        print(f"Model        {config.model}, {total:,} parameters, {trained:,} to train")
        print(f"Training     {times} of {steps} steps of {config.batch_size} images")
        print(f"             learning rate up to {' and '.join(f'{rate:g}' for rate in rates)}")
        print(f"Log          {utils.short(run_dir)}")
        print(f"Checkpoints  {utils.short(config.checkpoint_dir)}")
        for kept in earlier.values():
            print(f"             an earlier run's is kept as {kept.name}")
        print("\n          --- training ---   -- validation --")
        print("  epoch   loss    accuracy   loss    accuracy   images/s")

    best_accuracy, best_epoch = last["best"] if last else (0.0, 0)
    with guard:  # Ctrl-C, a full disk, ...: one line, and at most the epoch in progress is lost
        if rank == 0 and not last:
            image, _ = validation_set[0]
            log_start(run_dir, config.to_save(), model, image[None].to(device))  # a batch of one
        for epoch in range(guard.saved + 1, epochs + 1):
            utils.seed_epoch(config.seed, epoch)
            train_set.set_epoch(epoch)
            batches = guard.steps(islice(train_loader, steps))
            no_bar = None if rank == 0 else True  # None: a bar on a terminal, none in a file
            bar = tqdm(batches, f"epoch {epoch}/{epochs}", steps, leave=False, disable=no_bar)
            start = time.perf_counter()
            train_loss, train_accuracy, images = train_epoch(
                network, bar, loss_function, optimizer, schedule, device
            )
            speed = images / (time.perf_counter() - start)

            logits, labels = devices.gather(*predict(network, validation_loader, device))
            loss = loss_function(logits, labels).item()
            metrics = measure(logits, labels)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the validation loss is {loss}")
            if rank > 0:
                guard.saved = epoch
                continue

            print(
                f"{epoch:3}/{epochs:<3}   {train_loss:.4f}  {train_accuracy:8.2%}   "
                f"{loss:.4f}  {metrics.accuracy:8.2%}   {speed:8,.0f}",
                flush=True,
            )
            log_epoch(
                run_dir,
                epoch,
                training={
                    "charts/loss": train_loss,
                    "charts/accuracy": train_accuracy,
                    "pace/learning_rate": schedule.get_last_lr()[0],
                    "pace/images_per_second": speed,
                },
                validation={"charts/loss": loss, "charts/accuracy": metrics.accuracy},
                model=model,
                samples=train_set.__getitems__(list(range(40))),
            )

            # best.pt holds what evaluate.py needs, last.pt also what training needs to go on.
            while earlier:
                path, kept = earlier.popitem()
                path.replace(kept)
            checkpoint = {
                "model": config.model,
                "weights": model.state_dict(),
                "epoch": epoch,
                "validation_accuracy": metrics.accuracy,
                "config": config.to_save(),
                "run": run_dir.name,
            }
            if metrics.accuracy >= best_accuracy:
                best_accuracy, best_epoch = metrics.accuracy, epoch
                utils.save_checkpoint(best_path, checkpoint)
            checkpoint["best"] = (best_accuracy, best_epoch)
            checkpoint["optimizer"] = optimizer.state_dict()
            checkpoint["schedule"] = schedule.state_dict()
            utils.save_checkpoint(last_path, checkpoint)
            guard.saved = epoch

        if rank == 0:
            settings = {n: v for n, v in config.to_save().items() if n not in MAY_CHANGE}
            results = {"final/best_accuracy": best_accuracy, "final/best_epoch": best_epoch}
            log_end(
                run_dir, epochs, settings, results, model, validation_set, logits, metrics.confusion
            )

    devices.leave_processes()
    if rank > 0:
        return

    # Where to look next.
    lock.release()
    best = f"{best_accuracy:.2%} (epoch {best_epoch})"
    print(f"\nBest validation accuracy: {best}, saved in {utils.short(best_path)}")
    print(f"Next: {evaluate_command}")


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_function: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> tuple[float, float, int]:
    """Show the model each batch once, and correct its weights after each.

    Args:
        model: takes images and gives logits (N, classes).
        batches: images (N, 1, 28, 28) float32, and labels (N,) int64, on any device.
        loss_function: of logits and labels; the mean over a batch.
        optimizer: of the model's weights.
        schedule: of its learning rate, one step a batch.
        device: where the model is.

    Returns:
        The mean loss, the share of images classified correctly (0 to 1), both while the weights
        were changing and on augmented images, and the number of images; of all processes together.

    Raises:
        FloatingPointError: if a loss is infinite or not a number.
    """
    model.train()  # batch norm uses this batch's own mean and variance
    images_seen = 0
    losses, correct = [], []  # these stay on the device: reading one makes the CPU wait for it
    for images, labels in batches:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)

        logits = model(images)  # forward: records the graph
        loss = loss_function(logits, labels)  # one number: how wrong
        optimizer.zero_grad()  # forget the last step's gradients
        loss.backward()  # walk the graph back: a gradient for each weight
        optimizer.step()  # move each weight against its gradient

        schedule.step()
        images_seen += len(images)
        losses.append(loss.detach() * len(images))
        correct.append((logits.detach().argmax(dim=1) == labels).sum())

    losses, correct = torch.stack(losses).tolist(), torch.stack(correct).sum().item()
    total, correct, images_seen = devices.sum_over_processes(
        [sum(losses), correct, images_seen], device
    )
    if not math.isfinite(total):
        losses.append(math.nan)  # if ours are finite, another process's was not
        step = [math.isfinite(loss) for loss in losses].index(False)
        raise FloatingPointError(f"in step {step + 1} the loss became infinite or not a number")
    return total / images_seen, correct / images_seen, int(images_seen)


def parse_args() -> tuple[Config, dict | None]:
    """Read the command line: the settings, and with --resume the checkpoint to go on from."""
    by_model = {
        name: ", ".join(f"{recipe[name]} for {model}" for model, recipe in RECIPES.items())
        for name in ("epochs", "lr")
    }
    parser = utils.flags_of(Config, "Train a classifier of handwritten digits.", by_model)
    parser.add_argument("--resume", action="store_true", help="go on with the run in last.pt")
    given = vars(parser.parse_args())  # only the flags that were given
    last = None
    if given.pop("resume", False):
        checkpoint_dir = given.setdefault("checkpoint_dir", Config.checkpoint_dir)
        last = utils.load_checkpoint(checkpoint_dir / "last.pt", MODELS)
        if "optimizer" not in last:
            sys.exit("last.pt is a copy of a best.pt: it lacks what training needs to go on")
        stored = asdict(Config()) | last["config"]  # a setting may be newer than the checkpoint
        for name in given.keys() - MAY_CHANGE:
            if given[name] != stored[name]:
                parser.error(
                    f"--resume: the run in last.pt has {name.replace('_', '-')} {stored[name]}, "
                    f"not {given[name]}; leave that flag out, or start a new run without --resume"
                )
        given = stored | given
    config = Config(**given)
    if config.freeze_backbone and config.model == "cnn":
        parser.error("--freeze-backbone needs a model with a backbone: --model resnet18")
    return config, last


if __name__ == "__main__":
    main(*parse_args())
