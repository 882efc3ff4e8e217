"""MNIST as a PyTorch Dataset: 55,000 images to train on, 5,000 to validate, 10,000 to test.

A Dataset answers two questions: how many samples are there (`__len__`), and what is sample number
i (`__getitem__`). A DataLoader asks them, in random order if told to, and hands out batches.

    loader = make_loader(MNISTDataset("data", "train"), batch_size=128, shuffle=True)
    images, labels = next(iter(loader))  # (128, 1, 28, 28) float32 and (128,) int64
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)
from torchvision import datasets

# Mean and standard deviation of all pixels of the 60,000 training images, on a scale from 0 to 1.
MEAN, STD = 0.1307, 0.3081

VALIDATION_EVERY = 12  # one image in 12, that is 5,000 of 60,000, is held out
SPLIT_SEED = 0  # the same split in every run: results stay comparable


class MNISTDataset(Dataset):
    """Handwritten digits with their labels.

    Args:
        data_dir: folder that holds `MNIST/raw/`. Files missing there are downloaded.
        split: "train", "validation" or "test". Only "train" is augmented.
        seed: together with the epoch it decides how each image is augmented.

    Raises:
        SystemExit: with one line of advice, where the data is missing or damaged.
    """

    def __init__(self, data_dir: Path | str, split: str, seed: int = 0):
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split is {split!r}: use 'train', 'validation' or 'test'")
        mnist = load_mnist(data_dir, train=split != "test")
        images, labels = mnist.data, mnist.targets  # (N, 28, 28) uint8 and (N,) int64
        if split != "test":
            train, validation = split_indices(labels)
            kept = train if split == "train" else validation
            images, labels = images[kept], labels[kept]

        # All of MNIST is 55 MB as bytes: it stays in memory, and becomes float batch by batch.
        self.images = images.unsqueeze(1)  # (N, 1, 28, 28): one grey channel
        self.labels = labels
        self.augment = split == "train"
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch's augmentation: one random affine map for each image.

        Drawing it here, not in `__getitem__`, makes an image depend on (seed, epoch, index) alone:
        not on the order of the samples, nor on which worker process loads it.
        """
        if self.augment:
            self.maps = random_affine_maps(len(self), np.random.default_rng([self.seed, epoch]))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample: an image (1, 28, 28) float32, normalised, and its label () int64."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch in one go: images (N, 1, 28, 28) float32, normalised, and labels (N,) int64.

        A DataLoader calls this in place of N calls of `__getitem__` where a Dataset has it. It
        expects a list of samples, and collates them; this is a batch already, which `make_loader`
        passes on as it is. That is the difference between waiting for data and not: see the README.
        """
        indices = torch.tensor(indices)
        images = self.images[indices].float() / 255  # 0 is background, 1 is ink
        if self.augment:
            grid = sampling_grid(self.maps[indices])
            images = F.grid_sample(images, grid, align_corners=False)  # outside the image: 0
        return (images - MEAN) / STD, self.labels[indices]


def random_affine_maps(n: int, rng: np.random.Generator) -> Tensor:
    """n random maps (n, 2, 3) float32, as `torch.nn.functional.affine_grid` takes them.

    Each turns, shears, scales and shifts an image a little, as another hand would have written
    the digit. The ranges gave the best validation loss; twice as much gave a worse one.
    """
    angle = np.deg2rad(rng.uniform(-7, 7, n))
    shear = np.tan(np.deg2rad(rng.uniform(-6, 6, n)))
    scale = rng.uniform(0.94, 1.06, n)
    shift_x, shift_y = rng.uniform(-1, 1, (2, n)) / 14  # 1 pixel; affine_grid's unit is 14 pixels

    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    rows = [[cos, shear * cos - sin, shift_x], [sin, shear * sin + cos, shift_y]]
    return torch.from_numpy(np.moveaxis(np.array(rows, dtype=np.float32), 2, 0).copy())


def sampling_grid(maps: Tensor) -> Tensor:
    """Where each pixel of an augmented image comes from, for `grid_sample`.

    It equals `torch.nn.functional.affine_grid` (but for rounding), written out because that took
    more time than all the rest of the augmentation together.

    Args:
        maps: (N, 2, 3) float32.

    Returns:
        (N, 28, 28, 2) float32: x and y, both from -1 to 1 across the image.
    """
    centre = (torch.arange(28) + 0.5) / 14 - 1  # of each row or column of pixels
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    maps = maps[:, :, :, None, None]  # (N, 2, 3, 1, 1), to go with (28, 28)
    grid = maps[:, :, 0] * x + maps[:, :, 1] * y + maps[:, :, 2]  # (N, 2, 28, 28)
    return grid.movedim(1, -1)


def split_indices(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split samples into train and validation, both with the same share of each digit.

    Args:
        labels: (N,) int64.

    Returns:
        Two disjoint index tensors, int64, ascending, that together hold 0 to N - 1.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    by_digit = shuffled[labels[shuffled].argsort(stable=True)]
    is_validation = torch.arange(len(labels)) % VALIDATION_EVERY == 0
    return by_digit[~is_validation].sort().values, by_digit[is_validation].sort().values


def load_mnist(data_dir: Path | str, train: bool) -> datasets.MNIST:
    """torchvision's MNIST: it downloads what is missing, checks the MD5 sums and unpacks.

    Raises:
        SystemExit: with one line of advice, where that fails.
    """
    raw = Path(data_dir, "MNIST", "raw")
    missing = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    try:
        mnist = datasets.MNIST(data_dir, train=train, download=True)
        if len(mnist.data) != len(mnist.targets):
            raise ValueError(f"{len(mnist.data):,} images have {len(mnist.targets):,} labels")
        return mnist
    except Exception as error:  # whatever a damaged file or a network makes torchvision raise
        for folder in missing:  # what torchvision has made for the download
            with suppress(OSError):
                folder.rmdir()
        reason = " ".join(str(error).split()) or type(error).__name__
        sys.exit(
            f"MNIST cannot be read from {raw}, nor downloaded: {reason}. See --data-dir; "
            "files there that may be damaged: delete them, and they are made anew"
        )


class Share(BatchSampler):
    """One process's share of each batch, as lists of indices.

    Where several processes train together (see "When one machine is not enough" in the README),
    all draw the same batches, if torch's generator has the same seed in all of them, and each takes
    its own part: together they see every sample once. A process that is alone takes all.

    Args:
        sampler: the order of the samples.
        batch_size: samples in a batch of all processes together; the last one may have fewer.
        rank: this process's number, from 0.
        processes: how many there are.

    Raises:
        SystemExit: with one line of advice, where a batch can't be shared.
    """

    def __init__(self, sampler: Sampler, batch_size: int, rank: int, processes: int):
        super().__init__(sampler, batch_size, drop_last=False)
        last_batch = len(sampler) % batch_size or batch_size
        if batch_size % processes or last_batch < processes:
            sys.exit(
                f"--batch-size {batch_size} can't be shared by {processes} processes: use a "
                f"multiple of {processes} that leaves at least {processes} images at the end"
            )
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[self.rank :: self.processes]


def make_loader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool = False,
    workers: int = 0,
    rank: int = 0,
    processes: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of a data set, made by its `__getitems__`, or of single samples if it has none.

    Args:
        dataset: where the samples come from.
        batch_size: images in each batch, of all processes together; the last one may have fewer.
        shuffle: a new random order in each epoch (for training).
        workers: processes that load in the background; 0 loads in this one.
        rank: this training process's number, from 0.
        processes: training processes that share the data.
        pin_memory: lay batches where a GPU can fetch them while the CPU goes on.

    Raises:
        SystemExit: with one line of advice, where a batch can't be shared by the processes.
    """
    order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    return DataLoader(
        dataset,
        batch_sampler=Share(order, batch_size, rank, processes),
        num_workers=workers,
        collate_fn=keep_batch,
        worker_init_fn=ignore_ctrl_c,
        pin_memory=pin_memory,
    )


def keep_batch(batch: tuple[Tensor, Tensor] | list) -> tuple[Tensor, Tensor]:
    """`__getitems__` has made a batch already; samples, as most Datasets give them, are stacked."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


def ignore_ctrl_c(worker: int) -> None:
    """A terminal sends Ctrl-C to all processes; the main one alone decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
