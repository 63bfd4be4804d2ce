"""Implements DetCo (`DetCo`, arXiv 2102.04803): MoCo's contrast at four levels of the trunk, between views and sets of patches.

Its authors published no pretraining code. From the paper: global views and nine-patch local views; a global and a local head at
each of res2 to res5, the local one over the concatenated features of the patches; keys of an EMA network and a queue of
65,536 for each level and kind; three contrasts a level (global to global, local to local, local query to global key); the
levels' weights 0.1, 0.4, 0.7, 1.0; SGD, 0.03 at a batch of 256, cosine.

Choices of this implementation: heads are Linear–ReLU–Linear as in MoCo v2, optionally with a norm (`head_norm`); local heads
have a hidden width of their own, because at res5 of a ResNet-50 nine patches are 18,432 features, and a hidden layer of 2,048
over them would have 38 million weights, more than the trunk; patches get colour jitter and grey, no blur; empty rows of a
queue are excluded instead of being random; Shuffle-BN is done within each worker (`statistics_groups`), which needs no
communication and works on one device.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.config import config
from workloads.models.backbone import STAGES, BackboneConfig, Trunk, imagenet_normalized, vector_norm
from workloads.models.momentum import KeyQueue, follow, target_of
from workloads.parallel.distributed import averaged, gather_rows, global_mean, row_counts
from workloads.types import PairViews, StepResult

_KINDS = ("global", "local")
_CONTRASTS = (("global", "global"), ("local", "local"), ("local", "global"))  # (query, key and queue)

Weight = Annotated[float, Field(ge=0)]


@config
class DetCoConfig:
    """Settings of DetCo; all of them can be swept."""

    kind: Literal["detco"] = "detco"
    """Name of the objective."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Temperature τ; cosine similarities are divided by it."""
    level_weights: tuple[Weight, Weight, Weight, Weight] = (0.1, 0.4, 0.7, 1.0)
    """Weights of the loss at C2, C3, C4, C5."""
    queue_size: Annotated[int, Field(ge=1)] = 65536
    """Keys in each of the eight queues: a multiple of global_batch_size, and at most a quarter of the number of images, so
    that an image is seldom its own negative."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    """EMA momentum of the networks of the keys."""
    projection_dim: Annotated[int, Field(ge=8)] = 128
    """Channels of the embeddings."""
    global_hidden: Annotated[int, Field(ge=8)] = 2048
    """Hidden width of the global heads, over whole views."""
    local_hidden: Annotated[int, Field(ge=8)] = 512
    """Hidden width of the local heads, over sets of patches."""
    head_norm: bool = False
    """Whether the heads' hidden layers are normalised, as in SimCLR but not in MoCo: without it, embeddings of untrained heads
    are nearly equal, and the first epochs are needed to separate them."""
    statistics_groups: Annotated[int, Field(ge=1)] = 4
    """With backbone.norm=batch: number of parts of a worker's share, each normalised by its own statistics, and divided
    differently for keys and queries (Shuffle-BN); with 1, shared statistics give a query's key away."""


def queue_contrast(
    query: Tensor, key: Tensor, queue: Tensor, filled: Tensor, valid: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """−log(e^{q·k/τ} / (e^{q·k/τ} + Σ_queue e^{q·k'/τ})) (MoCo, arXiv 1911.05722, eq. 1), in float32.

    Args:
        query, key: (b, D), normalised. queue: (K, D), normalised. filled: bool (K,), rows that hold a key. valid: bool (b,).

    Returns:
        The loss of each row, float32 (b,), 0 where invalid; and whether its key is the most similar, bool (b,).
    """
    # An invalid row may hold NaN, which zeros keep out of the loss and of its gradient.
    query, key = (x.float().masked_fill(~valid[:, None], 0.0) for x in (query, key))
    positive = (query * key).sum(-1, keepdim=True)
    negative = (query @ queue.float().T).masked_fill(~filled, -torch.inf)
    logits = torch.cat([positive, negative], dim=1) / temperature
    found = logits[:, 0] >= logits.max(1).values
    return (logits.logsumexp(1) - logits[:, 0]) * valid, found & valid


def statistics_groups(rows: int, groups: int, *, of_keys: bool) -> list[slice]:
    """The rows that are normalised together: consecutive ones for queries, every `groups`-th one for keys.

    The order of images is random at every step, so that fixed groups are as good as random ones. Each group of keys shares
    about equally many images with every group of queries. A group has at least two rows if there are two, since one row has
    no variance.
    """
    groups = max(min(groups, rows // 2), 1)
    if of_keys:
        return [slice(first, rows, groups) for first in range(groups)]
    return [slice(rows * g // groups, rows * (g + 1) // groups) for g in range(groups)]


class _Heads(nn.Module):
    """A trunk with a global and a local head at each stage."""

    def __init__(self, settings: DetCoConfig, backbone: BackboneConfig, patches: int) -> None:
        super().__init__()
        self.trunk = Trunk(backbone)
        dim = settings.projection_dim

        def head(channels: int, hidden: int) -> nn.Module:
            norm = vector_norm(backbone.norm, hidden) if settings.head_norm else nn.Identity()
            return nn.Sequential(nn.Linear(channels, hidden), norm, nn.ReLU(inplace=True), nn.Linear(hidden, dim))

        widths = dict(zip(STAGES, self.trunk.channels, strict=True))
        self.whole = nn.ModuleDict({stage: head(width, settings.global_hidden) for stage, width in widths.items()})
        self.parts = nn.ModuleDict({s: head(patches * width, settings.local_hidden) for s, width in widths.items()})

    def forward(self, images: Tensor, patches: Tensor) -> Tensor:
        """Images (B, 3, h, w) and patches (B, P, 3, h', w') to normalised embeddings (B, 2 kinds, 4 levels, D)."""
        b = patches.shape[0]
        whole = {s: x.mean((-2, -1)) for s, x in self.trunk(imagenet_normalized(images)).items()}
        parts = {s: x.mean((-2, -1)) for s, x in self.trunk(imagenet_normalized(patches.flatten(0, 1))).items()}
        kinds = (
            torch.stack([self.whole[stage](whole[stage]) for stage in STAGES], dim=1),
            torch.stack([self.parts[stage](parts[stage].reshape(b, -1)) for stage in STAGES], dim=1),
        )
        return F.normalize(torch.stack(kinds, dim=1).float(), dim=-1)


class DetCo(nn.Module):
    """Query networks, key networks (their EMA), and eight queues."""

    def __init__(self, settings: DetCoConfig, backbone: BackboneConfig, *, patches: int) -> None:
        super().__init__()
        self.settings = settings
        self.online = _Heads(settings, backbone, patches)
        self.target = target_of(self.online)
        self.queues = nn.ModuleDict(
            {f"{k}_{s}": KeyQueue(settings.queue_size, settings.projection_dim) for k in _KINDS for s in STAGES}
        )
        self._fresh: tuple[Tensor, Tensor] | None = None  # keys of this step and their validity, until the update
        self.buffers_equal_on_ranks = [f"queues.{name}" for name, _ in self.queues.named_buffers()]

    @property
    def trunk(self) -> Trunk:
        """The trunk of the query networks."""
        return self.online.trunk

    def forward(self, views: PairViews) -> StepResult:
        """The loss of this rank's views against the queues: the weighted sum over levels and contrasts, a mean over images."""
        return self.loss(self.embed(views), views)

    def embed(self, views: PairViews) -> dict[str, Tensor]:
        """`queries` from the first view and its patches, `keys` from the second: (B, 2 kinds, 4 levels, D), normalised."""
        queries = self._embedded(self.online, views, view=0)
        with torch.no_grad():
            keys = self._embedded(self.target, views, view=1)
        return {"queries": queries, "keys": keys}

    def _embedded(self, networks: nn.Module, views: PairViews, *, view: int) -> Tensor:
        assert views.patches is not None
        images, patches = views.images[:, view], views.patches[:, view]
        parts = self.settings.statistics_groups if self.trunk.settings.norm == "batch" else 1
        found = images.new_empty(
            images.shape[0], len(_KINDS), len(STAGES), self.settings.projection_dim, dtype=torch.float32
        )
        for rows in statistics_groups(images.shape[0], parts, of_keys=view == 1):
            found[rows] = networks(images[rows], patches[rows])
        return found

    def loss(self, embeddings: Mapping[str, Tensor], views: PairViews) -> StepResult:
        """The loss of the embeddings that `embed` returns; `after_update` adds their keys to the queues."""
        queries, keys = embeddings["queries"], embeddings["keys"].detach()
        valid = views.valid
        with torch.autocast(valid.device.type, enabled=False):
            counts = row_counts(valid.shape[0])
            self._fresh = gather_rows(keys, counts), gather_rows(valid, counts)
            total = queries.new_zeros(())
            sums: dict[str, tuple[Tensor, Tensor]] = {}
            for level, stage in enumerate(STAGES):
                for of_query, of_key in _CONTRASTS:
                    queue, filled = self.queues[f"{of_key}_{stage}"].contents()  # type: ignore[operator]
                    loss, found = queue_contrast(
                        queries[:, _KINDS.index(of_query), level],
                        keys[:, _KINDS.index(of_key), level],
                        queue,
                        filled,
                        valid,
                        temperature=self.settings.temperature,
                    )
                    total = total + self.settings.level_weights[level] * loss.sum()
                    name = f"{of_query}_{of_key}_{stage.lower()}"
                    sums[f"train/loss_{name}"] = (loss.sum(), valid.sum())
                    sums[f"train/found_{name}"] = (found.sum(), valid.sum())
            sums["train/loss"] = (total, valid.sum())
            return StepResult(loss=global_mean(total, valid.sum()), metrics=averaged(sums))

    @torch.no_grad()
    def after_update(self, step: int, steps: int) -> None:
        """Update the key networks, and add this step's keys to the queues."""
        follow(self.target, self.online, self.settings.momentum)
        if self._fresh is None:
            return
        keys, valid = self._fresh
        self._fresh = None
        for kind, name in enumerate(_KINDS):
            for level, stage in enumerate(STAGES):
                self.queues[f"{name}_{stage}"].push(keys[:, kind, level], valid)  # type: ignore[operator]
