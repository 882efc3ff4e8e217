"""MNIST as a PyTorch Dataset, with data augmentation.

A Dataset answers two questions: how many samples are there (`__len__`), and what is sample number
i (`__getitem__`)? A DataLoader does the rest. It asks for samples, in random order if you like,
and stacks them into batches:

    loader = DataLoader(MNISTDataset("data", "train"), batch_size=128, shuffle=True)
    images, labels = next(iter(loader))  # (128, 1, 28, 28) float32 and (128,) int64
"""

import gzip
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from utils import UserError

FILES = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")}
FILES |= {"test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")}


class MNISTDataset(Dataset):
    """Handwritten digits: 55,000 to train on, 5,000 to validate on and 10,000 to test on.

    Args:
        data_dir: the folder that holds the four files, directly or in `MNIST/raw/`. If there are
            none at all, MNIST is downloaded; a folder that has some is never written to.
        split: "train", "validation" or "test". Only "train" is augmented.

    Attributes:
        images: (N, 1, 28, 28) uint8; all of them fit in memory.
        labels: (N,) int64, from 0 to classes - 1.
        classes: the number of classes.

    Raises:
        UserError: if a file is damaged or missing, or if none is there and the download fails.
    """

    def __init__(self, data_dir: Path | str, split: str):
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split is {split!r}; use 'train', 'validation' or 'test'")
        folder = find_files(Path(data_dir))
        names = FILES["test" if split == "test" else "train"]
        images, labels = (read_idx(folder / name) for name in names)
        if images.shape[:1] != labels.shape:
            raise UserError(f"The images and labels in {folder} don't match")
        if split != "test" and len(labels.unique()) < 2:
            raise UserError(f"The labels in {folder} are all the same: there's nothing to learn")
        self.classes = labels.max().item() + 1
        if split != "test":
            # The test set is the exam, so we set some training images aside to validate on. A
            # fixed seed picks the same ones every time, which keeps runs comparable.
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            held_out = -(-len(order) // 12)  # a twelfth, rounded up: 5,000 of 60,000
            kept = order[held_out:] if split == "train" else order[:held_out]
            images, labels = images[kept], labels[kept]

        self.images = images.unsqueeze(1)  # (N, 1, 28, 28): one channel, because they're greyscale
        self.labels = labels.long()
        self.augment = split == "train"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image (1, 28, 28) float32 from 0 (paper) to 1 (ink), and its label, an int64."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Several samples at once. A DataLoader calls this, if it exists, for a whole batch.

        It's optional, but it pays off here: augmenting 128 images together is many times faster
        than augmenting them one by one.
        """
        indices = torch.tensor(indices)
        images, labels = self.images[indices].float() / 255, self.labels[indices]
        if self.augment:
            images = random_affine(images)
        return list(zip(images, labels, strict=True))


def random_affine(images: Tensor) -> Tensor:
    """Rotate, shear, scale and shift each image a little, as if another hand had written it.

    Every call draws new random numbers, so the network never sees quite the same image twice. We
    chose the ranges by their validation loss; ranges twice as wide made it worse.

    Takes and returns (N, C, H, W) float32. Pixels that come in from outside the image are 0.
    """
    n, _, height, width = images.shape

    def uniform(limit: float) -> Tensor:
        return torch.empty(n, device=images.device).uniform_(-limit, limit)

    angle, shear = torch.deg2rad(uniform(7)), torch.deg2rad(uniform(6)).tan()
    scale = 1 + uniform(0.06)
    shift_x, shift_y = uniform(2 / width), uniform(2 / height)  # ±1 pixel: grids go from -1 to 1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # One 2×3 matrix per image tells each pixel of the new image where in the old one to look.
    matrices = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
    matrices = torch.stack(matrices, dim=1).view(n, 2, 3)
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def read_idx(path: Path) -> Tensor:
    """Read one of MNIST's four files, compressed (.gz) or not, as a uint8 tensor.

    The format is called IDX and described at http://yann.lecun.com/exdb/mnist: two zeros, an 8 for
    "bytes", the number of dimensions, the size of each in four bytes, and then all the values.
    """
    unpacked = path.with_suffix("")
    try:
        packed = path.exists() or not unpacked.exists()
        content = gzip.decompress(path.read_bytes()) if packed else unpacked.read_bytes()
        if content[:3] != bytes([0, 0, 8]):
            raise ValueError("it isn't in MNIST's format")
        shape = np.frombuffer(content, dtype=">i4", count=content[3], offset=4)
        values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(shape))
        return torch.from_numpy(values.reshape(shape).copy())  # `content` itself is read-only
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise UserError(f"Can't read {path}; it's missing or damaged ({error})") from error


def find_files(data_dir: Path) -> Path:
    """Find the folder with MNIST's files, or download them if there are none.

    If a folder already holds some of the files, it's yours, and we never write to it.
    """
    raw = data_dir / "MNIST" / "raw"
    for folder in (data_dir, raw):
        if any(folder.glob("*-idx[13]-ubyte*")):
            return folder
    from torchvision.datasets import MNIST  # slow to import, and hardly ever needed

    # Download into a temporary folder, and move that into place once it's complete.
    print(f"Can't find MNIST in {data_dir}, so we'll download it")
    parent = next(p for p in (data_dir, *data_dir.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            MNIST(temporary, download=True)  # torchvision tries mirrors and verifies checksums
            raw.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # another run may have got there first
                Path(temporary, "MNIST", "raw").rename(raw)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"Can't find MNIST in {data_dir} (see --data-dir), and downloading it failed: {reason}"
        ) from error
    return raw
