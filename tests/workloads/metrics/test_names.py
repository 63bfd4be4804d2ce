"""Keys of evaluation metrics and their parts."""

import pytest

from workloads.metrics.names import MetricName


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("eval/sga_p3", MetricName("sga_p3")),
        ("eval/photometric/gap_r", MetricName("gap_r", group="photometric")),
        ("eval/on_val-0123abcd/one_shot/ap50", MetricName("ap50", group="one_shot", dataset="val-0123abcd")),
        ("eval/ap50/traffic light/n.a.", MetricName("traffic light/n.a.", group="ap50")),
        ("eval/on_val-0123abcd/sga", MetricName("sga").on("val-0123abcd")),
    ],
)
def test_a_key_and_its_parts(key: str, parts: MetricName):
    assert MetricName.parse(key) == parts and str(parts) == key
    assert str(parts.on(None)) == key.replace("on_val-0123abcd/", "")


@pytest.mark.parametrize("key", ["train/loss", "eval", "eval/", "eval/a/", "eval/on_val"])
def test_other_keys_are_refused(key: str):
    with pytest.raises(ValueError, match="expected eval/"):
        MetricName.parse(key)
