"""Changes the colours of two views (`change_colours`): jitter, grey, blur, solarisation (arXiv 2006.07733, appendix B)."""

import torch
from torch import Tensor

from workloads.config import config
from workloads.data.views.crops import JitterConfig, Share, grey, jitter_colours
from workloads.errors import ConfigError

DRAWS = 10
"""Number of draws from [0, 1) for one view."""


@config
class PhotometricConfig:
    """Colour changes of two views; a pair of shares is for the first and the second view."""

    jitter: JitterConfig = JitterConfig(share=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.0)
    """Colour jitter; its own `grey` acts on jittered views only, the one below on all views."""
    grey: Share = 0.2
    """Share of the views that become grey."""
    blur: tuple[Share, Share] = (1.0, 0.1)
    """Shares of the views to which a Gaussian blur is applied."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and largest standard deviation of the Gaussian, pixels at a view size of 224; scaled with the view size."""
    solarise: tuple[Share, Share] = (0.0, 0.2)
    """Shares of the views whose pixels above one half are inverted."""

    def __post_init__(self) -> None:
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ConfigError(f"views.colours.blur_sigma: expected 0 < least <= largest, given {list(self.blur_sigma)}")


def change_colours(views: Tensor, draws: Tensor, settings: PhotometricConfig) -> Tensor:
    """Jitter, then grey, then blur, then solarisation.

    Args:
        views: float32 (B, 2, 3, h, w) in [0, 1].
        draws: float32 (B, 2, DRAWS) in [0, 1).
    """
    b, _, _, size, _ = views.shape
    views = jitter_colours(views, draws[..., :6], settings.jitter)
    views = torch.where(_chosen(draws[..., 6] < settings.grey), grey(views), views)
    low, high = settings.blur_sigma
    sigma = (low + (high - low) * draws[..., 8]) * (size / 224)
    blurred = _first_and_second(draws[..., 7], settings.blur)
    radius = max(1, round(size / 20))
    views = blur(views.flatten(0, 1), sigma.masked_fill(~blurred, 1e-3).flatten(), radius).unflatten(0, (b, 2))
    solarised = _first_and_second(draws[..., 9], settings.solarise)
    return torch.where(_chosen(solarised) & (views >= 0.5), 1.0 - views, views)


def _first_and_second(draws: Tensor, shares: tuple[float, float]) -> Tensor:
    """bool (B, 2): which draws (B, 2) are below their view's share."""
    # View by view: a tensor of the two shares would be copied to the device, which the host waits for.
    return torch.stack([draws[:, view] < share for view, share in enumerate(shares)], dim=1)


def _chosen(views: Tensor) -> Tensor:
    return views[..., None, None, None]


def blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur of (N, C, h, w), reflected at the borders, each image with its own `sigma` (N,), pixels.

    Two products with a band matrix for each image, because convolutions with a kernel for each image are slow on a CPU.
    """
    n, channels, height, width = images.shape
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    taps = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    taps = taps / taps.sum(1, keepdim=True)
    rows, columns = _bands(taps, radius, height), _bands(taps, radius, width)
    tall = torch.bmm(rows, images.transpose(1, 2).reshape(n, height, channels * width))
    out = torch.bmm(tall.reshape(n, height * channels, width), columns.transpose(1, 2))
    return out.reshape(n, height, channels, width).transpose(1, 2)


def _bands(taps: Tensor, radius: int, length: int) -> Tensor:
    """(N, length, length): the matrix that applies `taps` (N, 2·radius + 1) along one axis."""
    places = torch.arange(length, device=taps.device)
    near = places[:, None] + torch.arange(-radius, radius + 1, device=taps.device)
    period = max(2 * (length - 1), 1)
    near = near.remainder(period)
    near = torch.where(near >= length, period - near, near)
    matrix = taps.new_zeros(taps.shape[0], length, length)
    return matrix.scatter_add_(2, near.expand(taps.shape[0], -1, -1), taps[:, None].expand(-1, length, -1))
