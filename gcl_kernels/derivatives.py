"""Derivatives that the kernels do not have are errors, never zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_forward_mode(name: str, *values: object) -> None:
    """Raises if a tensor among `values` carries a derivative that only plain PyTorch operations pass on.

    Custom operators have no forward-mode formula: PyTorch would take their tangent for zero, and a loss composed from them would
    return the part of its tangent that went another way. `torch.func.grad` and its kin do not reach custom operators either.

    Args:
        name: the public function, for the message.
        values: what it was called with; anything but a tensor is passed over.

    Raises:
        RuntimeError: naming `gcl_kernels.reference`, which has every derivative.
    """
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return
    if torch.compiler.is_compiling() or any(isinstance(x, Tensor) and _carries_derivative(x) for x in values):
        raise RuntimeError(
            f"{name}: expected tensors without forward-mode tangents and outside torch.func's derivatives, got one inside "
            "torch.autograd.forward_ad, torch.func.jvp, jacfwd, grad, vjp, jacrev or hessian, which the kernels do not support. "
            "Use backward() or torch.autograd.grad, or gcl_kernels.reference, which has all of these derivatives"
        )


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]  # traced tensors have lost their tangents
def _carries_derivative(x: Tensor) -> bool:
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)  # from a vmap inside the derivative
    return forward_ad.unpack_dual(x).tangent is not None


def refuse_double_backward(name: str, where: str) -> Callable[..., NoReturn]:
    """An autograd rule for the gradient of an operator whose gradient cannot be differentiated."""

    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{name}: expected one backward pass, got a second through its gradient; double backward is not supported {where}"
        )

    return refuse


PLAIN = (Tensor, torch.nn.Parameter)


def eager(*tensors: Tensor) -> bool:
    """Whether an operator's function may be called in its place: nothing traces, intercepts or transforms operators.

    PyTorch's dispatch of a custom operator costs the host some 40 microseconds, forward and backward.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for x in tensors:  # noqa: SIM110  # a generator would take as long as all of the above
        if type(x) not in PLAIN or x.is_meta:
            return False
    return True
