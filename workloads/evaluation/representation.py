"""Evaluates a frozen trunk by nearest neighbours and a linear probe on image labels."""

from typing import Any

import numpy as np
import torch

from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import Dataset, open_dataset
from workloads.data.views.counter_random import text_keys
from workloads.errors import ConfigError
from workloads.evaluation.artifacts import artifact_folder, write_report
from workloads.metrics import representation
from workloads.metrics.representation import Features, RepresentationConfig, Split
from workloads.models.backbone import imagenet_normalized
from workloads.parallel.distributed import gather_rows
from workloads.parallel.runtime import Runtime
from workloads.spec.pretrain import EvaluationConfig


class RepresentationEvaluation:
    """Measures a trunk's frozen features on two sets of labelled images, and reports the figures; every rank runs it."""

    def __init__(self, evaluation: EvaluationConfig, settings: RepresentationConfig, runtime: Runtime) -> None:
        self.settings, self.runtime = settings, runtime
        self._batch_size = evaluation.batch_size
        self._train, self._test, self.split = self.check(settings)

    @staticmethod
    def check(settings: RepresentationConfig) -> tuple[Dataset, Dataset, Split]:
        """Open the training and the test dataset, and choose their images.

        Raises:
            ConfigError: fewer than two classes, no test image, or too few training images for a linear probe.
            DataError: there is no dataset at an address.
        """
        train = open_dataset(settings.train_uri)
        test = open_dataset(settings.test_uri) if settings.test_uri is not None else None
        split = representation.choose_split(_labels(train), _labels(test) if test is not None else None, settings)
        if len(split.classes) < 2 or not split.test:
            raise ConfigError(
                f"evaluation.representation.train_uri: {settings.train_uri} has {len(split.classes)} classes and leaves "
                f"{len(split.test)} test images; give a dataset with at least two labels, a smaller per_class, or a test_uri"
            )
        if settings.linear:
            representation.held_out(np.array(list(_in_order(split.train).values())), seed=settings.seed)
        return train, train if test is None else test, split

    def run(self, model: torch.nn.Module, *, step: int, final: bool) -> dict[str, float]:
        """Measure `model.trunk` and report its figures at `step`, with each test image's hits as an artifact.

        Args:
            final: train the linear probe too, as at step 0, from which gains are counted.

        Returns:
            The figures on rank 0; nothing elsewhere.
        """
        model.eval()
        trunk: Any = model.trunk
        train, train_labels = self._features(trunk, self._train, self.split.train)
        test, test_labels = self._features(trunk, self._test, self.split.test)
        if self.runtime.rank != 0:
            self.runtime.report({}, step=step)
            return {}
        linear = (final or step == 0) and self.settings.linear
        figures, hits = representation.measure(train, train_labels, test, test_labels, self.settings, linear=linear)
        with artifact_folder() as folder:
            write_report(folder, "representation", step, columns=hits)
        self.runtime.report(figures, step=step, artifacts=folder)
        return figures

    def _features(self, trunk: Any, dataset: Dataset, wanted: dict[str, int]) -> tuple[Features, np.ndarray]:
        """Features and class numbers of all ranks' images, ordered by the images' hashes: the same on any number of ranks."""
        loader = EvalLoader(
            dataset,
            DataConfig(uri=dataset.uri, decode_size=None),
            batch_size=self._batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            wanted=frozenset(wanted),
        )
        batches = (batch.to(self.runtime.device) for batch in loader)
        mine = representation.extract(
            lambda images: trunk.pooled(imagenet_normalized(images)),
            batches,
            frozenset(wanted),
            self.settings,
            device=self.runtime.device,
        )
        joined = [gather_rows(torch.from_numpy(column)) for column in (mine.trunk, mine.pixel, mine.image)]
        order = joined[2].argsort()
        vectors, pixels, images = (column[order].numpy() for column in joined)
        by_hash = _in_order(wanted)
        labels = np.array([by_hash[image] for image in images.tolist()], dtype=np.int64)
        return Features(trunk=vectors, pixel=pixels, image=images), labels


def _in_order(wanted: dict[str, int]) -> dict[int, int]:
    """Hash of each image's id → class number, in the order of the hashes."""
    return dict(sorted(zip(text_keys(tuple(wanted)).tolist(), wanted.values(), strict=True)))


def _labels(dataset: Dataset) -> dict[str, str | None]:
    return {image: annotations.label for image, annotations in read_annotations(dataset).items()}
