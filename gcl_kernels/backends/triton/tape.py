"""A small step without its Python: what a function launched is recorded once, and done again for inputs of the same layout.

Below some 6,000 rows a GPU waits for its host, and most of the host's time goes into deciding what to launch. The launch code
reads no number of the device, so all of that follows from shapes, strides, dtypes, options and settings. `Plan.run`
runs a function as it is when it sees these for the first time, records it the second time, and from then on makes the recorded
allocations, calls the recorded PyTorch operators, and starts the compiled kernels with the addresses of this call:

    inputs          as they are passed
    scratch         what only kernels read and write: parts of one allocation
    other memory    an allocation each, as recorded

There is no second launch code: a tape is what the first wrote.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..settings import may_record
from . import run
from .run import Block

# Operators that allocate and write nothing, and those that decide something by a number on the device.
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item")
DIRECT: dict[Any, Callable[..., Any]] = {torch.ops.aten.mm.default: torch.mm}  # in half the time of the overload

ALIGNMENT = 512  # bytes, as CUDA's caching allocator aligns what it gives

# A tape keeps what the function frees early until its end: at most so much, beyond which the device is not waiting anyway.
LARGEST_SCRATCH = 2**26
PLANS = 512  # layouts that are remembered, those used last

Outputs = tuple[Tensor | None, ...]
Function = Callable[..., Outputs]

SEEN, PLAIN = "seen once", "not to be recorded"


class Plan:
    """What is known of some functions under one key: tapes, by a name or what else tells the functions apart."""

    def __init__(self):
        self.tapes: dict[Hashable, Tape | str] = {}
        self.first = SEEN if may_record() else PLAIN

    def run(self, name: Hashable, function: Function, tensors: Sequence[Tensor | None]) -> Outputs:
        """`function(*tensors)`, from its tape where there is one. The function writes to no input."""
        tape = self.tapes.get(name)
        if type(tape) is Tape:
            return tape.replay(tensors)
        if tape is None:
            self.tapes[name] = self.first
            return function(*tensors)
        if tape is PLAIN or not _distinct(tensors):
            return function(*tensors)
        recorder = Recorder(tensors)
        with recorder, run.watched_by(recorder.launched):
            outputs = function(*tensors)
        self.tapes[name] = recorder.tape(outputs) or PLAIN
        return outputs


_plans: OrderedDict[Hashable, Plan] = OrderedDict()


def plan_of(key: Hashable) -> Plan:
    """The key says all that the functions' decisions depend on, `layout` of their tensors among it."""
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = Plan()
        if len(_plans) > PLANS:
            _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    return plan


def layout(tensors: Sequence[Tensor | None]) -> tuple:
    """What a kernel is compiled for, and the launch code decides by, but the device."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in tensors])


def _distinct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what is recorded of one input cannot be taken for another's."""
    storages = [_storage(x) for x in tensors if x is not None]
    return len(storages) == len(set(storages))


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Ref(NamedTuple):
    """A tensor of a recorded call: a view of an owner's memory."""

    owner: int
    view: (
        tuple[torch.Size, tuple[int, ...], int] | None
    )  # size, stride, elements from the owner's first; None: as it is
    offset: int  # bytes from the owner's first


class Allocation(NamedTuple):
    owner: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


class Launched(NamedTuple):
    kernel: str
    programs: int
    arguments: dict[str, Any]
    compiled: Any  # Triton's; None in its interpreter


class Called(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple
    options: dict[str, Any]
    results: tuple[int, ...]  # owners of what it returns


class Recorder(TorchDispatchMode):
    """Sees a function's operators and, as `run.watched_by`, its launches."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        self.inputs = len(inputs)
        self.owners: list[Tensor | None] = list(inputs)
        self.by_storage = {_storage(x): i for i, x in enumerate(inputs) if x is not None}
        self.allocations: list[Allocation] = []
        self.steps: list[Launched | Called] = []
        self.on_operators: set[int] = set()  # owners that must be tensors
        self.recordable = True
        self.launching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.launching:
            return result
        name = func.overloadpacket.__name__
        results = [result] if isinstance(result, Tensor) else result
        if name in READS or not isinstance(results, (list, tuple)) or not all(isinstance(x, Tensor) for x in results):
            self.recordable = False
            return result
        made = [x for x in results if _storage(x) not in self.by_storage]
        if name in ALLOCATIONS and made:
            (x,) = made
            self.allocations.append(
                Allocation(self._own(x), x.shape, x.stride(), x.dtype, x.untyped_storage().nbytes())
            )
        elif made or not (func.is_view or name in FREE_VIEWS):
            if made and len(made) != len(results):
                self.recordable = False
            given, options = self._refs(args), self._refs(kwargs)
            function = DIRECT.get(func) or func
            self.steps.append(Called(function, given, options, tuple(map(self._own, made))))
        return result

    def launched(self, launch: Callable[..., Any], kernel: str, programs: int, arguments: dict[str, Any]) -> None:
        self.launching = True  # the interpreter's own operators are none of the function's
        try:
            compiled = launch(kernel, programs, **arguments)
        finally:
            self.launching = False
        refs = {name: self._refs(x, kernel=True) for name, x in arguments.items()}
        self.steps.append(Launched(kernel, programs, refs, compiled))

    def _own(self, x: Tensor) -> int:
        self.by_storage[_storage(x)] = len(self.owners)
        self.owners.append(x)  # alive, so that no other tensor has its storage's number
        return len(self.owners) - 1

    def _refs(self, x: Any, kernel: bool = False) -> Any:
        """With a `Ref` for each tensor."""
        if isinstance(x, Tensor):
            return self.ref(x, kernel)
        if isinstance(x, Block):
            return Block(self.ref(x.tensor, kernel=False), x.rows, x.cols)  # pyright: ignore[reportArgumentType]
        if isinstance(x, dict):
            return {name: self._refs(value, kernel) for name, value in x.items()}
        if isinstance(x, (list, tuple)) and type(x) in (list, tuple):
            return type(x)(self._refs(value, kernel) for value in x)
        return x

    def ref(self, x: Tensor, kernel: bool) -> Ref:
        index = self.by_storage.get(_storage(x))
        owner = None if index is None else self.owners[index]
        if index is None or owner is None or owner.dtype != x.dtype:
            self.recordable = False
            return Ref(0, None, 0)
        if not kernel:
            self.on_operators.add(index)
        first = int(x.storage_offset()) - int(owner.storage_offset())
        same = first == 0 and x.shape == owner.shape and x.stride() == owner.stride()
        return Ref(index, None if same else (x.shape, x.stride(), first), first * x.itemsize)

    def tape(self, outputs: Outputs) -> Tape | None:
        returned = tuple(None if x is None else self.ref(x, kernel=False) for x in outputs)
        if not self.recordable or sum(a.bytes for a in self.allocations) > LARGEST_SCRATCH:
            return None
        return Tape(self, returned)


FREE_VIEWS = ("_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "alias")


class Tape:
    """`replay(inputs)` does what was recorded. `source` is its text, in which tN is a tensor, aN its address, by owner."""

    def __init__(self, recorder: Recorder, outputs: tuple[Ref | None, ...]):
        launches = [step for step in recorder.steps if isinstance(step, Launched)]
        self.by_address = all(step.compiled is not None for step in launches)
        self.device = next(x.device for x in recorder.owners if x is not None)
        self.names: dict[str, Any] = {"empty": torch.empty_strided, "device": self.device, "uint8": torch.uint8}
        self.names |= {"run": run.run, "block": _block}
        self.inputs = recorder.inputs
        on_operators = recorder.on_operators
        scratch = [a for a in recorder.allocations if self.by_address and a.owner not in on_operators]
        places = list(accumulate([-(-a.bytes // ALIGNMENT) * ALIGNMENT for a in scratch], initial=0))
        self.scratch = dict(zip([a.owner for a in scratch], places, strict=False))
        lines = [f"a{i} = t{i}.data_ptr()" for i, x in enumerate(recorder.owners[: self.inputs]) if x is not None]
        if scratch:
            lines += [f"scratch = empty(({places[-1]},), (1,), dtype=uint8, device=device)", "a = scratch.data_ptr()"]
        for owner, size, stride, dtype, _ in recorder.allocations:
            if owner not in self.scratch:
                made = f"empty({tuple(size)}, {stride}, dtype={self.constant(dtype)}, device=device)"
                lines += [f"t{owner} = {made}", f"a{owner} = t{owner}.data_ptr()"]
        for step in recorder.steps:
            lines += self.call(step) if isinstance(step, Called) else [self.launch(step)]
        lines.append(f"return {self.tensors(outputs)}")
        given = "".join(f"t{i}, " for i in range(self.inputs))
        self.source = "\n    ".join([f"def replay({given}):", *lines])
        exec(compile(self.source, "<tape>", "exec"), self.names)  # as dataclasses and Triton's launchers are made
        self._replay: Callable[..., Outputs] = self.names.pop("replay")

    def replay(self, inputs: Sequence[Tensor | None]) -> Outputs:
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._replay(*inputs)
        return self._replay(*inputs)

    def call(self, called: Called) -> list[str]:
        given = "".join(f"{self.tensors(x)}, " for x in called.arguments)
        given += "".join(f"{name}={self.tensors(x)}, " for name, x in called.options.items())
        call = f"{self.constant(called.function)}({given})"
        if not called.results:
            return [call]
        made = ", ".join(f"t{owner}" for owner in called.results)
        return [f"{made} = {call}", *(f"a{owner} = t{owner}.data_ptr()" for owner in called.results)]

    def launch(self, launched: Launched) -> str:
        kernel, programs, arguments, compiled = launched
        if not self.by_address:  # in the interpreter
            given = "".join(f"{name}={self.tensors(x)}, " for name, x in arguments.items())
            return f"run({kernel!r}, {programs}, {given})"
        # a compiled kernel takes an address as it takes a tensor
        given = "".join(f"{self.addresses(x)}, " for x in run.in_order(kernel, arguments))
        return f"{self.constant(compiled[(programs, 1, 1)])}({given})"

    def addresses(self, x: Any) -> str:
        """The text of an argument of a compiled kernel."""
        if type(x) is Ref:
            if x.owner in self.scratch:
                return f"a + {self.scratch[x.owner] + x.offset}"
            return f"a{x.owner} + {x.offset}" if x.offset else f"a{x.owner}"
        return self._text(x, self.addresses)

    def tensors(self, x: Any) -> str:
        """The text of anything else."""
        if type(x) is Ref:
            if x.view is None:
                return f"t{x.owner}"
            size, stride, first = x.view
            before = f"t{x.owner}.storage_offset() + " if x.owner < self.inputs else ""
            return f"t{x.owner}.as_strided({tuple(size)}, {stride}, {before}{first})"
        return self._text(x, self.tensors)

    def _text(self, x: Any, of_item: Callable[[Any], str]) -> str:
        if type(x) is tuple:
            return f"({''.join(f'{of_item(v)}, ' for v in x)})"
        if type(x) is list:
            return f"[{', '.join(map(of_item, x))}]"
        if type(x) is dict:
            return f"{{{', '.join(f'{name!r}: {of_item(v)}' for name, v in x.items())}}}"
        if type(x) is Block:
            made = "block" if self.by_address else self.constant(Block)
            return f"{made}({self.tensors(x.tensor)}, {x.rows}, {x.cols})"
        return repr(x) if x is None or type(x) in (bool, int, str) else self.constant(x)

    def constant(self, x: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = x
        return name


def _block(tensor: Tensor, rows: int, cols: int) -> Any:
    return run.as_argument(Block(tensor, rows, cols))
