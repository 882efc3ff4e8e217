"""Train several networks and average their answers: an *ensemble*.

    python -m examples.ensemble 5               # five runs of train.py, with seeds 0 to 4
    python -m examples.ensemble 5 --epochs 12   # the same, with one of train.py's flags

Networks that started from different random weights make different mistakes. So when one of them is
wrong, the others usually outvote it. It's the most reliable way to a better result that we know of,
and the dullest, because the price is simply several times the work, in training and in use.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to import from the folder above
import train
import utils
from dataset import MNISTDataset
from evaluate import load_model, predict


def main(args: argparse.Namespace) -> None:
    """Train the networks one after the other, then test each alone and all of them together."""
    seeds = range(args.settings.seed, args.settings.seed + args.networks)
    run_dirs = []
    for seed in seeds:
        args.settings.seed = seed
        run_dirs.append(train.main(args.settings))

    device = utils.choose_device(args.settings.device)
    test_set = MNISTDataset(args.settings.data_dir, "test")
    total = 0.0
    print()
    for seed, run_dir in zip(seeds, run_dirs, strict=True):
        model, _ = load_model(run_dir / "best.pt")
        logits, labels = predict(model.to(device), test_set, device)
        print(f"Seed {seed}: {accuracy(logits, labels):.2%} of the test images read correctly")
        total = total + logits.softmax(dim=1)  # (N, classes): how the networks vote
    print(f"Test accuracy of all {args.networks} together: {accuracy(total, labels):.2%}")


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose label scores highest. Takes (N, classes), and (N,) int64."""
    return (scores.argmax(dim=1) == labels).float().mean().item()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the number of networks; all other flags are train.py's."""
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(
        "python -m examples.ensemble",
        description=summary,
        epilog="All other flags are train.py's; see python train.py --help.",
    )
    parser.add_argument("networks", type=utils.number(int, 1), help="how many networks to train")
    args, flags = parser.parse_known_args(argv)
    args.settings = train.parse_args(flags)
    return args


if __name__ == "__main__":
    utils.run(parse_args, main)
