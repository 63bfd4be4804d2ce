"""Heads that map a trunk's features to the embedding in which similarity is measured."""

from torch import Tensor, nn


class Projector(nn.Module):
    """Linear–norm–ReLU–Linear."""

    def __init__(self, channels: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        # LayerNorm: a projector on a batch of one crop is defined, and no statistics leak between workers.
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out_channels)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(N, C) to (N, out_channels)."""
        return self.layers(features)
