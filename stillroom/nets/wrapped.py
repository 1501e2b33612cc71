"""Other libraries' image networks, and parts of our own, behind one call: images (B, C, H, W) in [0, 1] to logits or features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from stillroom.nets.parts import Normalise


class Wrapped(nn.Module):
    """Another library's classifier, made to take images (B, C, H, W) in [0, 1] of any size and to give logits.

    It repeats a grey image over the model's channels, resizes (bilinear, antialiased) to `size` and normalises by `mean` and `std`.
    """

    def __init__(self, model: nn.Module, size: int | None, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model, self.size, self.normalise = model, size, Normalise(mean, std)

    def prepare(self, images: Tensor) -> Tensor:
        """The pixels as the model wants them."""
        channels = len(self.normalise.mean)
        if images.shape[1] == 1 < channels:
            images = images.expand(-1, channels, -1, -1)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return self.normalise(images)

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(self.prepare(images))
        return output if isinstance(output, Tensor) else output.logits


class Encoder(nn.Module):
    """The features of a classifier that has `features(images)`, as a network of their own: images (B, C, H, W) in [0, 1] to (B, d)."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net.features(images)


class Backbone(Wrapped):
    """Another library's image encoder, made to take images (B, C, H, W) in [0, 1] of any size and to give features (B, d): the class
    token of a transformer, the average over positions of a convolutional network."""

    def forward(self, images: Tensor) -> Tensor:
        last = self.model(self.prepare(images)).last_hidden_state
        return last[:, 0] if last.ndim == 3 else last.mean((2, 3))
