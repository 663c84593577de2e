"""What the library takes for a process group, and for tensors that are spread over one (`DTensor`)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # some builds of torch have no distributed
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    ProcessGroupLike: TypeAlias = ProcessGroup | DeviceMesh | Literal["world"] | None
else:
    ProcessGroupLike = Any

T = TypeVar("T")


def check_process_group(process_group: object) -> None:
    """What can be told before a group is needed: the type, and a mesh's dimensions."""
    if isinstance(process_group, str):
        if process_group != "world":
            raise ValueError(f"process_group: expected 'world' as the only name, got {process_group!r}")
    elif _is_mesh(process_group):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group: expected a DeviceMesh of one dimension, got {process_group.ndim} dimensions "
                f"{process_group.mesh_dim_names or tuple(process_group.shape)}; pass one of them, mesh[name]"
            )
    elif process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group: expected None, 'world', a DeviceMesh of one dimension, or a torch.distributed.ProcessGroup that "
            f"this process is a member of, got {type(process_group).__name__} {process_group!r}"
        )


def resolve_group(process_group: ProcessGroupLike) -> ProcessGroup | None:
    """The group that `process_group` means at this moment; None for a single process.

    `"world"` is the default group, or None where `torch.distributed` has not been initialised.
    """
    check_process_group(process_group)
    if isinstance(process_group, str):
        # None before init_process_group. torch.compile compiles again when it changes, which is_initialized() does not cause.
        return dist.group.WORLD if dist.is_available() else None
    if _is_mesh(process_group):
        if process_group.get_coordinate() is None:
            raise ValueError(f"process_group: expected a DeviceMesh with this process in it, got {process_group!r}")
        return process_group.get_group()
    return process_group  # pyright: ignore[reportReturnType]


def local_tensor(name: str, x: T, process_group: ProcessGroup | None) -> T | Tensor:
    """A DTensor's rows on this rank, with gradients that go back to it; anything else as it is.

    `Shard(0)` needs a process group over the ranks that hold its other rows. `Replicate()` needs none, or one over other ranks
    than those that hold its copies: otherwise every rank would pass the same rows.

    Raises:
        ValueError: naming the argument, for other placements and for a process group that does not fit.
    """
    if type(x) is Tensor or type(x) is nn.Parameter or not isinstance(x, Tensor):
        return x
    module = sys.modules.get("torch.distributed.tensor")  # imported by whoever has made a DTensor
    if module is None or not isinstance(x, module.DTensor):
        return x
    spread: Any = x
    placements = list(spread.placements)
    sharded = [p for p in placements if not p.is_replicate()]
    if len(sharded) > 1 or any(type(p) is not module.Shard or p.dim != 0 for p in sharded):
        raise ValueError(
            f"{name}: expected a DTensor placed as Replicate() or Shard(0), got {placements}; redistribute() it first"
        )
    members = set() if process_group is None else set(dist.get_process_group_ranks(process_group))
    for dimension, placement in enumerate(placements):
        holders = set(dist.get_process_group_ranks(spread.device_mesh.get_group(dimension)))
        if placement.is_replicate():
            fits = len(holders & members) <= 1
            expected = "no process group over the ranks that hold the copies of a Replicate() DTensor"
        else:
            fits = holders == members
            expected = "a process group over the ranks that hold the rows of a Shard(0) DTensor"
        if not fits:
            got = f"one over ranks {sorted(members)}" if members else "none (process_group=; ClipLoss: world_size=)"
            raise ValueError(f"{name}: expected {expected}, which are ranks {sorted(holders)}, got {got}")
    return spread.to_local()


def _is_mesh(x: object) -> TypeGuard[DeviceMesh]:
    module = sys.modules.get("torch.distributed.device_mesh")  # imported by whoever has made a mesh
    return module is not None and hasattr(module, "DeviceMesh") and isinstance(x, module.DeviceMesh)
