"""Train on photos of your own, in a folder for each kind of thing: photos/cat/1.jpg and so on.

    python -m examples.photos photos                     # trains, and saves photos.pt
    python -m examples.photos photos new.jpg other.jpg   # says what is on new photos

The loop is that of train.py. What changes is here: photos differ in size, some are damaged, nobody
has split them, and classes have names. Few photos call for pretrained weights and augmentation.
"""

import argparse
from functools import cache
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import utils
from dataset import open_picture
from evaluate import predict
from model import ResNet18
from train import build_optimizer, train_epoch

SIZE, BATCH_SIZE = 128, 16  # pixels of a side, and photos a step
to_float = v2.ToDtype(torch.float32, scale=True)  # from 0 to 1; the model normalises
plain = v2.Compose([v2.Resize((SIZE, SIZE)), to_float])
part = v2.RandomResizedCrop(SIZE, scale=(0.5, 1))  # another one each time
augmented = v2.Compose([part, v2.RandomHorizontalFlip(), to_float])


@cache  # in each epoch after the first they come from memory: 10,000 in 2 GB
def read_photo(path: str | Path) -> Tensor:
    """A photo, made small, (3, H, W) uint8. Raises InputError, if it can't be read."""
    try:
        photo = open_picture(path).convert("RGB")  # upright, as the camera was held
    except utils.InputError as error:
        raise utils.InputError(f"{utils.short(Path(path))}: {error}") from error
    photo.thumbnail((2 * SIZE, 2 * SIZE))
    return v2.functional.pil_to_tensor(photo)


def read_folder(folder: Path, held_out: bool) -> ImageFolder:
    """The photos to train on, or those held out to validate; says which files can't be read."""

    def is_wanted(path: str) -> bool:
        # One in five is held out. Chosen by name, a photo stays where it is when others come.
        if (crc32(Path(path).name.encode(errors="replace")) % 5 == 0) != held_out:
            return False
        try:
            return read_photo(path) is not None
        except utils.InputError as error:
            print(f"Left out: {error}")
            return False

    return ImageFolder(
        folder,
        transform=plain if held_out else augmented,
        loader=read_photo,
        is_valid_file=is_wanted,
        allow_empty=True,  # train says which
    )


def train(args: argparse.Namespace) -> None:
    train_set, held_out = (read_folder(args.folder, part) for part in (False, True))
    names = train_set.classes
    empty = [name for label, name in enumerate(names) if label not in train_set.targets]
    if len(names) < 2 or empty or not held_out.samples:
        lack = f"a photo to train on in {empty[0]}" if empty else "two kinds, and more photos"
        raise utils.InputError(f"{args.folder} lacks {lack} (one photo in five is held out)")
    print(f"{len(train_set)} photos to train on, {len(held_out)} held out: {', '.join(names)}")
    device, _, _ = utils.setup_distributed("auto")
    torch.manual_seed(0)  # all that is random follows from it
    model = ResNet18(len(names), args.pretrained, size=SIZE)
    model.to(device, memory_format=torch.channels_last)
    loader = DataLoader(train_set, BATCH_SIZE, shuffle=True)
    loss_function = nn.CrossEntropyLoss(reduction="none")  # a loss for each photo
    optimizer, scheduler = build_optimizer(model, args.lr, args.epochs * len(loader))
    for epoch in range(1, args.epochs + 1):
        losses, _, _ = train_epoch(model, loader, loss_function, optimizer, scheduler, device)
        logits, labels = predict(model, held_out, device)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        print(f"epoch {epoch}: loss {losses.mean():.3f}, validation {accuracy:.1%}", flush=True)
    checkpoint = {"model": "photos", "classes": len(names), "names": names, "epoch": args.epochs}
    utils.save_checkpoint(Path(f"{args.folder}.pt"), checkpoint | {"weights": model.state_dict()})
    print(f"Saved {args.folder}.pt")


def classify(args: argparse.Namespace) -> None:
    checkpoint = utils.load_checkpoint(Path(f"{args.folder}.pt"))
    names = utils.alike(checkpoint.get("names"), [""] * checkpoint["classes"])  # so many texts
    model = ResNet18(len(names), size=SIZE)
    utils.load_states(checkpoint, model)
    for path in args.photos:
        logits, _ = predict(model, [(plain(read_photo(path)), 0)], torch.device("cpu"))
        probability, best = logits[0].softmax(dim=0).max(dim=0)
        print(f"{utils.short(path)}: {names[best]!r} ({probability:.1%})")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m examples.photos", description=__doc__.split("\n")[0]
    )
    flag = parser.add_argument
    flag("folder", type=Path, help="has a folder of photos for each kind of thing")
    flag("photos", type=Path, nargs="*", metavar="PHOTO", help="say what is on these")
    flag("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="ImageNet (yes)")
    flag("--epochs", type=int, default=15, metavar="N", help="how often to see all photos (15)")
    flag("--lr", type=float, default=0.001, metavar="X", help="peak learning rate (0.001)")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error("--epochs: use 1 or more")
    return args


if __name__ == "__main__":
    utils.run_script(parse_args, lambda args: classify(args) if args.photos else train(args))
