"""Training: the loop, a run's folder, resuming, the log, bad input, and what goes wrong."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, contents, one_line, write_mnist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import models

import train as script
from dataset import MNISTDataset
from evaluate import predict
from model import build_model
from train import parse_args, train_epoch
from utils import InputError, load_checkpoint, run_script, save_checkpoint


def small_training(images, labels, steps, lr=0.005):
    """A CNN, trained on one batch for some steps by train.py's own loop."""
    torch.manual_seed(0)
    model = build_model("cnn", classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    batches = [(images, labels)] * steps
    loss_function = nn.CrossEntropyLoss(reduction="none")
    return model, train_epoch(model, batches, loss_function, optimizer, scheduler, CPU)


@pytest.fixture(scope="module")
def batch(small_data_dir):
    dataset = MNISTDataset(small_data_dir, "train")
    return dataset.images[:128] / 255, dataset.labels[:128]


def test_a_small_set_can_be_learnt_by_heart(batch):
    model, (losses, _, _) = small_training(*batch, steps=60)
    first, second, *_, last = losses.view(60, -1).mean(dim=1)
    assert second < first and last < first / 10
    logits, labels = predict(model, TensorDataset(*batch), CPU)
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.97


def test_an_epoch_s_numbers_equal_a_count_by_hand():
    """With a learning rate of 0 the weights stand still: a second pass gives the same numbers."""
    torch.manual_seed(0)
    images, labels = torch.rand(10, 1, 28, 28), torch.arange(10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step)
    batches = [(images[:7], labels[:7]), (images[7:], labels[7:])]  # of unequal size
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    losses, rates, accuracy = train_epoch(model, batches, loss_function, optimizer, scheduler, CPU)
    torch.testing.assert_close(losses, loss_function(model(images), labels).detach())
    assert rates == [0, 0]
    right = model(images).argmax(dim=1) == labels
    assert accuracy == pytest.approx(right.float().mean().item())


def test_after_the_first_epoch_the_hardest_images_are_practised(train, monkeypatch, capsys):
    """With a made-up training, in which the loss of image i is i, and 0 when it is seen again."""
    epochs = []

    def train_epoch(model, batches, *others):
        seen = torch.cat([images[:, 0, 0, 0].long() for images, _ in batches])
        losses = torch.where(torch.isin(seen, torch.cat([torch.tensor([-1]), *epochs])), 0, seen)
        epochs.append(seen)
        return losses.float(), [0.1] * len(batches), 1.0

    def getitems(self, indices):
        return [(torch.full((1, 28, 28), float(i)), torch.tensor(0)) for i in indices]

    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr(MNISTDataset, "__getitems__", getitems)
    run_dir = train("--hard-share=0.1")
    first, second, third = (epoch.tolist() for epoch in epochs)
    assert sorted(first) == list(range(1_100))
    assert sorted(second) == list(range(990, 1_100)) and second != sorted(second, reverse=True)
    assert sorted(third) == list(range(880, 990))  # the others have a loss of 0 by now
    rows = re.findall(r"^ \d/3 +([\d,]+) ", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["1,100", "110", "110"]
    losses = load_checkpoint(run_dir / "last.pt")["losses"]
    assert losses.tolist() == [*map(float, range(880)), *[0.0] * 220]


def test_with_a_share_of_1_all_images_are_in_each_epoch(train):
    run_dir = train("--hard-share=1", "--batch-size=100")
    steps = [event.step for event in read_log(run_dir / "training").Scalars("charts/accuracy")]
    assert steps == [11, 22, 33]


def test_a_seed_decides_the_weights_bit_for_bit(train):
    weights = {}
    for name, flags in {
        "a": ["--seed=0"],
        "again": ["--seed=0"],
        "other": ["--seed=1"],
    }.items():
        run_dir = train("--epochs=1", *flags)
        weights[name] = load_checkpoint(run_dir / "last.pt")["weights"]
        torch.rand(3)  # the generator's state between runs must not matter
    for key, value in weights["a"].items():
        assert torch.equal(value, weights["again"][key]), key
    assert not torch.equal(weights["a"]["classifier.weight"], weights["other"]["classifier.weight"])


def test_both_scripts_from_another_folder_with_no_paths_given(run, run_here, checkout):
    """As a newcomer runs them: default paths lie beside the scripts. A dry run is not evaluated."""
    result = run("train.py", "--dry-run", "--device=cpu")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no bar, no warning
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 or str(checkout) in line for line in lines)
    (run_dir,) = (checkout / "checkpoints").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-cnn-dry-run", run_dir.name)
    row = r"^ +1/1 +1,280( +[\d.]+ +[\d.]+%){2} +[\d,]+$"
    assert re.search(row, result.stdout, re.MULTILINE)
    assert lines[-1] == f"python evaluate.py --checkpoint {run_dir}/best.pt"
    assert lines[-2] == f"tensorboard --logdir {run_dir.parent}"
    assert load_checkpoint(run_dir / "best.pt")["epoch"] == 1

    one_line(run_here("evaluate.py"), 1, "run 'python train.py' first")
    earlier, newest = (run_dir.with_name(f"2020010{i}-000000-cnn") for i in (1, 2))
    for folder in (newest, earlier):
        shutil.copytree(run_dir, folder)
    result = run_here("evaluate.py", "--device=cpu")
    assert result.returncode == 0 and result.stderr == ""
    assert str(newest / "best.pt") in result.stdout
    last_line = result.stdout.splitlines()[-1]
    assert re.fullmatch(r"Test accuracy: \d+\.\d\d% \([\d,]+ of 10,000 wrong\)", last_line)
    assert not (earlier / "best-mistakes.png").exists()
    assert (newest / "best-mistakes.png").exists()


def test_each_run_has_a_folder_of_its_own(train, monkeypatch):
    clock = iter(["20260101-000000", "20260101-000000", "20260101-000001"])  # the same second
    monkeypatch.setattr(time, "strftime", lambda form: next(clock))
    folders = [train("--epochs=1").name for _ in "ab"]
    assert folders == ["20260101-000000-cnn", "20260101-000001-cnn"]


# Bad input: {file} is a file where a folder should be, {empty} an empty folder.

BAD_INPUT = [
    ("--model vgg", 2, "--model"),
    ("--epochs 0", 2, "--epochs: use a number from 1 to 10,000"),
    ("--epochs many", 2, "--epochs: invalid int value: 'many'"),
    ("--batch-size 0", 2, "--batch-size: use a number from 1"),
    ("--lr 0", 2, "--lr: use a number"),
    ("--lr nan", 2, "--lr: use a number"),
    ("--hard-share 2", 2, "--hard-share: use a number from 0 to 1"),
    ("--seed -1", 2, "--seed: use a number from 0"),
    ("--workers 257", 2, "--workers: use a number from 0 to 256"),
    ("--device cuda", 1, "--device cuda: there is none here; use auto"),
    ("--freeze-backbone", 2, "--model resnet18"),
    ("--data-dir {empty}", 1, "--data-dir"),
    ("--data-dir {file}", 1, "--data-dir"),
    ("--out-dir {file}", 1, "file"),
    ("--resume --out-dir {empty}", 1, "--resume: there is no run"),
    ("--resume nothing", 1, "nothing/last.pt"),
    ("--learning-rate 0.1", 2, "--learning-rate"),
]


@pytest.mark.parametrize("flags, status, part", BAD_INPUT)
def test_bad_input_gives_one_line_and_writes_nothing(
    run_here, small_data_dir, checkout, tmp_path, offline, flags, status, part
):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    left_out = ("MNIST", "raw")  # torchvision makes these folders before it tries to download

    def seen():
        found = contents(tmp_path) | dict.fromkeys(checkout.rglob("*"))
        return {path: content for path, content in found.items() if path.name not in left_out}

    before = seen()
    given = flags.format(file=tmp_path / "file", empty=tmp_path / "empty").split()
    defaults = [f"--data-dir={small_data_dir}", f"--out-dir={tmp_path / 'runs'}"]
    one_line(run_here("train.py", *defaults, *given), status, part)
    assert seen() == before


# Schedule, optimizer, models


@pytest.mark.parametrize("batch_size, steps", [(300, 4), (1_100, 1)])
def test_the_shortest_runs_train_at_a_rate_that_does_something(train, batch_size, steps):
    run_dir = train("--epochs=1", f"--batch-size={batch_size}")
    rates = [
        event.value for event in read_log(run_dir / "training").Scalars("charts/learning_rate")
    ]
    assert len(rates) == steps and rates[0] > 1e-4
    assert load_checkpoint(run_dir / "last.pt")["step"] == steps


@pytest.mark.parametrize("kind", ["full", "frozen"])
def test_fine_tuning_from_a_weights_file(train, tmp_path, monkeypatch, kind):
    """The file holds random numbers, but lies where torchvision's download would."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    weights = models.resnet18().state_dict()
    torch.save(weights, cache / Path(models.ResNet18_Weights.DEFAULT.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    flags = {"full": [], "frozen": ["--freeze-backbone"]}[kind]
    made, real = [], script.build_optimizer
    monkeypatch.setattr(
        script, "build_optimizer", lambda *args, **kw: made.append(real(*args, **kw)) or made[0]
    )
    run_dir = train("--model=resnet18", "--dry-run", "--batch-size=4", "--lr=0.002", *flags)
    last, groups = load_checkpoint(run_dir / "last.pt"), made[0][0].param_groups
    assert last["model"] == "resnet18"
    kept = torch.equal(last["weights"]["backbone.conv1.weight"], weights["conv1.weight"])
    assert kept == (kind == "frozen")
    peaks = [group["max_lr"] for group in groups]
    assert peaks == [0.002]
    seen = sum(len(group["params"]) for group in groups)
    assert seen == {"full": 62, "frozen": 2}[kind]
    assert build_model("resnet18", last["classes"]).load_state_dict(last["weights"])


def test_a_model_of_your_own_needs_only_forward(train, monkeypatch):
    own = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(784, 10))
    monkeypatch.setattr(script, "build_model", lambda *_: own)
    assert (
        load_checkpoint(train("--epochs=1") / "best.pt")["weights"].keys()
        == own.state_dict().keys()
    )


def test_no_validation_mistakes_at_all(train, monkeypatch):
    def know_all(model, dataset, device):
        labels = torch.stack([label for _, label in dataset])
        return 9.0 * nn.functional.one_hot(labels, dataset.classes), labels

    monkeypatch.setattr(script, "predict", know_all)
    run_dir = train("--epochs=1")
    assert load_checkpoint(run_dir / "best.pt")["accuracy"] == 1
    assert read_log(run_dir / "validation").Images("images/mistakes")


def test_best_pt_is_of_the_epoch_with_the_best_validation_accuracy(train, monkeypatch):
    shifts = iter([1, 0, 1])  # in the second of three epochs all is right, else nothing

    def predict(model, dataset, device):
        labels = torch.stack([label for _, label in dataset])
        said = (labels + next(shifts)) % dataset.classes
        return nn.functional.one_hot(said, dataset.classes).float(), labels

    monkeypatch.setattr(script, "predict", predict)
    run_dir = train()
    assert load_checkpoint(run_dir / "best.pt")["epoch"] == 2
    assert load_checkpoint(run_dir / "last.pt")["best"] == 1


@pytest.mark.parametrize(
    "model, size", [("cnn", 28), ("cnn", 32), pytest.param("resnet18", 32, marks=pytest.mark.slow)]
)
def test_26_classes_and_larger_images(train, tmp_path, model, size):
    rng = np.random.default_rng(0)
    write_mnist(tmp_path, rng.integers(0, 256, (240, size, size)), np.arange(240) % 26)
    flags = (f"--model={model}", "--no-pretrained", "--epochs=1", f"--data-dir={tmp_path}")
    if (model, size) == ("cnn", 32):
        with pytest.raises(InputError, match="32, 32"):
            train(*flags)
    else:
        assert load_checkpoint(train(*flags) / "best.pt")["classes"] == 26


# Resuming


class Stop(Exception):
    """What ends a run in the middle of an epoch, as if it had been killed."""


@pytest.fixture
def stopped_run(train, monkeypatch, tmp_path):
    """The folder of a run of 3 epochs that has come into its second."""

    def start(*flags):
        epochs, real = [], script.train_epoch
        logs, real_log = [], script.SummaryWriter

        def train_epoch(model, batches, *others):
            epochs.append(0)
            if len(epochs) == 2:
                next(iter(batches))
                raise Stop
            return real(model, batches, *others)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(script, "train_epoch", train_epoch)
            patch.setattr(
                script, "SummaryWriter", lambda *a, **b: logs.append(real_log(*a, **b)) or logs[-1]
            )
            train(*flags, name="stopped")
        for log in logs:
            log.close()  # as the end of a process does
        return max((tmp_path / "stopped").iterdir())

    return start


def same(a, b):
    """Whether two parts of checkpoints are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def read_log(folder):
    return EventAccumulator(str(folder)).Reload()


def assert_same_end(run_dir, other):
    """The same checkpoints, and logs of the same steps."""
    for name in ("best.pt", "last.pt"):
        a, b = load_checkpoint(run_dir / name), load_checkpoint(other / name)
        assert a.keys() == b.keys()
        for key in a:
            assert same(a[key], b[key]), (name, key)
    for part in ("training", "validation"):
        logs = [read_log(folder / part) for folder in (run_dir, other)]
        for tag in logs[1].Tags()["scalars"]:
            steps = [[event.step for event in log.Scalars(tag)] for log in logs]
            assert steps[0] == steps[1], (part, tag)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(train, stopped_run, workers):
    whole = train(f"--workers={workers}", name="whole")
    stopped = stopped_run(f"--workers={workers}")
    moved = stopped.rename(stopped.with_name("moved"))
    train("--resume", moved.name, name="stopped")
    assert_same_end(moved, whole)


def test_the_newest_run_that_is_not_finished_goes_on(train, stopped_run, tmp_path):
    older = stopped_run()
    newer = stopped_run()
    finished = train("--epochs=1", name="stopped")
    assert older < newer < finished
    for expected in (newer, older):
        assert train("--resume", name="stopped") == expected
        assert load_checkpoint(expected / "last.pt")["epoch"] == 3
    for which in ("--resume", f"--resume={finished}"):
        with pytest.raises(InputError, match="not finished"):
            train(which, name="stopped")


def test_what_a_run_computes_cannot_change_but_where_can(stopped_run, capsys):
    run_dir = stopped_run("--no-pretrained")
    args = parse_args([f"--resume={run_dir}", "--workers=1", "--device=cpu", "--lr=0.014"])
    assert (args.workers, args.epochs, args.batch_size, args.pretrained) == (1, 3, 64, False)
    for flag in ("--epochs=9", "--pretrained", "--seed=1"):
        with pytest.raises(SystemExit):
            parse_args([f"--resume={run_dir}", flag])
        assert "--resume: this run has" in capsys.readouterr().err


def test_settings_in_a_file_meet_the_same_checks_and_name_no_folders(stopped_run, tmp_path, capsys):
    run_dir = stopped_run()
    last = load_checkpoint(run_dir / "last.pt")
    *others, _, _, _ = last["settings"]
    folders = ["--data-dir=/stranger", "--out-dir=/stranger", "--resume=/stranger"]
    save_checkpoint(run_dir / "last.pt", last | {"settings": others + folders})
    args = parse_args([f"--resume={run_dir}", f"--data-dir={tmp_path}"])
    assert (args.resume, args.data_dir) == (run_dir, tmp_path)
    assert "stranger" not in str(args.out_dir)
    flags = [f if "workers" not in f else "--workers=300" for f in last["settings"]]
    save_checkpoint(run_dir / "last.pt", last | {"settings": flags})
    with pytest.raises(SystemExit):
        parse_args([f"--resume={run_dir}"])
    assert "from 0 to 256" in capsys.readouterr().err


def test_after_the_optimizer_was_changed_a_run_is_refused(train, stopped_run, monkeypatch):
    run_dir = stopped_run()

    def sgd(model, lr, total_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps)

    monkeypatch.setattr(script, "build_optimizer", sgd)
    with pytest.raises(InputError, match="optimizer"):
        train(f"--resume={run_dir}")


@pytest.mark.parametrize(
    "state", [torch.zeros(3), torch.zeros(()), torch.empty(16, 1, 5, 5, device="meta")]
)
def test_states_of_another_shape_are_refused(train, stopped_run, state):
    """A fused optimizer would write beyond their end."""
    run_dir = stopped_run()
    last = load_checkpoint(run_dir / "last.pt")
    last["optimizer"][0]["exp_avg"] = state
    save_checkpoint(run_dir / "last.pt", last)
    with pytest.raises(InputError, match="does not fit"):
        train(f"--resume={run_dir}")


def test_a_run_with_links_in_it_is_refused(stopped_run, tmp_path):
    """A stranger's folder could send the log anywhere."""
    run_dir = stopped_run()
    shutil.rmtree(run_dir / "training")
    (run_dir / "training").symlink_to(tmp_path)
    with pytest.raises(InputError, match="links"):
        parse_args([f"--resume={run_dir}"])


@pytest.mark.skipif(sys.platform == "win32", reason="open files can't be renamed there")
def test_the_clock_may_go_back_while_a_run_is_stopped(stopped_run, train):
    run_dir = stopped_run()
    for path in list(run_dir.rglob("events.out.tfevents.*")):  # .seconds, and more
        path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.9")))
    train(f"--resume={run_dir}")
    log = read_log(run_dir / "validation")
    assert len({event.step for event in log.Scalars("charts/accuracy")}) == 3


def test_a_run_on_other_data_is_refused(stopped_run, data_dir):
    """The schedule would end too early, or never."""
    args = parse_args([f"--resume={stopped_run()}", f"--data-dir={data_dir}"])
    with pytest.raises(InputError, match="data"):
        script.main(args)


# The log


def test_the_log_shows_what_the_readme_says(trained):
    training, validation = read_log(trained / "training"), read_log(trained / "validation")
    last = load_checkpoint(trained / "last.pt")
    steps = 35 + 9  # of 1,100 images, and of a quarter of them
    assert [event.step for event in training.Scalars("charts/loss")] == list(range(1, steps + 1))
    rates = [event.value for event in training.Scalars("charts/learning_rate")]
    assert rates[0] < max(rates) > rates[-1]
    for log, tags in (
        (training, ("charts/accuracy",)),
        (validation, ("charts/loss", "charts/accuracy")),
    ):
        for tag in tags:
            assert [event.step for event in log.Scalars(tag)] == [35, steps]
    assert validation.Scalars("charts/accuracy")[1].value == pytest.approx(last["accuracy"])
    histograms = set(training.Tags()["histograms"])
    for name, _ in build_model("cnn", last["classes"]).named_parameters():
        assert {f"weights/{name}", f"gradients/{name}"} <= histograms
    for log, tag in (
        (training, "images/augmented"),
        (training, "images/hardest"),
        (validation, "images/confusion"),
        (validation, "images/mistakes"),
    ):
        (*_, picture) = log.Images(tag)
        assert min(picture.width, picture.height) >= 100


def test_the_settings_and_results_are_on_the_hparams_page(trained):
    log = read_log(trained)
    data = log.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info.hparams
    assert settings["epochs"].number_value == 2 and settings["model"].string_value == "cnn"
    best = load_checkpoint(trained / "best.pt")["accuracy"]
    assert log.Scalars("final/best_accuracy")[0].value == pytest.approx(best)


# What goes wrong in real life, really caused: nothing is lost, and one line says what to do.


@pytest.fixture
def start(checkout, small_data_dir, tmp_path):
    """Start train.py in a process of its own; `before` is Python code to run first."""
    processes = []

    def start_training(*flags, before=""):
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(checkout)}
        environment["PYTHONWARNINGS"] = "ignore::UserWarning"  # of loaders, where there is one core
        code = f"import runpy, sys; sys.argv = sys.argv[1:]; {before}\n"
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        flags = (f"--data-dir={small_data_dir}", f"--out-dir={tmp_path / 'runs'}", *flags)
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                code,
                str(checkout / "train.py"),
                "--batch-size=64",
                "--device=cpu",
                *flags,
            ],
            cwd=tmp_path,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start_training
    for process in processes:
        with process:
            process.kill()


def wait_for(process, text):
    while text not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


def finish(process):
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(
    "number, status, workers",
    [("SIGINT", 130, 2), pytest.param("SIGTERM", 143, 0, marks=pytest.mark.slow)],
)
def test_a_signal_ends_a_run_and_one_line_says_how_to_go_on(
    start, small_data_dir, tmp_path, number, status, workers
):
    process = start("--epochs=10000", f"--workers={workers}", "--batch-size=4")
    wait_for(process, " 2/10000")
    time.sleep(0.7)  # for the loading processes to be there
    os.killpg(process.pid, getattr(signal, number))  # a terminal sends it to the whole group
    result = finish(process)
    assert result.returncode == status, result.stderr
    assert result.stderr.count("Stopped. Go on with: python ") == 1
    if workers == 0:  # in a worker that ends, Python itself may complain of a broken pipe
        assert result.stderr.count("\n") == 1
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(run_dir / "last.pt")["epoch"] >= 2
    how = f"train.py --resume {run_dir.relative_to(tmp_path)} --data-dir {small_data_dir}"
    assert how in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_ctrl_c_during_the_imports(checkout, script):
    command = [sys.executable, "-X", "importtime", checkout / script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "numpy" in line:  # torch has begun, too
                break
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -signal.SIGINT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "end, status, lines",
    [
        ("> /dev/full", 1, 1),
        pytest.param("| true", 1, 1, marks=pytest.mark.slow),
        pytest.param(">&-", 0, 0, marks=pytest.mark.slow),
        pytest.param("2>&-", 0, 0, marks=pytest.mark.slow),
    ],
)
def test_output_that_goes_nowhere(checkout, trained, small_data_dir, end, status, lines):
    flags = f"--checkpoint={trained}/best.pt --data-dir={small_data_dir}"
    command = f"set -o pipefail; {sys.executable} {checkout}/evaluate.py {flags} {end}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == status
    assert len(result.stderr.splitlines()) == lines, result.stderr


def test_a_run_s_folder_that_disappears(run_here, small_data_dir, tmp_path, monkeypatch):
    real = script.train_epoch

    def train_epoch(*args):
        for folder in (tmp_path / "runs").iterdir():
            shutil.rmtree(folder)
        return real(*args)

    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr("utils.run_script", lambda parse_args, main: run(parse_args, script.main))
    run = run_script
    flags = (f"--data-dir={small_data_dir}", f"--out-dir={tmp_path / 'runs'}")
    one_line(run_here("train.py", *flags), 1, "No such file or directory")


@pytest.mark.parametrize("images", [1, 2, 13])
def test_few_images(train, tmp_path, images):
    rng = np.random.default_rng(0)
    write_mnist(tmp_path, rng.integers(0, 256, (images, 28, 28)), np.arange(images) % 3)
    if images == 1:
        with pytest.raises(InputError, match="1 images"):
            train(f"--data-dir={tmp_path}")
    else:
        assert load_checkpoint(train(f"--data-dir={tmp_path}") / "last.pt")["epoch"] == 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.slow
@pytest.mark.parametrize("limit", [300_000, 600_000])
def test_a_full_disk_while_saving(start, train, stopped_run, tmp_path, limit):
    run_dir = stopped_run()
    before = contents(run_dir)
    sizes = [len(before[run_dir / name]) for name in ("best.pt", "last.pt")]
    assert 300_000 < sizes[0] < 600_000 < sizes[1]
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    result = finish(start(f"--resume={run_dir}", before=full))
    one_line(result, 1, "File too large", f"--resume {run_dir.relative_to(tmp_path)}")
    assert contents(run_dir)[run_dir / "last.pt"] == before[run_dir / "last.pt"]
    assert load_checkpoint(run_dir / "best.pt")["epoch"] in (1, 2)
    assert {path.name for path in run_dir.glob("*pt*")} == {"best.pt", "last.pt"}
    train(f"--resume={run_dir}")  # with room again, to the same end
    assert_same_end(run_dir, train(name="whole"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("limit", [pytest.param(50, marks=pytest.mark.slow), 50_000])
def test_a_full_disk_while_logging(start, tmp_path, limit):
    """tensorboardX writes in a thread of its own: the program must not wait for it for ever."""
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    one_line(finish(start("--epochs=3", before=full)), 1, "File too large")
    assert not list((tmp_path / "runs").glob("*/*.pt"))


def test_a_learning_rate_far_too_large(run_here, small_data_dir, tmp_path):
    flags = (f"--data-dir={small_data_dir}", f"--out-dir={tmp_path / 'runs'}", "--lr=1e9")
    one_line(run_here("train.py", *flags), 1, "smaller --lr")
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    "error", [RuntimeError("sizes"), ValueError("too many values"), KeyError(1)]
)
def test_a_bug_keeps_its_traceback(run_here, small_data_dir, monkeypatch, tmp_path, error):
    def fail(self, indices):
        raise error

    monkeypatch.setattr("dataset.MNISTDataset.__getitems__", fail)
    with pytest.raises(type(error)):
        run_here("train.py", f"--data-dir={small_data_dir}", f"--out-dir={tmp_path}")


SLOW_SAVING = """
import os, time, types, utils  # of utils alone: tensorboardX calls fsync too, and often
utils.os = types.SimpleNamespace(**vars(os))
utils.os.fsync = lambda file: (time.sleep(0.2), os.fsync(file))
"""


@pytest.mark.slow
def test_twenty_kills_in_the_middle_of_saving_then_the_same_end(start, train, tmp_path):
    """SIGKILL can't be handled: whatever is on the disk at that moment has to do."""
    epochs = "--epochs=4"
    process = start(epochs, before=SLOW_SAVING)
    wait_for(process, " 2/")
    (run_dir,) = (tmp_path / "runs").iterdir()
    for _ in range(20):
        while not (saving := list(run_dir.glob("last.pt.*"))):
            assert process.poll() is None, "it came to its end before it was killed"
            time.sleep(0.01)
        process.kill()
        process.wait()
        for path in (run_dir / "best.pt", run_dir / "last.pt"):
            load_checkpoint(path)  # it is whole
        saving[0].unlink(missing_ok=True)  # only to see the next
        process = start("--resume", before=SLOW_SAVING)
    assert finish(process).returncode == 0
    assert_same_end(run_dir, train(epochs, name="whole"))


@pytest.mark.slow
def test_without_a_compiler(run, small_data_dir, tmp_path):
    flags = ("--compile", "--dry-run", "--device=cpu", f"--data-dir={small_data_dir}")
    environment = {"PATH": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run("train.py", *flags, f"--out-dir={tmp_path}", **environment)
    one_line(result, 1, "C++ compiler")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU torch.compile needs a C++ compiler")
def test_a_compiled_model_learns_the_same(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    runs = [train("--epochs=2", flag) for flag in ("--no-compile", "--compile")]
    assert list((tmp_path / "cache").rglob("*.so"))
    eager, compiled = (load_checkpoint(run_dir / "last.pt") for run_dir in runs)
    assert eager["weights"].keys() == compiled["weights"].keys()
    losses = [read_log(run_dir / "validation").Scalars("charts/loss")[-1].value for run_dir in runs]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.slow
def test_the_default_run_gets_the_accuracy_that_the_readme_promises(default_run, data_dir):
    checkpoint = load_checkpoint(default_run / "best.pt")
    model = build_model(checkpoint["model"], checkpoint["classes"])
    model.load_state_dict(checkpoint["weights"])
    logits, labels = predict(model, MNISTDataset(data_dir, "test"), CPU)
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.995
