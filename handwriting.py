"""Turn a photo or drawing of one digit into an image like those of MNIST.

A network knows what it was trained on, and nothing else: white ink on black, 20 pixels tall, in the
middle of 28×28. So a picture from a phone is brought into that form first, in the way in which
MNIST itself was made: "the images were size normalized to fit in a 20x20 pixel box while preserving
their aspect ratio", then "centered in a 28x28 image by computing the center of mass of the pixels"
(Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", 1998).
"""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

WORK_SIZE = 160  # pixels of the longer side while looking for the ink
STROKE_EDGE = 1 / 3  # of the full ink: where a soft stroke is taken to end
BOX, SIZE = 20, 28  # pixels: the digit's longer side, and the image's


def read_digit(path: Path | str) -> Tensor:
    """Read a picture of one digit, whichever of ink and paper is darker.

    Args:
        path: a file in a format that Pillow reads.

    Returns:
        (1, 28, 28) float32 from 0 (paper) to 1 (ink), like an image of MNIST.

    Raises:
        ValueError: with a line for the user, if that can't be done.
    """
    picture = open_picture(path)
    grey = to_grey(picture)
    ink, box = find_ink(grey)
    if max(ink.shape) < WORK_SIZE / 2:  # a small digit on a large page: look again, from near by
        scale = max(picture.size) / max(grey.shape)
        left, top, right, bottom = (round(scale * side) for side in box)
        margin = max(right - left, bottom - top) // 2
        width, height = picture.size
        picture = picture.crop(
            (
                max(left - margin, 0),
                max(top - margin, 0),
                min(right + margin, width),
                min(bottom + margin, height),
            )
        )
        ink, _ = find_ink(to_grey(picture))
    return torch.from_numpy(centre(ink))[None]


def open_picture(path: Path | str) -> Image.Image:
    """Read a picture, upright, as RGBA: colours, and A, alpha, which is 0 where it is transparent.

    Raises:
        ValueError: with a line for the user, if that can't be done.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            image = ImageOps.exif_transpose(image)  # cameras note how they were held
            if image.mode[0] in "IF":  # 16 or 32 bits a pixel
                values = np.asarray(image, dtype=np.float64)
                spread = max(values.max() - values.min(), 1e-9)
                image = Image.fromarray(np.uint8((values - values.min()) / spread * 255))
            return image.convert("RGBA")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise ValueError(f"the image has over {limit:,} pixels: scale it down") from error
    except FileNotFoundError as error:
        raise ValueError("there is no such file") from error
    except (OSError, SyntaxError) as error:
        raise ValueError("this is not an image that can be read") from error


def to_grey(picture: Image.Image) -> np.ndarray:
    """The picture as grey values (H, W) float64, with WORK_SIZE pixels on its longer side.

    The grey value is the position along the direction in which the colours differ most: red ink on
    blue paper can be as bright as the paper.
    """
    scale = WORK_SIZE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    how = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    picture = picture.resize(size, how)
    picture = picture.filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.BoxBlur(2))  # noise
    colours = np.asarray(picture, dtype=np.float64)
    colours = fill_transparent(colours[:, :, :3], colours[:, :, 3:] / 255)
    centred = (colours - colours.mean(axis=(0, 1))).reshape(-1, 3)
    _, _, directions = np.linalg.svd(centred.T @ centred)
    return (centred @ directions[0]).reshape(colours.shape[:2])


def fill_transparent(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Paint the colour of paper where a picture is transparent.

    Args:
        colours: (H, W, 3) from 0 to 255.
        alpha: (H, W, 1) from 0, transparent, to 1.
    """
    if alpha.mean() > 0.5:  # mostly opaque: what is seen is paper
        paper = np.median(colours[alpha[:, :, 0] > 0.5], axis=0)
    else:  # what is seen is ink: black on white, or white on black
        ink = (colours * alpha).sum(axis=(0, 1)) / max(alpha.sum(), 1e-9)
        paper = 255.0 if ink.mean() < 128 else 0.0
    return colours * alpha + paper * (1 - alpha)


def find_ink(grey: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Tell ink from paper.

    Args:
        grey: (H, W) float64.

    Returns:
        The ink, cut out: (h, w) float64 from 0 (paper) to 1; and where it was: left, top, right,
        bottom.

    Raises:
        ValueError: with a line for the user, if there is no ink.
    """
    contrast = grey - paper_surface(grey)
    if (contrast**3).sum() < 0:  # ink is the smaller part, and far from paper
        contrast = -contrast
    noise = 1.48 * np.median(np.abs(contrast))  # standard deviation, if it is normal
    strongest = contrast.max()
    if strongest < max(10, 6 * noise):
        raise ValueError("there is no digit: the page is empty")

    mask = largest_components(contrast > max(0.4 * strongest, 3 * noise))
    full = np.median(contrast[mask])
    ink = np.clip(contrast / full, 0, 1) * dilate(mask)
    rows, columns = (np.nonzero(ink.max(axis=axis) > STROKE_EDGE)[0] for axis in (1, 0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return ink[top:bottom, left:right], (left, top, right, bottom)


def paper_surface(grey: np.ndarray) -> np.ndarray:
    """The brightness of unevenly lit paper (H, W): a quadratic surface through most pixels.

    Least trimmed squares: fit all pixels, then again and again those that the fit is closest to.
    """
    height, width = grey.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    some = slice(None, None, 8)  # enough to know a surface by
    terms, all_terms, values = terms[some], terms, grey.ravel()[some]
    distance = np.abs(values - np.median(values))
    for _ in range(10):
        close = distance <= np.quantile(distance, 0.6)
        weights = np.linalg.lstsq(terms[close], values[close], rcond=None)[0]
        distance = np.abs(values - terms @ weights)
    return (all_terms @ weights).reshape(height, width)


def dilate(mask: np.ndarray) -> np.ndarray:
    """Widen a mask (H, W) by 3 pixels: a stroke's soft edge belongs to it."""
    return F.max_pool2d(torch.from_numpy(mask)[None].float(), 7, 1, 3)[0].numpy()


def largest_components(mask: np.ndarray) -> np.ndarray:
    """Keep of a mask (H, W) what hangs together and is not tiny beside the largest such part."""
    coarse = F.max_pool2d(torch.from_numpy(mask)[None].float(), 2, ceil_mode=True)  # quicker
    labels = torch.arange(1.0, coarse.numel() + 1).view_as(coarse) * coarse
    while True:  # each pixel takes the highest number of its neighbours, until none changes
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * coarse
        if torch.equal(spread, labels):
            break
        labels = spread
    numbers, counts = labels[labels > 0].unique(return_counts=True)
    kept = torch.isin(labels, numbers[counts >= 0.05 * counts.max()])[0].numpy()
    height, width = mask.shape
    return mask & kept.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]


def centre(ink: np.ndarray) -> np.ndarray:
    """Scale ink (h, w) so that its longer side is 20 pixels, and centre its mass in 28×28."""
    scale = BOX / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    small = Image.fromarray(ink.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    small = np.asarray(small)
    image = np.zeros((SIZE, SIZE), dtype=np.float32)
    mass = small.sum()
    # In MNIST's files the centre of mass lies in the middle of pixel 14, counted from 0.
    top = SIZE / 2 + 0.5 - (small.sum(axis=1) * (np.arange(height) + 0.5)).sum() / mass
    left = SIZE / 2 + 0.5 - (small.sum(axis=0) * (np.arange(width) + 0.5)).sum() / mass
    top, left = (min(max(round(t), 0), SIZE - side) for t, side in ((top, height), (left, width)))
    image[top : top + height, left : left + width] = small
    return image
