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
from conftest import ROOT
from PIL import Image

from dataset import MNISTDataset

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [path.stem for path in ROOT.glob("*.py")]
SCRIPTS = {name: name for name in ("train.py", "evaluate.py", "tests/benchmark.py")}
SCRIPTS |= {f"examples.{path.stem}": f"examples/{path.name}" for path in ROOT.glob("examples/*.py")}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page, language):
    """The blocks of a page in a language, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = [
        (text[: match.start()].count("\n") + 2, *match.groups()) for match in FENCE.finditer(text)
    ]
    return [(line, block) for line, kind, block in found if kind == language]


def prose(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page):
    lines = [line for _, block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def folder(tmp_path, monkeypatch, data_dir, trained):
    """Where a reader types in what a page shows: with data, a trained model, and a picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data_dir, target_is_directory=True)
    shutil.copy(trained / "best.pt", tmp_path)
    (tmp_path / "checkpoints").symlink_to(trained.parent, target_is_directory=True)
    seven = MNISTDataset(data_dir, "test").images[0, 0].numpy()
    Image.fromarray(255 - seven).save("digit.png")
    return tmp_path


@each_page
def test_every_python_block_runs_and_prints_what_it_says(page, folder):
    """A comment after a print is its output, with ... for what differs from run to run."""
    names = {}
    for line, block in blocks(page, "python"):
        code = compile("\n" * (line - 1) + block, str(page), "exec")
        with redirect_stdout(io.StringIO()) as output:
            exec(code, names)
        prints = re.findall(r"^ *print\(.*?\)(?:  # (.*))?$", block, re.MULTILINE)
        printed = output.getvalue().splitlines()
        assert len(printed) >= len(prints), block
        for said, text in zip(prints, printed, strict=False):
            pattern = ".*".join(map(re.escape, said.split("..."))) if said else ".*"
            assert re.fullmatch(pattern, text), f"{page.name}, block at line {line}: {text}"


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_and_files_exist(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`([\w/]+\.(?:py|md|txt|toml))`", prose(page)):
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), name


def test_every_flag_exists(run_here):
    flags = {
        name: set(re.findall(r"--[a-z-]+", run_here(script, "--help").stdout))
        for name, script in SCRIPTS.items()
    }
    known = set.union(*flags.values()) | {"--logdir", "--host", "--port", "--rdzv-endpoint"}
    for page in PAGES:
        for command in commands(page):
            for script in flags.keys() & set(command):
                after = command[command.index(script) :]
                assert {flag for flag in after if flag.startswith("--")} <= flags[script], command
        for name in re.findall(r"`(--[a-z-]+)", prose(page)):
            assert name in known, f"{page.name}: {name}"


def test_commands_that_end_quickly(run_here, trained, tmp_path, data_dir):
    """Those that measure, as they are; those that train, as dry runs."""
    ran = 0
    for python, *command in [command for page in PAGES for command in commands(page)]:
        if python != "python" or command[0] not in ("train.py", "evaluate.py"):
            continue
        if {"--resume", "--compile", "resnet18"} & set(command):
            continue  # they need a stopped run, minutes, ImageNet's weights: see test_train.py
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


def test_pictures_are_few_small_and_in_use():
    shown = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    assert shown == set((ROOT / "docs" / "images").iterdir()) and len(shown) <= 8
    for picture in shown:
        assert picture.stat().st_size <= 150_000, picture


# The changes that pages propose, as diffs


def changes(page):
    """Each diff of a page, by the title above it."""
    found, text = {}, page.read_text(encoding="utf-8")
    for line, block in blocks(page, "diff"):
        before = "\n".join(text.splitlines()[: line - 1])
        titles = re.findall(r"^(?:## |\*\*)([^*\n]+)", before, re.MULTILINE)
        found[titles[-1].strip(".")] = block
    return found


def apply(diff, folder):
    """Change a copy of the project as a diff says; a line "@@ file, place @@" begins each part."""
    for name, part in re.findall(r"^@@ (\S+?\.py).*? @@\n((?:[-+ ].*\n|\n)+)", diff, re.MULTILINE):
        lines = [line or " " for line in part.splitlines()]
        old, new = ("".join(f"{t[1:]}\n" for t in lines if t[0] in kinds) for kinds in (" -", " +"))
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{text.count(old)} times in {name}:\n{old}"
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def copy(checkout, tmp_path, monkeypatch):
    """A copy of the project, to be changed; what is imported comes from there."""
    folder = tmp_path / "copy"
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns("MNIST", "checkpoints"))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def train_copy(copy, run_here, small_data_dir, tmp_path):
    """Run the copy's train.py on few images; gives what it prints."""

    def start(*flags, data_dir=small_data_dir):
        flags = [f"--data-dir={data_dir}", f"--out-dir={tmp_path / 'runs'}", *flags]
        result = run_here(copy / "train.py", *flags)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return start


ROW = re.compile(r"^ *(\d+)/\d+ +([\d,]+) +([\d.]+) +([\d.]+)% +([\d.]+) +([\d.]+)%", re.MULTILINE)
FLAGS = {
    "Anything else": ["--model=resnet18", "--no-pretrained"],
    "Another model": ["--model=mlp"],
    "Early stopping": ["--lr=0.005", "--epochs=40", "--no-dry-run"],
}
CHANGES = changes(ROOT / "docs" / "make-it-yours.md")
EXERCISES = changes(ROOT / "docs" / "exercises.md")


@pytest.mark.slow
@pytest.mark.parametrize("title", CHANGES)
def test_a_proposed_change_works(title, copy, train_copy, small_data_dir, tmp_path):
    if title == "Files in MNIST's format":
        folder = tmp_path / "data" / "FashionMNIST"
        shutil.copytree(small_data_dir / "MNIST", folder)
        small_data_dir = folder.parent
    if title == "Anything else":
        small_data_dir = tmp_path / "pictures"
        for name in (f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(20)):
            (small_data_dir / name).parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 30), 50).convert("RGB").save(small_data_dir / name)
    apply(CHANGES[title], copy)
    output = train_copy("--dry-run", *FLAGS.get(title, []), data_dir=small_data_dir)
    epochs = len(ROW.findall(output))
    assert "Best validation accuracy" in output and 0 < epochs < 40  # without early stopping


@pytest.mark.slow
@pytest.mark.parametrize("title", ["1. One by one", "2. Pooling where others have it", "3. Deeper"])
def test_a_solved_exercise_runs(title, copy, train_copy):
    apply(EXERCISES[title], copy)
    assert len(ROW.findall(train_copy("--dry-run"))) == 1


def test_exercise_forget_to_forget(copy, train_copy):
    flags = ("--epochs=1", "--batch-size=32")
    before = ROW.search(train_copy(*flags))
    apply(EXERCISES["1. Forget to forget"], copy)
    after = ROW.search(train_copy(*flags))
    assert float(after[3]) > float(before[3]) and float(after[4]) < float(before[4])


def test_exercise_walk_the_graph(copy, train_copy):
    apply(EXERCISES["2. Walk the graph yourself"], copy)
    names = re.findall(r"^(\S+) (torch.Size.*)$", train_copy("--dry-run"), re.MULTILINE)
    assert names[0][0] == "MeanBackward0" and "SoftmaxBackward" in str(names)
    assert names[-1] == ("torch::autograd::AccumulateGrad", "torch.Size([10])")


def test_exercise_forget_to_switch(copy, run_here, trained, small_data_dir):
    def accuracy():
        flags = [f"--checkpoint={trained / 'best.pt'}", f"--data-dir={small_data_dir}"]
        output = run_here(copy / "evaluate.py", *flags).stdout
        return float(re.search(r"Test accuracy: ([\d.]+)%", output)[1])

    switched = accuracy()
    apply(EXERCISES["1. Forget to switch"], copy)
    in_fives = accuracy()
    apply(
        "@@ evaluate.py @@\n-    loader = DataLoader(dataset, batch_size=5)\n"
        "+    loader = DataLoader(dataset, batch_size=100)\n",
        copy,
    )
    assert in_fives < accuracy() - 1 and in_fives < switched - 1


def test_exercise_least_certain(copy, run_here, trained, small_data_dir):
    apply(EXERCISES["2. Does it know what it does not know?"], copy)
    flags = [f"--checkpoint={trained / 'best.pt'}", f"--data-dir={small_data_dir}"]
    output = run_here(copy / "evaluate.py", *flags).stdout
    least, all_of_them = re.findall(r"(?:least certain|accuracy): ([\d.]+)%", output)
    assert float(least) < float(all_of_them) - 20


def test_exercise_pale_ink(copy, small_data_dir):
    apply(EXERCISES["2. Pale ink"], copy)
    dataset = importlib.import_module("dataset").MNISTDataset(small_data_dir, "train")
    darkest = torch.stack([image.max() for image, _ in dataset.__getitems__(range(100))])
    assert darkest.min() < 0.6 and darkest.max() > 0.9


@pytest.mark.slow
def test_what_the_readme_says_to_type_at_a_breakpoint(copy, small_data_dir, tmp_path):
    apply(
        "@@ model.py @@\n+        breakpoint()\n         if images.shape[1:] != (1, 28, 28):\n",
        copy,
    )
    (typed,) = [
        block for _, block in blocks(ROOT / "README.md", "text") if "images.shape " in block
    ]
    first, step, mean, on, stop = [line.split("  ")[0] for line in typed.splitlines()]
    typed = "\n".join([first, *[step] * 3, mean, on, stop])
    flags = ["--device=cpu", "--dry-run", f"--data-dir={small_data_dir}", f"--out-dir={tmp_path}"]
    command = [sys.executable, copy / "train.py", *flags]
    result = subprocess.run(command, input=typed, capture_output=True, text=True)
    assert "torch.Size([128, 1, 28, 28])" in result.stdout and "tensor(" in result.stdout
    assert "BdbQuit" in result.stderr and "Error" not in result.stdout


@pytest.mark.slow
def test_exercise_another_optimizer(copy, train_copy, data_dir):
    apply(EXERCISES["3. Another optimizer"], copy)
    rows = ROW.findall(train_copy("--epochs=3", "--lr=0.1", data_dir=data_dir))
    assert max(float(row[5]) for row in rows) > 99.2


@pytest.mark.slow
def test_exercise_in_two_parts(copy, small_data_dir, tmp_path):
    apply(EXERCISES["3. In two parts"], copy)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--redirects=1", f"--log-dir={tmp_path / 'logs'}"]  # a file for each process
    command += [copy / "train.py", "--device=cpu", "--dry-run", f"--data-dir={small_data_dir}"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    outputs = [path.read_text() for path in (tmp_path / "logs").rglob("stdout.log")]
    assert len(outputs) == 2
    for output in outputs:  # 1,100 images: eight batches of 128, and the rest
        assert re.findall(r"^\d+$", output, re.MULTILINE)[:8] == ["64"] * 8
