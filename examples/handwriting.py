"""Let the network read your own handwriting, one digit per picture.

    python -m examples.handwriting digit.png photo.jpg

A network knows what it was trained on, and nothing else. Ours has seen white digits on black, 20
pixels tall, in strokes as thick as a felt pen's. Show it a photo straight from your phone and it
fails, not because it's bad at digits but because it has never seen paper, shadows or ruled lines.
So most of this file makes a picture look like one of MNIST's: find the ink, keep the digit, scale
it, and thicken the strokes of a fine pen. In most projects that use a network, this part is the
real work.
"""

import argparse
import sys
import warnings
from itertools import islice
from os.path import realpath
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageSequence
from scipy import ndimage
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to import from the folder above
import utils
from evaluate import load_model, newest_checkpoint, predict
from utils import UserError

try:  # Pillow needs this package to read an iPhone's HEIC files
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pass

LOOK_AT = 256  # before we look at a picture, its longer side is shrunk to this many pixels
PEN = 2.4  # pixels; MNIST's strokes are about this wide, and we widen finer ones to match
PROGRAMS = {"EPS", "WMF"}  # formats that hold drawing commands, not pixels
TOUCHING = np.ones((3, 3))  # for ndimage.label: pixels that touch at a corner belong together
# How to turn a picture upright, for orientations 2 to 8 of the Exif standard (tag 0x0112).
UPRIGHT = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))


def main(args: argparse.Namespace) -> None:
    """Print which digit is in each picture, and save what the network saw."""
    path = args.checkpoint or newest_checkpoint()
    model, _ = load_model(path)
    answers = path.with_name(f"{path.stem}-predictions.png")
    if realpath(answers) in map(realpath, args.images):
        raise UserError(f"{printable(answers)} would be overwritten; rename it first")

    names, images = [], []
    for image in args.images:
        try:
            images.append(read_digit(image))
            names.append(printable(image))
        except UserError as error:
            print(f"{printable(image)}: {error}", file=sys.stderr)
    if images:
        samples = [(image, 0) for image in images]  # `predict` wants labels too, but ignores them
        logits, _ = predict(model, samples, torch.device("cpu"))
        captions = []
        for name, probabilities in zip(names, logits.softmax(dim=1), strict=True):
            (first, second), (digit, other) = (best.tolist() for best in probabilities.topk(2))
            print(f"{name}: {digit} ({first:.1%}), then {other} ({second:.1%})")
            name = Path(name).name[:16].encode("ascii", "replace").decode()  # safe in any font
            captions.append(f"{name}: {digit}, {first:.0%}")
        title = "What the network saw: file, digit, confidence"
        utils.save_picture(utils.draw_images(title, images[:30], captions[:30], 5), answers)
    if len(images) < len(args.images):
        failed = len(args.images) - len(images)
        raise UserError(f"{failed} of {len(args.images)} pictures could not be read")


def printable(path: Path) -> str:
    """A file's name, with a question mark for whatever the terminal can't show."""
    name = "".join(c if c.isprintable() else "?" for c in utils.relative(path))
    encoding = sys.stdout.encoding or "utf-8"
    return name.encode(encoding, "replace").decode(encoding)


def read_digit(path: Path | str | BinaryIO) -> Tensor:
    """Read a picture of one digit: dark ink on light paper or the other way round.

    Returns what MNIST would have made of it, (1, 28, 28) float32 from 0 (paper) to 1 (ink). Raises
    UserError if the file can't be read, or doesn't show exactly one digit.
    """
    picture = open_picture(path)
    digit, box, place = find_digit(picture)
    longer = max(box[2] - box[0], box[3] - box[1])
    if longer < max(picture.size) / 2:  # a small digit on a large page: take a closer look
        margin = longer // 2 + 2
        left, top = max(box[0] - margin, 0), max(box[1] - margin, 0)
        right, bottom = min(box[2] + margin, picture.width), min(box[3] + margin, picture.height)
        box = (left, top, right, bottom)
        digit, _, _ = find_digit(picture.crop(box), place.crop(box))
    return to_mnist(digit)


def open_picture(path: Path | str | BinaryIO) -> Image.Image:
    """Open a picture as RGBA, and turn it upright. Alpha is 0 where the picture is transparent.

    For an animation, this picks the first frame that isn't blank. Raises UserError on failure.
    """
    try:
        if isinstance(path, (str, Path)) and Path(path).exists() and not Path(path).is_file():
            # Opening a named pipe, for example, would block forever.
            raise UserError("this is not a regular file")
        Image.init()  # load all of Pillow's formats
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # most are about details that we don't use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=[f for f in Image.ID if f not in PROGRAMS]) as file:
                for frame in islice(ImageSequence.Iterator(file), 100):
                    picture = to_rgba(frame)
                    if any(low < high for low, high in picture.convert("RGBa").getextrema()):
                        break
                try:  # cameras note how they were held; a garbled note shouldn't cost us the photo
                    orientation = file.getexif().get(0x0112)
                except Exception:
                    orientation = None
        return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise UserError(f"it has more than {most} pixels; scale it down first") from error
    except UserError:
        raise
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        reason = getattr(error, "strerror", None) or "it's damaged, or not an image"
        if isinstance(path, (str, Path)) and Path(path).suffix.lower() in (".heic", ".heif"):
            reason += " (a HEIC photo? Save it as JPEG, or pip install pillow-heif)"
        raise UserError(f"this can't be read: {reason}") from error


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert a picture of any kind to RGBA; grey of 16 or 32 bits is rescaled to 8."""
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        values = (values - values.min()) / max(np.ptp(values), 1e-9)
        image = Image.fromarray(np.uint8(255 * values))
    return image.convert("RGBA")


def find_digit(
    picture: Image.Image, place: Image.Image | None = None
) -> tuple[np.ndarray, list[int], Image.Image]:
    """Find the digit in a picture. If `place` is given, look only where it isn't 0.

    Returns the digit, cropped, as a bool mask (h, w); its box in the picture (left, top, right,
    bottom); and its place, as a mask the size of the picture. Raises UserError if there's no digit,
    or several.
    """
    # Averaging ("box") keeps a hairline visible, though paler; picking single pixels would skip it.
    side = min(max(*picture.size, 160), LOOK_AT)
    scale = side / max(picture.size)
    size = [max(round(length * scale), 1) for length in picture.size]
    small = picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX)
    colours = np.asarray(small, dtype=np.float32)

    # Blur as much as the noise demands. The Laplacian, each pixel's difference from its four
    # neighbours, is nearly all noise, with sqrt(20) times the noise's own standard deviation.
    # For noise, the median of the absolute values is 0.67 standard deviations.
    noise = np.median(abs(ndimage.laplace(colours[:, :, 1]))) / 0.67 / 20**0.5
    blur = min(noise / 4.5, 2.5)
    if blur > 0.3:
        colours = ndimage.gaussian_filter(colours, (blur, blur, 0))
    grey = dark_on_light(colours, side)

    # The paper under the ink is as bright as the paper beside it. A *closing*, which is the darkest
    # of the brightest values nearby, fills in whatever is narrower than its window: ink. Anything
    # wider, such as a shadow or a table, stays.
    paper = ndimage.grey_closing(ndimage.gaussian_filter(grey, side / 250), side // 3)
    contrast = paper - grey
    # Noise makes the closing a little brighter than the paper, so even bare paper seems to have
    # some contrast. How much (the bias), and how much does that vary?
    palest, bias = np.quantile(contrast, (0.05, 0.25))
    contrast -= bias
    mask = contrast > max(3, 8 * (bias - palest))
    # Ink is darker than the ruled line it crosses. Averages over 3×3 pixels show that better
    # than single pixels, because a hairline may fall on one pixel, or half on each of two.
    strength = ndimage.uniform_filter(contrast, 3)
    labels, count = ndimage.label(mask, TOUCHING)
    peaks = np.zeros(count + 1, dtype=np.float32)
    np.maximum.at(peaks, labels[mask], strength[mask])
    mask &= strength > peaks[labels] / 5
    mask = without_lines(mask, side)
    if place is not None:
        mask &= np.asarray(place.resize(size)) > 0
    mask = only_digit(mask, contrast, side)

    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    box = [round(edge / scale) for edge in (left, top, right, bottom)]
    place = Image.fromarray(ndimage.maximum_filter(mask, side // 40 + 1)).resize(picture.size)
    return mask[top:bottom, left:right], box, place


def dark_on_light(colours: np.ndarray, side: int) -> np.ndarray:
    """Turn RGBA (H, W, 4), 0 to 255, into grey (H, W) in which ink is darker than paper.

    Both are float32. Black ink on white paper has a contrast of 100.
    """
    # Where the picture is transparent there's paper, and we choose its colour.
    colours, alpha = colours[:, :, :3], colours[:, :, 3:] / 255
    paper = 255.0 if (colours * alpha).mean() < 128 * alpha.mean() else 0.0
    if alpha.mean() > 0.5:
        paper = np.median(colours[alpha[:, :, 0] > 0.5], axis=0)
    colours = colours * alpha + paper * (1 - alpha)
    # A shadow dims everything in it by the same factor. On a log scale that's a constant offset,
    # so ink in a shadow loses less of its contrast. (0.4 keeps the noise down.)
    colours = 46 * np.log(0.4 + colours / 255)
    # Red ink on blue paper can be as bright as the paper. So we don't measure brightness, but how
    # far a colour goes in the direction in which nearby colours differ most (the first *principal
    # component*). To find it, and to answer the next question, a quarter of the pixels is enough.
    few = colours[::2, ::2]
    nearby = few - ndimage.uniform_filter(few, (side // 6, side // 6, 0), mode="nearest")
    nearby = nearby.reshape(-1, 3)
    direction = np.linalg.eigh(nearby.T @ nearby)[1][:, -1]
    direction *= np.sign(direction.sum() or 1)
    # Is the ink dark or light? Two votes. There's less ink than paper, so the few pixels that
    # differ a lot from those around them are ink (*skewness*). And strokes are narrower than the
    # paper between them, so a narrow closing fills in dark strokes, and an *opening* light ones.
    local, few = nearby @ direction, few @ direction
    vote = -(local * local * local).mean() / max((local * local).mean() ** 1.5, 1e-9) / 2
    dark = light = 1e-9
    for window in (side // 32, side // 10):
        dark += ((ndimage.grey_closing(few, window) - few) ** 2).sum() / window**2
        light += ((few - ndimage.grey_opening(few, window)) ** 2).sum() / window**2
    vote += (dark - light) / (dark + light)
    return colours @ (direction if vote > 0 else -direction)


def without_lines(mask: np.ndarray, side: int) -> np.ndarray:
    """Erase ruled lines, frames, grids and underlines. Masks are (H, W) bool.

    All of these are long, straight and thin. So are some of a digit's own strokes, but a printed
    line runs in from the edge of the picture, or spans a frame, or continues to the left and the
    right of the digit. Where a stroke crosses a line, the ink is thicker than the line, and stays.
    """
    thickest = side // 50 + 2
    # Lines may tilt a little, so allow for a few pixels to either side.
    tolerant = [ndimage.maximum_filter1d(mask, 5, axis=1 - axis) for axis in (0, 1)]
    long = [opening(tolerant[axis], side // 9, axis) & mask for axis in (0, 1)]  # down, across
    thick = [opening(mask, thickest, 1 - axis) for axis in (0, 1)]
    if not ((long[0] & ~thick[0]) | (long[1] & ~thick[1])).any():
        return mask
    blobs = opening(opening(mask, thickest, 0), thickest, 1)
    parts = ndimage.find_objects(ndimage.label(mask, TOUCHING)[0])
    frames = [part for part in parts if is_frame(part, long, side)]

    printed = [np.zeros_like(mask), np.zeros_like(mask)]
    for axis, length in enumerate(mask.shape):
        for line, start, stop in straight_lines(long[axis], axis):
            if (start < 3 or stop > length - 3) and stop - start > side / 3:
                printed[axis] |= line
        for part in frames:
            for line, start, stop in straight_lines(long[axis][part], axis):
                if stop - start > 0.93 * (part[axis].stop - part[axis].start):
                    printed[axis][part] |= line
    mask = mask & ~(printed[0] & ~thick[0]) & ~(printed[1] & ~thick[1])
    mask &= ~(printed[0] & printed[1] & ~blobs)

    # What's left may be underlined. Where are the digit's first and last columns?
    labels, count = ndimage.label(ndimage.maximum_filter(mask & ~(long[1] & ~thick[1]), 7))
    sizes = np.bincount((labels * mask).ravel(), minlength=count + 1)
    sizes[at_border(labels)] = 0
    large = (sizes > max(0.3 * sizes.max(), side / 8))[labels]
    columns = np.flatnonzero(large.any(axis=0))
    if columns.size:
        beyond = 0.25 * max(np.ptp(columns), side / 16)
        for line, start, stop in straight_lines(long[1], 1):
            if start < columns[0] - beyond and stop > columns[-1] + beyond:
                mask &= ~(line & ~thick[1])
    return mask


def straight_lines(long: np.ndarray, axis: int):
    """For each line in a mask of long lines along an axis: its own mask, its start and its end."""
    labels, _ = ndimage.label(ndimage.maximum_filter1d(long, 9, axis=axis), TOUCHING)
    for i, part in enumerate(ndimage.find_objects(labels), start=1):
        yield labels == i, part[axis].start, part[axis].stop


def is_frame(part: tuple[slice, slice], long: list[np.ndarray], side: int) -> bool:
    """Whether a piece of ink has a long line along each side that isn't at the picture's border."""
    for axis in (0, 1):
        across, length = part[1 - axis], long[0].shape[1 - axis]
        lines = np.moveaxis(long[axis][part], axis, 0)
        edge = max(lines.shape) // 12 + 3
        first, last = (sides.any(axis=1).mean() for sides in (lines[:, :edge], lines[:, -edge:]))
        if (
            lines.shape[1] < side / 10
            or (across.start > 2 and first < 0.8)
            or (across.stop < length - 2 and last < 0.8)
        ):
            return False
    return True


def opening(mask: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Keep what's at least `length` pixels long along an axis."""
    eroded = ndimage.minimum_filter1d(mask, length, axis=axis, mode="nearest")
    return ndimage.maximum_filter1d(eroded, length, axis=axis, origin=length % 2 - 1)


def at_border(labels: np.ndarray) -> np.ndarray:
    """The labels that touch the picture's border."""
    return np.unique(np.concatenate([*labels[[0, -1]], *labels[:, [0, -1]].T]))


def only_digit(mask: np.ndarray, contrast: np.ndarray, side: int) -> np.ndarray:
    """Keep only the digit in a mask (H, W) of ink. Raises UserError if there's none, or several.

    We look at the parts twice: first as they are, then with parts close together taken as one,
    because the bar of a 5 may not touch the rest of it.
    """
    for width in (1, side // 40 | 1):
        labels, count = ndimage.label(ndimage.maximum_filter(mask, width), TOUCHING)
        labels *= mask
        pixels = np.bincount(labels.ravel(), minlength=count + 1)
        sizes = np.bincount(labels.ravel(), contrast.ravel(), minlength=count + 1)
        sizes[0] = 0
        # Anything at the border is a table, a finger or a shadow, unless nearly everything is.
        outer = at_border(labels)
        if np.delete(sizes, outer).max(initial=0) > 0.02 * sizes.max():
            sizes[outer] = 0
        # Anything small is a speck. Anything much paler than the digit is the edge of something.
        strength = sizes / np.maximum(pixels, 1)
        sizes[strength < 0.4 * strength[sizes.argmax()]] = 0
        sizes[sizes < (0.02 if width == 1 else 0.05) * sizes.max()] = 0
        mask = (sizes > 0)[labels]
    if not mask.any():
        raise UserError("there's no digit; the page is blank")
    parts = filter(None, ndimage.find_objects(labels * mask))
    heights = sorted(part[0].stop - part[0].start for part in parts)
    if len(heights) > 1 and heights[-2] > 0.7 * heights[-1]:
        raise UserError("there are two or more digits; keep just one")
    return mask


def to_mnist(digit: np.ndarray) -> Tensor:
    """Scale and place a digit, a bool mask (h, w), the way MNIST does. Returns (1, 28, 28) float32.

    MNIST's digits were scaled "to fit in a 20x20 pixel box while preserving their aspect ratio",
    then placed so that "the center of mass of the pixels" is in the middle. Source: Y. LeCun,
    C. Cortes, C. Burges, "The MNIST database of handwritten digits" (1998).
    """
    # In a stroke of width w the distance to the edge goes from 0 to w / 2: a mean of w / 4. To
    # widen it, take in everything that's no further away from it than `grow`.
    pen = 4 * ndimage.distance_transform_edt(np.pad(digit, 1))[1:-1, 1:-1][digit].mean() - 1
    grow = (PEN / 20 * max(digit.shape) - pen) / 2 / (1 - PEN / 20)
    ink = digit.astype(np.float32)
    if grow > 0:
        away = ndimage.distance_transform_edt(~np.pad(digit, int(np.ceil(grow))))
        ink = np.clip(grow + 1 - away, 0, 1).astype(np.float32)
    scale = 20 / max(ink.shape)
    height, width = (max(round(length * scale), 1) for length in ink.shape)
    ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    # In MNIST's files the centre of mass is in the middle of pixel 14, counted from 0.
    top = 14.5 - (ink.sum(axis=1) * (np.arange(height) + 0.5)).sum() / ink.sum()
    left = 14.5 - (ink.sum(axis=0) * (np.arange(width) + 0.5)).sum() / ink.sum()
    top, left = (min(max(round(t), 0), 28 - n) for t, n in ((top, height), (left, width)))
    image = torch.zeros(1, 28, 28)
    image[0, top : top + height, left : left + width] = torch.from_numpy(ink.copy())
    return image


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the settings from the command line, or from a list of flags."""
    about = "Let the network read your own handwriting, one digit per picture."
    parser = argparse.ArgumentParser("python -m examples.handwriting", description=about)
    add = parser.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="pictures of one digit each")
    add("--checkpoint", type=Path, metavar="FILE", help="a best.pt (default: the newest run's)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run(parse_args, main)
