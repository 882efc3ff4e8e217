"""Two classifiers of grey 28×28 images: a small CNN from scratch, and torchvision's ResNet-18.

A model is an nn.Module: its layers are members, made once in `__init__`; `forward` says how data
flows through them. PyTorch finds the weights through the members, and the gradients by recording
what `forward` does.
"""

import pickle
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

MODELS = ("cnn", "resnet18")
IMAGE_SHAPE = (1, 28, 28)  # channels, height, width
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # how dataset.py normalises images

WEIGHTS = models.ResNet18_Weights.DEFAULT
RESNET_SIZE = 56  # pixels; see "Fine-tuning" in the README for what other sizes cost and bring


class CNN(nn.Module):
    """Four convolutions and a linear layer.

    A convolution without padding gives up a border of pixels, which is what makes this network
    quick: MNIST's border is empty.

    Args:
        classes: how many kinds of image to tell apart.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.block1 = conv_block(1, 24, kernel_size=5, pool=True)
        self.block2 = conv_block(24, 48)
        self.block3 = conv_block(48, 64, pool=True)
        self.block4 = conv_block(64, 96)
        self.classifier = nn.Linear(96 * 2 * 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) float32, normalised, to logits (N, classes).

        Raises:
            ValueError: if the images have another shape.
        """
        return self.classifier(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the last layer decides upon, (N, 384)."""
        check_shape(images)
        x = self.block1(images)  # (N, 24, 12, 12)
        x = self.block2(x)  # (N, 48, 10, 10)
        x = self.block3(x)  # (N, 64, 4, 4)
        x = self.block4(x)  # (N, 96, 2, 2)
        return x.flatten(start_dim=1)  # (N, 384)


def conv_block(
    channels_in: int, channels_out: int, kernel_size: int = 3, pool: bool = False
) -> nn.Sequential:
    """Convolution, 2×2 max pooling where asked for, batch norm, ReLU.

    Pooling usually comes last, and batch norm and ReLU then work on four times as many values. With
    the same statistics and a positive scale both orders give the same: the largest value stays the
    largest. (In training the statistics differ: here they are those of the pooled values.)
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size, bias=False),  # the norm has a bias
        nn.MaxPool2d(2) if pool else nn.Identity(),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class ResNet18(nn.Module):
    """torchvision's ResNet-18, to be fine-tuned.

    The backbone is everything but the last layer. It turns an image into 512 features, and learnt
    which ones from ImageNet's 1.2 million photographs: edges, curves, textures, parts. That
    knowledge is what we borrow. The head turns features into classes; ours are digits, so it is
    new and starts from random weights.

    Another of torchvision's models takes three changes: WEIGHTS above, `models.resnet18`, and its
    last layer, `fc` here. In DenseNet that is `classifier`, in Swin `head`; in VGG, MobileNet,
    EfficientNet and ConvNeXt it is the last part of a Sequential, `classifier[-1]`.

    Args:
        classes: how many kinds of image to tell apart.
        pretrained: start the backbone from WEIGHTS; else from random weights.
        freeze_backbone: train the head alone.

    Raises:
        SystemExit: with one line of advice, where the weights can't be had.
    """

    def __init__(self, classes: int = 10, pretrained: bool = False, freeze_backbone: bool = False):
        super().__init__()
        self.freeze_backbone = freeze_backbone
        self.backbone = models.resnet18()
        if pretrained:
            load_imagenet_weights(self.backbone)
        self.head = nn.Linear(self.backbone.fc.in_features, classes)
        self.backbone.fc = nn.Identity()  # was: 512 features to ImageNet's 1,000 classes

        # Autograd records only what leads to a parameter that wants a gradient: with none in the
        # backbone there is no graph to keep, and the backward pass ends at the head.
        self.backbone.requires_grad_(not freeze_backbone)

        # The backbone expects colours as it saw them in training. Buffers are tensors that move to
        # the device with the model, but are not trained; these are not saved either.
        preset = WEIGHTS.transforms()
        self.register_buffer("mean", torch.tensor(preset.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1), persistent=False)

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
        """Images (N, 1, 28, 28) float32, normalised, to logits (N, classes).

        Raises:
            ValueError: if the images have another shape.
        """
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the head decides upon, (N, 512)."""
        check_shape(images)
        x = images * MNIST_STD + MNIST_MEAN  # undo dataset.py's normalisation: 0 to 1 again
        x = F.interpolate(x, size=RESNET_SIZE, mode="bilinear")  # (N, 1, 56, 56)
        x = (x - self.mean) / self.std  # (N, 3, 56, 56): a grey value for each of three channels
        return self.backbone(x)  # (N, 512)


def load_imagenet_weights(backbone: nn.Module) -> None:
    """Load WEIGHTS from torch's cache; they are downloaded (45 MB) if they are not there.

    Raises:
        SystemExit: with one line of advice, where that fails.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS.url).name)
    try:
        backbone.load_state_dict(WEIGHTS.get_state_dict(check_hash=True, weights_only=True))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, TypeError) as error:
        if cached.is_file():
            sys.exit(f"{cached} does not hold ResNet-18 weights: delete it, to download it again")
        reason = " ".join(str(error).split())
        sys.exit(
            f"Cannot download {cached.name} ({reason}). Get {WEIGHTS.url} on another machine and "
            f"put it in {cached.parent}, or use --model cnn, or --no-pretrained (random weights)"
        )


def parameter_groups(model: nn.Module, lr: float, pretrained: bool) -> list[dict]:
    """What the optimizer trains, and how fast: parameter groups as torch.optim takes them.

    A pretrained backbone is nearly right. It takes small steps, or it would forget what it knows
    while the head is still random; the head has everything to learn and takes large ones.
    """
    if isinstance(model, ResNet18) and (pretrained or model.freeze_backbone):
        head = {"params": list(model.head.parameters()), "lr": lr}
        backbone = {"params": list(model.backbone.parameters()), "lr": lr / 10}
        return [head] if model.freeze_backbone else [backbone, head]
    return [{"params": list(model.parameters()), "lr": lr}]


def build_model(name: str, classes: int = 10, **resnet_options: bool) -> nn.Module:
    """A new model: `name` is one of MODELS, `resnet_options` are those of ResNet18.

    Raises:
        ValueError: if there is no model of that name.
    """
    if name == "cnn":
        return CNN(classes)
    if name == "resnet18":
        return ResNet18(classes, **resnet_options)
    raise ValueError(f"there is no model {name!r}: use 'cnn' or 'resnet18'")


def check_shape(images: Tensor) -> None:
    """Say it clearly when the input can't be right: a layer's own message would not."""
    if images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(
            f"images have shape {tuple(images.shape)}: expected (N, 1, 28, 28), that is a batch, "
            "one grey channel, height, width"
        )
