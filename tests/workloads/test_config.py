"""One grammar of dotted keys: YAML, overrides, and errors in words."""

from typing import Annotated

import pytest

from workloads.config import (
    ADDED_LATER,
    apply_overrides,
    build,
    config,
    config_hash,
    describe,
    flatten,
    parse_overrides,
    parse_yaml,
    to_dict,
    to_yaml,
    valid_keys,
)
from workloads.errors import ConfigError
from workloads.spec.pretrain import PretrainConfig

LEAST = {"data": {"uri": "somewhere"}}


def built(*overrides: str) -> PretrainConfig:
    return build(PretrainConfig, apply_overrides(LEAST, parse_overrides(overrides)))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective.temprature=0.1", "unknown key objective.temprature; did you mean objective.temperature?"),
        ("temperature=0.1", "unknown key temperature; did you mean objective.temperature?"),
        ("objective.temperature=0", "objective.temperature: input should be greater than 0 (given: 0)"),
        ("objective.temperature=warm", "objective.temperature: input should be a valid number (given: 'warm')"),
        ("steps=true", "steps: input should be a valid integer (given: True)"),
        ("steps=1.5", "steps: input should be a valid integer"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("optimizer.kind=adam", "optimizer"),
        ("views.crop_scale=[0.3, 0.2]", "views.crop_scale: expected 0 < least <= largest"),
        ("objective.levels=[P3, P7]", "P7 is a single cell at views.full_size=128"),
        ("name=a/b", "name"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_its_key(override, sentence):
    with pytest.raises(ConfigError) as error:
        built(override)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_all_faults_are_named_at_once_unknown_keys_first():
    with pytest.raises(ConfigError) as error:
        built("steps=0", "objective.temprature=1", "optimizer.lr=fast", "views.crop_scale=[0.3, 0.2]", "name=a/b")
    assert str(error.value) == (
        "5 faults: (1) unknown key objective.temprature; did you mean objective.temperature? "
        "(2) name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (given: 'a/b') "
        "(3) steps: input should be greater than or equal to 1 (given: 0) "
        "(4) views.crop_scale: expected 0 < least <= largest, given [0.3, 0.2] "
        "(5) optimizer.lr: input should be a valid number (given: 'fast')"
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("objective.crop_grid=foo", "objective.crop_grid: input should be 'native' or a valid integer (given: 'foo')"),
        ("objective.crop_grid=0", "objective.crop_grid: input should be greater than or equal to 2 (given: 0)"),
        ("optimizer.kind=sdg", "optimizer.kind: 'sdg' is unknown; did you mean sgd? known: adamw, sgd, lars"),
        ("optimizer={kind: sgd, betas: [1, 2]}", "unknown key optimizer.betas: kind sgd does not have it"),
    ],
)
def test_a_key_of_several_types_or_kinds_is_one_fault(override, sentence):
    with pytest.raises(ConfigError) as error:
        built(override)
    assert str(error.value) == sentence


def test_of_a_key_given_twice_the_last_value_counts_and_that_is_said_once(caplog: pytest.LogCaptureFixture):
    assert parse_overrides(["steps=1", "name=x", "steps=2"]) == {"steps": 2, "name": "x"}
    assert caplog.messages == ["steps: given twice on the command line; the last value counts: 2"]


@pytest.mark.parametrize("argument", ["steps", "=1", "a..b=1", "1a=2"])
def test_an_override_is_key_equals_value(argument):
    with pytest.raises(ConfigError, match="key=value"):
        parse_overrides([argument])


def test_yaml_numbers_are_numbers_and_repeats_are_refused():
    assert parse_yaml("a: 1e-3\nb: 1_000\nc: .5\nd: 1.5e+2\ne: 1e3x", source="x") == {
        "a": 0.001, "b": 1000, "c": 0.5, "d": 150.0, "e": "1e3x",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="twice"):
        parse_yaml("a: 1\na: 2", source="x")
    with pytest.raises(ConfigError, match="x: not readable"):
        parse_yaml("a: [1", source="x")


def test_another_kind_replaces_the_whole_block():
    base = apply_overrides(LEAST, parse_overrides(["optimizer.kind=adamw", "optimizer.betas=[0.9, 0.95]"]))
    changed = build(PretrainConfig, apply_overrides(base, parse_overrides(["optimizer.lr=0.5", "optimizer.kind=sgd"])))
    assert to_dict(changed.optimizer) == {"kind": "sgd", "lr": 0.5, "weight_decay": 1e-4, "momentum": 0.9}


def test_a_config_survives_yaml_and_its_hash_is_of_its_values():
    settings = built("objective.crop_grid=12", "optimizer.kind=lars")
    again = build(PretrainConfig, parse_yaml(to_yaml(settings), source="x"))
    assert again == settings and config_hash(again) == config_hash(settings)
    assert config_hash(built("objective.crop_grid=13", "optimizer.kind=lars")) != config_hash(settings)
    assert flatten(settings)["objective.crop_grid"] == 12
    with pytest.raises(AttributeError):
        settings.steps = 3


def test_every_key_has_a_help_text():
    assert [key for key, _, help_text in describe(PretrainConfig) if not help_text] == []
    assert "optimizer.trust" in valid_keys(PretrainConfig)


def test_a_key_that_a_later_release_added_changes_the_hash_only_where_it_is_set() -> None:
    @config
    class Before:
        steps: int = 10

    @config
    class After:
        steps: int = 10
        warmup: Annotated[int, ADDED_LATER] = 0
        """Steps of warm-up."""

    @config
    class Outer:
        inner: After = After()

    assert config_hash(After()) == config_hash(Before()) != config_hash(After(warmup=1))
    assert config_hash(Outer()) == config_hash({"inner": {"steps": 10}}) != config_hash(Outer(inner=After(warmup=1)))
    assert config_hash([After()]) == config_hash([Before()])
    assert to_dict(After()) == {"steps": 10, "warmup": 0}  # it is stored all the same
