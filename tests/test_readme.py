"""The README keeps its word: its Python runs, its commands, flags and links exist."""

import io
import re
import shlex
from contextlib import redirect_stdout

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    (TEXT[: match.start()].count("\n") + 2, *match.groups())
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
]
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(command, comments=True)
    for _, language, block in BLOCKS
    if language == "sh"
    for command in block.splitlines()
]
SCRIPTS = {name: name for name in ("train.py", "evaluate.py")}
SCRIPTS |= {f"examples.{name}": f"examples/{name}.py" for name in ("draw", "look_inside", "photos")}


def test_every_python_block_runs_and_prints_what_it_says(data_dir, tmp_path, monkeypatch):
    """A comment after a print is its output, with ... for what differs from run to run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data_dir, target_is_directory=True)
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


def test_links_and_files_exist():
    titles = re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(([^)]+)\)", PROSE)
    assert len(links) > 30
    for link in links:
        if link.startswith("#"):
            assert link in anchors, link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link
    for name in re.findall(r"`([\w/]+\.(?:py|md|txt|toml))`", PROSE):
        assert (ROOT / name).exists(), name


def test_every_flag_exists(run_here):
    flags = {
        name: set(re.findall(r"--[a-z-]+", run_here(script, "--help").stdout))
        for name, script in SCRIPTS.items()
    }
    for command in COMMANDS:
        for script in flags.keys() & set(command):
            after = command[command.index(script) :]
            assert {flag for flag in after if flag.startswith("--")} <= flags[script], command
    known = set.union(*flags.values()) | {"--full", "--logdir"}
    for name in re.findall(r"`(--[a-z-]+)", PROSE):
        assert name in known, name


def test_commands_that_end_quickly(run_here, trained, tmp_path, data_dir):
    """Those that measure, as they are; those that train, as dry runs."""
    ran = 0
    for python, *command in COMMANDS:
        if python != "python" or command[0] not in ("train.py", "evaluate.py"):
            continue
        if {"--resume", "resnet18"} & set(command):
            continue  # these need a run that has stopped, and ImageNet's weights: see test_train.py
        script, *flags = command
        if script == "train.py":
            flags += ["--dry-run", f"--out-dir={tmp_path}"]
        else:
            flags = [path for flag in flags for path in sorted(ROOT.glob(flag)) or [flag]]
            (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
            flags += [f"--checkpoint={tmp_path / 'best.pt'}"]
        result = run_here(script, *flags)
        assert result.returncode == 0, result.stderr
        ran += 1
    assert ran >= 3


def test_pictures_are_small_enough_to_load_quickly():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert len(pictures) >= 5
    for picture in pictures:
        assert (ROOT / picture).stat().st_size <= 150_000, picture
