"""The data: samples, split, augmentation, loading; then pictures of your own."""

import gzip
import hashlib
import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate
from torchvision import datasets

from dataset import MNISTDataset, random_affine, read_digit
from evaluate import predict
from model import build_model
from utils import InputError, load_checkpoint

SIZES = {"train": 55_000, "validation": 5_000, "test": 10_000}


@pytest.fixture(scope="module")
def sets(data_dir):
    return {split: MNISTDataset(data_dir, split) for split in SIZES}


@pytest.mark.parametrize("name, md5", datasets.MNIST.resources)
def test_committed_files_are_the_canonical_ones(name, md5):
    content = (ROOT / "data" / "MNIST" / "raw" / name).read_bytes()
    assert hashlib.md5(content).hexdigest() == md5


@pytest.mark.parametrize("split", SIZES)
def test_samples_have_the_documented_form(sets, split):
    dataset = sets[split]
    assert len(dataset) == SIZES[split] and dataset.classes == 10
    image, label = dataset[-1]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32
    assert label.shape == () and label.dtype == torch.int64
    images, labels = default_collate(dataset.__getitems__(range(2_000)))
    assert labels.unique().tolist() == list(range(10))
    assert images.min() == 0 and 0.9 < images.max() <= 1.001


def test_test_images_are_the_originals(sets, data_dir):
    original = datasets.MNIST(data_dir, train=False)
    for i in (0, 1, 2_345, -1):
        image, label = sets["test"][i]
        assert label == original.targets[i]
        assert torch.equal(image[0], original.data[i].float() / 255)


def test_the_split_is_disjoint_complete_and_always_the_same(sets, data_dir):
    rows = torch.cat([sets[split].images.flatten(1) for split in ("train", "validation")])
    original = datasets.MNIST(data_dir, train=True).data.flatten(1)
    weights = torch.arange(784) ** 2 + 1  # a checksum for each image
    assert torch.equal(
        (rows * weights).sum(dim=1).sort().values, (original * weights).sum(dim=1).sort().values
    )
    torch.manual_seed(1)  # whatever the state of the global generator
    again = MNISTDataset(data_dir, "validation")
    assert torch.equal(again.images, sets["validation"].images)


def test_only_training_images_are_augmented_and_each_time_anew(sets):
    for split in ("validation", "test"):
        assert torch.equal(sets[split][7][0], sets[split][7][0])
    images, again = (
        torch.stack([x for x, _ in sets["train"].__getitems__(range(500))]) for _ in "ab"
    )
    plain = sets["train"].images[:500] / 255
    for other in (again, plain):
        assert (images != other).flatten(1).any(dim=1).all()
    same = torch.stack([x for x, _ in sets["train"].__getitems__([3] * 100)])
    assert len(same.flatten(1).unique(dim=0)) == 100  # each with numbers of its own


def test_the_affine_map_is_random_small_and_keeps_the_ink(sets):
    torch.manual_seed(0)
    images = sets["test"].images / 255
    augmented = random_affine(images)
    assert augmented.shape == images.shape and augmented.dtype == torch.float32
    ratio = augmented.sum(dim=(1, 2, 3)) / images.sum(dim=(1, 2, 3))
    # A scale of 1 ± 0.06 changes areas by its square: 0.88 to 1.12, and its inverse.
    assert 0.85 < ratio.min() < 0.93 and 1.08 < ratio.max() < 1.16
    assert abs(ratio.mean() - 1) < 0.03

    def centre(images):
        x = (images.sum(dim=(1, 2)) * torch.arange(28)).sum(dim=1)
        return x / images.sum(dim=(1, 2, 3))

    shift = centre(augmented) - centre(images)
    assert 0.9 < shift.abs().max() < 1.6  # a pixel, and what turning and shearing add
    assert abs(shift.mean()) < 0.02


def test_a_plain_loader_a_subset_and_the_default_collation_work(sets):
    """The first thing that somebody who copies the project does."""
    images, labels = next(iter(DataLoader(sets["train"], batch_size=128)))
    assert images.shape == (128, 1, 28, 28) and labels.shape == (128,)
    subset = Subset(sets["test"], range(10, 20))
    images, labels = next(iter(DataLoader(subset, batch_size=10)))
    assert torch.equal(images, sets["test"].images[10:20] / 255)
    assert torch.equal(labels, sets["test"].labels[10:20])
    images, _ = default_collate([sets["test"][i] for i in range(10, 20)])
    assert torch.equal(images, sets["test"].images[10:20] / 255)


def damage(raw, kind):
    """Damage MNIST's files in one way."""
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    if kind == "missing":
        images.unlink()
    elif kind == "truncated":
        images.write_bytes(images.read_bytes()[:100_000])
    elif kind == "empty":
        images.write_bytes(b"")
    elif kind == "no header":
        images.write_bytes(b"\xff" * 16 + images.read_bytes()[16:])
    elif kind == "labels of fewer images":
        labels.write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    elif kind == "archive damaged":
        packed = bytearray(gzip.compress(images.read_bytes()))
        packed[len(packed) // 2] ^= 0xFF
        (raw / f"{images.name}.gz").write_bytes(packed)
        images.unlink()


@pytest.mark.parametrize(
    "kind",
    ["missing", "truncated", "empty", "no header", "labels of fewer images", "archive damaged"],
)
def test_bad_data_gives_one_line(small_data_dir, tmp_path, offline, monkeypatch, kind):
    folder = tmp_path / "data"
    for path in small_data_dir.rglob("*-ubyte"):
        copy = folder / path.relative_to(small_data_dir)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    damage(folder / "MNIST" / "raw", kind)
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens
    with pytest.raises(InputError) as stop:
        MNISTDataset(folder, "train")
    message = str(stop.value)
    assert str(folder) in message and "\n" not in message


# Pictures of digits as people bring them: made of MNIST test images, or drawn with Pillow.


def enlarged(image, factor=8):
    """An MNIST image (28, 28) uint8 as black ink on white paper, mode L."""
    size = (28 * factor, 28 * factor)
    return ImageOps.invert(Image.fromarray(image)).resize(size, Image.Resampling.BICUBIC)


def on_paper(image, rng, ink=(0, 0, 0), paper=(255, 255, 255), shade=0.0, noise=0.0):
    """Ink of one colour on a larger sheet of another, unevenly lit, with the camera's noise."""
    strength = 1 - np.asarray(enlarged(image), dtype=float) / 255
    sheet = np.zeros((400, 480))
    top, left = rng.integers(0, 400 - 224), rng.integers(0, 480 - 224)
    sheet[top : top + 224, left : left + 224] = strength
    colours = sheet[..., None] * np.array(ink) + (1 - sheet[..., None]) * np.array(paper)
    y, x = np.mgrid[-1:1:400j, -1:1:480j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + shade * (np.cos(angle) * x + np.sin(angle) * y - (x**2 + y**2) / 3)
    colours = colours * light[..., None] + rng.normal(0, noise, colours.shape)
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8))


def small(image, rng):
    """A digit of a tenth of the sheet's width, anywhere on it."""
    ink = 1 - np.asarray(enlarged(image).resize((24, 24), Image.Resampling.BOX)) / 255
    sheet = 230 + rng.normal(0, 4, (240, 240))
    top, left = rng.integers(0, 240 - 24, 2)
    sheet[top : top + 24, left : left + 24] -= 190 * ink
    return Image.fromarray(sheet.clip(0, 255).astype(np.uint8))


def transparent(image, rng, ink=(0, 0, 0)):
    """Ink on nothing: what drawing programs save."""
    alpha = ImageOps.invert(enlarged(image))
    picture = Image.new("RGBA", alpha.size, (*ink, 255))
    picture.putalpha(alpha)
    return picture


def photo(image, rng, edges=0, light=None, finger=False, lines=0, at_border=False):
    """A photo, 480×400, of a digit of any size, written with some pen on some sheet of paper.

    `edges`: sides on which it ends, and a table begins. `light`: "gradient", "flash", or how many
    pixels wide the edge of a shadow is, which may lie on the digit. `finger`: one that holds the
    paper. `lines`: 1 for lined paper, 2 for squared. `at_border`: the digit touches the picture's.
    """
    y, x = np.mgrid[0:400.0, 0:480.0]
    side = int(rng.integers(110, 240))  # of MNIST's 28×28 pixels, of which the digit has 20
    pen = enlarged(image).filter(ImageFilter.MaxFilter(int(rng.choice([1, 3, 7]))))  # thinner
    strength = 1 - np.asarray(pen.resize((side, side), Image.Resampling.BOX), dtype=float) / 255
    strength = strength[np.ix_(*(strength.max(axis=axis) > 0.5 for axis in (1, 0)))]
    height, width = strength.shape
    top, left = rng.integers(50, 350 - height), rng.integers(50, 430 - width)
    if at_border:
        top, left = [(0, left), (400 - height, left), (top, 0), (top, 480 - width)][rng.integers(4)]
    scene = (
        np.ones((400, 480, 1)) * rng.uniform(205, 245) * np.array([1, 0.99, rng.uniform(0.9, 1)])
    )
    distance = rng.integers(22, 40)
    for axis in (y, x)[:lines]:
        scene[(axis - rng.integers(distance)) % distance < rng.integers(1, 3)] = [150, 180, 215]
    ink = np.zeros((400, 480, 1))
    ink[top : top + height, left : left + width, 0] = strength
    colour = [(30, 30, 35), (35, 45, 140), (110, 110, 115), (170, 40, 40)][rng.integers(4)]
    scene += ink * (np.array(colour) - scene)
    # How far it is to the digit's box from each side; a table or finger takes a part of that.
    room = np.array([left, top, 480 - left - width, 400 - top - height])
    table = np.array([(60, 50, 45), (150, 105, 70), (110, 115, 120), (250, 250, 250)])[
        rng.integers(3 if scene[0, 0, 0] > 225 else 4)
    ]
    for i in (rng.integers(4) + np.arange(edges)) % 4:  # two sides that have a corner in common
        depth, along = [(x, y - 200), (y, x - 240), (479 - x, y - 200), (399 - y, x - 240)][i]
        reach = rng.uniform(0.3, 0.7) * room[i]
        slope = rng.uniform(-1, 1) * min(0.15, 0.25 * room[i] / 240)
        beyond = (reach - depth + slope * along).clip(0, 1)[..., None]
        scene += beyond * (table + 6 * np.sin(y / 9 + x / 40)[..., None] - scene)
    if finger:  # a capsule that comes in from outside, and ends before the digit
        i = room.argmax()
        tip = rng.uniform(0.4, 0.8) * room[i]
        depth, across = [(x, y), (y, x), (479 - x, y), (399 - y, x)][i]
        radius = rng.uniform(25, 45)
        off = np.hypot((depth - tip + radius).clip(0), across - rng.uniform(0, across.max()))
        skin = np.array([(225, 175, 150), (190, 130, 100), (110, 75, 55)][rng.integers(3)])
        scene += (radius - off).clip(0, 1)[..., None] * (
            skin * (1 - 0.2 * off / radius)[..., None] - scene
        )
    angle = rng.uniform(0, 2 * np.pi)
    if light == "flash":
        spot = (x - rng.uniform(160, 320)) ** 2 + (y - rng.uniform(130, 270)) ** 2
        scene *= (0.6 + 0.6 * np.exp(-spot / 2 / rng.uniform(60, 120) ** 2))[..., None]
    else:  # from bright to dark, across a line near the digit's middle
        across = np.cos(angle) * (x - left - width / 2) + np.sin(angle) * (y - top - height / 2)
        across += rng.uniform(-70, 70)
        steepness = (
            {"gradient": 1 / 200, None: 0}.get(light) if not isinstance(light, float) else 4 / light
        )
        scene *= (
            1
            - rng.uniform(0.35, 0.6)
            * (steepness > 0)
            / (1 + np.exp(-(steepness * across).clip(-50, 50)))[..., None]
        )
    scene = scene.clip(0, 255) + rng.normal(0, rng.uniform(1, 6), scene.shape)
    return Image.fromarray(scene.clip(0, 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(0.8)
    )


def cropped(image, rng, pen):
    """Cut out as tightly as can be: the ink reaches each side. `pen` makes it thinner if > 1."""
    picture = enlarged(image).filter(
        (ImageFilter.MaxFilter if pen > 0 else ImageFilter.MinFilter)(abs(pen))
    )
    return picture.crop(picture.point(lambda v: 255 * (v < 128)).getbbox())


# Each makes of an MNIST image, and a random generator, a picture.
KINDS = {
    "inverted": lambda image, rng: ImageOps.invert(Image.fromarray(image)),
    "enlarged": lambda image, rng: enlarged(image),
    "2 megapixels": lambda image, rng: enlarged(image, factor=54),
    "shifted": on_paper,
    "red on yellow": lambda image, rng: on_paper(image, rng, (200, 30, 30), (250, 240, 150)),
    "red on equal blue": lambda image, rng: on_paper(image, rng, (200, 60, 60), (60, 70, 250)),
    "chalk on a board": lambda image, rng: on_paper(image, rng, (240, 240, 235), (30, 80, 60)),
    "pale pencil": lambda image, rng: on_paper(image, rng, (170, 170, 175), (235, 235, 230)),
    "noisy": lambda image, rng: on_paper(image, rng, (30,) * 3, (220,) * 3, noise=25),
    "shaded": lambda image, rng: on_paper(image, rng, (30,) * 3, (200,) * 3, shade=0.35),
    "shaded, noisy": lambda image, rng: on_paper(
        image, rng, (40, 40, 90), (190, 185, 170), shade=0.3, noise=12
    ),
    "black on transparent": transparent,
    "white on transparent": lambda image, rng: transparent(image, rng, (255, 255, 255)),
    "a tenth of a sheet": small,
    "blurred": lambda image, rng: enlarged(image).filter(ImageFilter.GaussianBlur(4)),
    "1 bit a pixel": lambda image, rng: enlarged(image).convert("1", dither=Image.Dither.NONE),
    "palette": lambda image, rng: enlarged(image).quantize(16),
    "16 bits a pixel": lambda image, rng: Image.fromarray(
        np.asarray(enlarged(image), dtype=np.uint16) * 200 + 3_000
    ),
    "low-quality JPEG": lambda image, rng: enlarged(image),
}

# The same for photos as people take them, which are harder.
PHOTOS = {
    "photo": photo,
    "lined paper": lambda image, rng: photo(image, rng, lines=1),
    "squared paper": lambda image, rng: photo(image, rng, lines=2),
    "light gradient": lambda image, rng: photo(image, rng, light="gradient"),
    "soft shadow": lambda image, rng: photo(image, rng, light=rng.uniform(15, 80)),
    "hard shadow": lambda image, rng: photo(image, rng, light=rng.uniform(1, 5)),
    "flash": lambda image, rng: photo(image, rng, light="flash"),
    "table on a side": lambda image, rng: photo(image, rng, edges=1),
    "table on two sides": lambda image, rng: photo(image, rng, edges=2),
    "finger": lambda image, rng: photo(image, rng, finger=True),
    "touches the border": lambda image, rng: photo(image, rng, at_border=True),
    "cropped thick": lambda image, rng: cropped(image, rng, -5),
    "cropped thin": lambda image, rng: cropped(image, rng, 7),
}


def save(picture, kind, folder):
    path = folder / ("picture.jpg" if "JPEG" in kind else "picture.png")
    picture.save(path, **({"quality": 15} if "JPEG" in kind else {}))
    return path


def likeness(a, b):
    """The correlation of two images' pixels: 1 if they are the same, but for a shift by a pixel."""
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    moved = [np.roll(a.squeeze(), shift, axis=(0, 1)) for shift in shifts]
    return max(np.corrcoef(np.ravel(image), np.ravel(b))[0, 1] for image in moved)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_done_to_an_mnist_image_it_comes_back(sets, tmp_path, kind):
    """MNIST was made in the same way, so that doing it again changes little."""
    rng = np.random.default_rng(0)
    for original in sets["test"].images[[0, 1, 4, 5], 0].numpy():
        digit = read_digit(save(KINDS[kind](original, rng), kind, tmp_path))
        assert digit.shape == (1, 28, 28) and digit.dtype == torch.float32
        assert digit.min() == 0 and 0.9 < digit.max() <= 1
        assert likeness(digit, original) > 0.8


def test_the_longer_side_has_20_pixels_and_the_mass_is_in_the_middle(sets, tmp_path):
    picture = on_paper(sets["test"].images[3, 0].numpy(), np.random.default_rng(1))
    digit = read_digit(save(picture, "", tmp_path))[0].numpy()
    rows, columns = np.nonzero(digit.max(axis=1))[0], np.nonzero(digit.max(axis=0))[0]
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    for axis in (0, 1):
        mean = (digit.sum(axis=1 - axis) * np.arange(28)).sum() / digit.sum()
        assert mean == pytest.approx(14, abs=0.51)  # as in MNIST's files


def test_a_photo_taken_sideways_is_turned_upright(sets, tmp_path):
    upright = enlarged(sets["test"].images[0, 0].numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation flag: turn by 90 degrees to see it upright
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright.save(tmp_path / "upright.jpg", quality=95)
    turned = read_digit(tmp_path / "turned.jpg")
    assert likeness(turned, read_digit(tmp_path / "upright.jpg")) > 0.99


def test_specks_are_not_ink(sets, tmp_path):
    clean = enlarged(sets["test"].images[0, 0].numpy())
    dusty = clean.copy()
    draw = ImageDraw.Draw(dusty)
    for x, y in np.random.default_rng(0).integers(0, 220, (15, 2)).tolist():
        draw.rectangle((x, y, x + 1, y + 1), fill=0)
    draw.rectangle((3, 3, 13, 13), fill=0)  # a blot, in a corner
    digits = [read_digit(save(picture, "", tmp_path)) for picture in (clean, dusty)]
    assert likeness(*digits) > 0.98


@pytest.mark.parametrize("kind", ["table on two sides", "finger", "hard shadow"])
def test_what_reaches_the_border_is_not_ink(sets, tmp_path, kind):
    rng, like = np.random.default_rng(0), []
    for original in sets["test"].images[:6, 0].numpy():
        digit = read_digit(save(PHOTOS[kind](original, rng), kind, tmp_path))
        like.append(likeness(digit, original))
    assert sorted(like)[1] > 0.6, like


def test_two_digits_are_not_guessed_at(sets, tmp_path):
    four, nine = (enlarged(sets["test"].images[i, 0].numpy()) for i in (4, 9))
    both = Image.new("L", (448, 224), 255)
    both.paste(four, (0, 0))
    both.paste(nine, (224, 0))
    with pytest.raises(InputError, match="two digits"):
        read_digit(save(both, "", tmp_path))


def test_a_five_whose_bar_is_apart_is_one_digit(tmp_path):
    picture = Image.new("L", (300, 300), 255)
    draw = ImageDraw.Draw(picture)
    draw.line((120, 70, 115, 140), fill=0, width=14)
    draw.arc((90, 130, 190, 240), 230, 140, fill=0, width=14)
    draw.line((145, 70, 200, 66), fill=0, width=14)  # 18 pixels from the rest
    digit = read_digit(save(picture, "", tmp_path))[0]
    assert digit[:9, 15:].max() > 0.5  # the bar is there


@pytest.mark.slow
@pytest.mark.parametrize("kinds, share", [(KINDS, 0.96), (PHOTOS, 0.9)], ids=["KINDS", "PHOTOS"])
def test_each_kind_is_read_correctly(default_run, sets, tmp_path, kinds, share):
    model = build_model("cnn", classes=10)
    model.load_state_dict(load_checkpoint(default_run / "best.pt")["weights"])
    number, rng = int(os.environ.get("PICTURES_OF_A_KIND", 30)), np.random.default_rng(0)
    originals = sets["test"].images[:: 10_000 // number, 0].numpy()
    labels = sets["test"].labels[:: 10_000 // number]
    right = {}  # mostly 98 % and more, by weights that are not the same on each machine
    for kind, make in kinds.items():
        digits = []
        for original in originals:
            try:
                digits.append(read_digit(save(make(original, rng), kind, tmp_path)))
            except InputError:  # a digit that is not found is not read
                digits.append(torch.full((1, 28, 28), 0.5))
        logits, _ = predict(model, TensorDataset(torch.stack(digits), labels), torch.device("cpu"))
        right[kind] = (logits.argmax(dim=1) == labels).sum().item()
        print(f"| {kind} | {right[kind]} of {number} |")
    assert min(right.values()) >= share * number, right
