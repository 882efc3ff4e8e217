"""Watch an image on its way through the network: what does each block make of it?

    python -m examples.look_inside            # a test image
    python -m examples.look_inside IMAGE      # your own handwriting

A *forward hook* is a function that a module calls with its output whenever it has computed one, so
you can look into a model without changing a line of it. The picture shows the input, the filters
of the first convolution (its weights, the little windows that slide over the input), the channels
that light up most after each block, and the logits.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to import from the folder above
import utils
from dataset import MNISTDataset
from evaluate import load_model, newest_checkpoint
from examples.handwriting import read_digit

SHOWN = 16  # channels per block


def main(args: argparse.Namespace) -> None:
    path = args.checkpoint or newest_checkpoint()
    model, checkpoint = load_model(path)
    image = read_digit(args.image) if args.image else MNISTDataset(args.data_dir, "test")[0][0]
    outputs = record_outputs(model, image)
    if not any(output.dim() == 3 for output in outputs.values()):
        what = f"{utils.relative(path)} holds a {checkpoint['model']}"
        raise utils.UserError(
            f"{what}, but only a cnn's blocks can be shown; choose one with --checkpoint"
        )
    for name, output in outputs.items():
        print(f"{name:12}{' × '.join(map(str, output.shape))}")
    figure = inside_figure(model, image, outputs)
    utils.save_picture(figure, path.with_name(f"{path.stem}-inside.png"))


@torch.inference_mode()
def record_outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What each part of a model makes of an image (C, H, W): its output, by the part's name."""
    outputs = {}
    for name, module in model.named_children():
        # name=name keeps this part's name; otherwise all hooks would see the loop's last one.
        module.register_forward_hook(
            lambda _, inputs, output, name=name: outputs.update({name: output[0]})
        )
    model(image[None])  # a batch of one; the hooks are called on the way
    return outputs


def inside_figure(model: nn.Module, image: Tensor, outputs: dict[str, Tensor]) -> Figure:
    """A row of images for each stage, and bars for the logits."""
    *stages, (last, logits) = outputs.items()
    filters = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight
    rows = [("input", image), ("filters of the first convolution", filters.detach()[:, 0])]
    for name, channels in stages:
        if channels.dim() == 3:  # (C, H, W)
            order = channels.mean(dim=(1, 2)).argsort(descending=True)  # the most active first
            shape = " × ".join(map(str, channels.shape))
            numbers = ", ".join(map(str, order[:SHOWN].tolist()))
            rows.append((f"{name}: {shape}, most active: {numbers}", channels[order]))

    figure = Figure(figsize=(10, 1.2 * len(rows) + 2), layout="constrained")
    heights = [2, *[1] * (len(rows) - 1), 1.5]
    *axes, bars = figure.subplots(len(heights), height_ratios=heights)
    for axis, (title, channels) in zip(axes, rows, strict=True):
        images = channels[:SHOWN, None]
        grid = make_grid(images, SHOWN, padding=1, normalize=True, pad_value=1)
        axis.imshow(grid.movedim(0, -1).numpy())
        axis.axis("off")
        axis.set_title(title, fontsize=10)
    bars.bar(range(len(logits)), logits.numpy(), color="#0072b2")
    bars.set_xticks(range(len(logits)))
    bars.set_title(f"{last}: {len(logits)} logits; the highest wins", fontsize=10)
    return figure


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m examples.look_inside", description=summary)
    add, data_dir = parser.add_argument, utils.ROOT / "data"
    add("image", type=Path, nargs="?", metavar="IMAGE", help="a picture (default: a test image)")
    add("--checkpoint", type=Path, metavar="FILE", help="a best.pt (default: the newest run's)")
    add(
        "--data-dir",
        type=Path,
        default=data_dir,
        help="folder with the MNIST files (default: data)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run(parse_args, main)
