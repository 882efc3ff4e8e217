"""README.md and the pages in docs/ keep their word: what they show runs, what they name exists."""

import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
from conftest import ROOT, apply, blocks
from PIL import Image

import utils
from dataset import MNISTDataset

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
PAGES += [ROOT / name for name in ("CONTRIBUTING.md", "data/README.md", "checkpoints/README.md")]
MINIMAL = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    """A page without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def run_blocks(page):
    """Run a page's Python blocks, one after the other, and return the names they define.

    A comment after a print is what it prints, with ... for what differs from run to run.
    """
    names = {}
    for block in blocks(page, "python"):
        if block == MINIMAL:  # test_minimal.py runs it
            continue
        with redirect_stdout(io.StringIO()) as output:
            exec(block, names)
        printed = iter(output.getvalue().splitlines())
        for said in re.findall(r"^ *print\(.*?\)(?:  # (.*))?$", block, re.MULTILINE):
            pattern = ".*".join(map(re.escape, said.split("..."))) if said else ".*"
            assert any(re.fullmatch(pattern, line) for line in printed), f"{said}\n\n{block}"
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch, data_dir, trained):
    """Where a reader types in what a page shows: with data, a trained model, and a picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    (tmp_path / "data").symlink_to(data_dir, target_is_directory=True)
    (tmp_path / "checkpoints").symlink_to(trained.parent, target_is_directory=True)
    shutil.copy(trained / "best.pt", tmp_path)
    seven = MNISTDataset(data_dir, "test").images[0, 0].numpy()
    Image.fromarray(255 - seven).save("digit.png")
    return tmp_path


# test_make_it_yours.py runs the blocks of that page, because they need other data.
@pytest.mark.parametrize("page", ["README", "exercises", "graphs", "several-machines"])
def test_every_python_block_runs_and_prints_what_it_says(page, folder, small_data_dir):
    if page == "exercises":  # predicts five times for each validation image
        (folder / "data").unlink()
        (folder / "data").symlink_to(small_data_dir, target_is_directory=True)
    assert run_blocks(README if page == "README" else DOCS / f"{page}.md")


def test_the_readme_shows_the_minimal_program_as_it_is():
    assert MINIMAL in blocks(README, "python")


def test_an_exported_program_computes_the_same_for_batches_of_any_size(folder):
    names = run_blocks(DOCS / "deploy.md")
    for size in (1, 3, 64):
        images = torch.rand(size, 1, 28, 28)
        with torch.inference_mode():
            expected, logits = names["model"](images), names["exported"](images)
        assert torch.allclose(logits, expected, atol=1e-4)


@each_page
def test_links_and_files_exist(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not link.startswith(("https://", "../../actions/")):  # the latter is GitHub's
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            if anchor:
                titles = re.findall(r"^#+ (.+)$", prose(target).lower(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", t).replace(" ", "-") for t in titles]
    for name in re.findall(r"`([\w/]+\.(?:py|md|txt|toml))`", prose(page)):
        assert any((parent / name).exists() for parent in (ROOT, DOCS)), name


@each_page
def test_every_command_is_accepted(page, capsys):
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", prose(page))
    for line in lines:
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if re.match(r"[\w/]+\.py$|(examples|docs)\.", word)]
        if not scripts or "..." in line:
            continue
        name, flags = scripts[0], words[words.index(scripts[0]) + 1 :]
        flags = ["1" if flag.isupper() else flag for flag in flags]  # N, RUN
        name = name.removesuffix(".py").replace("/", ".")
        source = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        if not re.match("train|evaluate|examples", name) or "parse_args" not in source:
            assert all(flag in source for flag in flags), line
        elif flags:
            try:
                importlib.import_module(name).parse_args(flags)
            except utils.UserError:
                pass  # a run to resume, say, isn't there
            except SystemExit:  # fine for a model that the page adds
                assert "invalid choice" in capsys.readouterr().err, line


def test_every_flag_in_the_text_exists():
    known = {"--logdir"}
    for path in [ROOT / "train.py", ROOT / "evaluate.py", *ROOT.glob("examples/*.py")]:
        known |= set(re.findall(r'"(--[a-z-]+)"', path.read_text(encoding="utf-8")))
    known |= {f"--no-{flag[2:]}" for flag in known}
    for page in PAGES:
        assert set(re.findall(r"`(--[a-z-]+)", prose(page))) <= known, page.name


def test_several_machines_shows_what_differs_between_the_two_programs():
    train = (ROOT / "train.py").read_text(encoding="utf-8")
    distributed = (ROOT / "examples" / "distributed.py").read_text(encoding="utf-8")
    for diff in blocks(DOCS / "several-machines.md", "diff"):
        old = [line[1:] for line in diff.splitlines() if line[:1] != "+"]
        new = [line[1:] for line in diff.splitlines() if line[:1] != "-"]
        assert "\n".join(old) in train and "\n".join(new) in distributed, diff


def test_every_picture_is_shown():
    shown = {
        name
        for page in PAGES
        for name in re.findall(r"!\[[^]]*\]\(\S*images/([\w.]+)\)", prose(page))
    }
    assert shown == {path.name for path in (DOCS / "images").iterdir()}


@pytest.mark.slow
def test_what_the_readme_says_to_type_at_a_breakpoint(copy, small_data_dir, tmp_path):
    first_line = "        if images.shape[1:] != (1, 28, 28):\n"
    apply(f"@@ model.py, CNN @@\n+        breakpoint()\n {first_line}", copy)
    (typed,) = [block for block in blocks(README, "text") if "images.shape " in block]
    first, step, mean, on, stop = [line.split("  ")[0] for line in typed.splitlines()]
    typed = "\n".join([first, step, step, mean, on, stop])
    flags = ["--device=cpu", "--dry-run", f"--data-dir={small_data_dir}", f"--out-dir={tmp_path}"]
    command = [sys.executable, copy / "train.py", *flags]
    result = subprocess.run(command, input=typed, capture_output=True, text=True)
    assert "torch.Size([1, 1, 28, 28])" in result.stdout and "tensor(" in result.stdout
    assert "BdbQuit" in result.stderr and "Error" not in result.stdout
