"""Loads an experiment from its name or file and `key=value` arguments: `load_experiment`, and `load_sweep` with its search."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workloads.config import apply_overrides, build, parse_overrides, read_yaml
from workloads.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.experiments.spec import AnyExperiment
    from orchestrator.experiments.sweep_spec import SweepExperiment

E = TypeVar("E", bound="AnyExperiment")
C = TypeVar("C")  # any config

_PATHS = (
    *("uri", "path", "init_from", "cache_dir", "ledger", "selection_uri", "trunk_from", "train_uri", "test_uri"),
    *("boxes", "masks", "file"),
)
"""Last parts of the keys that may name a local file."""

_RAY_CACHE = "working_dir_files"  # folder below which Ray unpacks the working directories of jobs

EXPERIMENTS = Path(__file__).parent


def _shipped() -> list[Path]:
    return sorted(EXPERIMENTS.glob("*/*.yaml"), key=lambda path: path.stem)


def list_experiments() -> dict[str, str]:
    """Name → opening comment of the file, for every experiment of the package."""
    return {path.stem: _opening_comment(path) for path in _shipped()}


def _opening_comment(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)


def find_experiment(name: str) -> Path:
    """The file of an experiment that is given by name or by path.

    Raises:
        ConfigError: there is no such experiment; the message suggests the nearest.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such experiment file")
        return Path(name)
    known = {path.stem: path for path in _shipped()}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise ConfigError(
        f"{name}: no such experiment" + (f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}")
    )


def load_experiment(name: str, arguments: Sequence[str] = (), *, loop: str | None = None) -> "AnyExperiment":
    """Read a file, apply overrides, validate, and make local paths absolute, because workers run in other folders.

    Args:
        loop: refuse an experiment of another loop; None: accept any.

    Raises:
        ConfigError: one line that names each fault by its dotted key.
    """
    overrides = parse_overrides(arguments)
    data = {key: value for key, value in read_yaml(find_experiment(name)).items() if key != "sweep"}
    data = apply_overrides(data, overrides)
    given = data.get("loop", "pretrain")
    if loop is not None and given != loop and given in ("pretrain", "finetune"):
        command = "train" if given == "pretrain" else given
        raise ConfigError(f"loop: {name} is an experiment of the {given} loop; run it by `orchestrator {command}`")
    from orchestrator.experiments.spec import EXPERIMENTS as KINDS  # late: it imports torch, which takes seconds
    from workloads.loops.dispatch import loop_of

    return absolute_paths(build(KINDS[loop_of(data)], data))


def has_sweep(name: str) -> bool:
    """Whether an experiment's file has a `sweep` section."""
    return "sweep" in read_yaml(find_experiment(name))


def load_sweep(name: str, arguments: Sequence[str] = ()) -> "SweepExperiment":
    """Load an experiment with its `sweep` section; see `load_experiment`.

    Raises:
        ConfigError: one line that names each fault by its dotted key.
    """
    from orchestrator.experiments.domains import override_space, take_dotted

    in_space, arguments = take_dotted(arguments, "sweep.space")
    in_trial, arguments = take_dotted(arguments, "sweep.trial")
    data = read_yaml(find_experiment(name))
    section = dict(data.pop("sweep", None) or {})
    section["space"] = override_space(section.get("space") or {}, parse_overrides(in_space))
    section["trial"] = {**(section.get("trial") or {}), **parse_overrides(in_trial)}
    if not section["space"]:
        raise ConfigError(
            f"sweep.space: {name} has no search space; give one, as "
            "sweep.space.objective.temperature='{kind: loguniform, low: 0.03, high: 0.3}'"
        )
    data = apply_overrides({**data, "sweep": section}, parse_overrides(arguments))
    from orchestrator.experiments.sweep_spec import SweepExperiment

    return absolute_paths(build(SweepExperiment, data))


def absolute_paths(experiment: "E") -> "E":
    """The experiment with every key that names a local file made absolute.

    Raises:
        ConfigError: `storage.path` is relative in a job whose folder Ray deletes with the cluster.
    """
    check_lasting("storage.path", experiment.storage.path)
    return with_absolute_paths(experiment)


def check_lasting(key: str, uri: str) -> None:
    """Check that an output does not lie in the working directory of a Ray job.

    Raises:
        ConfigError: `uri` is relative in a job whose folder Ray deletes with the cluster.
    """
    if _RAY_CACHE in Path.cwd().parts and absolute_uri(uri) != uri:
        raise ConfigError(
            f"{key}: {uri} lies in this job's working directory, which Ray deletes with its cluster; "
            "give an absolute folder that all nodes share, or s3://bucket/prefix"
        )


def with_absolute_paths(settings: C) -> C:
    """`settings` with an absolute path in every key that names a local file, in nested blocks too."""
    absolute: C = _absolute(settings)
    return absolute


def _absolute(block: Any) -> Any:
    if not dataclasses.is_dataclass(block) or isinstance(block, type):
        return block
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if field.name in _PATHS and isinstance(value, str):
            changes[field.name] = absolute_uri(value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _absolute(value)
    return dataclasses.replace(block, **changes)


def absolute_uri(uri: str) -> str:
    """`uri` itself if it has a scheme, else the absolute path of the local file."""
    return uri if "://" in uri or not uri else str(Path(uri).expanduser().absolute())
