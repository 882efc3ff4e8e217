"""Draw the pictures in README.md. Their curves and values are computed, not made up.

    python -m docs.pictures              # all of them, in three minutes; run train.py first
    python -m docs.pictures graph hard   # some of them

The others are made by examples/look_inside.py (inside.png) and docs/animation.py (draw.gif), and
tensorboard.png is a screenshot.
"""

import sys
import tempfile
from functools import cache
from itertools import pairwise

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.utils import make_grid

from dataset import MNISTDataset, random_affine
from evaluate import load_model, newest_checkpoint, predict
from examples.handwriting import read_digit
from train import main, parse_args
from utils import ROOT, load_checkpoint

# Okabe and Ito's colours, which colour-blind people can tell apart. At seven inches wide, letters
# of this size are still readable on a phone.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#767676"
STYLE = {"font.size": 13, "axes.titlesize": 14, "axes.titleweight": "bold", "lines.linewidth": 2.5}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130}
STYLE |= {"figure.constrained_layout.use": True, "legend.frameon": False}
CPU = torch.device("cpu")


def canvas(height: float, title: str, xlim: tuple, ylim: tuple) -> tuple[Figure, Axes]:
    """A figure to draw on, seven inches wide and without axes."""
    figure = Figure(figsize=(7, height))
    axes = figure.subplots()
    axes.set(xlim=xlim, ylim=ylim)
    axes.axis("off")
    figure.suptitle(title, weight="bold", fontsize=14)
    return figure, axes


def box(axes: Axes, x: float, y: float, text: str, colour: str, **options) -> None:
    style = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": colour, "linewidth": 2}
    axes.text(x, y, text, ha="center", va="center", bbox=style, **options)


def arrow(axes: Axes, start: tuple, end: tuple, colour: str, shrink=0, curve=0.0) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 2, "mutation_scale": 18}
    style |= {"shrinkA": shrink, "shrinkB": shrink, "connectionstyle": f"arc3,rad={curve}"}
    axes.annotate("", end, start, arrowprops=style)


def cells(axes: Axes, numbers: torch.Tensor, x: float, y: float, size=1.0, ink=True, **options):
    """Draw a matrix as a table of numbers whose upper left corner is at (x, y)."""
    top = numbers.abs().max().item() or 1
    for i, row in enumerate(numbers.tolist()):
        for j, value in enumerate(row):
            shade = 1 - 0.75 * max(value, 0) / top if ink else 1
            corner = (x + j * size, y - (i + 1) * size)
            square = Rectangle(corner, size, size, facecolor=str(shade), edgecolor=GREY)
            axes.add_patch(square)
            text = f"{value:.1f}".removeprefix("0").removesuffix(".0") or "0"
            middle = (corner[0] + size / 2, corner[1] + size / 2)
            colour = "white" if shade < 0.5 else "black"
            axes.text(
                *middle, text.replace("-", "−"), ha="center", va="center", color=colour, **options
            )


def digit() -> Figure:
    image = MNISTDataset(ROOT / "data", "validation").images[3, 0] / 255
    figure = Figure(figsize=(7, 3.7))
    figure.suptitle("An image is a grid of numbers", weight="bold", fontsize=14)
    left, right = figure.subplots(1, 2)
    left.imshow(1 - image, cmap="gray", vmin=0, vmax=1)
    row, column, size = 11, 9, 10
    frame = {"fill": False, "edgecolor": ORANGE, "linewidth": 3}
    left.add_patch(Rectangle((column - 0.5, row - 0.5), size, size, **frame))
    right.set(xlim=(0, size), ylim=(-size, 0), aspect="equal")
    cells(right, image[row : row + size, column : column + size], 0, 0, fontsize=9)
    right.add_patch(Rectangle((0, -size), size, size, **frame))
    left.set_title("28 × 28 pixels", weight="normal", fontsize=13)
    right.set_title("and 100 of them up close", weight="normal", fontsize=13)
    for axes in (left, right):
        axes.axis("off")
    return figure


def valley() -> Figure:
    x, learning_rate, steps = 4.0, 0.1, [4.0]
    for _ in range(12):
        x -= learning_rate * 2 * (x - 1)
        steps.append(x)
    figure = Figure(figsize=(7, 3.8))
    axes = figure.subplots()
    places = torch.linspace(-1.5, 4.5, 200)
    axes.plot(places, (places - 1) ** 2, color=GREY)
    axes.plot(steps, [(step - 1) ** 2 for step in steps], "o", color=ORANGE, markersize=9)
    for start, end in list(pairwise(steps))[:5]:
        arrow(axes, (start, (start - 1) ** 2), (end, (end - 1) ** 2), ORANGE, 5, curve=0.35)
    axes.text(3.1, 9.2, "steep: large steps", color=ORANGE, ha="right")
    axes.text(1, 2.2, "flat: tiny steps", color=ORANGE, ha="center")
    axes.set(title="Gradient descent: feel the slope, step downhill", ylim=(-0.5, 12.5))
    axes.set(xlabel="a weight", ylabel="loss", xticks=[], yticks=[])
    return figure


def loop() -> Figure:
    title = "The heart of training: show, measure, blame, nudge"
    figure, axes = canvas(4.3, title, (-4.4, 4.4), (-2.4, 2.75))
    steps = [
        ("1. model(images)\nwhat does it say?", 0, 2.2, BLUE),
        ("2. loss_function(…)\nhow wrong is that?", 2.9, 0.95, BLUE),
        ("3. zero_grad()\nforget the last slopes", 2.5, -1.75, GREY),
        ("4. loss.backward()\nwho's to blame?", -2.5, -1.75, ORANGE),
        ("5. optimizer.step()\nnudge every weight", -2.9, 0.95, GREEN),
    ]
    for text, x, y, colour in steps:
        box(axes, x, y, text, colour)
    again = "again and again,\neach time with a new batch"
    axes.text(0, 0.1, again, ha="center", va="center", color=GREY)
    arrow(axes, (1.45, 2.2), (2.9, 1.55), BLUE, curve=-0.3)
    arrow(axes, (3.1, 0.35), (2.85, -1.15), GREY, curve=-0.15)
    arrow(axes, (0.8, -1.75), (-0.8, -1.75), ORANGE)
    arrow(axes, (-2.85, -1.15), (-3.1, 0.35), GREEN, curve=-0.15)
    arrow(axes, (-2.9, 1.55), (-1.45, 2.2), GREY, curve=-0.3)
    return figure


def text_of(tensor: torch.Tensor) -> str:
    return str([round(x) for x in tensor.tolist()] if tensor.dim() else round(tensor.item()))


def graph() -> Figure:
    w, x = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    product = w * x
    total = product.sum()
    loss = total**2
    for tensor in (product, total, loss):
        tensor.retain_grad()  # otherwise only w would keep its gradient
    loss.backward()

    figure, axes = canvas(4.4, "loss = (w * x).sum() ** 2", (-1.0, 10.3), (-3.3, 2.6))
    columns = [("w", w, 0), ("product", product, 3.3), ("sum", total, 6.6), ("loss", loss, 9.4)]
    for name, tensor, place in columns:
        box(axes, place, 1.2, f"{name}\n{text_of(tensor)}", BLUE)
        box(axes, place, -2.1, text_of(tensor.grad), ORANGE)
    box(axes, 0, -0.45, f"x\n{text_of(x)}", GREY)
    for (_, _, start), (_, _, end) in pairwise(columns):
        arrow(axes, (start + 0.85, 1.2), (end - 0.95, 1.2), BLUE)
        arrow(axes, (end - 0.98, -2.1), (start + 0.95, -2.1), ORANGE)
    arrow(axes, (0.85, -0.2), (2.5, 0.75), GREY)
    for place, text in ((1.75, "times x"), (4.95, "add"), (8.05, "square")):
        axes.text(place, 1.45, text, ha="center", color=BLUE)
    for place, text in (
        (1.75, f"· {text_of(x)}"),
        (4.95, "· [1, 1]"),
        (8.05, f"· 2 · {total:.0f}"),
    ):
        axes.text(place, -1.85, text, ha="center", color=ORANGE)
    axes.text(5, 2.15, "forward: the values", ha="center", color=BLUE, weight="bold")
    text = "backward: the slope of the loss with respect to each value"
    axes.text(5, -3.2, text, ha="center", color=ORANGE, weight="bold")
    return figure


def window() -> Figure:
    image = torch.zeros(4, 6)
    image[:, 2] = 1
    stroke = torch.tensor([[-1.0, 2, -1]] * 3)
    output = nn.functional.conv2d(image[None, None], stroke[None, None])[0, 0]
    title = "A filter slides over the image, one weighted sum per position"
    figure, axes = canvas(3.0, title, (-0.2, 16.2), (-5.2, 1.2))
    axes.set_aspect("equal")
    cells(axes, image, 0, 0)
    cells(axes, stroke, 7.2, -0.5, ink=False)
    cells(axes, output, 11.9, -1)
    frame = {"fill": False, "edgecolor": ORANGE, "linewidth": 4}
    axes.add_patch(Rectangle((1, -3), 3, 3, **frame))
    axes.add_patch(Rectangle((12.9, -2), 1, 1, **frame))
    for x, text in ((6.6, "×"), (11.05, "=")):
        axes.text(x, -2, text, ha="center", va="center", fontsize=20)
    for x, text in ((3, "image"), (8.7, "filter"), (13.9, "output")):
        axes.text(x, 0.35, text, ha="center")
    axes.text(8, -5.0, "3 · (−1 · 0 + 2 · 1 − 1 · 0) = 6", ha="center", color=ORANGE)
    return figure


def split() -> Figure:
    sizes = [len(MNISTDataset(ROOT / "data", s)) for s in ("train", "validation", "test")]
    figure, axes = canvas(2.5, "Learn, choose, and only then take the exam", (0, 74_000), (-2, 2))
    start = 0
    for size, colour, name, why, y in zip(
        sizes,
        (ORANGE, BLUE, GREEN),
        ("to train on", "to validate on", "to test on"),
        (
            "the weights learn from these",
            "we choose settings with these",
            "the exam, at the very end",
        ),
        (0.75, -1.5, 0.75),
        strict=True,
    ):
        axes.add_patch(Rectangle((start, -0.5), size, 0.9, facecolor=colour, edgecolor="white"))
        middle = start + size / 2
        text = f"{size:,} {name}\n{why}"
        axes.text(middle if size > 20_000 else start + size, y, text, color=colour,
                  ha="center" if size > 20_000 else "right", va="bottom")  # fmt: skip
        start += size + (4_000 if name == "to validate on" else 0)
    return figure


def overfitting() -> Figure:
    """Train a network that has far more weights than images to learn from."""
    torch.manual_seed(0)
    train_set, held_out = (MNISTDataset(ROOT / "data", s) for s in ("train", "validation"))
    train_set.augment = False
    few = Subset(train_set, range(500))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    loss_function, curves = nn.CrossEntropyLoss(), ([], [])
    for _ in range(40):
        for images, labels in DataLoader(few, batch_size=32, shuffle=True):
            loss = loss_function(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for curve, dataset in zip(curves, (few, held_out), strict=True):
            curve.append(loss_function(*predict(model, dataset, CPU)).item())
        model.train()
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    best = min(curves[1])
    axes.plot(range(1, 41), curves[1], color=BLUE)
    axes.plot(range(1, 41), curves[0], color=ORANGE)
    axes.text(40, curves[1][-1] + 0.05, "validation loss", color=BLUE, ha="right")
    axes.text(40, curves[0][-1] + 0.05, "training loss", color=ORANGE, ha="right")
    turn = (curves[1].index(best) + 1, best)
    axes.annotate("from here on it overfits", turn, (10, 0.8), arrowprops={"arrowstyle": "->"})
    axes.set(title="Overfitting: better and better at the wrong thing", ylim=(-0.02, 1.2))
    axes.set(xlabel="epoch (on only 500 images)", ylabel="loss")
    return figure


def backbone() -> Figure:
    figure, axes = canvas(2.9, "Keep the backbone, replace the head", (-0.9, 12.4), (-2.1, 1.6))
    photo = ImageOps.exif_transpose(Image.open(ROOT / "docs" / "digits" / "chalk.jpg"))
    axes.imshow(photo, extent=(-0.9, 1.1, -0.9, 1.1), aspect="auto")
    box(axes, 4.1, 0.1, "backbone\nResNet-18\n11 million weights", BLUE)
    box(axes, 8.5, 0.1, "head\nnn.Linear\n5,130 weights", ORANGE)
    axes.text(11.9, 0.1, "logits", ha="center", va="center")
    arrow(axes, (1.2, 0.1), (2.15, 0.1), GREY)
    arrow(axes, (6.0, 0.1), (7.15, 0.1), GREY)
    arrow(axes, (9.85, 0.1), (11.1, 0.1), GREY)
    axes.text(6.55, 0.35, "512", ha="center", color=GREY)
    axes.text(10.45, 0.35, "10", ha="center", color=GREY)
    axes.text(
        3.9,
        -1.9,
        "learnt from ImageNet's photos:\nwhat tells things apart",
        ha="center",
        color=BLUE,
    )
    axes.text(9.1, -1.9, "new, starts out random:\nlearns our classes", ha="center", color=ORANGE)
    return figure


def augmented() -> Figure:
    torch.manual_seed(0)
    images = MNISTDataset(ROOT / "data", "train").images[:5] / 255
    figure = Figure(figsize=(6.4, 5.2))
    figure.suptitle(
        "Five digits, and what five epochs might make of each", weight="bold", fontsize=14
    )
    left, right = figure.subplots(1, 2, width_ratios=[1, 5])
    copies = torch.cat([random_affine(image.repeat(5, 1, 1, 1)) for image in images])
    for axes, part, columns, title in (
        (left, images, 1, "original"),
        (right, copies, 5, "augmented"),
    ):
        axes.imshow(make_grid(1 - part, nrow=columns, padding=1).movedim(0, -1).numpy())
        axes.set_title(title, weight="normal", color=BLUE if part is images else ORANGE)
        axes.axis("off")
    return figure


def eval_mode() -> Figure:
    """What the network says about one image, in training mode and in evaluation mode."""
    model, checkpoint = load_model(newest_checkpoint())
    dataset = MNISTDataset(ROOT / "data", "validation")
    images, labels = dataset.images / 255, dataset.labels
    generator = torch.Generator().manual_seed(0)
    logits, _ = predict(model, dataset, CPU)
    right = logits.softmax(dim=1)[range(len(labels)), labels]
    one = (right - 0.8).abs().argmin()  # the network is not quite sure of this one

    @torch.no_grad()
    def answers(mode: bool) -> list[float]:
        model.load_state_dict(checkpoint["weights"])  # training mode would change the averages
        model.train(mode)
        found = []
        for _ in range(40):
            others = torch.randperm(len(images), generator=generator)[:9]
            batch = torch.cat([images[one][None], images[others]])
            found.append(model(batch)[0].softmax(dim=0)[labels[one]].item())
        return found

    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    axes.plot(answers(True), "o", color=ORANGE)
    axes.plot(answers(False), color=BLUE)
    axes.text(40, 1.02, "after model.eval(): always the same", color=BLUE, ha="right", va="bottom")
    axes.text(40, 0.25, "after model.train()", color=ORANGE, ha="right", va="bottom")
    axes.set(title="Forget eval(), and the answer depends on the neighbours", ylim=(0, 1.15))
    axes.set(xlabel="the same image among nine others, 40 times", xticks=[])
    axes.set(ylabel=f"probability of {labels[one]}")
    return figure


@cache
def losses_after_an_epoch() -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = main(parse_args(["--epochs=1", f"--out-dir={folder}", "--device=cpu"]))
        return load_checkpoint(run_dir / "last.pt")["image_losses"]


def hard() -> Figure:
    losses, dataset = losses_after_an_epoch(), MNISTDataset(ROOT / "data", "train")
    order, share = losses.argsort(), parse_args([]).hard_share
    limit = losses[order[-round(share * len(losses))]].item()
    figure = Figure(figsize=(7, 5.2))
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    axes = top.subplots()
    bins = torch.linspace(0.5, 3, 51).tolist()
    for part, colour in ((losses[losses < limit], BLUE), (losses[losses >= limit], ORANGE)):
        axes.hist(part.clamp(0.5, 3).numpy(), bins, color=colour)
    axes.text(0.75, 20_000, f"{1 - share:.0%}: learnt, set aside", color=BLUE)
    axes.text(1.1, 2_500, f"the hardest {share:.0%}: practise these", color=ORANGE)
    axes.set(yscale="log", xlabel="loss when shown in epoch 1 (3 means 3 or more)", ylabel="images")
    axes.set(title="After one epoch, most digits are learnt", ylim=(1, 50_000))
    for axes, colour, chosen, title in zip(
        bottom.subplots(1, 2),
        (BLUE, ORANGE),
        (order[:18], order[-18:]),
        ("the easiest", "the hardest"),
        strict=True,
    ):
        grid = make_grid(1 - dataset.images[chosen] / 255, nrow=6, padding=1)
        axes.imshow(grid.movedim(0, -1).numpy())
        axes.axis("off")
        axes.set_title(title, color=colour, weight="normal", fontsize=13)
    return figure


def gallery(title: str, images: list, captions: list[str], columns: int) -> Figure:
    rows = len(images) // columns
    figure = Figure(figsize=(7, 0.6 + rows * 7.9 / columns))
    figure.suptitle(title, weight="bold", fontsize=14)
    for axes, image, caption in zip(
        figure.subplots(rows, columns).flat, images, captions, strict=True
    ):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set_title(caption, y=-0.02, va="top", fontsize=12, weight="normal")
        axes.axis("off")
    return figure


def hardest() -> Figure:
    losses = load_checkpoint(newest_checkpoint().with_name("last.pt"))["image_losses"]
    dataset = MNISTDataset(ROOT / "data", "train")
    worst = losses.topk(15).indices
    images = [1 - dataset.images[i, 0] / 255 for i in worst]
    captions = [f"label: {dataset.labels[i]}" for i in worst]
    return gallery("The hardest training images: are the labels right?", images, captions, 5)


def predictions() -> Figure:
    model, _ = load_model(newest_checkpoint())
    paths = sorted((ROOT / "docs" / "digits").iterdir())
    seen = torch.stack([read_digit(path) for path in paths])
    with torch.inference_mode():
        probabilities, digits = model(seen).softmax(dim=1).max(dim=1)
    images = []
    for path in paths:
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        square = ImageOps.pad(
            Image.alpha_composite(paper, picture).convert("RGB"), (200, 200), color="white"
        )
        images.append(square)
    images += [1 - image[0] for image in seen]
    captions = [path.stem.replace("_on_a_page", "").replace("_", " ") for path in paths]
    captions += [f"{digit} ({p:.0%})" for digit, p in zip(digits, probabilities, strict=True)]
    return gallery("The picture, and what the network sees", images, captions, len(paths))


PICTURES = {
    draw.__name__: draw
    for draw in (digit, valley, loop, graph, window, split, overfitting, backbone, augmented)
    + (eval_mode, hard, hardest, predictions)
}


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        torch.manual_seed(0)
        path = ROOT / "docs" / "images" / f"{name}.png"
        with matplotlib.rc_context(STYLE):
            PICTURES[name]().savefig(path)
        print(f"{path}: {path.stat().st_size:,} bytes")
