"""DetCo against a restatement with loops, its queues against lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import detco as oracle
from tests.workloads.objectives.pairs import pair_views_of
from workloads.models.backbone import STAGES, BackboneConfig
from workloads.models.momentum import KeyQueue
from workloads.objectives.detco import DetCo, DetCoConfig, queue_contrast, statistics_groups
from workloads.parallel.gradient_cache import backward_in_micro_batches


def model_of(queue_size: int = 8, norm: str = "group", **knobs) -> DetCo:
    torch.manual_seed(0)
    options = DetCoConfig(
        queue_size=queue_size,
        projection_dim=8,
        global_hidden=16,
        local_hidden=16,
        temperature=0.2,
        momentum=0.9,
        **knobs,
    )
    return DetCo(options, BackboneConfig(norm=norm), patches=4)


def queues_of(model: DetCo) -> list[list[list[list[float]]]]:
    """[kind][level] → the keys that count."""
    found = []
    for kind in ("global", "local"):
        contents = [model.queues[f"{kind}_{stage}"].contents() for stage in STAGES]
        found.append([keys[filled].tolist() for keys, filled in contents])
    return found


def test_loss_equals_the_loops_with_queues_empty_part_full_and_full():
    model = model_of()
    for step in range(4):
        views = pair_views_of(3, patches=4, seed=step, last_is_valid=step != 1)
        embedded = model.embed(views)
        result = model.loss(embedded, views)
        expected = oracle.loss(
            embedded["queries"].tolist(),
            embedded["keys"].tolist(),
            queues_of(model),
            views.valid.tolist(),
            model.settings.level_weights,
            0.2,
        )
        assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        model.after_update(step, 10)
    assert len(queues_of(model)[1][3]) == 8


def test_level_weights_reproduce_the_sum():
    views = pair_views_of(3, patches=4)
    model = model_of()
    model.loss(model.embed(views), views)
    model.after_update(0, 10)
    metrics = model.loss(model.embed(views), views).metrics
    parts = [
        weight * metrics[f"train/loss_{name}_{stage.lower()}"]
        for stage, weight in zip(STAGES, (0.1, 0.4, 0.7, 1.0), strict=True)
        for name in ("global_global", "local_local", "local_global")
    ]
    assert float(metrics["train/loss"]) == pytest.approx(float(sum(parts)), rel=1e-5)
    only_last = model_of(level_weights=(0.0, 0.0, 0.0, 1.0))
    assert float(only_last(views).metrics["train/loss_global_global_c5"]) == 0.0  # its queue is empty


def test_one_key_is_attracted_and_only_filled_places_repel():
    query = torch.nn.functional.normalize(torch.randn(2, 4), dim=1)
    queue, filled = torch.full((3, 4), torch.nan), torch.tensor([True, False, False])
    queue[0] = query[1]
    queue[1:] = 100.0
    loss, found = queue_contrast(query, query, queue, filled, torch.tensor([True, True]), temperature=0.5)
    expected = oracle.contrast(query[0].tolist(), query[0].tolist(), [query[1].tolist()], 0.5)
    assert float(loss[0]) == pytest.approx(expected, rel=1e-5)
    assert found.all()  # of the second the key and the place in the queue are equal: a tie counts


def test_an_invalid_row_touches_nothing_not_even_as_nan():
    query = torch.randn(2, 4)
    query[1] = torch.nan
    query.requires_grad_()
    arguments = (torch.randn(3, 4), torch.ones(3, dtype=torch.bool), torch.tensor([True, False]))
    loss, found = queue_contrast(query, query.detach(), *arguments, temperature=0.5)
    loss.sum().backward()
    assert float(loss[1].detach()) == 0.0 and not found[1] and torch.isfinite(query.grad).all()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(4, 11),
    batches=st.lists(st.lists(st.booleans(), min_size=1, max_size=4), max_size=12),
)
def test_a_queue_holds_the_newest_keys_whatever_comes(size, batches):
    queue, expected = KeyQueue(size, 1), oracle.Queue(size)
    number = 0
    for valid in batches:
        keys = [float(number + i + 1) for i in range(len(valid))]
        number += len(valid)
        queue.push(torch.tensor(keys)[:, None], torch.tensor(valid))
        expected.push([key for key, ok in zip(keys, valid, strict=True) if ok])
        contents, filled = queue.contents()
        assert sorted(contents[filled].flatten().tolist()) == expected.keys


def test_more_keys_than_places_are_refused():
    with pytest.raises(ValueError, match="5 keys do not fit into a queue of 4"):
        KeyQueue(4, 1).push(torch.zeros(5, 1), torch.ones(5, dtype=torch.bool))


def test_queues_belong_to_the_checkpoint_and_keys_of_a_step_enter_after_its_update():
    model, views = model_of(), pair_views_of(3, patches=4)
    result = model(views)
    assert not model.queues["global_C5"].contents()[1].any()
    result.loss.backward()
    model.after_update(0, 10)
    assert int(model.queues["local_C2"].count) == 3
    other = model_of()
    other.load_state_dict(model.state_dict())
    assert queues_of(other) == queues_of(model)
    assert len([n for n in model.state_dict() if n.endswith(".keys")]) == 8


def test_micro_batches_give_the_same_loss_gradients_and_queues():
    whole, cached = model_of(), model_of()
    for step in range(2):
        views = pair_views_of(4, patches=4, seed=step, last_is_valid=False)
        for model in (whole, cached):
            model.zero_grad()
        expected = whole(views)
        expected.loss.backward()
        found = backward_in_micro_batches(cached, views, 3)
        torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-5, atol=1e-6)
        for model in (whole, cached):
            model.after_update(step, 10)
    for (name, a), b in zip(whole.named_parameters(), cached.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=5e-5 * float(a.grad.abs().max()), msg=name)
    torch.testing.assert_close(queues_of(cached), queues_of(whole), rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), groups=st.integers(1, 9))
def test_groups_of_statistics_hold_each_row_once_and_those_of_keys_mix_those_of_queries(rows, groups):
    queries, keys = (
        [list(range(rows))[part] for part in statistics_groups(rows, groups, of_keys=kind)] for kind in (False, True)
    )
    for parts in (queries, keys):
        assert sorted(row for part in parts for row in part) == list(range(rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and len(parts) == max(min(groups, rows // 2), 1)
    common = [len(set(a) & set(b)) for a in queries for b in keys]
    assert max(common) - min(common) <= 1


def test_statistics_come_from_the_groups_alone():
    model, views = model_of(norm="batch", statistics_groups=2), pair_views_of(6, patches=4)
    found = model.embed(views)
    for name, networks, view, rows in (
        ("queries", model.online, 0, [3, 4, 5]),
        ("keys", model.target, 1, [1, 3, 5]),
    ):
        alone = networks(views.images[rows, view], views.patches[rows, view])
        torch.testing.assert_close(found[name][rows], alone, rtol=1e-4, atol=1e-5)
    whole = model_of(norm="batch", statistics_groups=1).embed(views)
    assert (found["queries"] - whole["queries"]).abs().max() > 1e-3  # so the groups matter
    found["queries"].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.online.parameters() if p.grad is not None)


def test_heads_with_a_norm_tell_images_apart_from_the_start():
    def likeness(head_norm: bool) -> float:
        model = model_of(norm="batch", head_norm=head_norm, statistics_groups=1)
        with torch.no_grad():
            found = model.embed(pair_views_of(8, patches=4))["queries"][:, 0, -1]
        return float((found @ found.T).triu(1).sum() / 28)

    assert likeness(True) < 0.5 < 0.8 < likeness(False)
