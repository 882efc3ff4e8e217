"""Draw a digit in your browser, and watch the network make up its mind.

    python -m examples.draw     # uses the newest run's best.pt

This is what *serving* a model means. Load it once; then, for every request, turn the input into
a tensor, run the model without gradients, and send numbers back. While you draw, draw.html keeps
sending its drawing here. It gets back the answer and each block's most active *feature maps* (its
output channels), which forward hooks pick up while the model runs. (examples/look_inside.py
explains hooks.)

Python's http.server is plenty for one person. To serve many, use a web framework.
"""

import argparse
import io
import json
import re
import sys
import threading
import webbrowser
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to import from the folder above
import utils
from evaluate import load_model, newest_checkpoint
from examples.handwriting import read_digit

SHOWN = 8  # maps per block
LARGEST = 1000  # pixels per side, because a small file can hold a huge picture
THIS_MACHINE = re.compile(r"(https?://)?(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
REFUSAL = (
    "Refused: this request came through {}, but only localhost, 127.0.0.1 and [::1] are allowed. "
    "Otherwise any website could send pictures here. Open http://localhost instead, with the port "
    "that the terminal shows, or the one you forward to it."
)


def main(args: argparse.Namespace) -> None:
    model, _ = load_model(args.checkpoint or newest_checkpoint())
    torch.set_num_threads(1)  # one small image isn't worth sharing between cores
    try:
        server = Server(("127.0.0.1", args.port), Handler)  # an address only this machine can reach
    except (OSError, OverflowError) as error:
        raise utils.UserError(f"Can't use --port {args.port} ({error}); choose another") from error
    server.answer = partial(answer, model, watch_blocks(model))
    address = f"http://127.0.0.1:{server.server_port}"
    print(f"Draw at {address} (Ctrl-C stops it)", flush=True)
    if args.browser:
        # In a thread, because a text browser returns only when you quit it.
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


def watch_blocks(model: nn.Module) -> dict[str, Tensor]:
    """Hook into each block. Returns a dictionary with the blocks' outputs from the latest run.

    A block is a child module of the model, or of its backbone, that contains layers. If there are
    none, we watch every child instead.
    """
    members = dict(getattr(model, "backbone", model).named_children())
    blocks = {name: member for name, member in members.items() if [*member.children()]}
    outputs = {}
    for name, block in (blocks or members).items():
        # name=name stores this name; without it, every hook would use the loop's last one.
        block.register_forward_hook(
            lambda _, inputs, output, name=name: outputs.update({name: output[0]})
        )
    return outputs


@torch.inference_mode()
def answer(model: nn.Module, outputs: dict[str, Tensor], drawing: bytes) -> dict:
    """What the network makes of a drawing: the classes' probabilities, and some maps per stage.

    `outputs` is the dictionary that `watch_blocks(model)` returned. Raises UserError if the drawing
    isn't a PNG, is huge, or shows no digit.
    """
    # A PNG's header holds its width and height.
    width, height = (int.from_bytes(drawing[at : at + 4], "big") for at in (16, 20))
    if not drawing.startswith(b"\x89PNG") or max(width, height) > LARGEST:
        raise utils.UserError(f"A drawing has to be a PNG of at most {LARGEST}×{LARGEST} pixels")
    image = read_digit(io.BytesIO(drawing))  # (1, 28, 28) float32: 0 is paper, 1 is ink
    logits = model(image[None])  # None makes a batch of one; the hooks fill `outputs`
    stages = {"image": image, **outputs}
    return {
        "probabilities": logits.softmax(dim=1)[0].tolist(),
        "stages": [
            {"name": name, "maps": most_active(maps)}
            for name, maps in stages.items()
            if maps.dim() == 3  # (C, H, W), so not the output of a linear layer
        ],
    }


def most_active(channels: Tensor) -> list[dict]:
    """The channels of (C, H, W) with the brightest pixels, as whole numbers from 0 to 255."""
    brightest = channels.amax(dim=(1, 2))
    chosen = brightest.topk(min(SHOWN, len(channels))).indices.sort().values
    pixels = (255 * channels[chosen] / brightest.max().clamp(min=1e-9)).clamp(min=0).round().int()
    pairs = zip(chosen.tolist(), pixels.tolist(), strict=True)
    return [{"channel": channel, "rows": rows} for channel, rows in pairs]


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that may wait to be accepted
    lock = threading.Lock()  # the threads, one per connection, share the hooks' outputs


class Handler(BaseHTTPRequestHandler):
    """GET / returns the page, and POST /read takes a drawing and returns its `answer`."""

    timeout = 10  # seconds, in case a client connects and then says nothing

    def respond(self) -> tuple[int, str, bytes]:
        """Return a status, a content type, and the content."""
        # A website that you visit can have your browser send things here, and it can even
        # pass this server off as its own ("DNS rebinding"). But these headers name the website.
        for name in (self.headers.get("Host", "no name"), self.headers.get("Origin", "localhost")):
            if not THIS_MACHINE.fullmatch(name):
                return 403, "text/plain", REFUSAL.format(name[:100]).encode()
        route = self.command, self.path.partition("?")[0]
        if route == ("GET", "/"):
            return 200, "text/html", Path(__file__).with_name("draw.html").read_bytes()
        if route != ("POST", "/read"):
            return 404, "text/plain", b"Not found"
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,6}", length):
            return 413, "text/plain", b"A drawing has to be smaller than 1 MB"
        drawing = self.rfile.read(int(length))
        try:
            with self.server.lock:
                numbers = self.server.answer(drawing)
            return 200, "application/json", json.dumps(numbers).encode()
        except utils.UserError as error:
            return 400, "text/plain", str(error).encode()

    def do_GET(self):
        status, kind, content = self.respond()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def handle(self):
        with suppress(ConnectionError):  # the browser closed the connection, which is fine
            super().handle()

    def log_message(self, *args):
        """Stay silent: a single drawing makes dozens of requests."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.draw", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="a best.pt (default: the newest run's)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--no-browser", dest="browser", action="store_false", help="don't open a browser"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run(parse_args, main)
