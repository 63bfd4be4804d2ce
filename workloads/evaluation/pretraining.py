"""Runs the evaluations that a pretraining config asks for: `evaluations_of` during training, `evaluate` for a checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from workloads.data.store.manifest import open_dataset
from workloads.errors import ConfigError
from workloads.evaluation.grid import GridEvaluation
from workloads.evaluation.representation import RepresentationEvaluation
from workloads.objectives.anchor_ntxent import AnchorNTXentConfig
from workloads.parallel.runtime import Runtime
from workloads.spec.loading import load_model
from workloads.spec.pretrain import EvaluationConfig, PretrainConfig
from workloads.storage.checkpoint import read_meta

Evaluation: TypeAlias = GridEvaluation | RepresentationEvaluation


def evaluations_of(run: PretrainConfig, runtime: Runtime) -> list[Evaluation]:
    """The evaluations that `run.evaluation` asks for, with their datasets opened.

    Raises:
        ConfigError: the labels do not allow the representation's evaluation.
        DataError: there is no dataset at an address.
    """
    wanted, evaluations = run.evaluation, list[Evaluation]()
    if wanted.uri is not None:
        evaluations.append(GridEvaluation(run, wanted, open_dataset(wanted.uri), runtime))
    if wanted.representation is not None:
        evaluations.append(RepresentationEvaluation(wanted, wanted.representation, runtime))
    return evaluations


def evaluate(
    checkpoint: Path,
    *,
    config: EvaluationConfig,
    runtime: Runtime,
) -> dict[str, float]:
    """Measure a checkpoint as `config` says, including RIGA, GAP-R and the linear probe, and report the figures at its step.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: its objective has no pyramid, or `config` names no dataset.
        DataError: there is no dataset at an address.
    """
    model, trained = load_model(checkpoint, device=runtime.device)
    run = replace(trained, evaluation=config)
    check_measurable(run)
    evaluations = evaluations_of(run, runtime)
    if not evaluations:
        raise ConfigError("evaluation.uri: name a dataset to evaluate on, or evaluation.representation.train_uri")
    step = read_meta(str(checkpoint)).step
    figures: dict[str, float] = {}
    for evaluation in evaluations:
        figures |= evaluation.run(model, step=step, final=True)
    return figures


def check_measurable(run: PretrainConfig) -> None:
    """See that grid accuracy is configured only for an objective with a pyramid, and for levels that it trains.

    Raises:
        ConfigError: names the key and what to do.
    """
    if run.evaluation.uri is None:
        return
    if not isinstance(run.objective, AnchorNTXentConfig):
        raise ConfigError(
            f"evaluation.uri: {run.objective.kind} trains no pyramid, so there is no SGA; leave it out, and train a pyramid "
            "on the frozen trunk afterwards (experiment grid_probe)"
        )
    missing = set(run.evaluation.protocol.levels) - set(run.objective.levels)
    if missing:
        raise ConfigError(
            f"evaluation.protocol.levels: {', '.join(sorted(missing))} is not trained; add it to objective.levels"
        )
