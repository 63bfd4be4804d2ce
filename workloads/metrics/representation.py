"""Classifies images by a trunk's frozen features: k nearest neighbours and a linear probe, the same for every objective.

The protocol is Caltech-101's: up to 30 training images a class, all others are test images, accuracy averaged over classes.
`choose_split` draws the images, `extract` computes the features, `measure` the figures.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from workloads.config import config
from workloads.data.views.counter_random import stream, text_keys, uniform
from workloads.data.views.resampling import axis_weights, resample
from workloads.errors import ConfigError
from workloads.metrics.bootstrap import interval, ratio
from workloads.metrics.figures import with_interval
from workloads.types import ImageBatch

_PIXEL_SIDE = 16  # of the thumbnails that the `pixel` baseline compares
_LEAST_TRAINED = 5  # images of which the linear probe can hold out a fifth


@config
class RepresentationConfig:
    """The frozen protocol. Two runs are comparable only if all of it is equal."""

    train_uri: str
    """Dataset with labels whose images are the training images."""
    test_uri: str | None = None
    """Dataset with labels whose images are the test images; null: the images of `train_uri` that are not training images."""
    leave_out: tuple[str, ...] = ("BACKGROUND_Google",)
    """Labels that are not classes; images with them are skipped."""
    per_class: Annotated[int, Field(ge=1)] = 30
    """Training images a class, drawn by a hash of their ids; a class that has fewer gives all, and no test image."""
    test_limit: Annotated[int, Field(ge=1)] | None = None
    """Number of test images, drawn by a hash of their ids; null: all."""
    view_size: Annotated[int, Field(ge=32, multiple_of=32)] = 128
    """Side of the square that each image is stretched to, pixels."""
    neighbours: Annotated[int, Field(ge=1)] = 20
    """Nearest training images that vote."""
    vote_temperature: Annotated[float, Field(gt=0)] = 0.07
    """A neighbour's vote is e^(cosine / this)."""
    linear: bool = True
    """Train a linear probe too, at step 0 and when the run ends; needs at least 5 training images."""
    seed: int = 101
    """Seed of the choice of images, of the linear probe's held-out images and of the bootstrap."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the images from which the 95 % intervals are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Training and test images by id, with the number of their class."""

    classes: tuple[str, ...]
    train: dict[str, int]
    test: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Features of N images: the trunk's vectors, thumbnails for the `pixel` baseline, and the hash of each image's id."""

    trunk: np.ndarray  # float32 (N, C)
    pixel: np.ndarray  # float32 (N, 3 · 16 · 16)
    image: np.ndarray  # int64 (N,)


def choose_split(
    train: dict[str, str | None], test: dict[str, str | None] | None, settings: RepresentationConfig
) -> Split:
    """Draw `per_class` images of each class by a hash of their ids, the same for every run.

    Args:
        train, test: label by image id; without `test`, the test images are those of `train` that are not drawn.
    """
    named = {image: label for image, label in train.items() if label is not None and label not in settings.leave_out}
    classes = tuple(sorted(set(named.values())))
    number = {label: i for i, label in enumerate(classes)}
    chosen: dict[str, int] = {}
    left: dict[str, int] = {}
    taken = [0] * len(classes)
    for image in _shuffled(named, settings, "train"):
        label = number[named[image]]
        if taken[label] < settings.per_class:
            taken[label] += 1
            chosen[image] = label
        else:
            left[image] = label
    if test is not None:
        left = {image: number[label] for image, label in test.items() if label in number}
    drawn = _shuffled(left, settings, "test")[: settings.test_limit]
    return Split(classes=classes, train=chosen, test={image: left[image] for image in drawn})


def _shuffled(images: Iterable[str], settings: RepresentationConfig, use: str) -> list[str]:
    ids = sorted(images)
    if not ids:
        return []
    draws = uniform(stream(settings.seed, "representation", use), text_keys(tuple(ids)), 1)[:, 0]
    return [ids[i] for i in draws.argsort(stable=True).tolist()]


@torch.no_grad()
def extract(
    pooled: Callable[[Tensor], Tensor],
    batches: Iterable[ImageBatch],
    wanted: frozenset[str],
    settings: RepresentationConfig,
    *,
    device: torch.device | str = "cpu",
) -> Features:
    """Features of the images whose ids are `wanted`, uncropped and stretched to a square.

    Args:
        pooled: images (B, 3, h, w) in [0, 1] to vectors (B, C).
        device: of the batches and of `pooled`; a rank without a wanted image learns C there.
    """
    trunk, pixel, image = [], [], []
    for batch in batches:
        rows = [
            i
            for i, (name, ok) in enumerate(zip(batch.image_ids, batch.valid.tolist(), strict=True))
            if ok and name in wanted
        ]
        if not rows:
            continue
        squares = _stretched(batch, rows, settings.view_size)
        trunk.append(pooled(squares).float().cpu().numpy())
        pixel.append(F.adaptive_avg_pool2d(squares, _PIXEL_SIDE).flatten(1).cpu().numpy())
        image.append(text_keys(tuple(batch.image_ids[i] for i in rows)).numpy())
    if not image:
        probe = pooled(torch.zeros(1, 3, settings.view_size, settings.view_size, device=device))
        return Features(
            trunk=np.zeros((0, probe.shape[1]), np.float32),
            pixel=np.zeros((0, 3 * _PIXEL_SIDE**2), np.float32),
            image=np.zeros(0, np.int64),
        )
    return Features(trunk=np.concatenate(trunk), pixel=np.concatenate(pixel), image=np.concatenate(image))


def _stretched(batch: ImageBatch, rows: Sequence[int], size: int) -> Tensor:
    images = batch.images[rows].to(torch.float32).div_(255.0)
    extent = batch.content_hw[rows].to(torch.float32)
    zero, upright = torch.zeros_like(extent[:, :1]), torch.zeros_like(extent[:, :1], dtype=torch.bool)
    return resample(
        images,
        axis_weights(zero, extent[:, :1], upright, images.shape[2], size),
        axis_weights(zero, extent[:, 1:], upright, images.shape[3], size),
    )[:, 0]


def nearest_neighbours(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, neighbours: int, temperature: float
) -> np.ndarray:
    """The class that the nearest training vectors vote for, each with e^(cosine / τ) (arXiv 1805.01978, section 3.4).

    Args:
        train: float32 (N, C). labels: int64 (N,). test: float32 (M, C).

    Returns:
        int64 (M,).
    """
    ours = F.normalize(torch.from_numpy(test), dim=1)
    theirs = F.normalize(torch.from_numpy(train), dim=1)
    similarity, index = (ours @ theirs.T).topk(min(neighbours, len(train)), dim=1)
    voted = torch.from_numpy(labels)[index]
    # Less their highest, so that a small temperature does not overflow; the vote is the same.
    weights = torch.exp((similarity - similarity[:, :1]) / temperature)
    votes = torch.zeros(len(test), int(labels.max()) + 1).scatter_add_(1, voted, weights)
    return votes.argmax(1).numpy()


def held_out(labels: np.ndarray, *, seed: int) -> np.ndarray:
    """bool (N,): the fifth of the training images on which the linear probe's penalty is chosen.

    Raises:
        ConfigError: there are too few images, or the other four fifths are of one class.
    """
    held = np.random.default_rng(seed).permutation(len(labels)) < len(labels) // 5
    if not held.any() or len(np.unique(labels[~held])) < 2:
        raise ConfigError(
            f"evaluation.representation.linear: {len(labels)} training images are too few to choose the linear probe's penalty "
            f"on a fifth of them; raise per_class or label more images (at least {_LEAST_TRAINED}, several a class), or set "
            "linear=false"
        )
    return held


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, seed: int) -> np.ndarray:
    """The class that a logistic regression on standardised features predicts; its penalty is chosen on `held_out` images.

    Args:
        train: float32 (N, C). labels: int64 (N,). test: float32 (M, C).

    Returns:
        int64 (M,).

    Raises:
        ConfigError: there are too few training images.
    """
    from sklearn.linear_model import LogisticRegression

    held = held_out(labels, seed=seed)
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation

    def fitted(penalty: float, rows: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=penalty, max_iter=200, tol=1e-3).fit(train[rows], labels[rows])

    penalties = (1e-4, 1e-3, 1e-2, 1e-1)
    best = max(penalties, key=lambda c: fitted(c, ~held).score(train[held], labels[held]))
    return fitted(best, np.ones(len(train), bool)).predict(test)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """float64 (M,): weights that make a mean over images the mean over classes."""
    counts = np.bincount(labels)
    return 1.0 / counts[labels]


def _interval(numerator: np.ndarray, denominator: np.ndarray, settings: RepresentationConfig) -> tuple[float, float]:
    images = len(numerator)
    return interval(ratio(numerator, denominator), images, seed=settings.seed, resamples=settings.bootstrap)


def accuracy(hits: np.ndarray, labels: np.ndarray, settings: RepresentationConfig) -> tuple[float, float, float]:
    """Accuracy averaged over classes, and its 95 % interval over images.

    Args:
        hits: bool (M,). labels: int64 (M,).
    """
    weights = class_weights(labels)
    low, high = _interval(hits * weights, weights, settings)
    return float(np.average(hits, weights=weights)), low, high


def paired_gain(
    ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray, settings: RepresentationConfig
) -> tuple[float, float, float]:
    """Difference of two models' accuracies on the same images, and its 95 % interval."""
    weights = class_weights(labels)
    difference = (ours.astype(np.float64) - theirs.astype(np.float64)) * weights
    low, high = _interval(difference, weights, settings)
    return float(difference.sum() / weights.sum()), low, high


def measure(
    train: Features,
    train_labels: np.ndarray,
    test: Features,
    test_labels: np.ndarray,
    settings: RepresentationConfig,
    *,
    linear: bool,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Figures by tracking key, and each test image's hits by method, for paired differences between runs.

    `eval/knn`, `eval/knn_low`, `eval/knn_high` (95 %), `eval/linear` likewise, `eval/knn_pixel` (the `pixel` baseline: thumbnails
    in place of features), `eval/knn_chance`.
    """

    def neighbours(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        voting, temperature = settings.neighbours, settings.vote_temperature
        return nearest_neighbours(ours, train_labels, theirs, neighbours=voting, temperature=temperature)

    predicted = {"knn": neighbours(train.trunk, test.trunk), "knn_pixel": neighbours(train.pixel, test.pixel)}
    if linear:
        predicted["linear"] = linear_probe(train.trunk, train_labels, test.trunk, seed=settings.seed)
    hits = {name: classes == test_labels for name, classes in predicted.items()}
    figures = {"eval/knn_chance": 1.0 / (int(train_labels.max()) + 1), "eval/knn_images": float(len(test_labels))}
    for name, hit in hits.items():
        value, *ends = accuracy(hit, test_labels, settings)
        figures |= with_interval(f"eval/{name}", value, (ends[0], ends[1]))
    return figures, {**hits, "label": test_labels, "image": test.image}
