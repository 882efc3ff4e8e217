"""The page to draw on: who may ask what; and digits drawn in a real browser."""

import http.client
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line
from PIL import Image, ImageDraw

# Strokes of each digit, as points (x, y) from 0 to 1, as a hand would draw them.
STROKES = [
    [[(0.5, 0.1), (0.3, 0.25), (0.25, 0.5), (0.3, 0.75), (0.5, 0.9), (0.7, 0.75), (0.75, 0.5)]],
    [[(0.5, 0.1), (0.49, 0.5), (0.48, 0.9)]],
    [[(0.28, 0.28), (0.4, 0.12), (0.6, 0.12), (0.7, 0.3), (0.6, 0.5), (0.27, 0.87), (0.75, 0.85)]],
    [[(0.3, 0.15), (0.55, 0.1), (0.7, 0.27), (0.5, 0.47), (0.72, 0.68), (0.55, 0.9), (0.28, 0.83)]],
    [[(0.35, 0.1), (0.25, 0.55), (0.75, 0.55)], [(0.65, 0.15), (0.62, 0.9)]],
    [
        [(0.7, 0.12), (0.35, 0.13), (0.32, 0.45), (0.6, 0.45), (0.72, 0.65), (0.55, 0.88)],
        [(0.55, 0.88), (0.28, 0.83)],
    ],
    [[(0.6, 0.1), (0.35, 0.4), (0.3, 0.75), (0.5, 0.9), (0.7, 0.75), (0.55, 0.55), (0.33, 0.65)]],
    [[(0.25, 0.13), (0.75, 0.13), (0.5, 0.5), (0.4, 0.9)]],
    [
        [(0.65, 0.2), (0.45, 0.12), (0.35, 0.28), (0.5, 0.48), (0.68, 0.7), (0.5, 0.9)],
        [(0.5, 0.9), (0.32, 0.72), (0.5, 0.48), (0.66, 0.3), (0.65, 0.2)],
    ],
    [[(0.7, 0.25), (0.5, 0.1), (0.35, 0.28), (0.5, 0.45), (0.7, 0.25), (0.68, 0.55), (0.6, 0.9)]],
]
STROKES[0][0] += [(0.7, 0.25), (0.5, 0.1)]


def start(checkpoint, *flags):
    """The process of a server, and its port, which the operating system chooses."""
    command = [sys.executable, "-m", "examples.draw", f"--checkpoint={checkpoint}", "--no-browser"]
    process = subprocess.Popen(
        [*command, "--port=0", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return process, int(re.search(r"http://127\.0\.0\.1:(\d+) ", line)[1])


def stop(process):
    if sys.platform == "win32":
        process.terminate()  # there are no signals to send
        process.communicate(timeout=20)
        return
    process.send_signal(signal.SIGINT)  # Ctrl-C
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, ""), err


@pytest.fixture(scope="module")
def port(trained):
    process, port = start(trained / "best.pt")
    yield port
    stop(process)


def ask(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def drawing(digit):
    """What the page sends: black lines on a transparent ground."""
    picture = Image.new("RGBA", (280, 280))
    for stroke in STROKES[digit]:
        points = [(280 * x, 280 * y) for x, y in stroke]
        ImageDraw.Draw(picture).line(points, fill=(0, 0, 0, 255), width=20, joint="curve")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_a_drawing_gets_probabilities_and_the_image_that_the_network_saw(port):
    status, content = ask(port, "POST", "/read", drawing(1))
    answer = json.loads(content)
    assert status == 200
    assert len(answer["probabilities"]) == 10
    assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-3)
    assert max(range(10), key=answer["probabilities"].__getitem__) == 1
    assert len(answer["image"]) == 28 * 28 and 0.5 < max(answer["image"]) <= 1


def test_nothing_but_the_two_routes_is_answered(port):
    status, page = ask(port, "GET", "/")
    assert status == 200 and page == (ROOT / "examples" / "draw.html").read_bytes()
    for method, path in (
        ("GET", "/draw.py"),
        ("GET", "/../utils.py"),
        ("POST", "/"),
        ("GET", "/read"),
    ):
        assert ask(port, method, path)[0] == 404
    assert ask(port, "PUT", "/read")[0] == 501


def test_names_of_other_hosts_are_refused(port):
    assert ask(port, "GET", "/", Host=f"localhost:{port}")[0] == 200
    for host in ("stranger.example", f"stranger.example:{port}", "127.0.0.1:1"):
        assert ask(port, "GET", "/", Host=host)[0] == 403
        assert ask(port, "POST", "/read", drawing(1), Host=host)[0] == 403


def test_what_is_no_drawing_is_refused_in_a_line(port):
    blank = io.BytesIO()
    Image.new("RGBA", (280, 280)).save(blank, "PNG")
    for body, part in ((b"text", b"not an image"), (blank.getvalue(), b"empty")):
        status, content = ask(port, "POST", "/read", body)
        assert status == 400 and part in content
    headers = {"Content-Length": "1000001"}
    assert ask(port, "POST", "/read", b"", **headers)[0] == 413
    headers = {"Content-Length": "-1"}
    assert ask(port, "POST", "/read", b"", **headers)[0] == 413


@pytest.mark.slow
def test_a_busy_port_is_one_line(port, trained):
    command = [sys.executable, "-m", "examples.draw", f"--checkpoint={trained / 'best.pt'}"]
    result = subprocess.run(
        [*command, f"--port={port}", "--no-browser"], cwd=ROOT, capture_output=True, text=True
    )
    one_line(result, 1, f"--port {port}", "choose another")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs Chromium and its driver")
def test_digits_drawn_in_a_browser_are_read(default_run, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--window-size=1000,800"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    process, port = start(default_run / "best.pt")
    with webdriver.Chrome(options, service) as browser:
        browser.get(f"http://127.0.0.1:{port}")
        paper = browser.find_element("id", "paper")
        side = paper.size["width"]

        def draw(strokes):
            actions = webdriver.ActionChains(browser, duration=10)
            for stroke in strokes:
                for i, (x, y) in enumerate(stroke):
                    actions.move_to_element_with_offset(paper, (x - 0.5) * side, (y - 0.5) * side)
                    if i == 0:
                        actions.click_and_hold()
                actions.release()
            actions.perform()

        def read():
            """The page's answer to all that was drawn."""
            while browser.execute_script("return asking || changed"):
                time.sleep(0.05)
            best = browser.find_elements("css selector", "#bars .best span")
            return int(best[0].text) if best else None

        read_as = []
        for strokes in STROKES:
            draw(strokes)
            read_as.append(read())
            browser.find_element("id", "clear").click()
            assert read() is None
        print(f"0 to 9 are read as {read_as}")
        assert sum(digit == answer for digit, answer in enumerate(read_as)) >= 9

        draw(STROKES[1])
        one = browser.find_element("id", "bars").text if read() == 1 else None
        draw([[(0.2, 0.2), (0.8, 0.2), (0.8, 0.8)]])
        assert read() is not None and browser.find_element("id", "bars").text != one
        browser.find_element("id", "back").click()
        assert read() == 1 and browser.find_element("id", "bars").text == one
        stop(process)
        draw(STROKES[2])
        read()
        assert "ended" in browser.find_element("id", "message").text
