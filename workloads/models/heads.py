"""Contains `Projector`, the head that maps a trunk's features to the embedding whose cosine similarities are compared."""

from torch import Tensor, nn

from workloads.models.backbone import Norm, vector_norm


class Projector(nn.Module):
    """Linear–norm–ReLU–Linear.

    Args:
        norm: of the hidden vectors; None: LayerNorm, which is defined for a batch of one and independent of other images.
        bias: whether the last layer has one.
    """

    def __init__(
        self, channels: int, hidden: int, out_channels: int, *, norm: Norm | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden),
            vector_norm(norm or "group", hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out_channels, bias=bias),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(N, C) to (N, out_channels)."""
        return self.layers(features)
