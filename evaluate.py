"""Measure a trained model on the test set, or let it read your own handwriting.

    python evaluate.py                           # checkpoints/best.pt
    python evaluate.py --checkpoint other.pt
    python evaluate.py my_digit.png other.jpg    # one digit in each picture

train.py never reads the test set: settings are chosen on the validation images, so that the number
printed here says how the model does on digits that played no part in making it. Pictures of the
results are saved beside the checkpoint.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import devices
import utils
from dataset import MEAN, STD, MNISTDataset, make_loader
from handwriting import read_digit
from model import MODELS, build_model
from pictures import (
    confusion_figure,
    mistakes_sheet,
    predictions_figure,
    reliability_figure,
    save_picture,
)

ROOT = Path(__file__).resolve().parent


@torch.inference_mode()  # no gradients needed: record no graph, which saves time and memory
def predict(model: nn.Module, loader: DataLoader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Run a model over all batches of a loader.

    Returns:
        The logits (N, classes) float32 and the true labels (N,) int64, both on the CPU.
    """
    model.eval()  # batch norm uses its running averages, not this batch's own
    batches = [(model(images.to(device)), labels) for images, labels in loader]
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits).cpu(), torch.cat(labels)


@dataclass
class Metrics:
    """How well a classifier did.

    Attributes:
        loss: mean cross-entropy, in nats.
        correct: number of images classified correctly.
        total: number of images.
        confusion: (classes, classes) int64; row: the true class, column: the predicted one.
    """

    loss: float
    correct: int
    total: int
    confusion: Tensor

    @property
    def accuracy(self) -> float:
        """Share of images classified correctly, 0 to 1."""
        return self.correct / self.total

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy, by Wilson's score.

        The familiar p ± 1.96·√(p(1-p)/n) is off where p is close to 1, and here it is. Source:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        Journal of the American Statistical Association 22 (1927).
        """
        z, n, p = 1.96, self.total, self.accuracy
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return centre - half, centre + half


def measure(logits: Tensor, labels: Tensor) -> Metrics:
    """Compare logits (N, classes) float32 with the true labels (N,) int64."""
    classes = logits.shape[1]
    predicted = logits.argmax(dim=1)
    pairs = labels * classes + predicted  # one number for each (true, predicted) pair
    return Metrics(
        loss=F.cross_entropy(logits, labels).item(),
        correct=(predicted == labels).sum().item(),
        total=len(labels),
        confusion=pairs.bincount(minlength=classes**2).view(classes, classes),
    )


def reliability(
    logits: Tensor, labels: Tensor, bins: int = 15
) -> tuple[Tensor, Tensor, Tensor, float]:
    """How often is a model right, for each level of confidence (its highest probability)?

    One that says 80 % should be right 80 times out of 100. Source: C. Guo, G. Pleiss, Y. Sun,
    K. Weinberger, "On calibration of modern neural networks" (2017).

    Args:
        logits: (N, classes) float32.
        labels: (N,) int64, the true ones.
        bins: of equal width, from 0 to 1.

    Returns:
        For each bin: how many images are in it, their mean confidence, and the share of them that
        is classified correctly, both not a number where there are none. Last the expected
        calibration error: how far these two are apart, in the mean over all images, 0 to 1.
    """
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    counts = bin_of.bincount(minlength=bins)
    certain = bin_of.bincount(confidence, bins)
    correct = bin_of.bincount((predicted == labels).float(), bins)
    error = (certain - correct).abs().sum().item() / len(labels)
    return counts, certain / counts, correct / counts, error


def report(metrics: Metrics, calibration_error: float) -> None:
    """Print what a reader wants to know; the line with the accuracy comes last."""
    confusion = metrics.confusion
    print("\ndigit   images   correct   accuracy")
    for digit, row in enumerate(confusion):
        total, correct = row.sum().item(), row[digit].item()
        print(f"{digit:5}   {total:6,}   {correct:7,}   {correct / max(total, 1):8.2%}")

    mistakes = confusion.clone().fill_diagonal_(0)
    counts, cells = mistakes.flatten().sort(descending=True, stable=True)
    confused = [
        f"{cell // len(confusion)} as {cell % len(confusion)} ({count})"
        for count, cell in zip(counts[:4].tolist(), cells[:4].tolist(), strict=True)
        if count > 0
    ]
    low, high = metrics.interval()
    wrong = metrics.total - metrics.correct
    print(f"\nMost frequent confusions  {', '.join(confused) or 'none'}")
    print(f"Loss (cross-entropy)      {metrics.loss:.4f}")
    print(f"Calibration error         {calibration_error:.2%}")
    print(f"95% interval              {low:.2%} to {high:.2%}")
    print(f"Test accuracy: {metrics.accuracy:.2%} ({wrong:,} of {metrics.total:,} wrong)")


def main(args: argparse.Namespace) -> None:
    """Measure a checkpoint on the test set, or read images with it; end with an exit status."""
    checkpoint = utils.load_checkpoint(args.checkpoint, MODELS)
    device = devices.choose_device(args.device)

    # The checkpoint says which model its weights belong to.
    model = build_model(checkpoint["model"])
    utils.load_weights(model, checkpoint, args.checkpoint)
    model.to(device)

    name, epoch = checkpoint["model"], checkpoint["epoch"]
    print(f"Checkpoint  {utils.short(args.checkpoint)}: {name}, after epoch {epoch}")
    folder = args.checkpoint.parent
    if args.images:
        read_handwriting(model, args.images, device, folder / "predictions.png")
    else:
        measure_on_test_set(model, args.data_dir, device, folder)


def measure_on_test_set(
    model: nn.Module, data_dir: Path, device: torch.device, picture_dir: Path
) -> None:
    """Print how a model does on the test set, save three pictures, and exit: 1 if that failed."""
    test_set = MNISTDataset(data_dir, "test")
    print(f"Test set    {len(test_set):,} images, on {device}")
    logits, labels = predict(model, make_loader(test_set, batch_size=1_000), device)
    metrics = measure(logits, labels)
    *bins, error = reliability(logits, labels)
    pictures = {
        "confusion.png": confusion_figure(metrics.confusion),
        "mistakes.png": mistakes_sheet(test_set, logits, at_most=100),
        "reliability.png": reliability_figure(*bins, error),
    }
    saved = [name for name, drawn in pictures.items() if save_picture(drawn, picture_dir / name)]
    print(f"Pictures    {', '.join(saved) or 'none'} in {utils.short(picture_dir)}")
    report(metrics, error)
    sys.exit(0 if len(saved) == len(pictures) else 1)


def read_handwriting(
    model: nn.Module, paths: list[Path], device: torch.device, picture: Path
) -> None:
    """Print which digit is in each file, save a picture of what the model saw, and exit.

    The exit status is 1 if a file could not be read, or the picture not be written.
    """
    images, names, failed = [], [], False
    for path in paths:
        try:
            images.append(read_digit(path))
            names.append(str(path))
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
    if images:
        images = (torch.stack(images) - MEAN) / STD
        with torch.inference_mode():
            probabilities = model.eval()(images.to(device)).softmax(dim=1).cpu()
        for name, row in zip(names, probabilities, strict=True):
            (first, second), (digit, other) = (best.tolist() for best in row.topk(2))
            print(f"{name}: {digit} ({first:.1%}), then {other} ({second:.1%})")
        figure = predictions_figure([Path(n).name for n in names], images, probabilities)
        if save_picture(figure, picture):
            print(f"Picture     {utils.short(picture)}")
        else:
            failed = True
    sys.exit(1 if failed else 0)


def parse_args() -> argparse.Namespace:
    parser = utils.Parser(
        description="Measure a trained model on MNIST's test set, or on your images."
    )
    parser.add_argument(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGE",
        help="pictures of one digit each, to be read instead of the test set",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=ROOT / "checkpoints" / "best.pt",
        metavar="FILE",
        help="what train.py saved (default: checkpoints/best.pt beside this script)",
    )
    parser.add_argument(
        "--device",
        choices=devices.NAMES,
        default="auto",
        help="where to compute (default: auto, the fastest there is)",
    )
    parser.add_argument(
        "--data-dir",
        type=utils.folder,
        default=ROOT / "data",
        metavar="D",
        help="folder of the MNIST files (default: data beside this script)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
