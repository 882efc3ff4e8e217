"""Resuming: a stopped run ends like any other, whatever model, optimizer and scheduler it uses."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_mnist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn, optim
from torch.optim import lr_scheduler

import train as script
from model import build_model
from train import parse_args
from utils import UserError, load_checkpoint, save_checkpoint


class Stop(Exception):
    """Ends a run in the middle of an epoch, as if it had been killed."""


@pytest.fixture
def stopped_run(train, monkeypatch):
    """Start a run of 3 epochs, stop it in the second one, and return its folder."""

    def start(*flags):
        real, epochs, logs, open_log = script.train_epoch, [], [], script.SummaryWriter

        def train_epoch(model, batches, *others):
            epochs.append(0)
            if len(epochs) == 2:
                next(iter(batches))
                raise Stop
            return real(model, batches, *others)

        def writer(*args, **options):
            logs.append(open_log(*args, **options))
            return logs[-1]

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(script, "train_epoch", train_epoch)
            patch.setattr(script, "SummaryWriter", writer)
            train(*flags, name="stopped")
        for log in logs:
            log.close()  # as the end of a process does
        run_dir = Path(logs[0].logdir).parent
        for path in run_dir.rglob("events.out.tfevents.*"):  # named after the second it began in;
            path.rename(str(path).replace("tfevents.", "tfevents.0"))  # we resume in the same one
        return run_dir

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


def assert_same_end(run_dir, other, parts=("training", "validation")):
    """The same checkpoints, and logs of the same steps."""
    for name in ("best.pt", "last.pt"):
        a, b = load_checkpoint(run_dir / name), load_checkpoint(other / name)
        assert a.keys() == b.keys()
        for key in a:
            assert same(a[key], b[key]), (name, key)
    for part in parts:
        logs = [EventAccumulator(str(folder / part)).Reload() for folder in (run_dir, other)]
        for tag in logs[1].Tags()["scalars"]:
            steps = [[event.step for event in log.Scalars(tag)] for log in logs]
            assert steps[0] == steps[1], (part, tag)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_resumed_run_equals_an_uninterrupted_one(train, stopped_run, workers):
    whole = train(f"--workers={workers}", name="whole")
    stopped = stopped_run(f"--workers={workers}")
    moved = stopped.rename(stopped.with_name("moved"))
    assert train("--resume", moved.name, name="stopped") == moved
    assert_same_end(moved, whole)


class Odd(nn.Module):
    """A model with the odd things in its state_dict that checkpoints once refused."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(784, 10))
        self.unused = nn.Linear(3, 3)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    def forward(self, images):
        return self.layers(images)


def adafactor(parameters):
    return optim.Adafactor(parameters, lr=0.01)


def amsgrad(parameters):
    return optim.AdamW(parameters, lr=0.001, amsgrad=True)


def momentum(parameters):
    return optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    "make_optimizer, make_scheduler, per_epoch",
    [
        (momentum, lambda o: lr_scheduler.ExponentialLR(o, 0.5), lambda s, loss: s.step()),
        (
            amsgrad,
            lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
            lambda s, loss: s.step(loss),
        ),
        pytest.param(
            adafactor,
            lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=20),
            None,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_model_optimizer_and_scheduler_can_be_resumed(
    train, stopped_run, monkeypatch, make_optimizer, make_scheduler, per_epoch
):
    """`per_epoch` steps the scheduler once per epoch instead of after each batch."""

    def build_optimizer(model, *args):
        optimizer = make_optimizer(model.parameters())
        return optimizer, make_scheduler(optimizer)

    def train_epoch(model, batches, loss_function, optimizer, scheduler, *others):
        every_step = argparse.Namespace(step=lambda: None) if per_epoch else scheduler
        losses, accuracy = real(model, batches, loss_function, optimizer, every_step, *others)
        if per_epoch:
            per_epoch(scheduler, losses.mean())
        return losses, accuracy

    real = script.train_epoch
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr(script, "build_optimizer", build_optimizer)
    monkeypatch.setattr(script, "build_model", lambda *_: Odd())
    whole, stopped = train(name="whole"), stopped_run()
    train(f"--resume={stopped}")
    assert_same_end(stopped, whole)


@pytest.mark.parametrize("value", [np.float64(0.5), nn.Linear(2, 2), {"deep": [np.arange(3)]}])
def test_what_cannot_be_loaded_again_is_named_before_anything_is_saved(tmp_path, value):
    with pytest.raises(TypeError, match="accuracy"):
        save_checkpoint(tmp_path / "best.pt", {"epoch": 1, "accuracy": value})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_many_classes_can_be_loaded(tmp_path):
    weights = build_model("cnn", 21_841).state_dict()
    save_checkpoint(tmp_path / "best.pt", {"classes": 21_841, "weights": weights})
    assert load_checkpoint(tmp_path / "best.pt")["classes"] == 21_841


# Which run


@pytest.mark.slow
def test_the_newest_readable_unfinished_run_is_resumed(train, stopped_run, capsys):
    older, newer = stopped_run(), stopped_run()
    finished = train("--epochs=1", name="stopped")
    damaged = finished.with_name("29990101-000000-cnn")
    damaged.mkdir()
    (damaged / "last.pt").write_bytes((finished / "last.pt").read_bytes()[:1000])
    assert older < newer < finished < damaged
    for expected in (newer, older):
        assert train("--resume", name="stopped") == expected
        assert damaged.name in capsys.readouterr().err
    with pytest.raises(UserError, match="no unfinished run"):
        train("--resume", name="stopped")
    for flags in ([], ["--epochs=9"]):
        with pytest.raises(UserError, match="finished"):
            train(f"--resume={finished}", *flags)


def test_a_run_is_named_by_its_folder_or_its_last_pt(train, stopped_run):
    run_dir = stopped_run()
    assert parse_args([f"--resume={run_dir}"]).resume == run_dir / "last.pt"
    with pytest.raises(UserError, match="last.pt"):
        parse_args([f"--resume={run_dir / 'best.pt'}"])
    assert train(f"--resume={run_dir / 'last.pt'}") == run_dir


# Settings


def test_a_resumed_run_may_move_but_not_change_its_settings(stopped_run, small_data_dir, tmp_path):
    run_dir = stopped_run("--no-pretrained")
    args = parse_args([f"--resume={run_dir}", "--workers=1", "--lr=0.014"])
    assert (args.workers, args.epochs, args.batch_size, args.pretrained) == (1, 3, 64, False)
    assert args.data_dir == small_data_dir
    assert parse_args([f"--resume={run_dir}", f"--data-dir={tmp_path}"]).data_dir == tmp_path
    for flag in ("--epochs=9", "--pretrained", "--seed=1", "--model=resnet18"):
        with pytest.raises(UserError, match=flag.partition("=")[0]):
            parse_args([f"--resume={run_dir}", flag])


def test_a_flag_added_after_a_run_began_gets_its_default(stopped_run, monkeypatch):
    run_dir = stopped_run()
    real = argparse.ArgumentParser.parse_args

    def parse(self, *args):
        if "--momentum" not in self._option_string_actions:
            self.add_argument("--momentum", type=float, default=0.9)
            self.add_argument("--sizes", nargs="+", type=int, default=[1, 2])
            self.add_argument("--fast", action="store_true")
            self.add_argument("--maybe")
        return real(self, *args)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    args = parse_args([f"--resume={run_dir}"])
    assert (args.momentum, args.sizes, args.fast, args.maybe) == (0.9, [1, 2], False, None)
    own = stopped_run("--sizes", 3, 4, "--fast")  # once given, they're kept like any other flag
    args = parse_args([f"--resume={own}"])
    assert (args.sizes, args.fast, args.maybe) == ([3, 4], True, None)


# What doesn't fit


def test_layers_that_swapped_places_are_refused(train, stopped_run, monkeypatch):
    """PyTorch would silently swap their optimizer states."""

    class Pair(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(784, 10))

        def forward(self, images):
            return self.a(images.flatten(1)) + self.b(images.flatten(1))

    monkeypatch.setattr(script, "build_model", lambda *_: Pair("ab"))
    run_dir = stopped_run()
    monkeypatch.setattr(script, "build_model", lambda *_: Pair("ba"))
    with pytest.raises(UserError, match="order"):
        train(f"--resume={run_dir}")


def test_a_layer_whose_size_changed_is_named(train, stopped_run, monkeypatch):
    run_dir = stopped_run()
    monkeypatch.setattr(script, "build_model", lambda *_: build_model("cnn", 11))
    with pytest.raises(UserError, match="classifier.weight"):
        train(f"--resume={run_dir}")


def test_different_data_is_refused(train, stopped_run, tmp_path):
    write_mnist(tmp_path / "other", np.zeros((500, 28, 28)), np.arange(500) % 10)
    with pytest.raises(UserError, match="images"):
        train(f"--resume={stopped_run()}", f"--data-dir={tmp_path / 'other'}")
