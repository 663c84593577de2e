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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


def cached(encoder: Callable[..., Any], micro_batch_size: int) -> Callable[..., Any]:
    """`encoder` with the same arguments and results, whose graph exists for one micro-batch at a time.

    Args:
        encoder: any callable. Tensors of its arguments, nested in lists, tuples and mappings however deep, are cut along
            their first dimension, the batch, alike in all; what is no tensor, and 0-d tensors, go to every micro-batch as they
            are. It returns tensors likewise nested, cut along the batch too (a 0-d one, like the `logit_scale` of
            open_clip's models, has to be the same for every micro-batch).
        micro_batch_size: rows encoded at once; the last micro-batch may be smaller.

    Returns:
        A callable; mappings it returns are dicts. Its results' gradients reach the encoder's parameters during `backward()`
        and equal those without caching: dropout and all other random numbers are replayed (the CPU's and those of the
        arguments' devices). Autocast is replayed too, and a `GradScaler` needs nothing special.

    With `DistributedDataParallel` pass the wrapped module itself as `encoder`: gradients are averaged over ranks with
    the last micro-batch, once a call. What trains must then come out of its `forward`, `logit_scale` included, as with
    open_clip's models; several fields or towers are best encoded by one module in one call.

    A layer that looks at its whole batch (BatchNorm) sees micro-batches. Parameters must not change between forward and backward.

    Raises:
        TypeError, ValueError: when called, naming the argument: batch sizes that differ, an argument that requires a gradient
            (encode it inside `encoder`), results that are not as long as their micro-batch.
    """
    if not callable(encoder):
        raise TypeError(f"encoder: expected a callable, got {type(encoder).__name__}")
    if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
        raise ValueError(f"micro_batch_size: expected an integer >= 1, got {micro_batch_size!r}")

    def encode(*args: Any, **kwargs: Any) -> Any:
        sizes = {}
        for path, x in (*_tensors(args, "args"), *_tensors(kwargs, "kwargs")):
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{path}: expected a tensor without gradient, got one that requires it")
            if x.ndim > 0:
                sizes[path] = len(x)
        if not sizes or 0 in sizes.values() or len(set(sizes.values())) > 1:
            raise ValueError(f"encoder: expected arguments with tensors of one batch size >= 1, got {sizes}")
        n = next(iter(sizes.values()))
        batches = [
            MicroBatch(encoder, args, kwargs, slice(start, min(start + micro_batch_size, n)))
            for start in range(0, n, micro_batch_size)
        ]
        results = []
        with torch.no_grad():
            for batch in batches:
                results.append(batch.encode_first())
        parts = [[x for _, x in _tensors(result, "result")] for result in results]
        whole = [torch.cat(xs) if xs[0].ndim else xs[0] for xs in zip(*parts, strict=True)]
        if torch.is_grad_enabled():
            trigger = torch.empty(
                (), requires_grad=True
            )  # without an input that requires a gradient there is no backward
            whole = _EncodeAgain.apply(trigger, batches, *whole)
        embeddings = iter(whole)  # pyright: ignore[reportArgumentType]
        return _map(results[0], lambda _: next(embeddings))

    return encode


class MicroBatch:
    """Some rows of the arguments, and the random state and autocast under which they are encoded, both times."""

    def __init__(self, encoder: Callable[..., Any], args: Any, kwargs: Any, rows: slice):
        self.encoder, self.args, self.kwargs, self.rows = encoder, args, kwargs, rows
        self.devices = {x.device.type for _, x in _tensors((args, kwargs), "")}
        self.autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in (self.devices | {"cpu"}) - {"meta"}
        }

    def encode_first(self) -> Any:
        self.cpu_state = torch.get_rng_state()
        self.device_states = get_device_states(*(x for _, x in _tensors((self.args, self.kwargs), "")))
        result = self._encode()
        count = self.rows.stop - self.rows.start
        for path, x in _tensors(result, "result"):
            if x.ndim and len(x) != count:
                raise ValueError(
                    f"{path}: expected ({count}, ...) from encoder for a micro-batch of {count}, got {tuple(x.shape)}"
                )
        return result

    def encode_again(self) -> list[Tensor]:
        devices, _ = self.device_states
        kind = next(iter(self.devices - {"cpu"}), "cuda")
        with torch.random.fork_rng(devices=devices, device_type=kind):
            torch.set_rng_state(self.cpu_state)
            set_device_states(*self.device_states, device_type=kind)
            return [x for _, x in _tensors(self._encode(), "result")]

    def _encode(self) -> Any:
        with contextlib.ExitStack() as stack:
            for device, (enabled, dtype) in self.autocast.items():
                # Without the cache: it would hand a weight cast without a graph to the second encoding.
                stack.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
            args, kwargs = (
                _map(x, lambda v: v[self.rows] if v.ndim else v) for x in (self.args, self.kwargs)
            )  # fmt: skip
            return self.encoder(*args, **kwargs)


class _EncodeAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trigger, batches, *whole):
        ctx.batches, ctx.scalars = batches, [x.ndim == 0 for x in whole]
        ctx.mark_non_differentiable(*(x for x in whole if not x.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in whole)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        for k, batch in enumerate(ctx.batches):
            last = k == len(ctx.batches) - 1
            with contextlib.nullcontext() if last else no_sync(batch.encoder), torch.enable_grad():
                outputs = batch.encode_again()
                pairs = []
                for x, g, scalar in zip(outputs, gradients, ctx.scalars, strict=True):
                    if not x.requires_grad:
                        continue
                    # A 0-d result is one number, not one a micro-batch: its gradient goes in once. Zeros, not nothing, where
                    # there is no gradient: a module that averages over ranks waits for all of its parameters.
                    if g is None or (scalar and not last):
                        pairs.append((x, torch.zeros_like(x)))
                    else:
                        pairs.append((x, g if scalar else g[batch.rows]))
                if pairs:
                    torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        return None, None, *[None] * len(gradients)


def no_sync(encoder: Any) -> contextlib.AbstractContextManager:
    """No averaging over ranks, where encoder is a module that does it (DistributedDataParallel)."""
    return encoder.no_sync() if hasattr(encoder, "no_sync") else contextlib.nullcontext()


def _tensors(x: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor in nested lists, tuples and mappings, in order."""
    if isinstance(x, Tensor):
        yield path, x
    elif isinstance(x, Mapping):
        for key, value in x.items():
            yield from _tensors(value, f"{path}[{key!r}]")
    elif isinstance(x, (list, tuple)):
        for k, value in enumerate(x):
            yield from _tensors(value, f"{path}[{k}]")


def _map(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with function(tensor) for each tensor; mappings become dicts."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {key: _map(value, function) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_map(value, function) for value in x))
    if isinstance(x, (list, tuple)):
        return type(x)(_map(value, function) for value in x)
    return x
