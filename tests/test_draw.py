"""The page to draw on: who may ask what, what the answer holds, and digits drawn in a browser."""

import http.client
import io
import itertools
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import OrderedDict
from contextlib import ExitStack
from queue import Queue

import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from evaluate import load_model
from examples import draw
from examples.handwriting import read_digit
from model import build_model
from utils import ROOT, save_checkpoint

# The strokes of each digit, as points (x, y) from 0 to 1, as a hand would draw them.
STROKES = [
    [[(0.5, 0.1), (0.3, 0.25), (0.25, 0.5), (0.3, 0.75), (0.5, 0.9), (0.7, 0.75), (0.75, 0.5)]],
    [[(0.5, 0.1), (0.49, 0.5), (0.48, 0.9)]],
    [[(0.28, 0.28), (0.4, 0.12), (0.6, 0.12), (0.7, 0.3), (0.6, 0.5), (0.27, 0.87), (0.75, 0.85)]],
    [[(0.3, 0.15), (0.55, 0.1), (0.7, 0.27), (0.5, 0.47), (0.72, 0.68), (0.55, 0.9), (0.28, 0.83)]],
    [[(0.35, 0.1), (0.25, 0.55), (0.75, 0.55)], [(0.65, 0.15), (0.62, 0.9)]],
    [[(0.7, 0.12), (0.35, 0.13), (0.32, 0.45), (0.6, 0.45), (0.72, 0.65), (0.55, 0.88)]],
    [[(0.6, 0.1), (0.35, 0.4), (0.3, 0.75), (0.5, 0.9), (0.7, 0.75), (0.55, 0.55), (0.33, 0.65)]],
    [[(0.25, 0.13), (0.75, 0.13), (0.5, 0.5), (0.4, 0.9)]],
    [[(0.65, 0.2), (0.45, 0.12), (0.35, 0.28), (0.5, 0.48), (0.68, 0.7), (0.5, 0.9)]],
    [[(0.7, 0.25), (0.5, 0.1), (0.35, 0.28), (0.5, 0.45), (0.7, 0.25), (0.68, 0.55), (0.6, 0.9)]],
]
STROKES[0][0] += [(0.7, 0.25), (0.5, 0.1)]
STROKES[5][0] += [(0.28, 0.83)]
STROKES[8][0] += [(0.32, 0.72), (0.5, 0.48), (0.66, 0.3), (0.65, 0.2)]


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def drawing(digit):
    picture = Image.new("L", (160, 160), 255)
    for stroke in STROKES[digit]:
        points = [(160 * x, 160 * y) for x, y in stroke]
        ImageDraw.Draw(picture).line(points, fill=0, width=14, joint="curve")
    return png(picture)


def serve(checkpoint, *flags):
    """Run main in a thread, with a text browser. Returns once the browser has got the page."""
    opened = Queue()

    def text_browser(address):
        opened.put((address, urllib.request.urlopen(address, timeout=5).read()))
        time.sleep(1000)  # somebody's reading it

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("webbrowser.open", text_browser)
        args = draw.parse_args(["--port=0", f"--checkpoint={checkpoint}", *flags])
        threading.Thread(target=draw.main, args=[args], daemon=True).start()
        address, page = opened.get(timeout=10)
    torch.set_num_threads(threads)
    return int(address.rpartition(":")[2]), page, checkpoint


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The port, the page and the checkpoint of a network that has learnt nothing."""
    path = tmp_path_factory.mktemp("draw") / "best.pt"
    weights = build_model("cnn", 10).state_dict()
    save_checkpoint(path, {"model": "cnn", "classes": 10, "epoch": 1, "weights": weights})
    return serve(path)


@pytest.fixture
def ask(served, capsys):
    """Ask the server something; at the end, check that nothing caused a traceback."""

    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", served[0], timeout=10)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()

    yield ask
    assert ask("GET", "/")[0] == 200  # it's still alive
    assert capsys.readouterr().err == ""


def test_a_text_browser_gets_the_page(served):
    assert served[1] == (ROOT / "examples" / "draw.html").read_bytes()


def test_the_answer_shows_the_most_active_maps_of_each_block(served, ask):
    status, content = ask("POST", "/read", drawing(4))
    answer = json.loads(content)
    assert status == 200 and len(answer["probabilities"]) == 10
    assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-3)
    assert [len(stage["maps"]) for stage in answer["stages"]] == [1, 8, 8, 8, 8]

    model, image = load_model(served[2])[0], read_digit(io.BytesIO(drawing(4)))
    seen = []
    model.block1.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    model(image[None])
    channels = seen[0].detach()
    best = channels.amax((1, 2)).topk(8).indices.tolist()
    pairs = zip(answer["stages"][:2], (image, channels), ([0], best), strict=True)
    for stage, expected, chosen in pairs:
        assert [m["channel"] for m in stage["maps"]] == sorted(chosen)
        for m in stage["maps"]:
            rows = 255 * expected[m["channel"]] / expected.max()
            assert (torch.tensor(m["rows"]) - rows).abs().max() < 0.6


BLOCKS = {f"block{i}": nn.Sequential(nn.Conv2d(1, 1, 3)) for i in range(1, 6)}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Sequential(OrderedDict(BLOCKS, head=nn.Sequential(nn.Flatten()))), [*BLOCKS]),
        (build_model("resnet18", 10), ["layer1", "layer2", "layer3", "layer4"]),
        (nn.Sequential(nn.Conv2d(1, 4, 28), nn.ReLU(), nn.Flatten()), ["0", "1"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)), []),
    ],
)
def test_other_networks_show_what_they_have(model, names):
    answer = draw.answer(model.eval(), draw.watch_blocks(model), drawing(7))
    assert [stage["name"] for stage in answer["stages"]] == ["image", *names]
    json.dumps(answer)  # plain numbers


def test_only_the_page_and_its_requests_are_served(ask):
    for method, path in [("GET", "/draw.py"), ("GET", "/../utils.py"), ("GET", "/read")]:
        assert ask(method, path)[0] == 404
    assert ask("POST", "/")[0] == 404


@pytest.mark.parametrize("host", ["localhost", "LocalHost:80", "127.0.0.1:9000", "[::1]:8000"])
def test_this_machine_is_answered_under_all_its_names(ask, host):
    assert ask("GET", "/", Host=host)[0] == 200
    assert ask("POST", "/read", drawing(1), Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example:8000", "null"])
def test_a_stranger_is_refused_and_told_why(ask, name):
    for headers in ({"Host": name}, {"Origin": f"http://{name}"}, {"Origin": name}):
        status, reason = ask("POST", "/read", drawing(1), **headers)
        assert status == 403
        assert name in reason and "http://localhost" in reason


def test_anything_but_a_drawing_is_refused_in_one_line(ask):
    huge = png(Image.new("1", (9000, 9000)))  # 10 KB as a file
    blank = png(Image.new("RGBA", (160, 160)))
    for body, part in [(b"", "PNG"), (b"text", "PNG"), (huge, "1000×1000"), (blank, "")]:
        status, reason = ask("POST", "/read", body)
        assert status == 400 and part in reason and len(reason.splitlines()) == 1
    assert ask("POST", "/read", drawing(8)[:100])[0] == 400  # half a file


@pytest.mark.parametrize("length", ["1000000", "9" * 5000, "-1", "²", "1e3", ""])
def test_a_strange_length_is_refused_unread(ask, length):
    assert ask("POST", "/read", b"", Content_Length=length)[0] == 413


def test_a_client_may_vanish_mid_request(served, ask):
    head = b"POST /read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
    for part in (b"", b"POST /re", head):
        with socket.create_connection(("127.0.0.1", served[0])) as client:
            client.sendall(part)
            time.sleep(0.1)  # so that the server waits for more when the connection is reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.1)


def test_sixty_connections_at_once_are_all_answered():
    with ExitStack() as stack:
        server = stack.enter_context(draw.Server(("127.0.0.1", 0), draw.Handler))
        clients = [
            stack.enter_context(socket.create_connection(server.server_address, timeout=0.5))
            for _ in range(60)  # before the server accepts the first
        ]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        for client in clients:
            client.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        for client in clients:
            client.settimeout(10)
            assert client.makefile("rb").read().endswith(b"</html>\n")


@pytest.mark.slow
def test_it_starts_as_a_script_and_says_that_a_port_is_taken(served):
    flags = [f"--port={served[0]}", f"--checkpoint={served[2]}", "--no-browser"]
    command = [sys.executable, ROOT / "examples" / "draw.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert f"--port {served[0]}" in result.stderr and "choose another" in result.stderr


@pytest.fixture(scope="module")
def browser(default_run, tmp_path_factory):
    """The page in headless Chromium, with a trained network behind it."""
    if not shutil.which("chromedriver"):
        pytest.skip("needs chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    for flag in ("--headless", "--no-sandbox", "--window-size=1000,800"):
        options.add_argument(flag)
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        driver.downloads = downloads
        driver.get(f"http://localhost:{serve(default_run / 'best.pt')[0]}")
        yield driver


WAIT = {"type": "pause"}


def move(x, y):
    """Move to a point well inside the paper: an action in WebDriver's format, like those below."""
    place = {"x": 50 + round(280 * x), "y": 120 + round(280 * y)}
    return {"type": "pointerMove", "duration": 10, **place}


def pointer(name, actions, kind="touch"):
    return {"type": "pointer", "id": name, "parameters": {"pointerType": kind}, "actions": actions}


def hand(strokes, kind="touch"):
    """A mouse, or a finger, that draws strokes."""
    down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
    ways = [[move(*stroke[0]), down, *(move(*p) for p in stroke[1:]), up] for stroke in strokes]
    return pointer(kind, [*itertools.chain(*ways)], kind)


def act(browser, *devices):
    """Have devices act together, tick by tick; then return the page's answer."""
    browser.execute("actions", {"actions": [*devices]})
    while browser.execute_script("return asking || changed"):
        time.sleep(0.01)
    return browser.find_element("id", "best").text


def press(browser, *keys):
    actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp") for key in keys]
    return act(browser, {"type": "key", "id": "keyboard", "actions": actions})


@pytest.mark.slow
@pytest.mark.parametrize("way", ["mouse", "finger", "palm before finger", "palm after finger"])
def test_digits_drawn_in_a_browser_are_read(browser, way):
    answers = ""
    for digit, strokes in enumerate(STROKES):
        devices = [hand(strokes, "mouse" if way == "mouse" else "touch")]
        if "palm" in way:  # it rests on the paper, and trembles, until the digit is done
            place, down, there, back, up = hand([[(0.9, 0.9), (0.93, 0.9), (0.9, 0.9)]])["actions"]
            tremble = [WAIT, there, WAIT, back] * (len(devices[0]["actions"]) // 4 + 1)
            palm = pointer("palm", [place, down, *tremble, up])
            late = palm if "after" in way else devices[0]
            late["actions"][:0] = [WAIT] * 3
            devices.append(palm)
        for _ in range(2):  # a busy browser now and then loses a simulated touch
            answer = act(browser, *devices)
            assert press(browser, "c") == "?"
            if answer == str(digit):
                break
        answers += answer
    assert answers == "0123456789"


@pytest.mark.slow
def test_keys_and_buttons_do_what_they_say(browser):
    assert act(browser, hand([[(0.3, 0.3)]])) != "?"  # it answers at the first touch
    browser.find_element("xpath", "//button[text()='Clear']").click()
    assert act(browser) == "?"
    assert act(browser, hand(STROKES[1])) == "1"
    for undo in (["u"], ["\ue009", "z"]):  # Control
        assert act(browser, hand([[(0.2, 0.2), (0.8, 0.2), (0.8, 0.8)]])) != "1"
        assert press(browser, *undo) == "1"
    assert press(browser, "\ue009", "c") == "1"  # copies

    browser.find_element("xpath", "//button[text()='Save PNG']").click()
    while not (file := browser.downloads / "digit.png").exists():
        time.sleep(0.05)
    assert read_digit(file).shape == (1, 28, 28)

    browser.find_elements("css selector", "#rows button")[9].send_keys("\n")
    assert "block2" in browser.find_element("id", "caption").text
    assert press(browser, "\ue017") == "?"  # Delete
