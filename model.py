"""Two classifiers of grey 28×28 images: a small CNN from scratch, and torchvision's ResNet-18.

A model is an nn.Module: its layers are members, made once in `__init__`; `forward` says how data
flows through them. PyTorch finds the weights through the members, and the gradients by recording
what `forward` does.
"""

from torch import Tensor, nn
from torchvision import models

MODELS = ("cnn", "resnet18")
IMAGE_SHAPE = (1, 28, 28)  # channels, height, width


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
        check_shape(images)
        x = self.block1(images)  # (N, 24, 12, 12)
        x = self.block2(x)  # (N, 48, 10, 10)
        x = self.block3(x)  # (N, 64, 4, 4)
        x = self.block4(x)  # (N, 96, 2, 2)
        return self.classifier(x.flatten(start_dim=1))  # (N, classes)


def conv_block(
    channels_in: int, channels_out: int, kernel_size: int = 3, pool: bool = False
) -> nn.Sequential:
    """Convolution, 2×2 max pooling where asked for, batch norm, ReLU.

    Pooling usually comes last. Batch norm and ReLU then work on four times as many values, to the
    same effect wherever the norm's scale is positive: the largest value stays the largest.
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size, bias=False),  # the norm has a bias
        nn.MaxPool2d(2) if pool else nn.Identity(),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class ResNet18(nn.Module):
    """torchvision's ResNet-18: a backbone that sees, and a new head that decides.

    Args:
        classes: how many kinds of image to tell apart.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.backbone = models.resnet18()
        self.head = nn.Linear(self.backbone.fc.in_features, classes)
        self.backbone.fc = nn.Identity()  # was: 512 features to ImageNet's 1,000 classes

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) float32, normalised, to logits (N, classes).

        Raises:
            ValueError: if the images have another shape.
        """
        check_shape(images)
        x = images.expand(-1, 3, -1, -1)  # (N, 3, 28, 28): the backbone expects red, green, blue
        x = self.backbone(x)  # (N, 512)
        return self.head(x)  # (N, classes)


def build_model(name: str, classes: int = 10) -> nn.Module:
    """A new model with random weights.

    Args:
        name: "cnn" or "resnet18".
        classes: how many kinds of image to tell apart.

    Raises:
        ValueError: if there is no model of that name.
    """
    if name == "cnn":
        return CNN(classes)
    if name == "resnet18":
        return ResNet18(classes)
    raise ValueError(f"there is no model {name!r}: use 'cnn' or 'resnet18'")


def check_shape(images: Tensor) -> None:
    """Say it clearly when the input can't be right: a layer's own message would not."""
    if images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(
            f"images have shape {tuple(images.shape)}: expected (N, 1, 28, 28), that is a batch, "
            "one grey channel, height, width"
        )
