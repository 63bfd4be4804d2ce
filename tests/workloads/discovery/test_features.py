"""Features of images of any size: padding, dilation, the same whatever else is in the batch; and the boxes that need none."""

import numpy as np
import pytest
import torch
import torchvision

from workloads.data.views.resampling import crop_boxes
from workloads.discovery.baselines import (
    ClsAttentionConfig,
    FelzenszwalbConfig,
    best_region,
    centre_box,
    cls_attention,
    felzenszwalb_box,
    random_box,
    whole_image,
)
from workloads.discovery.components import FeaturesError
from workloads.discovery.features import PatchExtractor, cells_to_pixels, same_size_groups
from workloads.models.backbone import BackboneConfig, Trunk, imagenet_normalized
from workloads.models.dilation import dilated
from workloads.models.vit import VitConfig, VitTrunk
from workloads.types import ImageBatch


def batch_of(*sizes: tuple[int, int], valid: tuple[bool, ...] | None = None) -> ImageBatch:
    content = torch.tensor(sizes)
    rng = torch.Generator().manual_seed(0)
    images = torch.zeros((len(sizes), 3, *content.amax(0).tolist()), dtype=torch.uint8)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = torch.randint(0, 256, (3, h, w), generator=rng, dtype=torch.uint8)
    counted = torch.tensor(valid or (True,) * len(sizes))
    return ImageBatch.of(images, content_hw=content, source_hw=content * 2, valid=counted)


@pytest.mark.parametrize(("name", "stride"), [("resnet18", 8), ("resnet18", 16), ("resnet50", 8)])
def test_dilation_refines_the_same_map(name: str, stride: int) -> None:
    torch.manual_seed(0)
    trunk = Trunk(BackboneConfig(name=name)).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = trunk(images)["C5"]
        fine = dilated(trunk, stride)(images)["C5"]
        assert fine.shape[-2:] == (64 // stride, 96 // stride)
        torch.testing.assert_close(fine[..., :: 32 // stride, :: 32 // stride], before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(trunk(images)["C5"], before)  # the trunk itself is as it was
        if name == "resnet50":
            peer = torchvision.models.resnet50(replace_stride_with_dilation=[False, stride == 8, True]).eval()
            peer.load_state_dict(
                {**trunk.body.state_dict(), **{k: v for k, v in peer.state_dict().items() if "fc" in k}}
            )
            whole = torch.nn.Sequential(*list(peer.children())[:-2])(images)
            torch.testing.assert_close(fine, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_an_image_is_seen_as_if_alone(kind: str) -> None:
    torch.manual_seed(0)
    trunk = VitTrunk(VitConfig(depth=2)) if kind == "vit" else Trunk(BackboneConfig())
    extractor = PatchExtractor(trunk).eval()
    together = batch_of((40, 64), (64, 40), (48, 60), (20, 20), valid=(True, True, True, False))
    seen = {}
    with torch.no_grad():
        for group in same_size_groups(together, extractor.cell):
            assert group.images.shape[-2] % 16 == group.images.shape[-1] % 16 == 0
            for row, features in zip(group.rows.tolist(), extractor(group.images).features, strict=True):
                seen[row] = features
        assert sorted(seen) == [0, 1, 2]
        for row, (h, w) in enumerate([(40, 64), (64, 40), (48, 60)]):
            # The slow way: normalise, then pad with zeros, one image at a time.
            image = imagenet_normalized(together.images[row : row + 1, :, :h, :w].float() / 255)
            padded = torch.zeros(1, 3, -(-h // 16) * 16, -(-w // 16) * 16)
            padded[..., :h, :w] = image
            torch.testing.assert_close(seen[row], extractor(padded).features[0], atol=1e-4, rtol=1e-4)


def test_boxes_are_clipped_to_the_image_and_scaled_to_its_source() -> None:
    boxes = torch.tensor([[0, 1, 4, 3], [1, 0, 2, 2]])
    content, source = torch.tensor([[40, 60], [40, 60]]), torch.tensor([[80, 90], [40, 60]])
    assert cells_to_pixels(boxes, 16, content, source).tolist() == [[0, 32, 90, 80], [16, 0, 32, 32]]


def test_cls_attention_keeps_the_mass_and_its_largest_component() -> None:
    weights = torch.tensor([[[0.30, 0.05, 0.25], [0.04, 0.02, 0.24]], [[0.1, 0.1, 0.1], [0.1, 0.5, 0.1]]]).flatten(1)
    attention = torch.stack([weights[0], weights[1]])[None]  # one image, two heads
    first = cls_attention(attention, (2, 3), ClsAttentionConfig(head=0, mass=0.65))
    assert first.boxes_xyxy.tolist() == [[2, 0, 3, 2]]  # .30 alone, .25 and .24 together
    assert cls_attention(attention, (2, 3), ClsAttentionConfig(head=1, mass=0.3)).boxes_xyxy.tolist() == [[1, 1, 2, 2]]
    assert cls_attention(attention, (2, 3)).seeds.tolist() == [4]
    with pytest.raises(FeaturesError, match="no head 2"):
        cls_attention(attention, (2, 3), ClsAttentionConfig(head=2))


def test_boxes_without_a_trunk() -> None:
    size = torch.tensor([[40, 60], [100, 30]])
    assert whole_image(size).tolist() == [[0, 0, 60, 40], [0, 0, 30, 100]]
    assert centre_box(size, 0.5).tolist() == [[15, 10, 45, 30], [7.5, 25, 22.5, 75]]
    drawn = random_box(("a", "b"), size, seed=1)
    assert torch.equal(drawn[1:], random_box(("b",), size[1:], seed=1)) and not torch.equal(
        drawn, random_box(("a", "b"), size, seed=2)
    )
    assert (drawn[:, :2] < drawn[:, 2:]).all() and (drawn[:, 2:] <= size.flip(1)).all()


def test_the_best_region_touches_the_fewest_sides() -> None:
    regions = np.zeros((10, 20), dtype=int)  # 0: the ground, on four sides
    regions[0:3, 5:15] = 1  # larger, on one side
    regions[5:8, 5:9] = 2  # smaller, on none
    regions[9, 19] = 3  # too small
    assert best_region(regions, 8).tolist() == [5 / 20, 5 / 10, 9 / 20, 8 / 10]
    assert best_region(np.zeros((4, 4), dtype=int), 2).tolist() == [0, 0, 1, 1]


def test_felzenszwalb_finds_a_square() -> None:
    pytest.importorskip("skimage")
    image = np.full((3, 100, 200), 30, dtype=np.uint8)
    image[:, 30:70, 60:140] = 220
    found = felzenszwalb_box(image, FelzenszwalbConfig()) * np.array([200, 100, 200, 100])
    np.testing.assert_allclose(found, [60, 30, 140, 70], atol=4)


def test_crops_are_what_pillow_makes_of_them() -> None:
    from PIL import Image

    batch = batch_of((60, 80))
    crop = crop_boxes(batch.images, torch.tensor([[10.0, 20.0, 70.0, 52.0]]), 24)
    pixels = Image.fromarray(batch.images[0].permute(1, 2, 0).numpy()).crop((10, 20, 70, 52))
    expected = torch.from_numpy(np.array(pixels.resize((24, 24), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    torch.testing.assert_close(crop[0], expected, atol=2 / 255, rtol=0)
