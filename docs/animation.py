"""The animation in README.md: a digit is being drawn, and the network answers.

    python -m docs.animation   # after a run of train.py; needs selenium, Chromium and chromedriver

A browser without a window draws on the page of examples/draw.py, a little further for every frame.
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

# A five as a hand writes it, the bar last. The points (x, y) go from 0 to 1; a corner comes twice.
STROKES = [
    [(0.4, 0.15), (0.35, 0.44), (0.35, 0.44), (0.5, 0.37), (0.69, 0.46), (0.71, 0.7), (0.56, 0.88)]
    + [(0.4, 0.88), (0.29, 0.79)],
    [(0.39, 0.16), (0.52, 0.165), (0.68, 0.14)],
]
MAPS = [4, 29]  # touched at the end, counting all maps on the page


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
    colours = pictures[-1].quantize(128, dither=Image.Dither.NONE)  # the same for all frames
    first, *others = [p.quantize(palette=colours, dither=Image.Dither.NONE) for p in pictures]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    print(f"{path}: {len(pictures)} frames, {path.stat().st_size:,} bytes")


def film(browser: webdriver.Chrome) -> Iterator[tuple[Image.Image, int]]:
    """Draw, and yield pictures of the page, each with the milliseconds to show it for."""
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
    """Points (N, 2) of a curve, 0.04 apart, that rounds off the corners of the line given.

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
