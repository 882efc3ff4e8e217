"""Draw a digit in your browser, and watch the network make up its mind.

    python -m examples.draw     # with the newest run's best.pt

This is how a model is served: load it once; then for each request make a tensor of what came in,
compute without gradients, send numbers back. draw.html sends its drawing as a PNG while you draw.
Python's own http.server does for one machine; for more put `answer` behind a web framework.
"""

import argparse
import io
import json
import webbrowser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import utils
from dataset import read_digit
from evaluate import ROOT, newest_checkpoint
from model import build_model


def main(args: argparse.Namespace) -> None:
    checkpoint = utils.load_checkpoint(args.checkpoint or newest_checkpoint(ROOT / "checkpoints"))
    model = build_model(checkpoint["model"], checkpoint["classes"])
    utils.load_states(checkpoint, model)
    torch.set_num_threads(1)  # for one small image
    try:  # 127.0.0.1 is this machine as it sees itself: nobody else can reach that
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except (OSError, OverflowError) as error:
        raise utils.InputError(f"--port {args.port}: {error}; choose another") from error
    server.model = model.eval()
    print(f"Draw on http://127.0.0.1:{server.server_port} (Ctrl-C ends)", flush=True)
    if args.browser:
        webbrowser.open(f"http://127.0.0.1:{server.server_port}")
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


@torch.inference_mode()
def answer(model: torch.nn.Module, drawing: bytes) -> dict:
    """The probability of each class for a picture, and the 28×28 image that the network saw."""
    image = read_digit(io.BytesIO(drawing))  # (1, 28, 28) float32, from 0 to 1
    probabilities = model(image[None]).softmax(dim=1)[0]  # None makes it a batch of one
    return {"probabilities": probabilities.tolist(), "image": image.flatten().tolist()}


class Handler(BaseHTTPRequestHandler):
    """Two routes: GET / gives the page, POST /read the `answer` to the drawing in its body."""

    timeout = 10  # seconds, for a program that connects and then says nothing

    def respond(self) -> tuple[int, str, bytes]:
        """A status, the kind of content, and the content."""
        # Any web page can give this server a name of its own ("DNS rebinding"), and your browser
        # would let it read the answers. But it tells us the name.
        port = self.server.server_port
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            return 403, "text/plain", b"Forbidden"
        if (self.command, self.path) == ("GET", "/"):
            return 200, "text/html", Path(__file__).with_name("draw.html").read_bytes()
        if (self.command, self.path) != ("POST", "/read"):
            return 404, "text/plain", b"Not found"
        length = self.headers.get("Content-Length", "")
        if not (length.isdecimal() and int(length) <= 1_000_000):
            return 413, "text/plain", b"A drawing has at most 1 MB"
        try:
            numbers = answer(self.server.model, self.rfile.read(int(length)))
            return 200, "application/json", json.dumps(numbers).encode()
        except utils.InputError as error:  # no picture, or nothing on it
            return 400, "text/plain", str(error).encode()

    def do_GET(self):
        status, kind, content = self.respond()
        with suppress(ConnectionError):  # who asked has gone
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *args):
        """Say nothing: there are many requests in a drawing."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.draw", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="not the newest best.pt")
    parser.add_argument("--port", type=int, default=8000, help="of the page (%(default)s)")
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="do not open it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
