import hashlib
import os
import signal
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils.data import TensorDataset
from torchvision import datasets

from dataset import (
    MEAN,
    STD,
    MNISTDataset,
    make_loader,
    random_affine_maps,
    sampling_grid,
    split_indices,
)

SIZES = {"train": 55_000, "validation": 5_000, "test": 10_000}


@pytest.fixture(scope="module")
def sets(data_dir):
    return {split: MNISTDataset(data_dir, split) for split in SIZES}


@pytest.fixture(scope="module")
def plain_train(data_dir):
    """The training images without augmentation, in the same order."""
    dataset = MNISTDataset(data_dir, "train")
    dataset.augment = False
    return dataset


def ink(images):
    """Sum of all pixels of each image, 0 to 784: what is left when the normalisation is undone."""
    return (images * STD + MEAN).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("name, md5", datasets.MNIST.resources)
def test_committed_files_are_the_canonical_ones(name, md5):
    content = (ROOT / "data" / "MNIST" / "raw" / name).read_bytes()
    assert hashlib.md5(content).hexdigest() == md5


@pytest.mark.parametrize("split", SIZES)
def test_samples_have_the_documented_form(sets, split):
    dataset = sets[split]
    assert len(dataset) == SIZES[split]

    image, label = dataset[0]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32
    assert label.shape == () and label.dtype == torch.int64

    images, labels = dataset.__getitems__(list(range(2_000)))
    assert images.shape == (2_000, 1, 28, 28) and images.dtype == torch.float32
    assert labels.unique().tolist() == list(range(10))
    pixels = images * STD + MEAN
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    assert pixels.max() > 0.9


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_images_are_the_originals(sets, data_dir, split):
    original = datasets.MNIST(data_dir, train=split != "test", download=True)
    indices = range(10_000) if split == "test" else split_indices(original.targets)[1].tolist()
    for i in (0, 1, 2_345, -1):
        image, label = sets[split][i]
        assert label == original.targets[indices[i]]
        pixels = original.data[indices[i]].float() / 255
        torch.testing.assert_close(image[0] * STD + MEAN, pixels, atol=1e-6, rtol=0)


def test_mean_and_std_are_those_of_the_training_images(data_dir):
    pixels = datasets.MNIST(data_dir, train=True, download=True).data.double() / 255
    assert round(pixels.mean().item(), 4) == MEAN
    assert round(pixels.std().item(), 4) == STD


def test_split_is_disjoint_complete_and_stratified(data_dir):
    labels = datasets.MNIST(data_dir, train=True, download=True).targets
    train, validation = split_indices(labels)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(60_000))
    assert len(validation) == 5_000

    fair_share = labels.bincount() * len(validation) / len(labels)
    assert (labels[validation].bincount() - fair_share).abs().max() < 1

    torch.manual_seed(1)  # whatever the state of the global generator
    again = split_indices(labels)
    assert torch.equal(train, again[0]) and torch.equal(validation, again[1])


def test_only_training_images_are_augmented(sets, plain_train):
    for split in ("validation", "test"):
        before, _ = sets[split][7]
        sets[split].set_epoch(3)
        assert torch.equal(sets[split][7][0], before)

    indices = list(range(500))
    augmented, labels = sets["train"].__getitems__(indices)
    plain, plain_labels = plain_train.__getitems__(indices)
    assert torch.equal(labels, plain_labels)
    changed = (augmented != plain).flatten(1).any(dim=1)
    assert changed.all()


def test_augmentation_differs_between_images_epochs_and_seeds(data_dir):
    dataset = MNISTDataset(data_dir, "train", seed=0)
    dataset.images[:100] = dataset.images[0].clone()  # a hundred times the same image
    epoch_0, _ = dataset.__getitems__(list(range(100)))
    assert len(epoch_0.flatten(1).unique(dim=0)) == 100

    dataset.set_epoch(1)
    epoch_1, _ = dataset.__getitems__(list(range(100)))
    assert (epoch_0 != epoch_1).flatten(1).any(dim=1).all()

    dataset.set_epoch(0)
    assert torch.equal(dataset.__getitems__(list(range(100)))[0], epoch_0)

    dataset.seed = 1
    dataset.set_epoch(0)
    other_seed, _ = dataset.__getitems__(list(range(100)))
    assert (epoch_0 != other_seed).flatten(1).any(dim=1).all()


def test_augmentation_keeps_the_ink(sets, plain_train):
    indices = list(range(0, 55_000, 11))
    ratio = ink(sets["train"].__getitems__(indices)[0]) / ink(plain_train.__getitems__(indices)[0])
    # A scale of 1 ± 0.06 changes areas by its square: 0.88 to 1.12, and its inverse.
    assert ratio.min() > 0.85 and ratio.max() < 1.16
    assert abs(ratio.mean() - 1) < 0.03


def test_affine_maps_stay_near_the_identity():
    maps = random_affine_maps(10_000, np.random.default_rng(0))
    assert maps.shape == (10_000, 2, 3) and maps.dtype == torch.float32
    linear, shift = maps[:, :, :2], maps[:, :, 2]
    assert (linear - torch.eye(2)).abs().max() < 0.3
    assert 0.9 < shift.abs().max() * 14 <= 1
    torch.testing.assert_close(maps.mean(dim=0), torch.eye(2, 3), atol=0.01, rtol=0)


def test_sampling_grid_equals_torch_affine_grid():
    maps = random_affine_maps(50, np.random.default_rng(0))
    expected = F.affine_grid(maps, (50, 1, 28, 28), align_corners=False)
    torch.testing.assert_close(sampling_grid(maps), expected, atol=1e-6, rtol=0)


def test_an_image_is_the_same_one_by_one_and_in_any_batch(sets):
    dataset = sets["train"]
    indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[
        :300
    ].tolist()
    together, labels = dataset.__getitems__(indices)
    for position, index in enumerate(indices):
        image, label = dataset[index]
        assert torch.equal(image, together[position])
        assert label == labels[position]
    in_sevens = torch.cat([dataset.__getitems__(indices[i : i + 7])[0] for i in range(0, 300, 7)])
    assert torch.equal(in_sevens, together)


def test_a_shuffled_epoch_holds_each_image_once(sets):
    dataset = sets["validation"]
    torch.manual_seed(0)
    loader = make_loader(dataset, batch_size=128, shuffle=True)
    order_1 = torch.cat([labels for _, labels in loader])
    order_2 = torch.cat([labels for _, labels in loader])
    assert [len(labels) for _, labels in loader] == [128] * 39 + [8]
    assert not torch.equal(order_1, order_2)
    assert torch.equal(order_1.bincount(), dataset.labels.bincount())


def test_a_dataset_of_single_samples_is_batched_too():
    """What most people write has `__getitem__` alone."""
    images, labels = torch.randn(5, 1, 28, 28), torch.arange(5)
    batches = list(make_loader(TensorDataset(images, labels), batch_size=2))
    assert [len(x) for x, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([x for x, _ in batches]), images)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_give_the_same_batches(sets, start_method):
    """macOS and Windows start workers by spawn: data set and functions have to be picklable.

    Ctrl-C reaches the workers too, and must not stop them: the main process decides.
    """
    if start_method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this operating system does not {start_method} processes")
    dataset = sets["train"]
    dataset.set_epoch(2)
    alone = make_loader(dataset, batch_size=11_000)
    helped = make_loader(dataset, batch_size=11_000, workers=2)
    helped.multiprocessing_context = start_method
    for number, (batch, helped_batch) in enumerate(zip(alone, helped, strict=True)):
        for ours, theirs in zip(batch, helped_batch, strict=True):
            assert torch.equal(ours, theirs)
        if number > 0 and sys.platform != "win32":  # both workers have started: each gave a batch
            for worker in torch.multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)


def test_unknown_split_is_refused(data_dir):
    with pytest.raises(ValueError, match="'train', 'validation' or 'test'"):
        MNISTDataset(data_dir, "valid")


def test_missing_files_are_downloaded(tmp_path, monkeypatch):
    handler = partial(SimpleHTTPRequestHandler, directory=ROOT / "data" / "MNIST" / "raw")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as mirror:
        threading.Thread(target=mirror.serve_forever).start()
        address = f"http://127.0.0.1:{mirror.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
        assert len(MNISTDataset(tmp_path, "test")) == 10_000
        mirror.shutdown()


def test_missing_files_without_network_give_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    with pytest.raises(SystemExit) as stop:
        MNISTDataset(tmp_path, "test")
    message = str(stop.value)
    assert str(tmp_path) in message and "--data-dir" in message and "\n" not in message
