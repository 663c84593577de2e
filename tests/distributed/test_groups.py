"""What is taken for a process group, and tensors that are spread over one."""

import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from gcl_kernels import ClipLoss, GCLLoss, gcl_loss, pairwise_logsumexp
from gcl_kernels.distributed import agreement
from tests.distributed.pool import error_of

N, D = 4, 3  # rows of a rank
SCORES = torch.tensor([1.0, 20.0, 60.0, 100.0])


def sides(rank):
    g = torch.Generator().manual_seed(rank)
    return [torch.randn(N, D, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]


def losses(x, y, process_group, module):
    """Of every public function that takes a group, by the name they show in errors."""
    return {
        "gcl_loss": gcl_loss(x, y, 2.0, label_smoothing=0.1, process_group=process_group),
        "GCLLoss": module(x, y, SCORES, 2.0),
        "pairwise_logsumexp": sum(v.sum() for v in pairwise_logsumexp(x, y, 2.0, process_group=process_group)),
    }


def values_and_gradients(process_group, module, rank):
    x, y = sides(rank)
    results = losses(x, y, process_group, module)
    return {name: [v.detach() for v in (loss, *torch.autograd.grad(loss, (x, y)))] for name, loss in results.items()}


def expect_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_world_without_a_group_is_one_process():
    assert not dist.is_initialized()
    actual, expected = (
        values_and_gradients(group, GCLLoss(normalize="mean", process_group=group), 0) for group in ("world", None)
    )
    expect_equal(actual, expected)


def world_on_rank(group, module):
    rank = dist.get_rank(group)
    return [
        values_and_gradients(given, loss, rank)
        for given, loss in (("world", module), (group, GCLLoss(normalize="mean", process_group=group)))
    ]


def test_world_is_the_group_at_the_time_of_the_call(pool):
    module = GCLLoss(
        normalize="mean", process_group="world"
    )  # made, and sent to the ranks, by a process without a group
    for actual, expected in pool.run(4, world_on_rank, module):
        expect_equal(actual, expected)


def test_code_compiled_before_there_is_a_group_is_not_used_after(tmp_path, monkeypatch):
    x, y = sides(0)
    module = GCLLoss(process_group="world")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expect_equal(compiled(x, y, SCORES, 2.0), module(x, y, SCORES, 2.0))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    agreements, agree = [], agreement.agree
    monkeypatch.setattr(agreement, "agree", lambda *a: agreements.append(1) or agree(*a))
    try:
        expect_equal(compiled(x, y, SCORES, 2.0), module(x, y, SCORES, 2.0).detach())
        assert len(agreements) == 2  # the compiled call's too
    finally:
        dist.destroy_process_group()


def mesh_on_rank(group):
    mesh, rank = DeviceMesh.from_group(group, "cpu"), dist.get_rank(group)
    return [
        values_and_gradients(given, GCLLoss(normalize="mean", process_group=given), rank) for given in (mesh, group)
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_a_mesh_of_one_dimension_is_its_group(pool, world):
    for actual, expected in pool.run(world, mesh_on_rank):
        expect_equal(actual, expected)


def two_dimensions_on_rank(_):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    x, y = sides(dist.get_rank())
    calls = (
        lambda: gcl_loss(x, y, 2.0, process_group=mesh),
        lambda: pairwise_logsumexp(x, y, 2.0, process_group=mesh),
        lambda: GCLLoss(process_group=mesh),
    )
    of_slice, of_group = (gcl_loss(x, y, 2.0, process_group=g).item() for g in (mesh["data"], mesh.get_group("data")))
    return [str(error_of(call)) for call in calls], of_slice == of_group


def test_a_mesh_of_two_dimensions_is_refused_and_its_slice_taken(pool):
    for errors, slice_is_taken in pool.run(4, two_dimensions_on_rank):
        assert slice_is_taken
        for error in errors:
            assert error.startswith(
                "process_group: expected a DeviceMesh of one dimension, got 2 dimensions ('data', 'model')"
            )


def sharded_on_rank(group):
    mesh, rank = DeviceMesh.from_group(group, "cpu"), dist.get_rank(group)
    module = GCLLoss(normalize="mean", process_group=group)
    spread = [DTensor.from_local(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in sides(rank)]
    results = {}
    for name, loss in losses(*spread, group, module).items():
        gradients = torch.autograd.grad(loss, spread)
        assert all(isinstance(g, DTensor) and list(g.placements) == [Shard(0)] for g in gradients), name
        results[name] = [loss.detach(), *(g.to_local() for g in gradients)]
    return results, values_and_gradients(group, module, rank)


@pytest.mark.parametrize("world", [1, 2])
def test_the_rows_of_a_sharded_tensor_are_those_of_its_ranks(pool, world):
    for actual, expected in pool.run(world, sharded_on_rank):
        expect_equal(actual, expected)


def everything_sharded_on_rank(group):
    """Whatever a rank has rows of."""
    mesh, rank = DeviceMesh.from_group(group, "cpu"), dist.get_rank(group)

    def loss(given):
        g = torch.Generator().manual_seed(rank)
        options = {
            "labels": given(torch.arange(N) + N * rank),
            "lhs_ids": given(torch.randint(3, (N,), generator=g)),
            "rhs_ids": given(torch.randint(3, (N,), generator=g)),
            "lhs_field_mask": given(torch.rand(N, 2, generator=g) > 0.2),
        }
        x, y = (given(x.detach()) for x in sides(rank))
        return GCLLoss(process_group=group)({"a": x, "b": y}, y, given(SCORES), 2.0, **options).item()

    return loss(lambda x: DTensor.from_local(x, mesh, [Shard(0)])), loss(lambda x: x)


def test_scores_labels_ids_and_masks_may_be_sharded_too(pool):
    for actual, expected in pool.run(2, everything_sharded_on_rank):
        assert actual == expected


def replicated_on_rank(group):
    mesh = DeviceMesh.from_group(group, "cpu")
    tensors = [*sides(0), torch.tensor(2.0, dtype=torch.float64).requires_grad_()]
    copies = [DTensor.from_local(x.detach(), mesh, [Replicate()]).requires_grad_() for x in tensors]
    results = []
    for function in (gcl_loss, ClipLoss(), lambda *a: sum(v.sum() for v in pairwise_logsumexp(*a))):
        loss = function(*copies)
        gradients = torch.autograd.grad(loss, copies)
        assert all(list(g.placements) == [Replicate()] for g in gradients)
        expected = function(*tensors)
        results.append(
            ([loss.detach(), *(g.to_local() for g in gradients)],
             [expected.detach(), *torch.autograd.grad(expected, tensors)])
        )  # fmt: skip
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_a_replicated_tensor_is_whole_on_every_rank(pool, world):
    for results in pool.run(world, replicated_on_rank):
        for actual, expected in results:
            expect_equal(actual, expected)


def clip_on_rank(_):
    mesh, rank = init_device_mesh("cpu", (4,)), dist.get_rank()
    results = []
    for flags in ((False, False), (False, True), (True, False), (True, True)):
        module = ClipLoss(*flags, rank=rank, world_size=4)
        x, y = sides(rank)
        spread = [DTensor.from_local(v.detach(), mesh, [Shard(0)]).requires_grad_() for v in (x, y)]
        actual, expected = module(*spread, 2.0), module(x, y, 2.0)
        gradients = [g.to_local() for g in torch.autograd.grad(actual, spread)]
        results.append(([actual.detach(), *gradients], [expected.detach(), *torch.autograd.grad(expected, (x, y))]))
    return results


def test_clip_loss_takes_sharded_features(pool):
    for results in pool.run(4, clip_on_rank):
        for actual, expected in results:
            expect_equal(actual, expected)


def refusals_on_rank(group):
    mesh = DeviceMesh.from_group(group, "cpu")
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    x, y = (v.detach() for v in sides(dist.get_rank(group)))
    shard, copy, partial, columns = (
        DTensor.from_local(x, mesh, [placement]) for placement in (Shard(0), Replicate(), Partial(), Shard(1))
    )
    scale = DTensor.from_local(torch.tensor(2.0), mesh, [Replicate()])
    calls = {
        "partial": lambda f: f(partial, y, 2.0),
        "columns": lambda f: f(columns, y[:, :1].expand(-1, D), 2.0, process_group=group),
        "no group": lambda f: f(shard, y, 2.0),
        "rhs": lambda f: f(y, shard, 2.0),
        "other group": lambda f: f(shard, y, 2.0, process_group=alone),
        "copies": lambda f: f(copy, y, 2.0, process_group=group),
        "scale": lambda f: f(x, y, scale, process_group=group),
    }
    errors = {
        name: [error_of(lambda f=f, call=call: call(f)) for f in (gcl_loss, pairwise_logsumexp)]
        for name, call in calls.items()
    }
    errors["field"] = [error_of(lambda: gcl_loss({"a": y, "b": shard}, y, 2.0))]
    errors["features"] = [error_of(lambda: ClipLoss()(x, shard, 2.0))]
    return {name: [f"{type(error).__name__}: {error}" for error in found] for name, found in errors.items()}


def test_what_would_be_wrong_is_refused_by_name(pool):
    placed = r"ValueError: lhs: expected a DTensor placed as Replicate() or Shard(0), got [{}]; redistribute() it first"
    rows = "expected a process group over the ranks that hold the rows of a Shard(0) DTensor, which are ranks [0, 1]"
    copies = (
        "expected no process group over the ranks that hold the copies of a Replicate() DTensor, which are ranks [0, 1]"
    )
    for rank, errors in enumerate(pool.run(2, refusals_on_rank)):
        expected = {
            "partial": placed.format("Partial(sum)"),
            "columns": placed.format("Shard(dim=1)"),
            "no group": f"ValueError: lhs: {rows}, got none (process_group=; ClipLoss: world_size=)",
            "rhs": f"ValueError: rhs: {rows}, got none (process_group=; ClipLoss: world_size=)",
            "other group": f"ValueError: lhs: {rows}, got one over ranks [{rank}]",
            "copies": f"ValueError: lhs: {copies}, got one over ranks [0, 1]",
            "scale": f"ValueError: logit_scale: {copies}, got one over ranks [0, 1]",
            "field": f"ValueError: lhs[b]: {rows}, got none (process_group=; ClipLoss: world_size=)",
            "features": f"ValueError: text_features: {rows}, got none (process_group=; ClipLoss: world_size=)",
        }
        for name, message in expected.items():
            assert errors[name] == [message] * len(errors[name]), name


def pickling_on_rank(group):
    return str(error_of(lambda: pickle.dumps(GCLLoss(process_group=group))))


def test_a_module_with_a_group_inside_cannot_be_pickled(pool):
    assert pool.run(1, pickling_on_rank) == ["cannot pickle 'torch._C._distributed_c10d.ProcessGroup' object"]


def test_clip_loss_of_many_ranks_needs_their_group():
    assert not dist.is_initialized()
    x, y = sides(0)
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        ClipLoss(rank=0, world_size=2)(x, y, 2.0)
