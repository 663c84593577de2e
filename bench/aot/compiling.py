"""Compiles one kernel ahead of time, for a chip that need not be present, as the library would launch it.

The launch code itself says with what: it runs on tensors without memory, and its launches are recorded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.aot.grid import Case
from bench.cases import SHORT_NAMES
from gcl_kernels.backends import Lines, Mean, Need, Want, settings
from gcl_kernels.backends import triton as backend
from gcl_kernels.backends.pointwise import PointwiseNeed, PointwiseUpstream
from gcl_kernels.backends.triton import (
    field_kernels,
    fields,
    kernels,
    line_kernels,
    loss_kernels,
    run,
    sigmoid,
    softmax,
    strip_kernels,
)
from gcl_kernels.backends.triton.config import row_block
from gcl_kernels.pairs import Pairs
from gcl_kernels.plan.trace import WithoutMemory

TYPES = {**SHORT_NAMES, torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", *run.OPTIONS)
LINES, LINES_OF_STRIPS = 1024, 8192


def build(case: Case) -> triton.compiler.CompiledKernel:
    kernel = next(
        getattr(x, case.kernel)
        for x in (kernels, strip_kernels, line_kernels, loss_kernels, field_kernels)
        if case.kernel in vars(x)
    )
    arguments = launched(case)
    options = {key: arguments.pop(key) for key in OPTIONS if key in arguments}
    signature, attributes, constants = {}, {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[name] = function_of_a_tile(value) if name in run.FUNCTIONS and value is not None else value
        else:
            specialized = not parameter.do_not_specialize
            signature[name] = declared(value, (parameter.num,), specialized, attributes, constants)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*case.family.target), options=options)


def function_of_a_tile(name: str) -> Any:
    return getattr(sigmoid if hasattr(sigmoid, name) else softmax, name)


def declared(value: Any, path: tuple[int, ...], specialized: bool, attributes: dict, constants: dict) -> Any:
    """The compiler's word for an argument's type, and what it is told of its value: as at a launch, that it is a multiple of
    16 or always 1. Buffers start on 16 bytes (`operands.operand`, `operands.PAD`)."""
    if isinstance(value, tuple):
        parts = enumerate(value)
        return tuple(declared(part, (*path, i), specialized, attributes, constants) for i, part in parts)
    if value is None or (specialized and isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, run.Block):
        return f"tensordesc<{TYPES[value.tensor.dtype]}[{value.rows}, {value.cols}]>"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, Tensor) or (specialized and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    return f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"


def launched(case: Case) -> dict[str, Any]:
    """What the launch code passes to the case's kernel."""
    found: list[dict[str, Any]] = []

    def note(kernel: str, programs: int, **arguments: Any) -> None:
        if kernel == case.kernel:
            found.append(arguments)

    with settings(config=case.config), run.replaced_by(note), WithoutMemory():
        if case.of_fields:
            launch_fields(case)
        else:
            launch_tiles(case)
    arguments = found[0]
    # what depends on the chip and on the process's settings
    if case.of_fields:
        arguments |= fields.block_constants(row_block(case.d, case.family.target[2]))
    elif case.of_tiles:
        arguments["PRECISION"] = case.precision
    return arguments


def launch_tiles(case: Case) -> None:
    options = case.options
    d = case.d + 16 if options.get("tail") else case.d
    n = LINES_OF_STRIPS if case.of_strips else LINES
    lhs, rhs = (torch.empty(n, d, dtype=case.dtype, device="meta") for _ in range(2))
    labels, ids = (
        torch.empty(n, k, dtype=torch.int64, device="meta") if k else None
        for k in (options.get("labels"), options.get("channels"))
    )
    limit = torch.empty(n, device="meta") if options.get("limits") else None
    pairs = Pairs(lhs, rhs, torch.empty((), device="meta"), labels, ids, ids, limit, limit)
    want, need = Want(*options.get("want", (True, True))), Need(True, True, True)
    shapes = n, n, (n, pairs.positives)
    lines = Lines(*(torch.empty(shape, dtype=torch.float64, device="meta") for shape in shapes))
    lines = lines._replace(row=lines.row if want.row else None, col=lines.col if want.col else None)
    if options.get("sigmoid"):
        upstream = PointwiseUpstream(torch.empty(LINES, dtype=torch.float64, device="meta"), lines.positive)
        known = upstream if options.get("gradient") else None
        backend.softplus(pairs, pairs.logit_scale, known, PointwiseNeed(True, True, True, True))
    elif options.get("stored"):
        backend.forward_with_gradient(pairs, lines, need)
    elif case.kernel in ("backward_tile", "pack_lines", "inner_products", "sum_parts"):
        backend.backward(pairs, lines, lines, need)
    elif case.kernel in ("sum_losses", "spread_gradient"):
        weights = torch.empty(LINES, device="meta")
        backend.spread_gradient(backend.sum_losses(lines, weights, True, torch.float32), weights, LINES, LINES, True)
    else:
        # so little room that the parts of several chunks are merged
        with settings(workspace_mib=None if case.kernel != "merge_partials" else 2**-10):
            backend.forward(pairs, want)


def launch_fields(case: Case) -> None:
    options = case.field_options
    n_fields, d = options["n_fields"], case.d - (0 if options["aligned"] else 1)
    x = [torch.empty(LINES, d, dtype=case.dtype, device="meta") for _ in range(n_fields)]
    mask = torch.empty(LINES, n_fields, dtype=torch.bool, device="meta") if options["mask"] else None
    mean = Mean([0.5] * n_fields, options["normalize"], options["normalize"])
    out, norms = backend.aggregate_fields(x, mask, mean)
    backend.aggregate_fields_backward(x, mask, mean, norms, out, [True] * n_fields)
