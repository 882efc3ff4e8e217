"""Two classifiers of images: a small CNN from scratch, and torchvision's ResNet-18.

A model is an nn.Module: its layers are members, made once in `__init__`; `forward` says how data
flows through them. Through the members PyTorch finds the weights, each an nn.Parameter, a tensor
that wants a gradient: `model.parameters()` lists them, and that is what the optimizer is given.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from utils import InputError

WEIGHTS = models.ResNet18_Weights.DEFAULT
RESNET_SIZE = 56  # pixels; see docs/fine-tuning.md for what other sizes cost and bring


class CNN(nn.Module):
    """Four convolutions and a linear layer, for MNIST's grey 28×28 images of some `classes`."""

    def __init__(self, classes: int):
        super().__init__()
        # Mean and standard deviation of all pixels that MNIST has for training. A buffer is part of
        # the model as a weight is, is moved and saved with it, but not trained.
        self.register_buffer("mean", torch.tensor(0.1307))
        self.register_buffer("std", torch.tensor(0.3081))
        self.block1 = conv_block(1, 16, kernel_size=5, pool=True)
        self.block2 = conv_block(16, 32)
        self.block3 = conv_block(32, 64, pool=True)
        self.block4 = conv_block(64, 128)
        # A linear layer gives each class a score: a weighted sum of all 512 numbers, plus a bias.
        self.classifier = nn.Linear(128 * 2 * 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) float32, from 0 to 1, to logits (N, classes): unscaled scores."""
        if images.shape[1:] != (1, 28, 28):
            raise InputError(f"images are {tuple(images.shape)}: this CNN takes (N, 1, 28, 28)")
        x = (images - self.mean) / self.std  # around 0, as layers like their input
        x = self.block1(x)  # (N, 16, 12, 12)
        x = self.block2(x)  # (N, 32, 10, 10)
        x = self.block3(x)  # (N, 64, 4, 4)
        x = self.block4(x)  # (N, 128, 2, 2)
        return self.classifier(x.flatten(start_dim=1))  # (N, 512) to (N, classes)


def conv_block(channels_in: int, channels_out: int, kernel_size=3, pool=False) -> nn.Sequential:
    """From (N, channels_in, H, W) to (N, channels_out, H', W').

    A channel is an image of one feature: of grey values at first, later of how much each place
    looks like a stroke, a corner, a loop. What the layers compute:

    - Convolution: a small window of weights, one for each channel in, slides over the image; the
      weighted sum at a place is a pixel of a channel out. Unpadded, H' is H - kernel_size + 1:
      MNIST's border is empty, and the less there is to compute the better.
    - Pooling keeps the largest of each 2×2 pixels: H and W are halved, and where exactly a feature
      was matters less.
    - Batch norm gives each channel mean 0 and variance 1 over the batch (in evaluation: by running
      averages), then a trained scale and bias. Training bears a larger learning rate with it.
    - ReLU, max(x, 0), is what makes several layers more than one: a sum of sums is but a sum.
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size, bias=False),  # batch norm has a bias
        nn.MaxPool2d(2) if pool else nn.Identity(),  # usually last; here it saves the rest work
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class ResNet18(nn.Module):
    """torchvision's ResNet-18, to be fine-tuned.

    The backbone, all but the last layer, turns an image into 512 features, and learnt which from
    ImageNet's 1.2 million photographs: edges, curves, textures, parts. That knowledge is what we
    borrow. The head turns features into classes; ours are others, so it starts at random.

    Args:
        classes: how many kinds of image to tell apart.
        pretrained: start the backbone from WEIGHTS; else from random weights.
        freeze_backbone: train the head alone.
        size: pixels of a side, to which images are scaled.
    """

    def __init__(self, classes: int, pretrained=False, freeze_backbone=False, size=RESNET_SIZE):
        super().__init__()
        self.size = size
        self.freeze_backbone = freeze_backbone
        self.backbone = models.resnet18()
        if pretrained:
            load_imagenet_weights(self.backbone)
        self.head = nn.Linear(self.backbone.fc.in_features, classes)
        self.backbone.fc = nn.Identity()  # was: 512 features to ImageNet's 1,000 classes

        # Autograd records only what leads to a parameter that wants a gradient: with none in the
        # backbone there is no graph to keep, and the backward pass ends at the head.
        self.backbone.requires_grad_(not freeze_backbone)

        preset = WEIGHTS.transforms()  # the backbone wants colours as it saw them in training
        self.register_buffer("mean", torch.tensor(preset.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1))

    def train(self, mode: bool = True) -> "ResNet18":
        """Switch to training mode, or with False to evaluation mode.

        A frozen backbone stays in evaluation mode. Otherwise its batch norm layers would go on
        replacing their running averages, which belong to its weights, by those of our images.
        """
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1 or 3, H, W) float32, from 0 to 1, to logits (N, classes)."""
        x = F.interpolate(images, size=self.size, mode="bilinear")  # (N, 1, 56, 56)
        x = (x - self.mean) / self.std  # (N, 3, 56, 56): a grey value for each of three channels
        return self.head(self.backbone(x))  # (N, 512) features, then (N, classes)


def load_imagenet_weights(backbone: nn.Module) -> None:
    """Load WEIGHTS from torch's cache, after a download (45 MB) if need be; else InputError."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS.url).name)
    try:
        backbone.load_state_dict(WEIGHTS.get_state_dict(check_hash=True, weights_only=True))
    except Exception as error:  # whatever a network, or a damaged file, makes torch raise
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{cached} can be neither read nor downloaded ({reason}). Put {WEIGHTS.url} there "
            "yourself, or use --no-pretrained"
        ) from error


def build_model(name: str, classes: int, pretrained=False, freeze_backbone=False) -> nn.Module:
    """A new model, "cnn" or "resnet18"; the last two arguments are for ResNet18."""
    if name == "cnn":
        return CNN(classes)
    if name == "resnet18":
        return ResNet18(classes, pretrained, freeze_backbone)
    raise InputError(f"there is no model {name!r}: use 'cnn' or 'resnet18'")
