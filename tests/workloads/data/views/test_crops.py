"""Views: the resampling equals torchvision's, boxes are where the pixels are, and draws depend on nothing but their key."""

import pytest
import torch
import torchvision.transforms.v2.functional as F

from workloads.config import build
from workloads.data.views.counter_random import stream, text_keys, uniform
from workloads.data.views.crops import JitterConfig, ViewsConfig, jitter_colours, make_views
from workloads.data.views.resampling import axis_weights, resample
from workloads.errors import ConfigError
from workloads.types import ImageBatch

NO_JITTER = JitterConfig(share=0.0)


def batch_of(images: torch.Tensor, content_hw=None, positions=None, epoch: int = 0) -> ImageBatch:
    known = {} if content_hw is None else {"content_hw": torch.as_tensor(content_hw)}
    known |= {} if positions is None else {"positions": positions}
    return ImageBatch.of(images, image_ids=tuple(f"image-{i}" for i in range(len(images))), epoch=epoch, **known)


@pytest.mark.parametrize("box", [(0, 0, 96, 64), (10, 5, 50, 61), (40, 30, 44, 33), (0, 0, 33, 33)])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_one_resampling_equals_crop_then_antialiased_resize(box, size):
    x0, y0, x1, y1 = box
    image = torch.rand(1, 3, 64, 96)
    expected = F.resize(image[:, :, y0:y1, x0:x1], [size, size], antialias=True)
    number = lambda *v: torch.tensor([[float(a) for a in v]])  # noqa: E731
    for flip_x in (False, True):
        rows = axis_weights(number(y0), number(y1 - y0), torch.tensor([[False]]), 64, size)
        columns = axis_weights(number(x0), number(x1 - x0), torch.tensor([[flip_x]]), 96, size)
        got = resample(image, rows, columns)[:, 0]
        torch.testing.assert_close(got, expected.flip(-1) if flip_x else expected, atol=1e-5, rtol=1e-4)


def test_full_view_equals_torchvision_on_the_content_of_the_canvas():
    images = torch.zeros(2, 3, 80, 80, dtype=torch.uint8)
    images[0, :, :60, :80] = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    images[1, :, :80, :33] = torch.randint(0, 256, (3, 80, 33), dtype=torch.uint8)
    settings = ViewsConfig(full_size=64, horizontal_flip=0.0, vertical_flip=0.0, jitter=NO_JITTER)
    views = make_views(batch_of(images, [[60, 80], [80, 33]]), settings, seed=0)
    for i, (h, w) in enumerate([(60, 80), (80, 33)]):
        expected = F.resize(images[i, :, :h, :w].float() / 255, [64, 64], antialias=True)
        torch.testing.assert_close(views.full[i], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flips", [0.0, 1.0, 0.5])
def test_boxes_are_where_the_pixels_are_after_all_flips(flips):
    """Each pixel of the image says where it is; a crop's mean colour must be the coordinate of its box's centre."""
    height, width, size = 192, 256, 128
    ramp_x = torch.linspace(0.5 / width, 1 - 0.5 / width, width).expand(height, width)
    ramp_y = torch.linspace(0.5 / height, 1 - 0.5 / height, height)[:, None].expand(height, width)
    image = (torch.stack([ramp_x, ramp_y, torch.zeros(height, width)]) * 255).round().to(torch.uint8)
    settings = ViewsConfig(
        full_size=size, crops_per_image=8, horizontal_flip=flips, vertical_flip=flips, jitter=NO_JITTER
    )
    views = make_views(batch_of(image.expand(6, -1, -1, -1)), settings, seed=3)
    center = views.geometry.center_xy / size
    mean = views.crops[:, :, :2].mean((-2, -1))
    full_flips = views.geometry.full_flips[:, None].expand_as(center)
    torch.testing.assert_close(mean, torch.where(full_flips, 1 - center, center), atol=6e-3, rtol=0)
    box = views.geometry.box_xyxy
    sides = (box[..., 2:] - box[..., :2]) * torch.tensor([width, height]) / size / max(height, width)
    assert (sides >= 0.0999).all() and (sides <= 0.2501).all()
    # The full view's own ramp is mirrored where it says so.
    rising = views.full[:, 0, 64, 100] > views.full[:, 0, 64, 20]
    assert torch.equal(rising, ~views.geometry.full_flips[:, 0])
    if flips == 0.5:
        assert views.geometry.crop_flips.float().mean() not in (0.0, 1.0)
        assert (views.geometry.crop_flips != full_flips).any()  # drawn independently


def test_crops_mirror_as_they_say():
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, :, :, :] = torch.arange(64, dtype=torch.uint8) * 4
    settings = ViewsConfig(full_size=64, crops_per_image=16, vertical_flip=0.0, jitter=NO_JITTER)
    views = make_views(batch_of(image), settings, seed=1)
    falling = views.crops[0, :, 0, 0, 0] > views.crops[0, :, 0, 0, -1]
    assert torch.equal(falling, views.geometry.crop_flips[0, :, 0])


def test_a_crop_holds_nothing_from_outside_its_box():
    image = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    settings = ViewsConfig(full_size=64, crops_per_image=32, crop_scale=(0.1, 0.1), jitter=NO_JITTER)
    views = make_views(batch_of(image), settings, seed=1)
    torch.testing.assert_close(views.crops, torch.ones_like(views.crops), atol=1e-5, rtol=0)


def test_padded_crops_keep_their_aspect_ratio():
    image = torch.full((1, 3, 200, 200), 255, dtype=torch.uint8)
    settings = ViewsConfig(crops_per_image=16, crop_size=40, crop_fit="pad", jitter=NO_JITTER)
    views = make_views(batch_of(image), settings, seed=1)
    box = views.geometry.box_xyxy[0]
    sides = box[:, 2:] - box[:, :2]
    filled = (views.crops[0, :, 0] > 0.5).float()
    width, height = filled.amax(1).sum(-1), filled.amax(2).sum(-1)
    torch.testing.assert_close(torch.maximum(width, height), torch.full((16,), 40.0), atol=1, rtol=0)
    torch.testing.assert_close(width / height, sides[:, 0] / sides[:, 1], atol=0.12, rtol=0)


def test_same_image_same_views_in_any_share_of_the_batch():
    images = torch.randint(0, 256, (6, 3, 48, 64), dtype=torch.uint8)
    settings = ViewsConfig(full_size=64, crop_size=32)
    whole = make_views(batch_of(images, positions=torch.arange(10, 16), epoch=2), settings, seed=5)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        views = make_views(batch_of(images[part], positions=torch.arange(10, 16)[part], epoch=2), settings, seed=5)
        assert torch.equal(views.geometry.box_xyxy, whole.geometry.box_xyxy[part])
        torch.testing.assert_close(views.crops, whole.crops[part], atol=1e-6, rtol=0)
    other = make_views(batch_of(images, positions=torch.arange(10, 16), epoch=3), settings, seed=5)
    assert not torch.equal(other.geometry.box_xyxy, whole.geometry.box_xyxy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_views_on_the_gpu():
    images = torch.randint(0, 256, (4, 3, 48, 64), dtype=torch.uint8)
    cpu = make_views(batch_of(images), ViewsConfig(), seed=5)
    gpu = make_views(batch_of(images).to("cuda"), ViewsConfig(), seed=5)
    assert torch.equal(cpu.geometry.box_xyxy, gpu.geometry.box_xyxy.cpu())
    torch.testing.assert_close(cpu.crops, gpu.crops.cpu(), atol=1e-3, rtol=0)


def test_uniform_is_uniform_and_streams_are_independent():
    keys = torch.arange(20_000)
    a, b = uniform(stream(0, "a"), keys, 2), uniform(stream(0, "b"), keys, 2)
    for draws in (a, b):
        assert draws.min() >= 0
        assert draws.max() < 1
        assert abs(float(draws.mean()) - 0.5) < 0.01 and abs(float(draws.var()) - 1 / 12) < 0.002
    table = torch.stack([a[:, 0], a[:, 1], b[:, 0], a[:, 0].roll(1)])
    assert (torch.corrcoef(table) - torch.eye(4)).abs().max() < 0.03
    assert len(set(text_keys(tuple(str(i) for i in range(1000))).tolist())) == 1000


def test_jitter_matches_torchvision_factor_by_factor():
    crops = torch.rand(1, 1, 3, 16, 16)
    for slot, (name, function) in enumerate(
        [("brightness", F.adjust_brightness), ("contrast", F.adjust_contrast), ("saturation", F.adjust_saturation)], 1
    ):
        strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, name: 0.4}
        draws = torch.full((1, 1, 6), 0.5)
        draws[..., 0], draws[..., slot], draws[..., 5] = 0.0, 0.9, 0.99
        got = jitter_colours(crops, draws, JitterConfig(share=1.0, grey=0.2, **strengths))
        factor = 1 + 0.8 * 0.4
        torch.testing.assert_close(got[0], function(crops[0], factor), atol=2e-3, rtol=0)
    draws[..., 5] = 0.1
    grey = jitter_colours(crops, draws, JitterConfig(share=1.0, brightness=0.0, contrast=0.0, saturation=0.0))
    torch.testing.assert_close(grey[0], F.rgb_to_grayscale(crops[0], 3), atol=2e-3, rtol=0)
    hue = jitter_colours(
        crops, draws * 0 + 0.75, JitterConfig(share=1.0, brightness=0, contrast=0, saturation=0, hue=0.1)
    )
    assert (hue - crops).abs().max() > 0.01
    draws[..., 0] = 0.6
    assert torch.equal(jitter_colours(crops, draws, JitterConfig(share=0.5)), crops)


def test_impossible_scale_is_refused():
    with pytest.raises(ConfigError, match=r"views\.crop_scale"):
        build(ViewsConfig, {"crop_scale": [0.3, 0.2]})
