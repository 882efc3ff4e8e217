"""MNIST as a PyTorch Dataset, and a picture of your own as one of its samples.

A Dataset answers two questions: how many samples are there (`__len__`), and what is sample number
i (`__getitem__`). A DataLoader asks them, in random order if told to, and hands out batches:

    loader = DataLoader(MNISTDataset("data", "train"), batch_size=128, shuffle=True)
    images, labels = next(iter(loader))  # (128, 1, 28, 28) float32 and (128,) int64
"""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from utils import InputError


class MNISTDataset(Dataset):
    """Handwritten digits with their labels: 55,000 to train, 5,000 to validate, 10,000 to test.

    Args:
        data_dir: folder that holds `MNIST/raw/`. Files missing there are downloaded.
        split: "train", "validation" or "test". Only "train" is augmented.

    Attributes:
        classes: how many kinds of image there are: labels go from 0 to classes - 1.

    Raises:
        InputError: if the files can be neither read nor downloaded.
    """

    def __init__(self, data_dir: Path | str, split: str):
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split is {split!r}: use 'train', 'validation' or 'test'")
        try:  # torchvision downloads what is missing, checks MD5 sums, and unpacks
            mnist = datasets.MNIST(data_dir, train=split != "test", download=True)
        except Exception as error:  # whatever a damaged file or a network makes it raise
            reason = " ".join(str(error).split()) or type(error).__name__
            folder = Path(data_dir, "MNIST", "raw")
            raise InputError(
                f"MNIST can be neither read from {folder} nor downloaded (see --data-dir): {reason}"
            ) from error
        images, labels = mnist.data, mnist.targets  # (N, 28, 28) uint8 and (N,) int64
        if len(images) != len(labels) or len(images) < (1 if split == "test" else 2):
            raise InputError(f"{data_dir} has {len(images):,} images and {len(labels):,} labels")
        self.classes = labels.max().item() + 1
        if split != "test":  # the same permutation in each run: results stay comparable
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            held_out = -(-len(order) // 12)  # 5,000 of 60,000
            kept = order[held_out:] if split == "train" else order[:held_out]
            images, labels = images[kept], labels[kept]

        # All of MNIST is 55 MB as bytes: it stays in memory, and becomes float batch by batch.
        self.images = images.unsqueeze(1)  # (N, 1, 28, 28): one channel, grey
        self.labels = labels
        self.augment = split == "train"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample: an image (1, 28, 28) float32 from 0 (paper) to 1 (ink), a label () int64."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Several samples in one go: a DataLoader prefers this, where a Dataset has it.

        The images of a batch are augmented together, which is many times as fast as one by one.
        """
        indices = torch.tensor(indices, dtype=torch.int64)
        images, labels = self.images[indices].float() / 255, self.labels[indices]
        if self.augment:
            images = random_affine(images)
        return list(zip(images, labels, strict=True))


def random_affine(images: Tensor) -> Tensor:
    """Turn, shear, scale and shift each image a little, as another hand would have written it.

    The random numbers are drawn anew in each call. The ranges gave the best validation loss; twice
    as much gave a worse one.

    Images are (N, C, H, W) float32, before and after; what comes in from outside is 0.
    """
    n, _, height, width = images.shape

    def uniform(limit: float) -> Tensor:
        return torch.empty(n, device=images.device).uniform_(-limit, limit)

    angle, shear = torch.deg2rad(uniform(7)), torch.deg2rad(uniform(6)).tan()
    scale = 1 + uniform(0.06)
    shift_x, shift_y = uniform(2 / width), uniform(2 / height)  # 1 pixel: an image is 2 units wide
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
    # Where does each pixel of the new image come from? The grid says it, and sampling takes it.
    grid = F.affine_grid(torch.stack(maps, dim=1).view(n, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


LOOK_AT = 160  # pixels of a picture's longer side, while looking for the ink
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")  # of pixels, not programs
STROKE_EDGE = 1 / 3  # of the full ink: where a soft stroke is taken to end
STROKE = 41  # pixels of the picture as we look at it: a stroke is thinner


def read_digit(path: Path | str | BinaryIO) -> Tensor:
    """Read a picture of one digit, in any format of Pillow's, whichever of ink and paper is darker.

    A network knows what it was trained on, and nothing else. So the digit is brought into the form
    of MNIST's: scaled "to fit in a 20x20 pixel box while preserving their aspect ratio", then put
    so that "the center of mass of the pixels" is in the middle. Source: Y. LeCun, C. Cortes,
    C. Burges, "The MNIST database of handwritten digits" (1998).

    Returns (1, 28, 28) float32, from 0 (paper) to 1 (ink). Raises InputError, if the file can't be
    read, or shows no digit, or several.
    """
    picture = open_picture(path)
    ink, box = find_ink(picture)
    if max(ink.shape) < LOOK_AT / 2:  # a small digit on a large page: look again, from near by
        left, top, right, bottom = box
        margin = max(right - left, bottom - top) // 2
        left, top = max(left - margin, 0), max(top - margin, 0)
        right, bottom = min(right + margin, picture.width), min(bottom + margin, picture.height)
        ink, _ = find_ink(picture.crop((left, top, right, bottom)))

    scale = 20 / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    # In MNIST's files the centre of mass lies in the middle of pixel 14, counted from 0.
    top = 14.5 - (ink.sum(axis=1) * (np.arange(height) + 0.5)).sum() / ink.sum()
    left = 14.5 - (ink.sum(axis=0) * (np.arange(width) + 0.5)).sum() / ink.sum()
    top, left = (min(max(round(t), 0), 28 - side) for t, side in ((top, height), (left, width)))
    image = torch.zeros(1, 28, 28)
    image[0, top : top + height, left : left + width] = torch.from_numpy(ink.copy())
    return image


def open_picture(path: Path | str | BinaryIO) -> Image.Image:
    """A picture, upright, as RGBA: colours, and A, alpha, which is 0 where it is transparent."""
    if isinstance(path, (str, Path)) and Path(path).exists() and not Path(path).is_file():
        raise InputError("this is no file")  # and a pipe would let us wait for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of details that we do not use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image = ImageOps.exif_transpose(image)  # cameras note how they were held
                if image.mode[0] in "IF":  # 16 or 32 bits a pixel
                    values = np.asarray(image, dtype=np.float64)
                    values = (values - values.min()) / max(np.ptp(values), 1e-9)
                    image = Image.fromarray(np.uint8(255 * values))
                return image.convert("RGBA")
    except Exception as error:  # whatever a damaged file makes Pillow raise
        reason = getattr(error, "strerror", None) or "it is damaged, or not an image"
        if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
            reason = f"over {Image.MAX_IMAGE_PIXELS:,} pixels are too many: scale it down"
        raise InputError(f"this can't be read: {reason}") from error


def find_ink(picture: Image.Image) -> tuple[np.ndarray, list[int]]:
    """The ink, cut out, (h, w) float32 from 0 (paper) to 1; and its box: left, top, right, bottom.

    The box is in pixels of the picture. Raises InputError, if there is no ink, or several digits.
    """
    scale = LOOK_AT / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    small = picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX)
    small = small.filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.BoxBlur(2))  # noise
    grey = ink_is_dark(np.asarray(small, dtype=np.float64))

    # The paper under the ink is as bright as that beside it. A closing, the darkest of the
    # brightest values nearby, fills strokes with it, and keeps what is wider: a shadow, a table.
    contrast = ndimage.grey_closing(grey, STROKE) - grey
    noise = np.quantile(contrast, 0.25)  # so much is there where there is paper
    contrast -= noise
    mask = digit_mask(contrast, least=max(10, 2 * noise))
    near_ink = ndimage.maximum_filter(mask, 7)
    ink = np.clip(contrast / np.median(contrast[mask]), 0, 1) * near_ink  # with its soft edge
    rows, columns = (np.nonzero(ink.max(axis=axis) > STROKE_EDGE)[0] for axis in (1, 0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    box = [round(side / scale) for side in (left, top, right, bottom)]
    return ink[top:bottom, left:right].astype(np.float32), box


def ink_is_dark(colours: np.ndarray) -> np.ndarray:
    """Grey values (H, W) of a picture (H, W, 4), RGBA from 0 to 255, in which ink is dark."""
    # Where the picture is transparent there is paper: of the other pixels' colour if they are many,
    # else they are ink and it is white, or black for light.
    colours, alpha = colours[:, :, :3], colours[:, :, 3:] / 255
    paper = 255.0 if (colours * alpha).mean() < 128 * alpha.mean() else 0.0
    if alpha.mean() > 0.5:
        paper = np.median(colours[alpha[:, :, 0] > 0.5], axis=0)
    # Light multiplies, in a shadow all by the same: of logarithms the differences stay as they are.
    colours = 150 * np.log(0.4 + (colours * alpha + paper * (1 - alpha)) / 255)
    # Grey is the position along the direction in which the colours of neighbours differ most: red
    # ink on blue paper can be as bright as the paper.
    local = (colours - ndimage.uniform_filter(colours, (61, 61, 0))).reshape(-1, 3)
    _, _, directions = np.linalg.svd(local.T @ local)
    grey = colours @ directions[0]
    # Strokes are thinner than the paper between them: in a narrow window a closing fills dark ones,
    # and an opening (the brightest of the darkest) light ones. The wide window is for thick pens.
    darker = 0.0
    for window in (9, 31):
        dark = ndimage.grey_closing(grey, window) - grey
        light = grey - ndimage.grey_opening(grey, window)
        darker += ((dark**2).sum() - (light**2).sum()) / window**2
    return grey if darker > 0 else -grey


def digit_mask(contrast: np.ndarray, least: float) -> np.ndarray:
    """Where the digit is: a mask (H, W) of pixels whose contrast (H, W) with the paper is strong.

    Raises InputError, if none has a contrast of `least`, or there are several digits.
    """
    mask = contrast > least
    if not mask.any():
        raise InputError("there is no digit: the page is empty")
    # What reaches the picture's border is a table, a finger, a shadow, unless nearly all does. Then
    # parts close together are one: widened they touch. Each ends at a quarter of its own contrast.
    for width in (1, 5):
        labels, count = ndimage.label(ndimage.maximum_filter(mask, width), np.ones((3, 3)))
        numbers = np.arange(count + 1)
        mask &= contrast > ndimage.maximum(contrast, labels, numbers)[labels] / 4
        labels *= mask
        sizes = ndimage.sum_labels(contrast, labels, numbers)
        sizes[0] = 0  # the paper
        outer = np.unique(np.concatenate([labels[[0, -1]].ravel(), labels[:, [0, -1]].ravel()]))
        if np.delete(sizes, outer).max(initial=0) > 0.02 * sizes.max():
            sizes[outer] = 0
        mask &= sizes[labels] > 0
    labels *= sizes[labels] >= 0.05 * sizes.max()  # no specks
    heights = sorted(box[0].stop - box[0].start for box in ndimage.find_objects(labels) if box)
    if len(heights) > 1 and heights[-2] > 0.7 * heights[-1]:
        raise InputError("there are two digits, or more: cut out one")
    return labels > 0
