"""The small network that the shipped experiments train."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three convolutions with max-pooling, two linear layers: minutes to train on a laptop.

    Parameters
    ----------
    in_channels : int
        Channels of the images.
    n_classes : int
        Number of outputs.
    width : int
        Channels of the first convolution; the others have twice as many.
    """

    def __init__(self, in_channels: int, n_classes: int, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(4),
        )
        self.classifier = nn.Sequential(
            nn.Linear(2 * width * 16, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, n_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, n_classes) for images (N, C, H, W) of any size from 16."""
        return self.classifier(torch.flatten(self.features(x), 1))
