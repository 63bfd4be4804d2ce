"""Objectives over pairs of views on 1, 2 and 3 real processes that hold uneven shares: the same loss, gradients, target and queues."""

import dataclasses

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_on_ranks
from tests.workloads.objectives.pairs import pair_views_of
from tests.workloads.objectives.test_detco import model_of as detco
from tests.workloads.objectives.test_detcon import model_of as detcon
from workloads.models.backbone import BackboneConfig
from workloads.objectives.ntxent import NTXent, NTXentConfig

SHARES = {1: [5], 2: [3, 2], 3: [1, 3, 1]}


def ntxent(norm: str) -> NTXent:
    torch.manual_seed(0)
    return NTXent(NTXentConfig(projector_hidden=16, projection_dim=8), BackboneConfig(norm=norm))


def models() -> dict[str, nn.Module]:
    return {
        "ntxent": ntxent("group"),
        # Float32 rounding of so few statistics grows to a percent on its way to the first layer.
        "ntxent with statistics of the global batch, float64": ntxent("sync_batch").double(),
        "detcon S": detcon("S"),
        "detcon B": detcon("B"),
        "detco": detco(),
    }


def two_steps(rank: int, world_size: int) -> dict:
    first = sum(SHARES[world_size][:rank])
    part = slice(first, first + SHARES[world_size][rank])
    found = {}
    for name, model in models().items():
        model.train()
        wrapped = DistributedDataParallel(model) if world_size > 1 else model
        for step in range(2):  # the second sees what the first left behind
            model.zero_grad()
            views = pair_views_of(5, patches=4, seed=step, last_is_valid=step == 0).rows(part)
            views = dataclasses.replace(views, images=views.images.to(next(model.parameters()).dtype))
            result = wrapped(views)
            result.loss.backward()
            model.after_update(step, 10)
        found[name] = {
            "loss": result.metrics["train/loss"],
            "gradients": {n: p.grad for n, p in model.named_parameters() if p.requires_grad},
            "state": {n: t for n, t in model.state_dict().items() if "target" in n or "queues" in n},
        }
    return found


def compare_on_rank(rank: int, world_size: int, alone: str) -> int:
    """Here rather than in the test, so that no rank has to hand over its networks; how many tensors were compared."""
    found, compared = two_steps(rank, world_size), 0
    for name, expected in torch.load(alone, weights_only=True, mmap=True).items():
        torch.testing.assert_close(found[name]["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
        largest = max(float(g.abs().max()) for g in expected["gradients"].values())
        assert found[name]["gradients"].keys() == expected["gradients"].keys()
        for key, gradient in expected["gradients"].items():
            scale = max(float(gradient.abs().max()), 1e-3 * largest)
            torch.testing.assert_close(
                found[name]["gradients"][key], gradient, rtol=0, atol=5e-5 * scale, msg=f"{name}: {key}"
            )
        for key, tensor in expected["state"].items():
            # A queue's last row is where keys that do not count are written.
            rows = slice(None, -1) if key.endswith(".keys") else ...
            torch.testing.assert_close(found[name]["state"][key][rows], tensor[rows], rtol=1e-4, atol=1e-5, msg=key)
        compared += len(expected["gradients"]) + len(expected["state"])
    return compared


def test_same_loss_gradients_target_and_queues_on_1_2_and_3_processes(tmp_path):
    torch.save(two_steps(0, 1), tmp_path / "alone.pt")
    for world_size in (2, 3):
        counts = run_on_ranks(compare_on_rank, world_size, tmp_path / str(world_size), str(tmp_path / "alone.pt"))
        assert counts == [counts[0]] * world_size and counts[0] > 500
    (tmp_path / "alone.pt").unlink()
