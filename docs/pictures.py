"""The drawings in README.md: what they show, PyTorch has computed.

    python -m docs.pictures   # after a run of train.py

It trains an epoch itself, to have the losses after it. docs/results.md says how the other pictures
are made.
"""

import tempfile

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from dataset import MNISTDataset, random_affine
from evaluate import load_model, newest_checkpoint, predict
from train import main, parse_args
from utils import ROOT, load_checkpoint

BLUE, ORANGE = "#0072b2", "#d55e00"  # colour-blind people can tell these apart (Okabe and Ito)
CPU = torch.device("cpu")


def text(tensor: Tensor) -> str:
    """A vector or a number, short."""
    return str([round(x) for x in tensor.tolist()] if tensor.dim() else round(tensor.item()))


def graph() -> Figure:
    """The graph of one line of code, from left to right; below it the gradients, walking back."""
    w, x = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    product = w * x
    total = product.sum()
    loss = total**2
    for tensor in (product, total, loss):
        tensor.retain_grad()  # else only leaves keep theirs
    loss.backward()

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.4, 8.4), ylim=(-1.15, 1.8))
    axes.axis("off")
    axes.set_title("loss = (w * x).sum() ** 2")
    nodes = [("product", product, 2.6), ("sum", total, 5), ("loss", loss, 7.4)]
    leaf = {"boxstyle": "round", "facecolor": "white", "edgecolor": BLUE}
    axes.text(0.2, 1.4, f"w\n{text(w)}", bbox=leaf, ha="center", va="center")
    grey = leaf | {"edgecolor": "grey"}
    axes.text(0.2, 0.2, f"x\n{text(x)}", bbox=grey, ha="center", va="center")
    for name, tensor, left in nodes:
        label = f"{name}\n{text(tensor)}"
        axes.text(left, 0.8, label, bbox=leaf, ha="center", va="center")
        function = type(tensor.grad_fn).__name__
        axes.text(left, 1.2, function, color=BLUE, ha="center", fontsize=9)
    arrow = {"arrowstyle": "->", "color": BLUE, "shrinkA": 26, "shrinkB": 26}
    for start, end in (((0.2, 1.4), (2.6, 0.8)), ((2.6, 0.8), (5, 0.8)), ((5, 0.8), (7.4, 0.8))):
        axes.annotate("", end, start, arrowprops=arrow)
    axes.annotate("", (2.6, 0.8), (0.2, 0.2), arrowprops=arrow | {"color": "grey"})
    back = arrow | {"color": ORANGE}
    steps = [(left, tensor.grad) for _, tensor, left in nodes[::-1]] + [(0.2, w.grad)]
    for (left, gradient), (end, _) in zip(steps, steps[1:], strict=False):
        axes.annotate("", (end, -0.75), (left, -0.75), arrowprops=back)
        axes.text(left, -0.75, text(gradient), color=ORANGE, ha="center", va="center")
    axes.text(0.2, -0.75, f"w.grad\n{text(w.grad)}", color=ORANGE, ha="center", va="center")
    axes.text(8.4, 1.7, "forward: values", color=BLUE, ha="right")
    axes.text(8.4, -1.1, "backward: d loss / d value", color=ORANGE, ha="right")
    return figure


def eval_mode() -> Figure:
    """What a network answers for one image among others, in training and in evaluation mode."""
    model, checkpoint = load_model(newest_checkpoint())
    dataset = MNISTDataset(ROOT / "data", "validation")
    images, labels = dataset.images / 255, dataset.labels
    generator = torch.Generator().manual_seed(0)
    logits, _ = predict(model, dataset, CPU)
    right = logits.softmax(dim=1)[range(len(labels)), labels]
    one = (right - 0.8).abs().argmin()  # the network is not quite sure of this one

    @torch.no_grad()
    def answers(mode: bool) -> list[float]:
        model.train(mode)
        found = []
        for _ in range(40):
            others = torch.randperm(len(images), generator=generator)[:9]
            batch = torch.cat([images[one][None], images[others]])
            found.append(model(batch)[0].softmax(dim=0)[labels[one]].item())
        return found

    @torch.no_grad()
    def accuracy(size: int) -> float:
        model.load_state_dict(checkpoint["weights"])  # undoes what training mode did to averages
        model.train()
        correct = [
            model(part).argmax(dim=1) == answer
            for part, answer in zip(images.split(size), labels.split(size), strict=True)
        ]
        return torch.cat(correct).float().mean().item()

    sizes = [2, 4, 10, 20, 50, 100, 250]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(answers(True), "o", color=ORANGE, label="model.train()")
    model.load_state_dict(checkpoint["weights"])
    left.plot(answers(False), color=BLUE, label="model.eval()")
    left.set(title=f"One image of a {labels[one]}, with nine others", ylim=(-0.02, 1.02))
    left.set(xlabel="which others: 40 batches", ylabel=f"probability of {labels[one]}", xticks=[])
    left.legend(loc="lower left")
    right.plot(sizes, [accuracy(size) for size in sizes], "o-", color=ORANGE, label="model.train()")
    at_best = (logits.argmax(dim=1) == labels).float().mean().item()
    right.axhline(at_best, color=BLUE, label="model.eval()")
    right.set(title="All validation images", xlabel="images in a batch", xscale="log")
    right.set(ylabel="accuracy", xticks=sizes, xticklabels=sizes)
    right.minorticks_off()
    right.legend(loc="lower right")
    return figure


def hard() -> Figure:
    """The losses of all training images after an epoch, and the extremes among them."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = main(parse_args(["--epochs=1", f"--out-dir={folder}", "--device=cpu"]))
        losses = load_checkpoint(run_dir / "last.pt")["image_losses"]
    dataset = MNISTDataset(ROOT / "data", "train")
    order = losses.argsort()
    limit = losses[order[-len(losses) // 4]].item()

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    axes = top.subplots()
    bins = torch.linspace(0.5, 3, 101).tolist()
    for part, colour, label in (
        (losses[losses < limit], BLUE, "learnt: put away"),
        (losses[losses >= limit], ORANGE, "the hardest quarter: practised in the next epoch"),
    ):
        axes.hist(part.clamp(0.5, 3).numpy(), bins, color=colour, label=label)
    axes.set(yscale="log", xlabel="loss when last seen (at 3: all above)", ylabel="training images")
    axes.set_title("55,000 images after the first epoch")
    axes.legend()
    for axes, color, chosen, title in zip(
        bottom.subplots(1, 2),
        (BLUE, ORANGE),
        (order[:24], order[-24:]),
        ("24 with the lowest losses", "24 with the highest"),
        strict=True,
    ):
        grid = make_grid(1 - dataset.images[chosen] / 255, nrow=12, padding=1)
        axes.imshow(grid.movedim(0, -1).numpy())
        axes.axis("off")
        axes.set_title(title, color=color)
    return figure


def augmented() -> Figure:
    """Some training images, and what augmentation makes of them."""
    torch.manual_seed(0)
    images = MNISTDataset(ROOT / "data", "train").images[:8] / 255
    rows = torch.cat(
        [torch.cat([image[None], random_affine(image.repeat(5, 1, 1, 1))]) for image in images]
    )
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    grid = make_grid(1 - rows, nrow=12, padding=1)
    axes.imshow(grid.movedim(0, -1).numpy(), interpolation="nearest")
    axes.axis("off")
    axes.set_title("Eight images, each as it is, and as five epochs show it")
    return figure


if __name__ == "__main__":
    torch.manual_seed(0)
    for draw in (graph, eval_mode, hard, augmented):
        path = ROOT / "docs" / "images" / f"{draw.__name__}.png"
        draw().savefig(path)
        print(f"{path}: {path.stat().st_size:,} bytes")
