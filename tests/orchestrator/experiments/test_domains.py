"""What a sweep tries: points are reproducible, in their domains, conditional where asked, and wrong spaces are one sentence."""

import json
import math
import pickle

import optuna
import pytest

from orchestrator.experiments.domains import DomainConfig, override_space, take_dotted
from orchestrator.sweeps.space import SearchSpace
from workloads.config import build, config
from workloads.errors import ConfigError

DOMAINS = {
    "objective.temperature": {"kind": "loguniform", "low": 0.01, "high": 1.0},
    "objective.crop_grid": {"kind": "grid", "values": ["native", 4, 8]},
    "optimizer.kind": {"kind": "choice", "values": ["adamw", "sgd"]},
    "optimizer.momentum": {"kind": "uniform", "low": 0.5, "high": 0.9, "when": {"optimizer.kind": "sgd"}},
    "objective.anchor_negatives": {"kind": "int", "low": 1, "high": 64, "log": True},
}
DEFAULTS = {
    "objective.temperature": 0.1,
    "objective.crop_grid": "native",
    "optimizer.kind": "adamw",
    "objective.anchor_negatives": 64,
}


@config
class Holder:
    """As the sweep's section holds them."""

    space: dict[str, DomainConfig]


def space_of(domains: dict | None = None, defaults: dict | None = None) -> SearchSpace:
    return SearchSpace(build(Holder, {"space": domains or DOMAINS}).space, defaults or DEFAULTS)


def test_the_nth_random_point_does_not_depend_on_how_many_there_are():
    few, many = space_of().random(5, seed=3), space_of().random(40, seed=3)
    assert many[:5] == few
    assert space_of().random(5, seed=4) != few


def test_random_points_lie_in_their_domains_and_grids_are_gone_through_in_turn():
    points = space_of().random(60, seed=0)
    assert [point["objective.crop_grid"] for point in points] == ["native", 4, 8] * 20
    temperatures = [point["objective.temperature"] for point in points]
    assert all(0.01 <= t <= 1 for t in temperatures)
    assert 15 <= sum(t < 0.1 for t in temperatures) <= 45  # half of the logarithms, not a tenth of the numbers
    counts = [point["objective.anchor_negatives"] for point in points]
    assert all(isinstance(n, int) and 1 <= n <= 64 for n in counts) and 15 <= sum(n < 8 for n in counts) <= 45
    assert {point["optimizer.kind"] for point in points} == {"adamw", "sgd"}


def test_a_conditional_key_is_there_only_under_its_condition():
    for point in space_of().random(30, seed=1):
        assert ("optimizer.momentum" in point) == (point["optimizer.kind"] == "sgd")
    fixed = {"optimizer.momentum": DOMAINS["optimizer.momentum"]}
    assert space_of(fixed, {"optimizer.kind": "adamw"}).random(3, seed=0) == [{}, {}, {}]
    assert all(space_of(fixed, {"optimizer.kind": "sgd"}).random(3, seed=0))


def test_a_small_space_is_not_drawn_twice_before_it_is_used_up():
    small = {"a": {"kind": "choice", "values": [1, 2]}, "b": {"kind": "choice", "values": [1, 2]}}
    points = space_of(small, {}).random(4, seed=0)
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 4
    assert len(space_of(small, {}).random(6, seed=0)) == 6
    start = points[0]
    assert start not in space_of(small, {}).random(3, seed=0, known=[start])


def test_the_grid_crosses_everything_and_counts_inactive_differences_once():
    domains = {
        "optimizer.kind": {"kind": "choice", "values": ["adamw", "sgd"]},
        "optimizer.momentum": {"kind": "choice", "values": [0.5, 0.9], "when": {"optimizer.kind": "sgd"}},
        "a": {"kind": "grid", "values": [1, 2]},
    }
    assert space_of(domains, {}).grid() == [
        {"optimizer.kind": "adamw", "a": 1},
        {"optimizer.kind": "adamw", "a": 2},
        {"optimizer.kind": "sgd", "optimizer.momentum": 0.5, "a": 1},
        {"optimizer.kind": "sgd", "optimizer.momentum": 0.5, "a": 2},
        {"optimizer.kind": "sgd", "optimizer.momentum": 0.9, "a": 1},
        {"optimizer.kind": "sgd", "optimizer.momentum": 0.9, "a": 2},
    ]
    with pytest.raises(ConfigError, match=r"sweep.space.objective.temperature: a grid needs .* given loguniform"):
        space_of().grid()


def test_optuna_suggests_what_the_point_then_is():
    space = space_of({**DOMAINS, "levels": {"kind": "choice", "values": [["P3"], ["P3", "P4"], None]}})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(30):
        trial = study.ask()
        point = space.suggest(trial)
        assert space.decode(trial.params) == point
        assert space.decode(space.encode(point)) == point
        assert ("optimizer.momentum" in point) == (point["optimizer.kind"] == "sgd")
        assert point["levels"] in (["P3"], ["P3", "P4"], None)
        assert math.isclose(point["objective.temperature"], trial.params["objective.temperature"], rel_tol=1e-3)


def test_tune_can_store_the_space():
    assert pickle.loads(pickle.dumps(space_of())).random(3, seed=0) == space_of().random(3, seed=0)


def test_the_start_is_the_experiments_own_values():
    assert space_of().baseline() == {**DEFAULTS}
    assert space_of().misplaced_baseline() is None
    assert space_of(defaults={**DEFAULTS, "objective.crop_grid": 16}).misplaced_baseline() == "objective.crop_grid"
    assert space_of(defaults={**DEFAULTS, "objective.anchor_negatives": True}).misplaced_baseline() is not None


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"kind": "loguniform", "low": 0, "high": 1}, "low: a loguniform domain must begin above 0"),
        ({"kind": "uniform", "low": 2, "high": 1}, "low: must be below high"),
        ({"kind": "int", "low": 0, "high": 9, "log": True}, "low: with log it must be above 0"),
        ({"kind": "int", "low": 0.5, "high": 9}, r"space.a.low: .*integer"),
        ({"kind": "choice", "values": []}, r"space.a.values: .*at least 1"),
        ({"kind": "uniform", "low": 1, "hihg": 2}, r"unknown key space.a.hihg"),
        ({"kind": "normal"}, "space.a.kind: 'normal' is unknown; did you mean uniform?"),
    ],
)
def test_a_wrong_domain_is_one_sentence(domain, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(Holder, {"space": {"a": domain}})
    assert "\n" not in str(caught.value)


def test_overrides_replace_a_domain_a_field_of_it_or_take_it_out():
    ours, others = take_dotted(["sweep.space.a.b.low=1", "steps=3", "sweep.trials=2"], "sweep.space")
    assert (ours, others) == (["a.b.low=1"], ["steps=3", "sweep.trials=2"])
    space = {"a.b": {"kind": "uniform", "low": 0, "high": 2}, "c": {"kind": "choice", "values": [1]}}
    changed = override_space(space, {"a.b.low": 1, "c": None, "d": {"kind": "choice", "values": [2]}})
    assert changed == {"a.b": {"kind": "uniform", "low": 1, "high": 2}, "d": {"kind": "choice", "values": [2]}}
    assert space["a.b"]["low"] == 0
