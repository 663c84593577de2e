"""Gradient caching (GradCache, Gao et al., arXiv 2101.06983): a loss over a batch larger than the encoder's memory.

    image_encoder = grad_cache.cached(model.encode_image, micro_batch_size=64)
    text_encoder = grad_cache.cached(model.encode_text, micro_batch_size=64)
    loss = gcl_loss(image_encoder(images), text_encoder(tokens), model.logit_scale.exp())
    loss.backward()

The wrapped encoder encodes in micro-batches without a graph. The loss, any loss, sees the whole batch. In the backward, once the
gradient of every embedding is known, each micro-batch is encoded again, with a graph, and its gradient goes into the encoder.
One encoding more buys an encoder memory that depends on the micro-batch only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .module_state import changed, modules_of, restore, state_of
from .nests import tensors, with_tensors
from .rows import batch_size, cut, differentiable, join


def cached(encoder: Callable[..., Any], micro_batch_size: int) -> Callable[..., Any]:
    """`encoder` with the same arguments and results, whose graph exists for one micro-batch at a time.

    Args:
        encoder: any callable. What is cut along the first dimension, the batch, alike in all arguments: tensors and numpy
            arrays, nested in lists, tuples, mappings (`BatchEncoding`), dataclasses, attrs objects and `SimpleNamespace`
            however deep, and lists and tuples without tensors that are as long as the batch (texts, pictures). What goes to every
            micro-batch whole: plain values, 0-d tensors, modules, functions, lists of another length. A list of numbers as long
            as the batch could be either and is refused.
            It returns tensors likewise nested, as long as the micro-batch, or 0-d and the same for every micro-batch, like
            the `logit_scale` of open_clip's models. Numpy arrays, and lists of plain values as long as the micro-batch, are
            joined too; all else has to be the same for every micro-batch.
        micro_batch_size: rows encoded at once; the last micro-batch may be smaller.

    Returns:
        A callable whose results have the encoder's own types. Their gradients reach the encoder's parameters during `backward()`
        and equal those without caching: dropout and all of torch's random numbers are replayed (the CPU's and those of the
        arguments' devices). Autocast is replayed too, and a `GradScaler` needs nothing special.

    With `DistributedDataParallel` pass the wrapped module itself as `encoder`: gradients are averaged over ranks with
    the last micro-batch, once a call. What trains must then come out of its `forward`, `logit_scale` included, as with
    open_clip's models; several fields or towers are best encoded by one module in one call.

    A row's result is to depend on that row alone: what compares rows, like the logits of a whole CLIP model, compares those of a
    micro-batch. A layer that looks at its whole batch (BatchNorm) sees micro-batches. Its buffers end as after one encoding
    of each: the second encoding starts from the buffers of the first, and what it writes is undone. So it is for every
    buffer, and every number among the attributes, of the modules that are found through the arguments or `encoder`: itself, a
    bound method, `functools.partial`, a closure, the globals that a function names. Other state is not looked for. Where that
    changes what is encoded, or random numbers that are not torch's do, or parameters that change between forward and backward,
    the second encoding differs from the first, which is an error.

    Raises:
        TypeError, ValueError: when called, naming the argument or the place in the result: batch sizes that differ, an argument
            that requires a gradient (encode it inside `encoder`), results that are not as long as their micro-batch, a type
            that may hold tensors and is not among those above.
        RuntimeError: in the backward, where the second encoding differs from the first by more than rounding: sqrt(eps), relative
            to the norm of a micro-batch's result, eps being that of the lowest precision in use.
    """
    if not callable(encoder):
        raise TypeError(f"encoder: expected a callable, got {type(encoder).__name__}")
    if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
        raise ValueError(f"micro_batch_size: expected an integer >= 1, got {micro_batch_size!r}")

    def encode(*args: Any, **kwargs: Any) -> Any:
        n = batch_size(args, kwargs)
        modules = modules_of(encoder, args, kwargs)
        batches = [
            MicroBatch(encoder, args, kwargs, slice(start, min(start + micro_batch_size, n)), n)
            for start in range(0, n, micro_batch_size)
        ]
        results, with_graph = [], torch.is_grad_enabled()
        state, touched = state_of(modules) if with_graph else {}, set()
        with torch.no_grad():
            for batch in batches:
                batch.state, before = state, state
                results.append(batch.encode_first())
                if with_graph:
                    state = state_of(modules, before)
                    touched |= changed(before, state)
        for batch in batches:
            batch.state = {key: batch.state[key] for key in touched if key in batch.state}
        whole: list[Tensor] = []
        joined = join(results, [batch.count for batch in batches], "result", whole)
        if with_graph and whole:
            precision = _precision(modules, [*tensors((args, kwargs), ""), *tensors(joined, "")])
            # without an input that requires a gradient there is no backward
            trigger = torch.empty((), requires_grad=True)
            whole = list(_EncodeAgain.apply(trigger, batches, modules, precision, *whole))  # pyright: ignore
        return with_tensors(joined, iter(whole))

    return encode


class MicroBatch:
    """Some rows of the arguments, and the random state and autocast under which they are encoded, both times."""

    def __init__(self, encoder: Callable[..., Any], args: Any, kwargs: Any, rows: slice, n: int):
        self.encoder, self.args, self.kwargs, self.rows, self.n = encoder, args, kwargs, rows, n
        self.count = rows.stop - rows.start
        self.state = {}
        self.devices = {x.device.type for _, x in tensors((args, kwargs), "")}
        self.autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in (self.devices | {"cpu"}) - {"meta"}
        }

    def encode_first(self) -> Any:
        self.cpu_state = torch.get_rng_state()
        self.device_states = get_device_states(*(x for _, x in tensors((self.args, self.kwargs), "")))
        result = self._encode()
        found = [(path, x) for path, x in tensors(result, "result") if x.layout == torch.strided]  # others are refused
        self.marks = [(path, x.shape, _mark(x)) for path, x in found]
        return result

    def encode_again(self) -> list[Tensor]:
        devices, _ = self.device_states
        kind = next(iter(self.devices - {"cpu"}), "cuda")
        restore(self.state)
        with torch.random.fork_rng(devices=devices, device_type=kind):
            torch.set_rng_state(self.cpu_state)
            set_device_states(*self.device_states, device_type=kind)
            found = list(tensors(self._encode(), "result"))
        shapes = [(path, tuple(shape)) for path, shape, _ in self.marks], [(path, tuple(x.shape)) for path, x in found]
        if shapes[0] != shapes[1]:
            raise RuntimeError(
                f"encoder: expected {shapes[0]} from the second encoding as from the first, got {shapes[1]}"
            )
        return [x for _, x in found]

    def difference(self, k: int, x: Tensor) -> Tensor:
        """How far x is from the k-th tensor of the first encoding, relative to the norm of x; 0-d."""
        first, again = self.marks[k][2], _mark(x)
        # what is not finite both times is an overflow, which the loss shows
        alike = (first == again) | ~(first.isfinite() | again.isfinite())
        x = torch.where(x.isfinite(), x, 0).detach()
        norm = torch.linalg.vector_norm(torch.view_as_real(x) if x.is_complex() else x, dtype=first.dtype)
        far = torch.linalg.vector_norm(torch.where(alike, 0, first - again))
        return torch.where(far == 0, 0.0, far / norm)

    def _encode(self) -> Any:
        with contextlib.ExitStack() as stack:
            for device, (enabled, dtype) in self.autocast.items():
                # Without the cache: it would hand a weight cast without a graph to the second encoding.
                stack.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
            args = tuple(cut(x, self.rows, self.n) for x in self.args)
            kwargs = {name: cut(x, self.rows, self.n) for name, x in self.kwargs.items()}
            return self.encoder(*args, **kwargs)


def _mark(x: Tensor) -> Tensor:
    """One number a row, the product with a random direction: keeping it costs O(N), whatever the encoder returns."""
    x = torch.view_as_real(x) if x.is_complex() else x
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim == 0 or x.numel() == 0:
        return x.clone()
    x = x.reshape(len(x), -1)
    return x @ _direction(x.shape[1], x.dtype, x.device)


@functools.lru_cache(maxsize=8)
def _direction(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)


def _precision(modules: list[nn.Module], named: list[tuple[str, Tensor]]) -> float:
    """eps of the lowest precision in which these modules may compute these tensors."""
    dtypes = {x.dtype for _, x in named} | {
        w.dtype for module in modules for w in module._parameters.values() if w is not None
    }
    devices = {x.device.type for _, x in named}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices - {"meta"} if torch.is_autocast_enabled(device)}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
    if torch.float32 in dtypes and (devices - {"cpu"} or torch.get_float32_matmul_precision() != "highest"):
        eps = max(eps, 2.0**-10)  # TF32
    return eps


class _EncodeAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trigger, batches, modules, precision, *whole):
        ctx.batches, ctx.modules, ctx.precision = batches, modules, precision
        ctx.scalars = [x.ndim == 0 for x in whole]
        ctx.mark_non_differentiable(*(x for x in whole if not differentiable(x)))
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in whole)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        batches = ctx.batches
        touched = {key for batch in batches for key in batch.state}
        now = state_of(ctx.modules) if touched else {}
        differences = []
        try:
            for k, batch in enumerate(batches):
                last = k == len(batches) - 1
                with contextlib.nullcontext() if last else no_sync(batch.encoder), torch.enable_grad():
                    outputs = batch.encode_again()
                    pairs = []
                    for j, (x, g) in enumerate(zip(outputs, gradients, strict=True)):
                        scalar = ctx.scalars[j]
                        if g is not None:
                            differences.append((batch, j, batch.difference(j, x)))
                        if not x.requires_grad:
                            continue
                        # A 0-d result is one number, not one a micro-batch: its gradient goes in once. Zeros, not nothing,
                        # where there is no gradient: a module that averages over ranks waits for all of its parameters.
                        if g is None or (scalar and not last):
                            pairs.append((x, torch.zeros_like(x)))
                        else:
                            pairs.append((x, g if scalar else g[batch.rows]))
                    if pairs:
                        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        finally:
            restore({key: now[key] for key in touched & now.keys()})
        _refuse_differences(differences, ctx.precision)
        return None, None, None, None, *[None] * len(gradients)


def _refuse_differences(differences: list[tuple[MicroBatch, int, Tensor]], precision: float) -> None:
    """Raises if a second encoding is not the first one: the gradients are then of something else than the loss has seen."""
    if not differences:
        return
    # read once, since the host waits for a device
    numbers = torch.stack([x.to(differences[0][2]) for _, _, x in differences]).tolist()
    for (batch, k, _), number in zip(differences, numbers, strict=True):
        if not number <= precision**0.5:
            raise RuntimeError(
                f"encoder: expected the second encoding, in the backward, to equal the first, got {batch.marks[k][0]} of "
                f"rows {batch.rows.start} to {batch.rows.stop - 1} that differs by {number:.1g} of its norm. Look for dropout or "
                f"noise whose random state is not torch's (numpy, random, a generator of its own), weights or arguments changed "
                f"between forward and backward (optimizer.step), train() or eval() in between, and state that is no buffer of a "
                f"module"
            )


def no_sync(encoder: Any) -> contextlib.AbstractContextManager:
    """No averaging over ranks, where encoder is a module that does it (DistributedDataParallel)."""
    return encoder.no_sync() if hasattr(encoder, "no_sync") else contextlib.nullcontext()
