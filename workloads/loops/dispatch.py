"""Chooses the loop of an experiment by its `loop` key: config, preflight, run and evaluation (`load_loop`, `run_loop`, …)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workloads.config import apply_overrides, build, read_yaml
from workloads.errors import ConfigError
from workloads.evaluation.pretraining import evaluate
from workloads.loops.finetune import FinetuneConfig, evaluate_detector, finetune
from workloads.loops.finetune import preflight as finetune_preflight
from workloads.loops.pretrain import preflight as pretrain_preflight
from workloads.loops.pretrain import pretrain
from workloads.loops.steps import Preflight
from workloads.parallel.runtime import Runtime
from workloads.spec.pretrain import ORCHESTRATOR_SECTIONS, PretrainConfig

LoopConfig = PretrainConfig | FinetuneConfig

LOOPS: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def loop_of(data: Mapping[str, Any]) -> str:
    """The loop that an experiment's values name; without one, pretraining.

    Raises:
        ConfigError: there is no such loop.
    """
    name = data.get("loop", "pretrain")
    if name not in LOOPS:
        raise ConfigError(f"loop: expected one of {', '.join(LOOPS)} (given: {name!r})")
    return str(name)


def build_loop(data: Mapping[str, Any]) -> LoopConfig:
    """Validate `data` as the config of the loop that it names.

    Raises:
        ConfigError: one sentence naming the key.
    """
    return build(LOOPS[loop_of(data)], data)


def load_loop(path: str | Path, overrides: Mapping[str, Any], *, loop: str | None = None) -> LoopConfig:
    """An experiment file and dotted overrides as a run without Ray and MLflow.

    Args:
        loop: the loop that the file must be of; None: any.

    Raises:
        ConfigError: one sentence naming the key.
    """
    data = {key: value for key, value in read_yaml(path).items() if key not in ORCHESTRATOR_SECTIONS}
    data = apply_overrides(data, overrides)
    if loop is not None and loop_of(data) != loop:
        raise ConfigError(f"loop: {path} is an experiment of the {loop_of(data)} loop, not of {loop}")
    return build_loop(data)


def preflight(settings: LoopConfig, world_size: int) -> Preflight:
    """Check all of a request that can be checked before it starts.

    Raises:
        ConfigError, DataError: one sentence with the key or path.
    """
    match settings:
        case PretrainConfig():
            return pretrain_preflight(settings, world_size)
        case FinetuneConfig():
            return finetune_preflight(settings, world_size)


def run_loop(settings: LoopConfig, runtime: Runtime) -> dict[str, float]:
    """Start or resume the run that `settings` describe."""
    match settings:
        case PretrainConfig():
            return pretrain(settings, runtime)
        case FinetuneConfig():
            return finetune(settings, runtime)


def evaluate_loop(checkpoint: Path, settings: LoopConfig, runtime: Runtime) -> dict[str, float]:
    """Measure a checkpoint as the `evaluation` section of `settings` says, and report it at its step."""
    match settings:
        case PretrainConfig():
            return evaluate(checkpoint, config=settings.evaluation, runtime=runtime)
        case FinetuneConfig():
            return evaluate_detector(str(checkpoint), settings=settings.evaluation, runtime=runtime)
