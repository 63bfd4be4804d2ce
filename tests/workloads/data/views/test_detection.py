"""A detector's views: pixels as Pillow resizes them, boxes where their pixels went, rows that do not count left out."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.workloads.data.images import picture
from workloads.config import build
from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.manifest import open_dataset
from workloads.data.store.objects import Objects, read_objects, read_panoptic
from workloads.data.views.detection import (
    DetectionViews,
    DetectionViewsConfig,
    LabelledObjects,
    make_detection_views,
    size_in_view,
)
from workloads.data.views.normalization import IMAGENET_MEAN, IMAGENET_STD
from workloads.errors import ConfigError
from workloads.types import ImageBatch

SETTINGS = DetectionViewsConfig(short_side=48, long_side=96)


def batch_of(*images: np.ndarray, valid: tuple[bool, ...] | None = None) -> ImageBatch:
    sizes = [image.shape[:2] for image in images]
    canvas = torch.zeros((len(images), 3, max(h for h, _ in sizes), max(w for _, w in sizes)), dtype=torch.uint8)
    for i, image in enumerate(images):
        canvas[i, :, : image.shape[0], : image.shape[1]] = torch.from_numpy(image.copy()).permute(2, 0, 1)
    names = tuple(f"i{i}" for i in range(len(images)))
    counted = torch.tensor(valid or (True,) * len(images))
    return ImageBatch.of(canvas, content_hw=torch.tensor(sizes), image_ids=names, valid=counted)


def views_of(batch: ImageBatch, settings: DetectionViewsConfig = SETTINGS, **more: object) -> DetectionViews:
    return make_detection_views(batch, settings, device=torch.device("cpu"), **more)


def pixels_of(views: DetectionViews) -> torch.Tensor:
    """Images in [0, 1] again; what lies beyond them is the mean."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return views.images * std + mean


def one(size_hw: tuple[int, int], *boxes: list[float], crowd: tuple[int, ...] = ()) -> Objects:
    count = np.arange(len(boxes))
    return Objects(
        size_hw=size_hw,
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        categories=("thing",) * len(boxes),
        crowd=np.isin(count, crowd),
        difficult=np.zeros(len(boxes), dtype=bool),
    )


def test_sizes_are_those_of_torchvisions_transform():
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    theirs = GeneralizedRCNNTransform(48, 96, [0.0] * 3, [1.0] * 3)
    for hw in ((60, 80), (80, 60), (40, 200), (48, 48), (30, 30)):
        image, _ = theirs.resize(torch.rand(3, *hw), None)
        ours = size_in_view(hw, SETTINGS)
        assert all(abs(a - b) <= 1 for a, b in zip(ours, image.shape[-2:], strict=True))  # they cut off, we round


@pytest.mark.parametrize("hw", [(96, 128), (128, 96), (30, 40)])
def test_pixels_are_those_of_pillows_antialiased_resize(hw):
    source = picture(3, width=hw[1], height=hw[0])
    views = views_of(batch_of(np.asarray(source), np.asarray(picture(4, width=100, height=50))))
    h, w = views.sizes_hw[0]
    expected = np.asarray(source.resize((w, h), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    np.testing.assert_allclose(pixels_of(views)[0, :, :h, :w].permute(1, 2, 0).numpy(), expected, atol=0.006)
    assert views.images.shape[-2] % 32 == views.images.shape[-1] % 32 == 0
    assert views.images[0, :, h:].abs().sum() == 0 and views.images[0, :, :, w:].abs().sum() == 0


def test_what_lies_beyond_an_image_is_zero_after_normalisation_too():
    batch = batch_of(np.full((48, 90, 3), 200, dtype=np.uint8), np.full((90, 48, 3), 200, dtype=np.uint8))
    views = views_of(batch)
    (h, w), _ = views.sizes_hw
    assert views.images[0, :, h:].abs().max() == 0 and views.images[0, :, :h, :w].abs().min() > 0.5


def test_boxes_go_where_their_pixels_go():
    pixels = np.zeros((60, 120, 3), dtype=np.uint8)
    pixels[10:30, 20:60] = 255
    objects = {f"i{i}": one((60, 120), [20, 10, 60, 30]) for i in range(8)}
    batch = batch_of(*[pixels] * 8)
    views = views_of(batch, labelled=LabelledObjects(objects=objects, labels={"thing": 3}), seed=1)
    flipped = 0
    for image, target in zip(pixels_of(views), views.targets, strict=True):
        rows, columns = torch.nonzero(image[0] > 0.5, as_tuple=True)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target["labels"].tolist() == [3]
        assert target["boxes"][0].tolist() == pytest.approx([float(v) for v in seen], abs=0.51)
        flipped += int(target["boxes"][0, 0] > 40)
    assert 0 < flipped < 8
    upright = DetectionViewsConfig(short_side=48, long_side=96, horizontal_flip=0)
    never = views_of(batch, upright, labelled=LabelledObjects(objects=objects, labels={"thing": 3}), seed=1)
    assert all(target["boxes"][0, 0] < 20 for target in never.targets)
    back = views.targets[0]["boxes"] / views.scale_xy[0].repeat(2)
    assert (back[0, 2] - back[0, 0]).item() == pytest.approx(40, abs=1e-4)


def test_flips_depend_on_the_image_not_on_its_neighbours():
    pixels = [np.asarray(picture(i, width=60, height=48)) for i in range(6)]
    whole = views_of(batch_of(*pixels), seed=5)
    batch = batch_of(*pixels)
    some = ImageBatch(
        images=batch.images[3:],
        content_hw=batch.content_hw[3:],
        source_hw=batch.source_hw[3:],
        image_ids=batch.image_ids[3:],
        positions=batch.positions[3:],
        valid=batch.valid[3:],
        epoch=0,
    )
    torch.testing.assert_close(views_of(some, seed=5).images, whole.images[3:])


def test_rows_that_do_not_count_are_left_out_and_one_stays_if_none_does():
    pixels = [np.asarray(picture(i)) for i in range(3)]
    objects = {f"i{i}": one((48, 64), [1, 1, 20, 20], [5, 5, 40, 40], crowd=(1,)) for i in range(3)}
    views = views_of(
        batch_of(*pixels, valid=(False, True, True)), labelled=LabelledObjects(objects=objects, labels={"thing": 1})
    )
    assert len(views.images) == 2 and views.counted.tolist() == [True, True]
    assert [len(t["boxes"]) for t in views.targets] == [1, 1]  # nothing is trained on a crowd
    none = views_of(
        batch_of(*pixels, valid=(False,) * 3), labelled=LabelledObjects(objects=objects, labels={"thing": 1})
    )
    assert len(none.images) == 1 and none.counted.tolist() == [False] and none.targets[0]["boxes"].shape == (0, 4)


def test_masks_of_panoptic_pngs_lie_under_their_boxes(coco):
    dataset = open_dataset(coco["train"])
    masks = read_panoptic(coco["train_panoptic"])
    objects = read_objects(dataset, masks=masks)
    own = read_objects(dataset)
    assert all((objects[i].boxes_xyxy == own[i].boxes_xyxy).all() for i in own)  # the same things, found in the masks
    batch = next(iter(EvalLoader(dataset, DataConfig(uri=coco["train"], decode_size=96), batch_size=16)))
    settings = DetectionViewsConfig(short_side=64, long_side=96)
    labelled = LabelledObjects(objects=objects, labels={"square": 1, "bar": 2}, masks=masks)
    views = views_of(batch, settings, labelled=labelled, seed=3)
    checked = 0
    for target in views.targets:
        assert target["masks"].shape[1:] == views.images.shape[-2:]
        for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box == pytest.approx([float(v) for v in seen], abs=1.0)
            checked += 1
    assert checked == sum(len(o.boxes_xyxy) for o in objects.values()) > 12


def test_a_view_longer_than_its_longer_side_is_refused():
    with pytest.raises(ConfigError, match=r"views\.long_side: 40 is less"):
        build(DetectionViewsConfig, {"short_side": 48, "long_side": 40})
