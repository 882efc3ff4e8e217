"""An image on its way through the network: what each block makes of it.

    python -m examples.look_inside            # a test image
    python -m examples.look_inside IMAGE      # a picture of your own

A forward hook is a function that a module calls with its output each time that it has computed one:
so you can look into a model without changing it. The picture shows the input, the filters of the
first convolution (its weights, which slide over the input), some channels after each block, and
the logits.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

import utils
from dataset import MNISTDataset, read_digit
from evaluate import ROOT, newest_checkpoint, save_picture
from model import build_model

SHOWN = 16  # channels of each block, the first ones


def main(args: argparse.Namespace) -> None:
    path = args.checkpoint or newest_checkpoint(ROOT / "checkpoints")
    checkpoint = utils.load_checkpoint(path)
    if checkpoint["model"] != "cnn":
        raise utils.InputError(f"{utils.short(path)} holds no cnn: choose another --checkpoint")
    model = build_model("cnn", checkpoint["classes"]).eval()
    utils.load_states(checkpoint, model)

    image = read_digit(args.image) if args.image else MNISTDataset(args.data_dir, "test")[0][0]
    outputs = record_outputs(model, image)
    for name, output in outputs.items():
        print(f"{name:12}{' × '.join(map(str, output.shape))}")
    picture = path.with_name(f"{path.stem}-inside.png")
    save_picture(figure_of(image, model.block1[0].weight.detach(), outputs), picture)
    print(f"Picture     {utils.short(picture)}")


@torch.inference_mode()
def record_outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What each member of a model makes of an image (1, 28, 28): its output, without the batch."""
    outputs = {}
    for name, module in model.named_children():
        # name=name keeps this name; the function would otherwise find the loop's last one.
        module.register_forward_hook(
            lambda _, inputs, output, name=name: outputs.update({name: output[0]})
        )
    model(image[None])  # the hooks run now
    return outputs


def figure_of(image: Tensor, filters: Tensor, outputs: dict[str, Tensor]):
    """One row of images for each stage, and bars for the logits."""
    from matplotlib.figure import Figure

    *blocks, (_, logits) = outputs.items()
    rows = [("input", image[None]), ("filters of block1", filters)]
    rows += [(name, channels[:, None]) for name, channels in blocks]
    figure = Figure(figsize=(10, 8), layout="constrained")
    *axes, bars = figure.subplots(len(rows) + 1, 1, height_ratios=[2, 1, 1, 1, 1, 1, 1.5])
    for axis, (name, channels) in zip(axes, rows, strict=True):
        grid = make_grid(channels[:SHOWN], nrow=SHOWN, padding=1, normalize=True, pad_value=1)
        axis.imshow(grid.movedim(0, -1).numpy())
        axis.axis("off")
        shape = " × ".join(map(str, channels.squeeze(1).shape))
        shown = f", {SHOWN} of them" if len(channels) > SHOWN else ""
        axis.set_title(f"{name}: {shape}{shown}", fontsize=10)
    bars.bar(range(len(logits)), logits.numpy(), color="#0072b2")
    bars.set_xticks(range(len(logits)))
    bars.set_title(f"classifier: {len(logits)} logits", fontsize=10)
    return figure


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m examples.look_inside", description=__doc__.split("\n")[0]
    )
    parser.add_argument("image", type=Path, nargs="?", metavar="IMAGE", help="not a test image")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="not the newest best.pt")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="of the MNIST files")
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
