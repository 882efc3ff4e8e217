"""The README keeps its word: its Python runs, and what it names exists."""

import ast
import builtins
import io
import keyword
import re
import shlex
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.distributed.run import get_args_parser

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    (TEXT[: match.start()].count("\n") + 2, *match.groups())
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
]
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
NAMES = re.findall(r"`([^`\n]+)`", PROSE)
COMMANDS = [
    command.split("  #")[0].strip()
    for _, language, block in BLOCKS
    if language == "sh"
    for command in block.splitlines()
]
MULTI_MACHINE = [
    command
    for _, language, block in BLOCKS
    if language == "text"
    for command in block.replace("\\\n", " ").splitlines()
    if "torchrun" in command
]

# Names of other projects, and things that are no names: everything else must exist here.
FOREIGN = {
    *("tf.cond", "tf.while_loop", "tf.function", "dynamic_rnn", "scan", "MatMul_3"),
    *("jax.jit", "jax.grad", "jax.vmap", "jit", "lax.cond", "lax.scan"),
    *("torch.FloatTensor", "torch.cuda.FloatTensor", "Byte", "Float", "AccumulateGrad", "nan"),
    *(
        "torchrun",
        "kill -9",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "photos/cat/1.jpg",
        "new.jpg",
    ),
    "torch.utils.data.default_collate([self[i] for i in indices])",
}


@pytest.fixture
def folder(data_dir, tmp_path, monkeypatch):
    """A folder as a reader has it: the data, and photos of two kinds of things."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data_dir, target_is_directory=True)
    rng = np.random.default_rng(0)
    for name, colour in (("cat", (200, 80, 60)), ("dog", (60, 90, 200))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(30):
            photo = rng.normal(colour, 40, (150, 200, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(photo).save(tmp_path / "photos" / name / f"{i}.jpg")
    cut = (tmp_path / "photos" / "cat" / "0.jpg").read_bytes()[:3_000]
    (tmp_path / "photos" / "cat" / "cut.jpg").write_bytes(cut)
    (tmp_path / "photos" / "dog" / "notes.txt").write_text("not a photo")
    return tmp_path


def test_every_python_block_runs_and_prints_what_it_says(folder):
    """A comment after a print is its output, with ... for what differs from run to run."""
    names, checked = {}, 0
    for line, language, block in BLOCKS:
        if language != "python":
            continue
        code = compile("\n" * (line - 1) + block, "README.md", "exec")
        with redirect_stdout(io.StringIO()) as output:
            exec(code, names)
        prints = re.findall(r"^print\(.*?\)(?:  # (.*))?$", block, re.MULTILINE)
        printed = output.getvalue().splitlines()
        assert len(printed) >= len(prints), block
        for said, text in zip(prints, printed, strict=False):
            pattern = ".*".join(map(re.escape, said.split("..."))) if said else ".*"
            assert re.fullmatch(pattern, text), f"README.md, block at line {line}: {text}"
            checked += bool(said)
    assert checked >= 8

    # The program for photos in folders. These are easy to tell apart: 4 epochs do.
    with redirect_stdout(io.StringIO()) as output:
        names["EPOCHS"] = 4
        names["train"]()
        names["classify"]("photos/dog/1.jpg")
    text = output.getvalue()
    assert "cut.jpg is left out" in text and "notes.txt is left out" in text
    assert float(re.search(r"epoch 4: .* validation ([\d.]+)%", text)[1]) > 90
    assert text.splitlines()[-1].startswith("photos/dog/1.jpg: dog (")


def test_links_lead_somewhere():
    titles = re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(([^)]+)\)", PROSE)
    assert len(links) > 30
    for link in links:
        if link.startswith("#"):
            assert link in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link


def names_in(code):
    """What Python code names or defines; comments and texts do not count."""
    names = set(keyword.kwlist) | set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        for field in ("id", "attr", "name", "arg", "module"):
            names |= set(str(getattr(node, field, "")).split("."))
    return names


def test_every_name_exists():
    known = set(dir(torch.nn)) | set(dir(torch.optim))
    known |= names_in("\n".join(block for _, language, block in BLOCKS if language == "python"))
    source = ""
    for path in ROOT.glob("*.py"):
        source += path.read_text(encoding="utf-8")
        known |= {path.stem} | names_in(path.read_text(encoding="utf-8"))
    checked, missing = 0, []
    for name in set(NAMES) - FOREIGN:
        if re.fullmatch(r"[\w.-]+\.(pt|png|partial)", name):  # what scripts write
            missing += [] if f'"{re.sub("-[0-9-]+|.partial", "", name)}"' in source else [name]
        elif re.fullmatch(r"[\w/.-]+\.(py|md|txt|toml)", name):
            missing += [] if (ROOT / name).exists() else [name]
        elif re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", name) and not name.startswith("session"):
            parts = re.sub(r"\(.*", "", name).strip(".").split(".")
            if not (ROOT / name).is_dir():
                missing += [name for part in parts if part not in known]
        else:
            continue
        checked += 1
    assert missing == []
    assert checked > 40


def test_every_flag_exists(run_here):
    flags = {}
    for script in ("train.py", "evaluate.py"):
        flags[script] = set(re.findall(r"--[a-z-]+", run_here(script, "--help").stdout))
    known = set.union(*flags.values()) | {"--seeds", "--logdir"}
    torchrun = set(re.findall(r"--[a-z-]+", get_args_parser().format_help()))
    for name in NAMES:
        if name.startswith("--"):
            assert name.split()[0] in known, name
    assert len(torchrun) > 10
    for command in COMMANDS + MULTI_MACHINE:
        for script, known_here in flags.items():
            if script in command:
                before, _, after = command.rpartition(script)
                assert set(re.findall(r"--[a-z-]+", after)) <= known_here, command
                before = before.rpartition("torchrun")[2]  # srun's own flags come first
                assert set(re.findall(r"--[a-z-]+", before)) <= torchrun, command


def test_commands_that_end_quickly(run_here, trained, tmp_path):
    """Those that measure, as they are; those that train, as dry runs."""
    ran = 0
    for command in COMMANDS:
        python, script, *flags = [*shlex.split(command, comments=True), "", ""][:10]
        flags = [flag for flag in flags if flag]
        if python != "python" or script not in ("train.py", "evaluate.py") or "--resume" in flags:
            continue
        if script == "train.py":
            if "resnet18" in flags:
                continue  # needs the weights; see test_train.py
            flags += ["--dry-run", "--log-dir", tmp_path / "runs", "--checkpoint-dir", tmp_path]
        else:
            flags = [path for flag in flags for path in sorted(ROOT.glob(flag)) or [flag]]
            checkpoint = tmp_path / "best.pt"
            checkpoint.write_bytes((trained / "best.pt").read_bytes())
            flags += ["--checkpoint", checkpoint]
        result = run_here(script, *flags)
        assert result.returncode == 0, result.stderr
        ran += 1
    assert ran >= 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows counts bytes of text differently")
def test_pictures_are_small_enough_to_load_quickly():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert len(pictures) >= 5
    for picture in pictures:
        assert (ROOT / picture).stat().st_size <= 150_000, picture
