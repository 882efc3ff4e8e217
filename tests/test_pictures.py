"""What train.py logs for TensorBoard, read back by TensorBoard; and the pictures of evaluate.py."""

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray

from dataset import MNISTDataset
from evaluate import measure, reliability
from model import MODELS, build_model
from pictures import (
    confusion_figure,
    contact_sheet,
    log_start,
    mistakes_sheet,
    predictions_figure,
    reliability_figure,
)
from train import Config, main
from utils import load_checkpoint


@pytest.fixture(scope="module")
def run_dir(small_data_dir, tmp_path_factory):
    """The log of two epochs on few images."""
    folder = tmp_path_factory.mktemp("logged")
    main(Config(epochs=2, data_dir=small_data_dir, checkpoint_dir=folder, log_dir=folder / "runs"))
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def read(folder):
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()


def test_training_and_validation_share_charts(run_dir):
    """TensorBoard draws curves of the same tag in one chart, one for each folder."""
    training, validation = read(run_dir / "training"), read(run_dir / "validation")
    last = load_checkpoint(run_dir.parent.parent / "last.pt", MODELS)
    for name in ("loss", "accuracy"):
        for log in (training, validation):
            assert [event.step for event in log.Scalars(f"charts/{name}")] == [1, 2]
    accuracy = validation.Scalars("charts/accuracy")[-1].value
    assert accuracy == pytest.approx(last["validation_accuracy"])
    rates = [event.value for event in training.Scalars("pace/learning_rate")]
    assert 0.01 > rates[0] > 10 * rates[1]
    assert training.Scalars("pace/images_per_second")[0].value > 0


def test_each_epoch_shows_examples_weights_and_gradients(run_dir):
    log = read(run_dir)
    first, second = log.Images("examples/augmented")
    assert (first.step, second.step) == (1, 2)
    assert first.encoded_image_string != second.encoded_image_string  # other augmentations
    for kind in ("weights", "gradients"):
        tags = {tag for tag in log.Tags()["histograms"] if tag.startswith(kind)}
        assert tags == {f"{kind}/{name}" for name, _ in build_model("cnn").named_parameters()}
        for tag in tags:
            events = log.Histograms(tag)
            assert [event.step for event in events] == [1, 2]
            assert events[0].histogram_value.max > events[0].histogram_value.min


def test_the_run_describes_itself(run_dir):
    log = read(run_dir)
    assert b"block4" in log.Graph().SerializeToString()
    (text,) = log.Tensors("settings/text_summary")
    page = text.tensor_proto.string_val[0].decode()
    assert "| batch_size | 128 |" in page and "`python " in page


def test_runs_can_be_compared_on_the_hparams_page(run_dir):
    log = read(run_dir)
    content = log.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["epochs"].number_value == 2 and settings["model"].string_value == "cnn"
    best = load_checkpoint(run_dir.parent.parent / "best.pt", MODELS)
    (event,) = log.Scalars("final/best_accuracy")
    assert event.value == pytest.approx(best["validation_accuracy"])


def test_after_training_it_shows_how_each_class_does(run_dir, small_data_dir):
    log = read(run_dir)
    for digit in range(10):
        (event,) = log.Tensors(f"precision_recall/{digit}")
        counts = make_ndarray(event.tensor_proto)
        labels = MNISTDataset(small_data_dir, "validation").labels
        assert counts[0, 0] == (labels == digit).sum()  # at threshold 0 all of them are found
    assert log.Images("examples/confusion") and log.Images("examples/most_confident_mistakes")


def test_the_projector_has_features_labels_and_sprites(run_dir):
    (vectors,), (labels,), (sprite,) = (
        list(run_dir.rglob(name)) for name in ("tensors.tsv", "metadata.tsv", "sprite.png")
    )
    rows = vectors.read_text().splitlines()
    assert len(rows) == 100 == len(labels.read_text().splitlines())
    assert len(rows[0].split("\t")) == 384
    with Image.open(sprite) as image:
        assert image.size == (280, 280)  # 10 by 10 images
    assert "sprite.png" in (run_dir / "projector_config.pbtxt").read_text()


def test_reliability_equals_a_count_by_hand():
    # Two classes. Confidences 0.9, 0.9, 0.6, 0.6, 0.6; right: yes, yes, no, yes, no.
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6], [0.6, 0.4]])
    labels = torch.tensor([0, 1, 1, 1, 1])
    counts, confidence, accuracy, error = reliability(p.log(), labels, bins=4)
    assert counts.tolist() == [0, 0, 3, 2]
    assert confidence[2:].tolist() == pytest.approx([0.6, 0.9])
    assert accuracy[2:].tolist() == pytest.approx([1 / 3, 1])
    assert error == pytest.approx((3 * (0.6 - 1 / 3) + 2 * 0.1) / 5)


def test_a_certain_model_belongs_to_the_last_bin():
    counts, *_ = reliability(torch.tensor([[500.0, 0.0]]), torch.tensor([0]))
    assert counts[-1] == 1


def test_mistakes_are_shown_worst_first(small_data_dir):
    dataset = MNISTDataset(small_data_dir, "validation")
    logits = torch.zeros(len(dataset), 10)
    logits[torch.arange(len(dataset)), dataset.labels] = 5
    sure, unsure = 7, 3
    logits[sure, (dataset.labels[sure] + 1) % 10] = 9
    logits[unsure, (dataset.labels[unsure] + 1) % 10] = 6
    images, _ = dataset.__getitems__([sure, unsure])
    labels = dataset.labels.tolist()
    p = logits.softmax(dim=1).max(dim=1).values
    captions = [f"{labels[i]} as {(labels[i] + 1) % 10}, {p[i]:.0%}" for i in (sure, unsure)]
    sheet = mistakes_sheet(dataset, logits, at_most=10)
    assert np.array_equal(np.asarray(sheet), np.asarray(contact_sheet(images, captions)))
    first = mistakes_sheet(dataset, logits, at_most=1)
    expected = contact_sheet(images[:1], captions[:1])
    assert np.array_equal(np.asarray(first), np.asarray(expected))


def test_the_confusion_picture_says_how_often_each_digit_was_taken_for_each_other():
    confusion = torch.diag(torch.full((10,), 90))
    confusion[4, 9] = 7
    (axes,) = confusion_figure(confusion).axes
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[(9, 4)] == "7" and axes.get_xlabel() == "predicted digit"  # x, y
    assert len(texts) == 11 and "7 of 907 wrong" in axes.get_title()


def test_the_reliability_picture_has_confidence_across_and_accuracy_up():
    counts, confidence = torch.tensor([0, 5, 20]), torch.tensor([torch.nan, 0.5, 0.9])
    accuracy = torch.tensor([torch.nan, 0.4, 1.0])
    upper, lower = reliability_figure(counts, confidence, accuracy, ece=0.1).axes
    curve = {line.get_label(): line for line in upper.lines}["this model"]
    assert curve.get_xdata()[1:].tolist() == pytest.approx([0.5, 0.9])
    assert curve.get_ydata()[1:].tolist() == pytest.approx([0.4, 1.0])
    assert [bar.get_height() for bar in lower.patches] == [0, 5, 20]


def test_predictions_are_shown_with_the_likeliest_digit():
    probabilities = torch.tensor([[0.7, 0.1, 0.2], [0.0, 0.1, 0.9]])
    figure = predictions_figure(["a.png", "b.png"], torch.zeros(2, 1, 28, 28), probabilities)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["a.png", "0 (70.0%)", "b.png", "2 (90.0%)"]
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == pytest.approx([0.7, 0.1, 0.2])


def test_logging_does_not_change_the_model(tmp_path):
    model = build_model("cnn").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    log_start(tmp_path, {}, model, torch.randn(1, 1, 28, 28))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_evaluate_saves_pictures_beside_the_checkpoint(run_here, run_dir, small_data_dir, tmp_path):
    checkpoint = tmp_path / "some.pt"
    checkpoint.write_bytes((run_dir.parent.parent / "best.pt").read_bytes())
    flags = ("--checkpoint", checkpoint, "--data-dir", small_data_dir)
    result = run_here("evaluate.py", *flags)
    assert result.returncode == 0 and result.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {
        *("some.pt", "confusion.png", "mistakes.png", "reliability.png")
    }
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.width >= 700

    (tmp_path / "confusion.png").unlink()
    (tmp_path / "confusion.png").mkdir()  # a picture that can't be written
    result = run_here("evaluate.py", *flags)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "confusion.png" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("Test accuracy: ")  # all the same


def test_an_empty_bin_or_no_mistake_draws_too():
    labels = torch.arange(10)
    logits = torch.eye(10) * 20
    *bins, error = reliability(logits, labels)
    reliability_figure(*bins, error).canvas.draw()
    confusion_figure(measure(logits, labels).confusion).canvas.draw()
    assert contact_sheet(torch.zeros(0, 1, 28, 28), []).height > 50
