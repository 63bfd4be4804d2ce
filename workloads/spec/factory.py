"""Builds the objective and renders the views that a pretraining config describes."""

from typing import TypeAlias

from workloads.data.views.crops import ViewsConfig, make_views
from workloads.data.views.pairs import PairViewsConfig, make_pair_views
from workloads.objectives.anchor_ntxent import AnchorNTXent, AnchorNTXentConfig
from workloads.objectives.detco import DetCo, DetCoConfig
from workloads.objectives.detcon import DetCon, DetConConfig
from workloads.objectives.ntxent import NTXent, NTXentConfig
from workloads.spec.pretrain import PretrainConfig
from workloads.types import ImageBatch, PairViews, Views

AnyObjective: TypeAlias = AnchorNTXent | NTXent | DetCon | DetCo


def build_objective(settings: PretrainConfig, *, seed: int | None = None) -> AnyObjective:
    """The objective with its networks, initialised from the global RNG.

    Args:
        seed: of the draws inside the objective; the run's own by default.
    """
    seed = settings.seed if seed is None else seed
    match settings.objective, settings.views:
        case AnchorNTXentConfig() as objective, ViewsConfig() as views:
            return AnchorNTXent(objective, settings.backbone, crop_size=views.crop_size, seed=seed)
        case NTXentConfig() as objective, _:
            return NTXent(objective, settings.backbone)
        case DetConConfig() as objective, _:
            return DetCon(objective, settings.backbone, seed=seed)
        case DetCoConfig() as objective, PairViewsConfig(patches=patches) if patches is not None:
            return DetCo(objective, settings.backbone, patches=patches.grid**2)
    raise AssertionError("PretrainConfig refuses other combinations")


def render_views(batch: ImageBatch, settings: PretrainConfig) -> Views | PairViews:
    """The training views of `batch`, on its device."""
    match settings.views:
        case ViewsConfig() as views:
            return make_views(batch, views, seed=settings.seed)
        case PairViewsConfig() as views:
            return make_pair_views(batch, views, seed=settings.seed)
