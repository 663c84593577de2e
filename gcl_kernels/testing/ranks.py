"""The gradient that DistributedDataParallel trains with, over two gloo processes, against the one process of the joined batch."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from . import accuracy

WORLD = 2
TIMEOUT = 300  # seconds, that both processes have


class NotImportable(Exception):
    """Why the function cannot be run in other processes."""


def offers_ranks(function: Any) -> bool:
    """Whether a loss says that it works over ranks: by a parameter `process_group`, attributes `rank` and `world_size` of a
    module, or an attribute `gathers` that is True."""
    if getattr(function, "gathers", False):
        return True
    if isinstance(function, torch.nn.Module):
        return hasattr(function, "rank") and hasattr(function, "world_size")
    return "process_group" in parameters_of(function)


def parameters_of(function: Any) -> set[str]:
    """Names of the parameters of a function, or of a module's forward."""
    try:
        return set(
            inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function).parameters
        )
    except (TypeError, ValueError):
        return set()


def over_ranks(function: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """[mean over ranks of the values, gradients of a shared projection of each side and of the scalars, averaged over ranks].

    Rank r has the r-th half of the rows. The inputs' rows, times a matrix that is the identity, are the features, so that the
    matrix has the gradient that parameters of a model would have.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((reference_to(function), [x.detach() for x in inputs])))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
        command = [sys.executable, "-m", __name__, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "a rank died")
        return torch.load(Path(folder) / "results")


def reference_to(function: Any) -> bytes:
    """The function, pickled so that another process can load it."""
    if not hasattr(os, "fork"):
        raise NotImportable("the ranks are forked, which this operating system cannot")
    try:
        home = type(function) if isinstance(function, torch.nn.Module) else function
        if home.__module__ == "__main__":
            raise NotImportable("it is defined in __main__, which the other processes do not import")
        return pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as fault:
        raise NotImportable(f"it cannot be pickled: {fault}") from fault


def on_rank(function: Any, rank: int) -> Callable[..., Any]:
    """The loss as this rank calls it."""
    if "process_group" in parameters_of(function):
        return lambda *inputs: function(*inputs, process_group=distributed.group.WORLD)
    if isinstance(function, torch.nn.Module) and hasattr(function, "world_size"):
        function = copy.copy(function)
        function.rank, function.world_size = rank, WORLD
    return function


def trained(function: Callable[..., Any], inputs: list[Tensor], rows: slice) -> list[Tensor]:
    """The value, and gradients of projections of the sides and of the scalars."""
    sides, scalars = inputs[:2], [x.clone().requires_grad_() for x in inputs[2:]]
    maps = [torch.eye(x.shape[1], dtype=x.dtype).requires_grad_() for x in sides]
    leaves = [*maps, *scalars]
    value = function(*(x[rows] @ m for x, m in zip(sides, maps, strict=True)), *scalars)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


def check_ranks(function: Any, inputs: tuple[Tensor, ...], judged: list[int]) -> None:
    """That the mean over ranks of value and gradients is that of one process. Raises AssertionError, naming what differs."""
    inputs = tuple(x.detach() for x in inputs)
    names = ("value", "gradient of lhs", "gradient of rhs", "gradient of logit_scale", "gradient of logit_bias")
    actual = over_ranks(function, inputs)
    expected = trained(function, list(inputs), slice(None))
    wrong = []
    for k in judged:
        factor = float((actual[k] * expected[k]).sum() / (expected[k] * expected[k]).sum())
        if accuracy.relative_error(actual[k], expected[k]) > 1e-4:
            by_factor = accuracy.relative_error(actual[k], factor * expected[k]) < 1e-4
            wrong.append(f"{names[k]} is {f'{factor:.3g} times' if by_factor else 'not'} that of one process")
    assert not wrong, "; ".join(wrong)


def serve(folder: Path, rank: int) -> None:
    """What one rank does."""
    torch.set_num_threads(1)
    reference, inputs = pickle.loads((folder / "task").read_bytes())
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        half = len(inputs[0]) // WORLD
        results = trained(on_rank(pickle.loads(reference), rank), inputs, slice(rank * half, (rank + 1) * half))
        for x in results:
            distributed.all_reduce(x)
        if rank == 0:
            torch.save([x / WORLD for x in results], folder / "results")
    finally:
        distributed.destroy_process_group()


def main() -> int:
    """Forks the ranks from one process that has imported torch, which takes longer than what they do."""
    folder = Path(sys.argv[1])
    ranks = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                serve(folder, rank)
                status = 0
            except BaseException as fault:
                print(
                    f"rank {rank}: {type(fault).__name__}: {' '.join(str(fault).split())}", file=sys.stderr, flush=True
                )
            os._exit(status)
        ranks.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in ranks)


if __name__ == "__main__":
    sys.exit(main())
