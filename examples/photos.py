"""Train a network on your own photos: a folder for each kind of thing, photos/cat/1.jpg and so on.

    python -m examples.photos photos                     # trains, and saves photos.pt
    python -m examples.photos photos new.jpg other.jpg   # says what's in new photos

The training loop is train.py's, unchanged. What's new is the data, which is where most of the work
in a real project goes: photos come in all sizes, some files are damaged, nobody has set any aside
for validation, and classes have names. There are never enough photos, either. So we start from a
network that has already seen 1.2 million of them (*transfer learning*), and show it a different
part of each photo every time (*data augmentation*).
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to import from the folder above
import utils
from evaluate import predict
from examples.handwriting import open_picture
from model import ResNet18
from train import build_optimizer, train_epoch

SIZE = 128  # pixels per side of the images that the network sees
VALIDATION = ("val", "valid", "validation", "test")  # what people call the photos they set aside
HIDDEN = (".", "__")  # as in .ipynb_checkpoints, .DS_Store and __MACOSX
to_float = v2.ToDtype(torch.float32, scale=True)  # from 0 to 1; the model normalises
plain = v2.Compose([v2.Resize((SIZE, SIZE)), to_float])
part = v2.RandomResizedCrop(SIZE, scale=(0.5, 1))  # a different one every time
augmented = v2.Compose([part, v2.RandomHorizontalFlip(), to_float])


def main(args: argparse.Namespace) -> None:
    """Say what's in the new photos if there are any, otherwise train."""
    return classify(args) if args.photos else train(args)


def train(args: argparse.Namespace) -> None:
    """Train on the photos in args.folder, and save the network from the best epoch."""
    folder, set_aside = find_split(args.folder)
    try:  # can we save the result? Better to find out now than after training
        tempfile.TemporaryFile(dir=args.output.parent).close()
    except OSError as error:
        where = f"{utils.relative(args.output.parent)}: {error.strerror}"
        raise utils.UserError(
            f"Can't write to {where}. Choose another place with --output"
        ) from error
    names = [path.name for path in folders_in(folder)]
    if len(names) < 2:
        raise utils.UserError(f"{utils.relative(folder)} needs at least two folders, one per class")

    # Model: it comes first because you'd want to know at once if its weights can't be downloaded.
    device = utils.choose_device()
    torch.manual_seed(0)  # everything random follows from this seed
    model = ResNet18(len(names), args.pretrained, size=SIZE).to(device)
    if device.type != "mps":
        model.to(memory_format=torch.channels_last)

    # Data: a list of (photo, label) pairs works as a Dataset: it has a length and can be indexed.
    held = f"those in {utils.relative(set_aside)}" if set_aside else "about a fifth of each class"
    print(f"Reading your photos. To check the network later, we hold out {held}.")
    train_set, validation_set = [], []
    for label, name in enumerate(names):
        photos = read_photos(folder / name)
        training, held_out = hold_out(photos)
        if set_aside:
            training, held_out = photos.values(), read_photos(set_aside / name).values()
        print(f"{name}: {len(training):,} photos to train on, {len(held_out):,} held out")
        if not training or not held_out:
            raise utils.UserError(f"{name} needs at least 1 photo to train on and 1 to hold out")
        train_set += [(photo, label) for photo in training]
        validation_set += [(plain(photo), label) for photo in held_out]
    loader = DataLoader(train_set, batch_size=16, shuffle=True, collate_fn=augment)

    # From here on it's train.py's story again, only shorter.
    print(f"Training on {device}. You can stop at any time, and the best network so far is kept.")
    loss_function = nn.CrossEntropyLoss(reduction="none")  # one loss per photo
    optimizer, scheduler = build_optimizer(model, args.lr, args.epochs * len(loader))
    best = 0.0
    for epoch in range(1, args.epochs + 1):
        losses, _ = train_epoch(model, loader, loss_function, optimizer, scheduler, device)
        logits, labels = predict(model, validation_set, device)
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        print(f"epoch {epoch}: loss {losses.mean():.3f}, validation {accuracy:.1%}", flush=True)
        if accuracy >= best:
            best, best_logits = accuracy, logits
            checkpoint = {"model": "photos", "classes": len(names), "names": names, "epoch": epoch}
            checkpoint["weights"] = model.state_dict()
            utils.save_checkpoint(args.output, checkpoint)

    mistakes = mistakes_figure(names, validation_set, best_logits)
    utils.save_picture(mistakes, args.output.with_name(f"{args.output.stem}-mistakes.png"))
    print(f"Network      {utils.relative(args.output)} got {best:.1%} of the held-out photos right")
    guess = labels.bincount().max() / len(labels)
    print(f"(Always naming the commonest class would get {guess:.1%}.) Do look at the mistakes.")
    print("Then add a new photo to the end of your command, and the network will say what's in it.")


def augment(batch: list[tuple[Tensor, int]]) -> list[Tensor]:
    """Make a batch of images and one of labels, each photo a little different from last time."""
    return default_collate([(augmented(photo), label) for photo, label in batch])


def find_split(folder: Path) -> tuple[Path, Path | None]:
    """The folder with the classes, and the one to validate on if the photos are already split."""
    folders = {path.name.lower(): path for path in folders_in(folder)}
    set_aside = [folders[name] for name in VALIDATION if name in folders]
    if "train" not in folders or not (set_aside or len(folders) == 1):
        return folder, None
    labelled = [path for path in set_aside if folders_in(path)]  # `test` often has no labels
    return folders["train"], labelled[0] if labelled else None


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, in alphabetical order, except hidden ones."""
    if not folder.is_dir():
        raise utils.UserError(f"{utils.relative(folder)} isn't a folder; give one with your photos")
    folders = [path for path in folder.iterdir() if path.is_dir()]
    return sorted(path for path in folders if not path.name.startswith(HIDDEN))


def read_photos(folder: Path) -> dict[Path, Tensor]:
    """All readable photos in a folder. They stay in memory, where 10,000 take up to 2 GB."""
    photos = {}
    for path in tqdm(sorted(folder.rglob("*")), folder.name, leave=False, disable=None):
        hidden = any(part.startswith(HIDDEN) for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            try:
                photos[path] = read_photo(path)
            except utils.UserError as error:
                tqdm.write(f"Skipped {utils.relative(path)}: {error}")
    return photos


def read_photo(path: Path) -> Tensor:
    """A photo as a small (3, H, W) uint8 tensor. Raises UserError if it can't be read."""
    photo = open_picture(path)  # upright, however the camera was held
    photo.thumbnail((2 * SIZE, 2 * SIZE))
    page = Image.new("RGBA", photo.size, "white")  # shows through where the photo is transparent
    page.alpha_composite(photo)
    return v2.functional.pil_to_tensor(page.convert("RGB"))


def hold_out(photos: dict[Path, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split a class's photos into those to train on, and about a fifth to validate on.

    Each photo's name gives it a number from 0 to 1, always the same; photos below 0.2 are held out.
    So adding photos doesn't move the ones you have. One exception: if either side would be
    empty, it borrows the photo whose number came closest, which may go back when you add more.
    """
    numbers = {path: Random(os.fsencode(Path(*path.parts[-2:]))).random() for path in photos}
    order = sorted(photos, key=numbers.get)
    count = sum(number < 0.2 for number in numbers.values())
    count = min(max(count, 1), len(order) - 1)
    return [photos[path] for path in order[count:]], [photos[path] for path in order[:count]]


def mistakes_figure(names: list[str], samples: list, logits: Tensor):
    """A figure of up to 30 misclassified photos, the most confident mistakes first."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    labels = torch.tensor([label for _, label in samples])
    wrong = [i for i in confidence.argsort(descending=True).tolist() if predicted[i] != labels[i]]
    title = f"{len(wrong):,} of {len(samples):,} wrong: true class, prediction, confidence"
    shown = wrong[:30]
    captions = [f"{names[labels[i]]} as {names[predicted[i]]}, {confidence[i]:.0%}" for i in shown]
    images = [1 - samples[i][0] for i in shown]  # undoes what draw_images does to digits
    return utils.draw_images(title, images, captions, columns=5)


def classify(args: argparse.Namespace) -> None:
    """Say what's in new photos."""
    file = utils.relative(args.output)
    if not args.output.exists():
        raise utils.UserError(f"There's no {file} yet; to train one, give just the folder's name")
    checkpoint = utils.load_checkpoint(args.output)
    if checkpoint["model"] != "photos":
        raise utils.UserError(f"{file} wasn't made by this program; choose another with --output")
    names = checkpoint["names"]
    model = ResNet18(len(names), size=SIZE)
    model.load_state_dict(checkpoint["weights"])
    unreadable = 0
    for path in args.photos:
        try:
            samples = [(plain(read_photo(path)), 0)]  # predict wants a label, but doesn't use it
        except utils.UserError as error:  # one bad file shouldn't stop the rest
            print(f"{utils.relative(path)}: {error}", file=sys.stderr)
            unreadable += 1
            continue
        logits, _ = predict(model, samples, torch.device("cpu"))
        (first, second), (best, other) = logits[0].softmax(dim=0).topk(2)
        answer = f"{names[best]} ({first:.1%}), then {names[other]} ({second:.1%})"
        print(f"{utils.relative(path)}: {answer}")
    if unreadable:
        raise utils.UserError(f"{unreadable} of {len(args.photos)} photos couldn't be read")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    summary = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("python -m examples.photos", description=summary)
    add, switch, number = parser.add_argument, argparse.BooleanOptionalAction, utils.number
    add("folder", type=Path, help="folder with one subfolder of photos per class")
    add("photos", type=Path, nargs="*", metavar="PHOTO", help="new photos to classify")
    add("--output", type=Path, metavar="FILE", help="the trained network (default: FOLDER.pt)")
    add("--pretrained", action=switch, default=True, help="use ImageNet weights (default: yes)")
    add("--epochs", type=number(int, 1), default=15, metavar="N", help="epochs (default: 15)")
    add("--lr", type=number(float, 1e-9), default=0.001, metavar="X", help="peak learning rate")
    args = parser.parse_intermixed_args(argv)
    name = f"{args.folder.resolve().name}.pt"  # resolve() so that `.` works too
    output = args.output or args.folder.resolve().parent
    args.output = output / name if output.is_dir() else output
    return args


if __name__ == "__main__":
    utils.run(parse_args, main)
