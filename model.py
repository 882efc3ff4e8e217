"""Two image classifiers: a small CNN built from scratch, and one built on a pretrained ResNet-18.

A model is an nn.Module. Its layers are attributes, created once in `__init__`, and `forward` says
how data flows through them. When you assign a layer to an attribute, PyTorch registers it. So
`model.parameters()` finds every weight by itself, and that's what we hand to the optimizer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError


class CNN(nn.Module):
    """A convolutional neural network for MNIST: four convolutions and a linear layer.

    Args:
        classes: the number of classes to tell apart.
    """

    def __init__(self, classes: int):
        super().__init__()
        # The mean and standard deviation of all pixels in MNIST's training set. A buffer goes
        # wherever the model goes (to the GPU, into a checkpoint), but it isn't trained.
        self.register_buffer("mean", torch.tensor(0.1307))
        self.register_buffer("std", torch.tensor(0.3081))
        self.block1 = conv_block(1, 16, kernel_size=5, pool=True)
        self.block2 = conv_block(16, 32)
        self.block3 = conv_block(32, 64, pool=True)
        self.block4 = conv_block(64, 128)
        self.classifier = nn.Linear(128 * 2 * 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (N, 1, 28, 28) float32, from 0 to 1, into logits (N, classes).

        N is the number of images in the batch; then come channels, height and width. A logit is a
        score: the higher it is, the more the network believes in that class.
        """
        if images.shape[1:] != (1, 28, 28):
            raise UserError(
                f"This CNN takes 1×28×28 images, not {'×'.join(map(str, images.shape[1:]))}"
            )
        x = (images - self.mean) / self.std  # mean 0, standard deviation 1
        x = self.block1(x)  # (N, 16, 12, 12)
        x = self.block2(x)  # (N, 32, 10, 10)
        x = self.block3(x)  # (N, 64, 4, 4)
        x = self.block4(x)  # (N, 128, 2, 2)
        return self.classifier(x.flatten(start_dim=1))  # (N, 512), then (N, classes)


def conv_block(channels_in: int, channels_out: int, kernel_size=3, pool=False) -> nn.Sequential:
    """Three layers, or four with `pool`: (N, channels_in, H, W) to (N, channels_out, H', W').

    A channel is an image of one feature. The input has a single channel of grey values;
    channels in later layers show how much each place looks like a stroke, a corner or a loop.
    Here's what each layer contributes:

    - A *convolution* slides a small window of weights over the image. At each place it computes a
      weighted sum over all input channels, which becomes one pixel of a new channel. We don't pad
      the images, because MNIST's have an empty border anyway. The result has H - kernel_size + 1
      rows.
    - *Max pooling* keeps the largest value in every 2×2 block. That halves the height and
      the width, and makes the exact position of a feature matter less.
    - *Batch norm* normalises each channel to mean 0 and variance 1, over every position in every
      image in the batch, and then applies a scale and a shift that are learnt. With it,
      training tolerates a larger learning rate.
    - *ReLU* is max(x, 0). Without a kink like that, all the layers together could do no more
      than one, because a weighted sum of weighted sums is just another weighted sum.
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size, bias=False),  # batch norm has a bias
        nn.MaxPool2d(2) if pool else nn.Identity(),  # pooling early leaves less work for the rest
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class ResNet18(nn.Module):
    """torchvision's ResNet-18, ready for transfer learning.

    The *backbone*, which is everything but the last layer, turns an image into 512 features. From
    ImageNet's 1.2 million photographs it learnt which features tell things apart, and that's the
    knowledge we borrow. The *head* turns features into classes. Our classes are different, so
    the head is new and starts out random.

    Args:
        classes: the number of classes to tell apart.
        pretrained: start the backbone from weights trained on ImageNet, not from random ones.
        freeze_backbone: train the head alone.
        size: images are scaled to this height and width in pixels. docs/fine-tuning.md says what
            you gain and lose with other sizes.
    """

    def __init__(self, classes: int, pretrained=False, freeze_backbone=False, size=56):
        super().__init__()
        from torchvision import models  # takes a second, and the CNN doesn't need it

        self.size = size
        self.freeze_backbone = freeze_backbone
        self.backbone = models.resnet18()
        if pretrained:
            load_imagenet_weights(self.backbone)
        self.head = nn.Linear(self.backbone.fc.in_features, classes)
        self.backbone.fc = nn.Identity()  # drop the layer that chose among ImageNet's 1,000 classes

        # Frozen weights need no gradients. So autograd doesn't record a frozen backbone at all, and
        # the backward pass ends at the head.
        self.backbone.requires_grad_(not freeze_backbone)

        # The backbone expects colours normalised with ImageNet's mean and standard deviation.
        preset = models.ResNet18_Weights.DEFAULT.transforms()
        self.register_buffer("mean", torch.tensor(preset.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preset.std).view(3, 1, 1))

    def train(self, mode: bool = True) -> "ResNet18":
        """Switch to training mode or, with `False`, to evaluation mode.

        A frozen backbone always stays in evaluation mode. Its batch norm layers keep running
        averages, which aren't weights: in training mode they'd drift towards our images.
        """
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Turn images (N, 1 or 3, H, W) float32, from 0 to 1, into logits (N, classes)."""
        x = F.interpolate(images, size=self.size, mode="bilinear")  # (N, 1, 56, 56)
        x = (x - self.mean) / self.std  # (N, 3, 56, 56): a grey image now has three channels
        return self.head(self.backbone(x))  # (N, 512) features, then (N, classes)


def load_imagenet_weights(backbone: nn.Module) -> None:
    """Load the ImageNet weights from torch's cache, or download them (45 MB) into it first.

    Raises UserError if neither works.
    """
    from torchvision.models import ResNet18_Weights

    weights = ResNet18_Weights.DEFAULT
    try:
        backbone.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
    except Exception as error:  # broken connections and files make torch raise many kinds of error
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise UserError(
            f"Can't load ResNet-18's pretrained weights ({str(error).partition(chr(10))[0]}). "
            f"Download {weights.url} into {folder} yourself, or use --no-pretrained"
        ) from error


def build_model(name: str, classes: int, pretrained=False, freeze_backbone=False) -> nn.Module:
    """Create a model by name, "cnn" or "resnet18". The last two arguments are for ResNet18."""
    if name == "cnn":
        return CNN(classes)
    if name == "resnet18":
        return ResNet18(classes, pretrained, freeze_backbone)
    raise UserError(f"There is no model called {name!r}; use 'cnn' or 'resnet18'")
