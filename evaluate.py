"""Measure a trained model on the test set, or let it read your own handwriting.

    python evaluate.py                           # the newest run's best.pt
    python evaluate.py --checkpoint other.pt
    python evaluate.py my_digit.png other.jpg    # one digit in each picture

train.py never reads the test set: settings are chosen on the validation images, so that the number
printed here says how the model does on digits that played no part in making it. Pictures of the
results are saved beside the checkpoint.
"""

import signal

if __name__ == "__main__":  # the imports below take seconds; Ctrl-C ends them without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid

import utils
from dataset import MNISTDataset, read_digit
from model import build_model

ROOT = Path(__file__).resolve().parent


def main(args: argparse.Namespace) -> None:
    """Measure a checkpoint on the test set, or read pictures with it."""
    path = args.checkpoint or newest_checkpoint(ROOT / "checkpoints")
    checkpoint = utils.load_checkpoint(path)
    device, _, _ = utils.setup_distributed(args.device)
    model = build_model(checkpoint["model"], checkpoint["classes"])
    utils.load_states(checkpoint, model)
    model.to(device)

    print(f"Checkpoint  {utils.short(path)}: {checkpoint['model']}, epoch {checkpoint['epoch']}")
    if args.images:
        read_pictures(model, args.images, device, beside(path, "predictions"))
    else:
        test_set = MNISTDataset(args.data_dir, "test")
        if test_set.classes > checkpoint["classes"]:
            raise utils.InputError(f"The data has {test_set.classes} classes, more than the model")
        print(f"Test set    {len(test_set):,} images, on {device}")
        print(f"Pictures    {path.stem}-confusion.png, {path.stem}-mistakes.png beside it\n")
        logits, labels = predict(model, test_set, device)
        report(logits, labels)
        save_picture(confusion_figure(logits, labels), beside(path, "confusion"))
        save_picture(mistakes_figure(test_set, logits, labels), beside(path, "mistakes"))


def newest_checkpoint(out_dir: Path) -> Path:
    """The newest run's best.pt; dry runs do not count. InputError, if there is none."""
    runs = [p for p in sorted(out_dir.glob("*/best.pt")) if "-dry-run" not in p.parent.name]
    if not runs:
        raise utils.InputError(f"No run in {utils.short(out_dir)}: run 'python train.py' first")
    return runs[-1]


@torch.inference_mode()  # no gradients needed: record no graph, which saves time and memory
def predict(model: nn.Module, dataset: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """The logits (N, classes) float32 and the true labels (N,) int64 of a data set, on the CPU."""
    model.eval()  # batch norm uses its running averages, not this batch's own
    loader = DataLoader(dataset, batch_size=250)
    batches = [(model(images.to(device)), labels) for images, labels in loader]
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    if not logits.isfinite().all():
        raise FloatingPointError("The model's answers are no numbers; train with a smaller --lr")
    return logits, labels


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """How often each class is taken for each: (classes, classes) int64, a row for a true class."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(dim=1)  # one number for each (true, predicted) pair
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def report(logits: Tensor, labels: Tensor) -> None:
    """Print what a reader wants to know; the line with the accuracy comes last."""
    confusion = confusion_matrix(logits, labels)
    print("digit   images   correct   accuracy")
    for digit, row in enumerate(confusion):
        total, correct = row.sum().item(), row[digit].item()
        print(f"{digit:5}   {total:6,}   {correct:7,}   {correct / max(total, 1):8.2%}")

    wrong, total = len(labels) - confusion.trace().item(), len(labels)
    print(f"\nLoss (cross-entropy): {F.cross_entropy(logits, labels):.4f}")
    print(f"Test accuracy: {1 - wrong / total:.2%} ({wrong:,} of {total:,} wrong)")


def read_pictures(model, paths: list[Path], device: torch.device, answers: Path) -> None:
    """Print which digit is on each picture, and save what the model saw of them as `answers`.

    Raises InputError, if some could not be read, when the others were.
    """
    if answers.resolve() in [path.resolve() for path in paths]:
        raise utils.InputError(f"{utils.short(answers)} would be written over: rename it")
    names, images, captions = [], [], []
    for path in paths:
        try:
            images.append(read_digit(path))
            names.append(utils.short(path))
        except utils.InputError as error:
            print(f"{utils.short(path)}: {error}", file=sys.stderr)
    if images:
        samples = [(image, 0) for image in images]  # a label is asked for, but not used
        logits, _ = predict(model, samples, device)
        for name, probabilities in zip(names, logits.softmax(dim=1), strict=True):
            (first, second), (digit, other) = (best.tolist() for best in probabilities.topk(2))
            print(f"{name}: {digit} ({first:.1%}), then {other} ({second:.1%})")
            name = Path(name).name[:16].encode("ascii", "replace").decode()  # the font has no more
            captions.append(f"{name}: {digit}, {first:.0%}")
        shown = min(30, len(images))
        title = f"{shown} of {len(images)} pictures, as the model sees them: digit, confidence"
        figure = sheet_figure(title, images[:shown], captions[:shown], columns=5)
        save_picture(figure, answers)
        print(f"Picture     {utils.short(answers)}")
    if len(images) < len(paths):
        raise utils.InputError(f"{len(paths) - len(images)} of {len(paths)} could not be read")


def beside(checkpoint: Path, what: str) -> Path:
    """Where a picture goes: of best.pt to best-confusion.png."""
    return checkpoint.with_name(f"{checkpoint.stem}-{what}.png")


def save_picture(figure, path: Path) -> None:
    path.unlink(missing_ok=True)  # of a link the link, not what it leads to
    figure.savefig(path)


def log_epoch(log: SummaryWriter, step: int, losses, rates, dataset, indices, model) -> None:
    """Log what happened in an epoch that ended with a `step`.

    `losses` (a tensor of a batch's) and `rates` have an entry for each of its steps; `indices` are
    some of its images, which are shown once more as the dataset augments them. Of the model:
    histograms of its weights and of their last gradients.
    """
    for i, (batch, rate) in enumerate(zip(losses, rates, strict=True), step - len(rates) + 1):
        log.add_scalar("charts/loss", batch.mean(), i)
        log.add_scalar("charts/learning_rate", rate, i)
    images = torch.stack([dataset[i][0] for i in indices])
    log.add_image("images/augmented", make_grid(images, nrow=10), step)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            log.add_histogram(f"weights/{name}", weight, step)
            log.add_histogram(f"gradients/{name}", weight.grad, step)


def log_results(log, step: int, dataset: Dataset, logits: Tensor, labels: Tensor) -> None:
    """Show which images of a data set are classified wrongly."""
    log.add_figure("images/confusion", confusion_figure(logits, labels), step)
    log.add_figure("images/mistakes", mistakes_figure(dataset, logits, labels), step)


def confusion_figure(logits: Tensor, labels: Tensor):
    """How often each class is taken for each other; colour shows mistakes alone."""
    from matplotlib.figure import Figure  # here, as that takes a second and training needs it not

    confusion = confusion_matrix(logits, labels)
    wrong = confusion.clone().fill_diagonal_(0)
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(wrong.numpy(), cmap="Blues", vmax=max(wrong.max().item(), 1) * 1.3)
    for true, row in enumerate(confusion.tolist()):
        for predicted, count in enumerate(row):
            if count:
                style = {"color": "#666666"} if true == predicted else {"weight": "bold"}
                axes.text(predicted, true, f"{count}", ha="center", va="center", **style)
    axes.set(xlabel="predicted digit", xticks=range(len(confusion)))
    axes.set(ylabel="true digit", yticks=range(len(confusion)))
    axes.set_title(f"{wrong.sum():,} of {len(labels):,} wrong; right ones in grey")
    return figure


def mistakes_figure(dataset: Dataset, logits: Tensor, labels: Tensor):
    """The images that are classified wrongly, the most confident first, 100 at most."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:100].tolist()
    captions = [f"{labels[i]} as {predicted[i]}, {confidence[i]:.0%}" for i in worst]
    title = f"{len(wrong):,} of {len(labels):,} wrong: true digit, said digit, confidence"
    return sheet_figure(title, [dataset[i][0] for i in worst], captions, columns=10)


def hardest_figure(dataset: Dataset, losses: Tensor):
    """The images with the highest losses (N,), as augmented: hard ones, and wrong labels."""
    worst = losses.topk(min(20, len(losses))).indices.tolist()
    images, labels = zip(*[dataset[i] for i in worst], strict=True)
    captions = [f"a {label}? loss {losses[i]:.1f}" for i, label in zip(worst, labels, strict=True)]
    return sheet_figure("The highest losses: label, loss when last seen", images, captions, 10)


def sheet_figure(title: str, images: list[Tensor], captions: list[str], columns: int):
    """Images (C, H, W) side by side, dark ink on white, each with a line of text below it."""
    from matplotlib.figure import Figure

    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(10, 0.5 + rows * 13 / columns), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    axes.set_title(title)
    if images:
        cells = 1 - F.pad(torch.stack(images), (2, 2, 1, 7))  # left, right, top, bottom
        axes.imshow(make_grid(cells, nrow=columns, padding=0, pad_value=1).movedim(0, -1).numpy())
        height, width = cells.shape[-2:]
        for i, caption in enumerate(captions):
            x, y = (i % columns + 0.5) * width, (i // columns + 1) * height - 7
            axes.text(x, y, caption, ha="center", va="top", fontsize=9, parse_math=False)
    return figure


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings, from a list of flags, by default the command line's."""
    parser = argparse.ArgumentParser(description="Measure a trained model on MNIST's test set.")
    flag = parser.add_argument
    flag("images", type=Path, nargs="*", metavar="IMAGE", help="read these pictures of a digit")
    flag("--checkpoint", type=Path, metavar="FILE", help="a best.pt (that of the newest run)")
    flag("--device", choices=utils.DEVICES, default="auto", help="where to compute (the fastest)")
    flag("--data-dir", type=Path, default=ROOT / "data", help="folder of the MNIST files (data)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
