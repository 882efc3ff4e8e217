"""Pictures of digits as people bring them: made of MNIST test images, or drawn with Pillow."""

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from dataset import MEAN, STD, MNISTDataset
from handwriting import paper_surface, read_digit
from model import MODELS, build_model
from utils import load_checkpoint


def enlarged(image, factor=8):
    """An MNIST image (28, 28) uint8 as black ink on white paper, mode L."""
    size = (28 * factor, 28 * factor)
    return ImageOps.invert(Image.fromarray(image)).resize(size, Image.Resampling.BICUBIC)


def on_paper(image, rng, ink, paper, shade=0.0, noise=0.0, place=True):
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


def small(image, rng, size, of=240, noise=4):
    """A digit somewhere on a sheet (of, of); size counts the pixels of MNIST's 28 across."""
    ink = 1 - np.asarray(enlarged(image).resize((size, size), Image.Resampling.BOX)) / 255
    sheet = np.full((of, of), 230.0)
    top, left = rng.integers(0, of - size, 2)
    sheet[top : top + size, left : left + size] -= 190 * ink
    return Image.fromarray(
        (sheet + rng.normal(0, noise, sheet.shape)).clip(0, 255).astype(np.uint8)
    )


def transparent(image, rng, ink=(0, 0, 0)):
    """Ink on nothing: what drawing programs save."""
    alpha = ImageOps.invert(enlarged(image))
    picture = Image.new("RGBA", alpha.size, (*ink, 255))
    picture.putalpha(alpha)
    return picture


def sixteen_bits(image, rng):
    grey = np.asarray(enlarged(image), dtype=np.uint16)
    return Image.fromarray(grey * 200 + 3_000)


STROKES = {  # corners of lines, and boxes of ellipses, on a page of 100×100
    0: [("ellipse", (28, 15, 72, 85))],
    1: [("line", (36, 32, 52, 15, 52, 85))],
    2: [("arc", (30, 15, 70, 50, 190, 30)), ("line", (66, 43, 30, 85, 72, 85))],
    3: [("arc", (30, 13, 66, 50, 200, 90)), ("arc", (28, 48, 70, 87, 270, 160))],
    4: [("line", (40, 15, 26, 60, 76, 60)), ("line", (62, 15, 62, 87))],
    5: [("line", (70, 15, 36, 15, 34, 46)), ("arc", (26, 40, 72, 86, 240, 150))],
    6: [("arc", (34, 10, 104, 110, 150, 265)), ("ellipse", (31, 45, 68, 86))],
    7: [("line", (28, 16, 72, 16, 46, 86))],
    8: [("ellipse", (34, 14, 66, 46)), ("ellipse", (30, 46, 70, 86))],
    9: [("ellipse", (32, 14, 68, 52)), ("line", (68, 34, 60, 86))],
}


def drawn(digit, width, rng):
    """A digit drawn with a pen, width in per cent of the page, turned and moved a little."""
    page = Image.new("L", (600, 600), 255)
    draw = ImageDraw.Draw(page)
    for shape, numbers in STROKES[digit]:
        box, angles = [6 * n for n in numbers], ()
        if shape == "arc":
            box, angles = box[:4], numbers[4:]
        style = {"outline": 0} if shape == "ellipse" else {"fill": 0}
        style |= {"joint": "curve"} if shape == "line" else {}
        getattr(draw, shape)(box, *angles, **style, width=6 * width)
    move = rng.integers(-40, 40, 2).tolist()
    return page.rotate(
        rng.uniform(-10, 10), Image.Resampling.BICUBIC, translate=move, fillcolor=255
    )


BLACK, WHITE = (0, 0, 0), (255, 255, 255)

# Each makes of an MNIST image, and a random generator, a picture.
KINDS = {
    "inverted": lambda image, rng: ImageOps.invert(Image.fromarray(image)),
    "enlarged": lambda image, rng: enlarged(image),
    "2 megapixels": lambda image, rng: enlarged(image, factor=54),
    "shifted": lambda image, rng: on_paper(image, rng, BLACK, WHITE),
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
    "white on transparent": lambda image, rng: transparent(image, rng, WHITE),
    "a tenth of a sheet": lambda image, rng: small(image, rng, 24),
    "blurred": lambda image, rng: enlarged(image).filter(ImageFilter.GaussianBlur(4)),
    "1 bit a pixel": lambda image, rng: enlarged(image).convert("1", dither=Image.Dither.NONE),
    "palette": lambda image, rng: enlarged(image).quantize(16),
    "16 bits a pixel": sixteen_bits,
    "low-quality JPEG": lambda image, rng: enlarged(image),
}


def save(picture, kind, folder):
    path = folder / ("picture.jpg" if "JPEG" in kind else "picture.png")
    picture.save(path, **({"quality": 15} if "JPEG" in kind else {}))
    return path


def likeness(a, b):
    """The correlation of two images' pixels: 1 if they are the same."""
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


@pytest.fixture(scope="module")
def test_set(data_dir):
    return MNISTDataset(data_dir, "test")


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_done_to_an_mnist_image_it_comes_back(test_set, tmp_path, kind):
    """MNIST was made in the same way, so that doing it again changes little."""
    rng = np.random.default_rng(0)
    originals = test_set.images[[0, 1, 4, 5], 0].numpy()
    digits = [read_digit(save(KINDS[kind](image, rng), kind, tmp_path)) for image in originals]
    for digit, original in zip(digits, originals, strict=True):
        assert digit.shape == (1, 28, 28) and digit.dtype == torch.float32
        assert digit.min() == 0 and 0.9 < digit.max() <= 1
        assert likeness(digit, original) > 0.8


def test_the_longer_side_has_20_pixels_and_the_mass_is_in_the_middle(test_set, tmp_path):
    picture = on_paper(test_set.images[3, 0].numpy(), np.random.default_rng(1), BLACK, WHITE)
    digit = read_digit(save(picture, "", tmp_path))[0].numpy()
    rows, columns = np.nonzero(digit.max(axis=1))[0], np.nonzero(digit.max(axis=0))[0]
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    for axis in (0, 1):
        mean = (digit.sum(axis=1 - axis) * np.arange(28)).sum() / digit.sum()
        assert mean == pytest.approx(14, abs=0.51)  # as in MNIST's files


def test_a_photo_taken_sideways_is_turned_upright(test_set, tmp_path):
    upright = enlarged(test_set.images[0, 0].numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation flag: turn by 90 degrees to see it upright
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright.save(tmp_path / "upright.jpg", quality=95)
    turned = read_digit(tmp_path / "turned.jpg")
    assert likeness(turned, read_digit(tmp_path / "upright.jpg")) > 0.99


def test_specks_and_the_paper_s_edge_are_not_ink(test_set, tmp_path):
    clean = enlarged(test_set.images[0, 0].numpy())
    dusty = clean.copy()
    draw = ImageDraw.Draw(dusty)
    for x, y in np.random.default_rng(0).integers(0, 220, (15, 2)).tolist():
        draw.rectangle((x, y, x + 1, y + 1), fill=0)
    draw.rectangle((3, 3, 13, 13), fill=0)  # a blot, in a corner
    digits = [read_digit(save(picture, "", tmp_path)) for picture in (clean, dusty)]
    assert likeness(*digits) > 0.98


def test_the_paper_s_brightness_is_found_beside_ink_of_the_same():
    y, x = np.mgrid[-1:1:120j, -1:1:160j]
    paper = 150 + 60 * x - 30 * y - 20 * x * y - 15 * x**2
    grey = paper.copy()
    grey[30:90, 60:100] -= 80  # as dark as paper elsewhere
    assert np.abs(paper_surface(grey) - paper).max() < 0.1


# evaluate.py with images


def test_it_names_the_digits_and_shows_what_it_saw(run_here, trained, data_dir, tmp_path):
    checkpoint, test_set = tmp_path / "best.pt", MNISTDataset(data_dir, "test")
    checkpoint.write_bytes((trained / "best.pt").read_bytes())
    for i in range(2):
        enlarged(test_set.images[i, 0].numpy()).save(tmp_path / f"digit {i}.png")
    result = run_here("evaluate.py", "digit 0.png", "digit 1.png", "--checkpoint", checkpoint)
    assert result.returncode == 0 and result.stderr == ""

    model = build_model("cnn")
    model.load_state_dict(load_checkpoint(checkpoint, MODELS)["weights"])
    images = torch.stack([read_digit(tmp_path / f"digit {i}.png") for i in range(2)])
    probabilities = model.eval()((images - MEAN) / STD).softmax(dim=1)
    lines = result.stdout.splitlines()
    for i in range(2):
        (first, second), (digit, other) = (best.tolist() for best in probabilities[i].topk(2))
        line = f"digit {i}.png: {digit} ({first:.1%}), then {other} ({second:.1%})"
        assert line in lines
    with Image.open(tmp_path / "predictions.png") as picture:
        assert min(picture.size) >= 200 and len(picture.getcolors(1 << 24)) > 10


def test_a_file_that_cannot_be_read_gets_one_line_and_the_others_are_done(
    run_here, trained, data_dir, tmp_path
):
    checkpoint = tmp_path / "best.pt"
    checkpoint.write_bytes((trained / "best.pt").read_bytes())
    good = enlarged(MNISTDataset(data_dir, "test").images[0, 0].numpy())
    good.save(tmp_path / "good.png")
    Image.new("L", (300, 200), 250).save(tmp_path / "empty.png")
    noise = np.random.default_rng(0).normal(230, 8, (300, 300)).clip(0, 255)
    Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "noise.png")
    Image.new("RGBA", (100, 100)).save(tmp_path / "transparent.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("seven")
    (tmp_path / "nothing.png").touch()
    (tmp_path / "folder.png").mkdir()
    expected = {
        "empty.png": "the page is empty",
        "noise.png": "the page is empty",
        "transparent.png": "the page is empty",
        "huge.png": "scale it down",
        "bomb.png": "scale it down",
        "cut.png": "not an image",
        "text.png": "not an image",
        "nothing.png": "not an image",
        "folder.png": "not an image",
        "missing.png": "no such file",
    }
    result = run_here("evaluate.py", *expected, "good.png", "--checkpoint", checkpoint)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == len(expected)
    for line, (name, part) in zip(lines, expected.items(), strict=True):
        assert line.startswith(name) and part in line
    assert re.search(r"^good\.png: \d \(", result.stdout, re.MULTILINE)
    assert (tmp_path / "predictions.png").is_file()


def read_kind(kind, number, data_dir, folder):
    """Pictures of a kind, read: digits (N, 1, 28, 28) float32 and labels (N,) int64."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    if kind.startswith("drawn"):
        width = int(kind.split()[-2])
        pictures, labels = (
            [drawn(i % 10, width, rng) for i in range(number)],
            torch.arange(number) % 10,
        )
    else:
        test_set = MNISTDataset(data_dir, "test")
        pictures = [
            KINDS[kind](image, rng) for image in test_set.images[:: 10_000 // number, 0].numpy()
        ]
        labels = test_set.labels[:: 10_000 // number]
    folder = folder / kind.replace(" ", "_")
    folder.mkdir()
    return torch.stack([read_digit(save(picture, kind, folder)) for picture in pictures]), labels


@pytest.mark.slow
def test_at_least_98_percent_of_each_kind_are_read_correctly(default_run, data_dir, tmp_path):
    model = build_model("cnn").eval()
    model.load_state_dict(load_checkpoint(default_run / "best.pt", MODELS)["weights"])
    kinds = [*KINDS, *(f"drawn, pen of {width} %" for width in (2, 4, 7, 11))]
    shares, number = {}, int(os.environ.get("PICTURES_OF_A_KIND", 50))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        results = pool.map(read_kind, kinds, repeat(number), repeat(data_dir), repeat(tmp_path))
        for kind, (digits, labels) in zip(kinds, results, strict=True):
            with torch.inference_mode():
                predicted = model((digits - MEAN) / STD).argmax(dim=1)
            shares[kind] = (predicted == labels).float().mean().item()
            print(f"| {kind} | {shares[kind]:.1%} |")
    assert min(shares.values()) >= 0.98, shares
