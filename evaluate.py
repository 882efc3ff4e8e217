"""Test a trained model on images that it has never seen.

    python evaluate.py                             # the newest run in checkpoints/
    python evaluate.py --checkpoint RUN/best.pt    # another run

The test set is the exam. train.py never looks at it, so the number printed here tells you how the
model does on digits that it was never trained on. (Choose your settings on validation images, and
come here last. If you choose them on the test set, its score will be too good to be true.)

Two pictures are saved beside the checkpoint: the confusion matrix, and the mistakes.
"""

import argparse
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import utils
from dataset import MNISTDataset
from model import build_model


def main(args: argparse.Namespace) -> None:
    """Test a checkpoint with the settings from `parse_args`."""
    device = utils.choose_device(args.device)
    path = args.checkpoint or newest_checkpoint()
    model, checkpoint = load_model(path)
    model.to(device)
    name, epoch, classes = (checkpoint[key] for key in ("model", "epoch", "classes"))
    print(f"Checkpoint   {utils.relative(path)}: {name}, epoch {epoch}")

    test_set = MNISTDataset(args.data_dir, "test")
    source = utils.relative(args.data_dir)
    print(f"Test set     {len(test_set):,} images from {source}, on {device}")
    if test_set.classes != classes:
        difference = f"{test_set.classes} classes, but the model was trained on {classes}"
        if test_set.classes > classes:
            raise utils.UserError(f"The test set has {difference}; see --data-dir")
        print(f"Careful      the test set has {difference}")

    logits, labels = predict(model, test_set, device)
    picture = utils.draw_confusion(logits, labels)
    utils.save_picture(picture, path.with_name(f"{path.stem}-confusion.png"))
    picture = utils.draw_mistakes(test_set, logits, labels)
    utils.save_picture(picture, path.with_name(f"{path.stem}-mistakes.png"))
    report(logits, labels)


def newest_checkpoint() -> Path:
    """The newest run's best.pt. Dry runs don't count. Raises UserError if there is none."""
    runs = sorted((utils.ROOT / "checkpoints").glob("*/best.pt"))
    runs = [path for path in runs if "-dry-run" not in path.parent.name]
    if not runs:
        train = utils.command("python", utils.ROOT / "train.py")
        raise utils.UserError(f"There's no trained model yet; run this first: {train}")
    return runs[-1]


def load_model(path: Path | str) -> tuple[nn.Module, dict]:
    """Rebuild a trained model from its checkpoint. Returns both, with the model in eval mode.

    A checkpoint holds the weights, not the model: first we build the model from code, then we put
    the weights into it. Raises UserError if the file can't be read or the weights don't fit.
    """
    checkpoint = utils.load_checkpoint(path)
    try:
        model = build_model(checkpoint["model"], checkpoint["classes"])
        model.load_state_dict(checkpoint["weights"])
    except (KeyError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 300)
        raise utils.UserError(f"{utils.relative(path)} doesn't match model.py: {reason}") from error
    return model.eval(), checkpoint


@torch.inference_mode()  # no gradients needed here; skipping autograd saves time and memory
def predict(model: nn.Module, dataset: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Run a model over a whole dataset. Returns the logits (N, classes) and labels (N,).

    Both are on the CPU. Raises UserError if the model's outputs aren't finite numbers.
    """
    model.eval()  # batch norm uses its running averages now, and dropout is off
    loader = DataLoader(dataset, batch_size=250)
    batches = [(model(images.to(device)), labels) for images, labels in loader]
    # Join the batches: one tensor of all logits, and one of all labels.
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    if not logits.isfinite().all():
        raise utils.UserError("The model outputs NaN or infinity; train with a smaller --lr")
    return logits, labels


def report(logits: Tensor, labels: Tensor) -> None:
    """Print each class's accuracy, then the loss, and on the last line the overall accuracy."""
    correct = logits.argmax(dim=1) == labels
    print("\nclass  images  correct  accuracy")
    for label in labels.unique().tolist():
        right = correct[labels == label]
        print(f"{label:5}  {len(right):6,}  {right.sum():7,}  {right.float().mean():8.2%}")
    wrong, total = (~correct).sum().item(), len(labels)
    print(f"\nTest loss: {F.cross_entropy(logits, labels):.4f}")  # without label smoothing
    print(f"Test accuracy: {1 - wrong / total:.2%} ({wrong:,} of {total:,} wrong)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the settings from the command line, or from a list of flags."""
    parser = argparse.ArgumentParser(description="Test a trained model on MNIST's test set.")
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="a best.pt (default: the newest run's)")
    add("--device", choices=utils.DEVICES, default="auto", help="device to run on (default: auto)")
    add("--data-dir", type=Path, default=utils.ROOT / "data", help="folder with the MNIST files")
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run(parse_args, main)
