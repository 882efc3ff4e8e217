"""What people see: the pages of TensorBoard, and the pictures beside a checkpoint."""

import math
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from torch import Tensor, nn

from dataset import MEAN, STD, MNISTDataset

# Blue and orange differ for colour-blind readers too (M. Okabe and K. Ito, "Color universal
# design", 2008).
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"


# TensorBoard. Curves with the same tag share a chart: those of the folders "training" and
# "validation" do. The part of a tag before the slash names a section of the page, sorted by name.


def open_log(run_dir: Path, epoch: int, part: str = ".") -> SummaryWriter:
    """Where what is known after an epoch goes, in the format of TensorBoard.

    Only closing it makes sure that all is on the disk, so each epoch has a file of its own.
    `purge_step` hides what an interrupted run may have logged of the same epoch.
    """
    return SummaryWriter(str(run_dir / part), purge_step=epoch, filename_suffix=f".{epoch:05}")


def log_start(run_dir: Path, settings: dict, model: nn.Module, image: Tensor) -> None:
    """Log the settings, the command and the model's graph; image is (1, 1, 28, 28) float32."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
    command = shlex.join(["python", *sys.argv])
    with open_log(run_dir, epoch=0) as log, warnings.catch_warnings():
        log.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}\n`{command}`", 0)
        warnings.simplefilter("ignore")  # of how tensorboardX traces the graph
        model.eval()  # or batch norm would take account of this image
        log.add_graph(model, image)


def log_epoch(
    run_dir: Path,
    epoch: int,
    training: dict[str, float],
    validation: dict[str, float],
    model: nn.Module,
    samples: tuple[Tensor, Tensor],
) -> None:
    """Log an epoch's numbers, weights and last gradients, and some augmented images.

    Args:
        run_dir: the run's folder.
        epoch: counted from 1.
        training: numbers by tag.
        validation: likewise; those with a tag that training has too share its chart.
        model: with the gradients of its last step.
        samples: images (N, 1, 28, 28) float32, normalised, and labels (N,) int64.
    """
    for part, numbers in (("training", training), ("validation", validation)):
        with open_log(run_dir, epoch, part) as log:
            for name, number in numbers.items():
                log.add_scalar(name, number, epoch)
    with open_log(run_dir, epoch) as log:
        images, labels = samples
        sheet = contact_sheet(images, [str(label) for label in labels.tolist()])
        log.add_image("examples/augmented", np.asarray(sheet), epoch, dataformats="HW")
        for name, weight in model.named_parameters():
            log.add_histogram(f"weights/{name}", weight.detach().cpu().numpy(), epoch)
            if weight.grad is not None:
                log.add_histogram(f"gradients/{name}", weight.grad.cpu().numpy(), epoch)


def log_end(
    run_dir: Path,
    epoch: int,
    settings: dict,
    results: dict[str, float],
    model: nn.Module,
    dataset: MNISTDataset,
    logits: Tensor,
    confusion: Tensor,
) -> None:
    """Log how the trained model does on the validation images, class by class.

    Args:
        run_dir: the run's folder.
        epoch: the last one.
        settings: for the HParams page, where runs are compared.
        results: for the same page.
        model: to take features from.
        dataset: the validation images.
        logits: (N, classes) float32, of the images of `dataset`.
        confusion: (classes, classes) int64; row: the true class, column: the predicted one.
    """
    probabilities, labels = logits.softmax(dim=1), dataset.labels
    with open_log(run_dir, epoch + 1) as log:
        for digit, column in enumerate(probabilities.T):
            log.add_pr_curve(f"precision_recall/{digit}", labels == digit, column, epoch)
        log.add_figure("examples/confusion", confusion_figure(confusion), epoch)
        sheet = np.asarray(mistakes_sheet(dataset, logits, at_most=40))
        log.add_image("examples/most_confident_mistakes", sheet, epoch, dataformats="HW")

        # A square number of images: tensorboardX leaves the rest of their sheet uninitialised.
        some = math.isqrt(min(400, len(dataset))) ** 2
        images, labels = dataset.__getitems__(list(range(some)))
        device = next(model.parameters()).device
        with torch.inference_mode():
            features = model.eval().features(images.to(device)).cpu()
        log.add_embedding(features, labels.tolist(), 1 - to_pixels(images), epoch)
        # log.add_hparams would do the same, but in a folder or at least a file of its own.
        for summary in hparams(settings, results):
            log.file_writer.add_summary(summary)
        for name, number in results.items():
            log.add_scalar(name, number, epoch)


# Pictures


def to_pixels(images: Tensor) -> Tensor:
    """Undo dataset.py's normalisation: float32 from 0, background, to 1, ink."""
    return (images * STD + MEAN).clamp(0, 1)


def save_picture(picture: Figure | Image.Image, path: Path) -> bool:
    """Save a picture; whether that worked. Where it did not, one line on standard error says why.

    The picture takes its name when it is whole, as checkpoints do (see utils.save_checkpoint).
    """
    partial = path.with_name(f"{path.name}.partial")
    save = picture.savefig if isinstance(picture, Figure) else picture.save
    try:
        save(partial, format="png")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        print(f"Cannot write the picture {path}: {error.strerror}", file=sys.stderr)
        return False
    return True


def mistakes_sheet(dataset: MNISTDataset, logits: Tensor, at_most: int) -> Image.Image:
    """The images that are classified wrongly, the most confident first, each with what was said.

    Args:
        dataset: the images, not augmented.
        logits: (N, classes) float32, one row an image of `dataset`.
        at_most: images to show.
    """
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != dataset.labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:at_most].tolist()
    captions = [f"{dataset.labels[i]} as {predicted[i]}, {confidence[i]:.0%}" for i in worst]
    return contact_sheet(dataset.__getitems__(worst)[0], captions)


def contact_sheet(images: Tensor, captions: list[str], columns: int = 10) -> Image.Image:
    """Images (N, 1, 28, 28), normalised, side by side, dark ink on white, captions below each."""
    width, height, text_height = 84, 84, 20
    rows = max(1, -(-len(images) // columns))
    size = (columns * (width + 8) + 8, rows * (height + text_height + 8) + 8)
    sheet = Image.new("L", size, color=255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pixels = ((1 - to_pixels(images[:, 0])) * 255).byte().numpy()
    for i, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        x, y = 8 + i % columns * (width + 8), 8 + i // columns * (height + text_height + 8)
        sheet.paste(
            Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y)
        )
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=200)
        draw.text((x + width / 2, y + height + 3), caption, fill=0, font=font, anchor="ma")
    return sheet


def confusion_figure(confusion: Tensor) -> Figure:
    """How often each digit is taken for each other; colour shows mistakes alone."""
    classes = len(confusion)
    wrong = confusion.clone().fill_diagonal_(0).numpy()
    figure = Figure(figsize=(7, 7), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(wrong, cmap="Blues", vmax=max(wrong.max(), 1) * 1.3)
    for true, row in enumerate(confusion.tolist()):
        for predicted, count in enumerate(row):
            if count:
                style = {"color": "#666666"} if true == predicted else {"weight": "bold"}
                axes.text(predicted, true, f"{count}", ha="center", va="center", **style)
    axes.set(xlabel="predicted digit", ylabel="true digit")
    axes.set(xticks=range(classes), yticks=range(classes))
    axes.set_title(f"{wrong.sum():,} of {confusion.sum().item():,} wrong; right ones in grey")
    return figure


def reliability_figure(counts: Tensor, confidence: Tensor, accuracy: Tensor, ece: float) -> Figure:
    """Is a model right as often as it thinks?

    Args:
        counts: (bins,) images in each bin of confidence.
        confidence: (bins,) their mean confidence, 0 to 1; not a number where there are none.
        accuracy: (bins,) the share of them that is classified correctly; likewise.
        ece: the expected calibration error, 0 to 1.
    """
    figure = Figure(figsize=(7, 7), dpi=100, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="as often as it thinks")
    upper.plot(confidence.numpy(), accuracy.numpy(), "o-", color=BLUE, label="this model")
    upper.set(ylabel="share classified correctly", ylim=(-0.02, 1.02))
    upper.set_title(f"Expected calibration error {ece:.2%}")
    upper.legend(loc="upper left")
    width = 1 / len(counts)
    edges = np.arange(len(counts)) * width
    lower.bar(edges, counts.numpy(), width, align="edge", color=ORANGE, edgecolor="white")
    lower.set(xlabel="confidence: the highest probability", ylabel="images", yscale="log")
    lower.set(xlim=(0, 1.02))
    return figure


def predictions_figure(names: list[str], images: Tensor, probabilities: Tensor) -> Figure:
    """Each input as the network sees it, beside the bars of its probabilities.

    Args:
        names: N file names.
        images: (N, 1, 28, 28) float32, normalised.
        probabilities: (N, classes) float32.
    """
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 2 * rows), dpi=100, layout="constrained")
    cells = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in cells.flat:
        axes.axis("off")
    for i, (name, pixels, bars) in enumerate(
        zip(names, to_pixels(images[:, 0]).numpy(), probabilities.numpy(), strict=True)
    ):
        left, right = cells[i // columns, 2 * (i % columns) :][:2]
        left.imshow(1 - pixels, cmap="gray", vmin=0, vmax=1)
        left.set_title(name if len(name) <= 24 else f"…{name[-23:]}", fontsize=9)
        right.axis("on")
        best = bars.argmax().item()
        right.bar(
            range(len(bars)), bars, color=[ORANGE if k == best else BLUE for k in range(len(bars))]
        )
        right.set(ylim=(0, 1), yticks=(0, 1), xticks=range(len(bars)))
        right.set_title(f"{best} ({bars[best]:.1%})", fontsize=9)
        right.tick_params(labelsize=8)
    return figure
