"""The data: samples, split, augmentation, loading, and files that are damaged or missing."""

import gzip
import hashlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, contents, write_mnist
from torch.utils.data import DataLoader, Subset, default_collate
from torchvision import datasets

from dataset import MNISTDataset, random_affine
from utils import UserError

SIZES = {"train": 55_000, "validation": 5_000, "test": 10_000}


@pytest.fixture(scope="module")
def sets(data_dir):
    return {split: MNISTDataset(data_dir, split) for split in SIZES}


@pytest.mark.parametrize("name, md5", datasets.MNIST.resources)
def test_committed_files_are_the_canonical_ones(name, md5):
    content = (ROOT / "data" / "MNIST" / "raw" / name).read_bytes()
    assert hashlib.md5(content).hexdigest() == md5


@pytest.mark.parametrize("split", SIZES)
def test_samples_have_the_documented_form(sets, split):
    dataset = sets[split]
    assert len(dataset) == SIZES[split] and dataset.classes == 10
    image, label = dataset[-1]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32
    assert label.shape == () and label.dtype == torch.int64
    images, labels = default_collate(dataset.__getitems__(range(2_000)))
    assert labels.unique().tolist() == list(range(10))
    assert images.min() == 0 and 0.9 < images.max() <= 1.001


def test_images_and_test_labels_match_torchvisions(sets, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")  # torchvision unpacks next to the .gz files
    test, train = (datasets.MNIST(tmp_path / "data", train, download=True) for train in (0, 1))
    assert torch.equal(sets["test"].images[:, 0], test.data)
    assert torch.equal(sets["test"].labels, test.targets)
    ours = torch.cat([sets[split].images.flatten(1) for split in ("train", "validation")])
    checksum = torch.arange(784) ** 2 + 1  # identifies an image, so none can be lost or used twice
    ours, theirs = ((x * checksum).sum(dim=1).sort().values for x in (ours, train.data.flatten(1)))
    assert torch.equal(ours, theirs)
    torch.manual_seed(1)  # the split doesn't depend on the global generator
    assert torch.equal(MNISTDataset(data_dir, "train").images, sets["train"].images)


def test_only_training_images_are_augmented_and_differently_each_time(sets):
    for split in ("validation", "test"):
        assert torch.equal(sets[split][7][0], sets[split].images[7] / 255)
    first, second = (
        torch.stack([x for x, _ in sets["train"].__getitems__([3] * 100)]) for _ in "ab"
    )
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 200


def test_augmentation_moves_images_a_little_and_keeps_their_ink(sets):
    torch.manual_seed(0)
    images = sets["test"].images[:2_000] / 255
    augmented = random_affine(images)
    assert augmented.shape == images.shape and augmented.dtype == torch.float32
    ratio = augmented.sum(dim=(1, 2, 3)) / images.sum(dim=(1, 2, 3))
    assert 0.8 < ratio.min() < ratio.max() < 1.25 and abs(ratio.mean() - 1) < 0.03

    def centre(images):
        x = (images.sum(dim=(1, 2)) * torch.arange(28)).sum(dim=1)
        return x / images.sum(dim=(1, 2, 3))

    shift = centre(augmented) - centre(images)
    assert 0.5 < shift.abs().max() < 4 and abs(shift.mean()) < 0.1


def test_the_dataset_works_with_a_loader_a_subset_and_workers(sets):
    """The first thing you'd try after copying the project."""
    images, labels = next(iter(DataLoader(sets["train"], batch_size=128, shuffle=True)))
    assert images.shape == (128, 1, 28, 28) and labels.shape == (128,)
    subset = Subset(sets["test"], range(10, 20))
    for workers in (0, 1):
        images, labels = next(iter(DataLoader(subset, batch_size=10, num_workers=workers)))
        assert torch.equal(images, sets["test"].images[10:20] / 255)
        assert torch.equal(labels, sets["test"].labels[10:20])


# Files


def copy_packed(small_data_dir, folder):
    """The small data set, as .gz files directly in a folder."""
    folder.mkdir(parents=True)
    for path in small_data_dir.rglob("*-ubyte"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder


def test_compressed_and_plain_files_hold_the_same_data_and_stay_untouched(small_data_dir, tmp_path):
    folder = copy_packed(small_data_dir, tmp_path / "mine")
    before = contents(tmp_path, small_data_dir)
    packed, unpacked = (MNISTDataset(path, "train") for path in (folder, small_data_dir))
    assert torch.equal(packed.images, unpacked.images)
    assert torch.equal(packed.labels, unpacked.labels)
    assert contents(tmp_path, small_data_dir) == before


WAYS_TO_DAMAGE = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:10_000]),
    "empty": lambda path: path.write_bytes(b""),
    "a web page": lambda path: path.write_bytes(gzip.compress(b"<html>404</html>")),
    "too short": lambda path: path.write_bytes(
        gzip.compress(gzip.decompress(path.read_bytes())[:999])
    ),
    "a header alone": lambda path: path.write_bytes(gzip.compress(bytes([0, 0, 8]))),
}


@pytest.mark.parametrize("damage", WAYS_TO_DAMAGE)
def test_a_damaged_file_is_named_and_never_replaced(small_data_dir, tmp_path, damage):
    folder = copy_packed(small_data_dir, tmp_path / "MNIST" / "raw")
    WAYS_TO_DAMAGE[damage](folder / "train-images-idx3-ubyte.gz")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz") as error:
        MNISTDataset(tmp_path, "train")
    assert "\n" not in str(error.value) and contents(tmp_path) == before
    MNISTDataset(tmp_path, "test")  # which needs two other files


def test_mismatched_labels_and_a_single_class_are_refused(tmp_path):
    images = np.zeros((20, 28, 28))
    write_mnist(tmp_path / "fewer", images, np.arange(20) % 3)
    write_mnist(tmp_path / "other", images[:12], np.arange(12) % 3)
    name = "MNIST/raw/train-labels-idx1-ubyte"
    shutil.copy(tmp_path / "other" / name, tmp_path / "fewer" / name)
    with pytest.raises(UserError, match="don't match"):
        MNISTDataset(tmp_path / "fewer", "train")
    write_mnist(tmp_path / "same", images, np.full(20, 7))
    with pytest.raises(UserError, match="all the same"):
        MNISTDataset(tmp_path / "same", "train")


def test_a_mistyped_folder_leaves_nothing_behind_offline(tmp_path, offline):
    with pytest.raises(UserError, match="--data-dir") as error:
        MNISTDataset(tmp_path / "dta", "train")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_first_runs_started_together_all_get_whole_files(data_dir, tmp_path, monkeypatch):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=data_dir / "MNIST" / "raw")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(4) as pool:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirrors = ["http://127.0.0.1:9/", f"http://127.0.0.1:{server.server_port}/"]
        monkeypatch.setattr(datasets.MNIST, "mirrors", mirrors)
        sets = list(pool.map(lambda _: MNISTDataset(tmp_path / "new", "test"), range(3)))
        server.shutdown()
    assert all(torch.equal(s.images, sets[0].images) and len(s) == 10_000 for s in sets)
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


def test_an_unknown_split_raises_value_error():
    with pytest.raises(ValueError, match="validation"):
        MNISTDataset("data", "val")
