"""Draws synthetic scenes (`write_scenes`) of textured shapes, all of one tone and contrast, so that colour is no help.

The textures are grey photographs from scikit-image and scikit-learn. Each is normalised locally: within about 20 px around every
pixel, mean and standard deviation are the same. So a crop can be found again only by its pattern. Training scenes use the left
part of every photograph and held-out scenes the right part, so that they share neither compositions nor patterns.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "heldout"]

_PHOTOS = (
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "page", "retina", "rocket", "text"),
)
_SCALES = (0.5, 0.75, 1.0)
_SIGMA = 7.0  # pixels; size of the neighbourhood within which tone and contrast are equalised
_TRAIN_SHARE = 0.65  # of every photograph's width
_SEED_OF = {"train": 0, "heldout": 1}

Array = np.ndarray


def write_scenes(
    folder: Path,
    *,
    split: Split,
    count: int,
    side: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `count` scenes of `side` × `side` pixels as JPEG into `folder`; the same arguments give the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    textures = load_textures(split)
    for index in range(count):
        rng = np.random.default_rng((seed, _SEED_OF[split], index))
        pixels = draw_scene(textures, side=side, rng=rng)
        Image.fromarray(np.repeat(pixels[..., None], 3, axis=2)).save(folder / f"{split}_{index:05d}.jpg", quality=92)
        if progress is not None:
            progress(index + 1, count)


def load_textures(split: Split) -> list[Array]:
    """The part of every photograph for `split`, at several scales: float32 (H, W), locally of mean 0 and deviation 1."""
    textures = []
    for grey in _photographs():
        border = int(grey.shape[1] * _TRAIN_SHARE)
        part = grey[:, :border] if split == "train" else grey[:, border:]
        for scale in _SCALES:
            size = (max(48, int(part.shape[1] * scale)), max(48, int(part.shape[0] * scale)))
            resized = Image.fromarray(part).resize(size, Image.Resampling.LANCZOS)
            textures.append(normalize_locally(np.asarray(resized, dtype=np.float32)))
    return textures


def _photographs() -> list[Array]:
    """Grey photographs, float32 (H, W), at most 512 px on the longer side."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    photos = [getattr(skimage.data, name)() for name in _PHOTOS] + list(load_sample_images().images)
    greys = []
    for photo in photos:
        image = Image.fromarray(np.asarray(photo)).convert("L")
        image.thumbnail((512, 512), Image.Resampling.LANCZOS)
        greys.append(np.asarray(image, dtype=np.float32))
    return greys


def normalize_locally(grey: Array) -> Array:
    """`grey` (H, W), normalised to mean 0 and standard deviation 1 around every pixel."""
    from scipy.ndimage import gaussian_filter

    centred = grey - gaussian_filter(grey, _SIGMA)
    deviation = np.sqrt(gaussian_filter(centred**2, _SIGMA))
    # Flat sky has only noise: the floor keeps that from being amplified into a texture.
    return (centred / np.maximum(deviation, 2.0)).astype(np.float32)


def draw_scene(textures: list[Array], *, side: int, rng: np.random.Generator) -> Array:
    """One scene, uint8 (side, side): a ground of a few textures, and shapes over it, each with another texture."""
    canvas = np.zeros((side, side), dtype=np.float32)
    order = rng.permutation(len(textures))
    sites = rng.uniform(0, side, size=(int(rng.integers(2, 5)), 2))
    rows, columns = np.mgrid[:side, :side]
    nearest = np.argmin([(rows - y) ** 2 + (columns - x) ** 2 for y, x in sites], axis=0)
    masks = [nearest == index for index in range(len(sites))]
    masks += [_shape_mask(side, rng) for _ in range(int(rng.integers(8, 14)))]
    for mask, texture in zip(masks, order, strict=False):
        values = _patch(textures[texture], side, rng)[mask]
        if values.size:
            canvas[mask] = (values - values.mean()) / max(float(values.std()), 0.2)
    return np.clip(127.5 + 45.0 * canvas, 0, 255).astype(np.uint8)


def _patch(texture: Array, side: int, rng: np.random.Generator) -> Array:
    """A random (side, side) piece of `texture`, rotated and flipped at random, mirrored at its borders if it is smaller."""
    turned = np.rot90(texture, int(rng.integers(4)))
    turned = turned[:, ::-1] if rng.random() < 0.5 else turned
    padding = [(0, max(0, side - extent)) for extent in turned.shape]
    padded = np.pad(turned, padding, mode="symmetric")
    top, left = (int(rng.integers(extent - side + 1)) for extent in padded.shape)
    return padded[top : top + side, left : left + side]


def _shape_mask(side: int, rng: np.random.Generator) -> Array:
    """A random ellipse, polygon or star as a bool mask (side, side)."""
    radius = side * rng.uniform(0.09, 0.2)
    center = rng.uniform(0.05 * side, 0.95 * side, size=2)
    corners = int(rng.choice([3, 4, 5, 6, 10, 32]))
    stretch, turn = rng.uniform(0.6, 1.0), rng.uniform(0, 2 * math.pi)
    dent = rng.uniform(0.5, 0.8) if corners == 10 else 1.0  # every other corner is moved inwards: a star
    points = []
    for corner in range(corners):
        angle = 2 * math.pi * corner / corners
        reach = radius * (dent if corner % 2 else 1.0)
        x, y = reach * math.cos(angle), reach * stretch * math.sin(angle)
        turned = (x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn))
        points.append((center[0] + turned[0], center[1] + turned[1]))
    image = Image.new("1", (side, side))
    ImageDraw.Draw(image).polygon(points, fill=1)
    return np.asarray(image, dtype=bool)
