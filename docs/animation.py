"""Make the animation in README.md: somebody draws a digit, and the network reads it.

    python -m docs.animation   # run train.py first; needs selenium, Chromium and chromedriver

A headless browser opens the page from examples/draw.py and draws on it, a bit more in every frame.
"""

import io
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image
from selenium import webdriver

from utils import ROOT

# A handwritten five, with the bar drawn last. Coordinates go from 0 to 1, and a point given
# twice makes a sharp corner.
STROKES = [
    [(0.4, 0.15), (0.35, 0.44), (0.35, 0.44), (0.5, 0.37), (0.69, 0.46), (0.71, 0.7), (0.56, 0.88)]
    + [(0.4, 0.88), (0.29, 0.79)],
    [(0.39, 0.16), (0.52, 0.165), (0.68, 0.14)],
]
MAPS = [4, 29]  # the channels to click at the end, counted from the top of the page


def main() -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=960,1000"):
        options.add_argument(flag)
    driver = webdriver.ChromeService(shutil.which("chromedriver"))
    command = [sys.executable, "-u", "-m", "examples.draw", "--port=0", "--no-browser"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[2]  # "Draw at http://..."
        with webdriver.Chrome(options, driver) as browser:
            dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
            browser.get(address)
            pictures, durations = zip(*film(browser), strict=True)
    finally:
        server.terminate()
    path = ROOT / "docs" / "images" / "draw.gif"
    colours = pictures[-1].quantize(128, dither=Image.Dither.NONE)  # one palette for all frames
    first, *others = [p.quantize(palette=colours, dither=Image.Dither.NONE) for p in pictures]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    print(f"{path}: {len(pictures)} frames, {path.stat().st_size:,} bytes")


def film(browser: webdriver.Chrome) -> Iterator[tuple[Image.Image, int]]:
    """Draw, and yield pictures of the page, each with its duration in milliseconds."""
    paper, page = (browser.find_element("css selector", name).rect for name in ("#paper", "main"))

    def picture() -> Image.Image:
        while browser.execute_script("return asking || changed"):
            time.sleep(0.01)
        screen = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        return screen.crop((0, 0, screen.width, round(page["y"] + page["height"] + page["x"])))

    def act(**action) -> None:
        pen = {"type": "pointer", "id": "pen", "actions": [action]}
        browser.execute("actions", {"actions": [pen]})

    yield picture(), 700
    for stroke in STROKES:
        for i, (x, y) in enumerate(smooth(np.array(stroke))):
            x, y = (round(paper[at] + paper["width"] * v) for at, v in (("x", x), ("y", y)))
            act(type="pointerMove", duration=0, x=x, y=y)
            if i == 0:
                act(type="pointerDown", button=0)
            yield picture(), 70
        act(type="pointerUp", button=0)
        yield picture(), 400
    yield picture(), 900
    for place in MAPS:
        browser.find_elements("css selector", "#rows button")[place].click()
        yield picture(), 1600


def smooth(points: np.ndarray) -> np.ndarray:
    """Round off the corners of a line. Takes and returns points (N, 2), the new ones evenly spaced.

    Source: G. Chaikin, "An algorithm for high-speed curve generation" (1974).
    """
    for _ in range(4):
        start, end = points[:-1], points[1:]
        cut = np.stack([0.75 * start + 0.25 * end, 0.25 * start + 0.75 * end], axis=1)
        points = np.concatenate([points[:1], cut.reshape(-1, 2), points[-1:]])
    lengths = np.cumsum([0, *np.hypot(*np.diff(points, axis=0).T)])
    steps = np.linspace(0, lengths[-1], round(lengths[-1] / 0.04))
    return np.stack([np.interp(steps, lengths, column) for column in points.T], axis=1)


if __name__ == "__main__":
    main()
