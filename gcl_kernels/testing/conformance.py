"""`check_loss`: a battery of properties of a contrastive loss `function(lhs, rhs, logit_scale[, logit_bias])`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .battery import QUANTITIES, Battery, Inputs, Loss, check_compiled, check_memory
from .dense import AGAINST
from .drawn import EDGE_DIMS, EDGE_SIZES, Problem
from .ranks import NotImportable, check_ranks, offers_ranks, parameters_of
from .report import Report, Result, Row

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALLEST = ((1, 1), (2, 3), (7, 5), (33, 17))  # always there, smallest first: the first to fail is the smallest
RAGGED = (1, 3, 15, 17, 31, 33, 63, 65, 127, 129)
DRAWS = 12
DIMS = tuple(d for d in EDGE_DIMS if d > 2)  # with fewer, rows are duplicates
MEMORY_SIZES = (2048, 4096)
BIAS = -10.0
# Of a row that draws options: the parameters that a loss has to have.
OPTIONS = {
    "weights": ("weights",),
    "labels": ("labels",),
    "false-negative ids": ("lhs_ids", "rhs_ids"),
}

# Names, or their beginnings, of rows below those of QUANTITIES that compare with the dense loss.
COMPARED = ("accuracy", "scale 0", "scale 100", "features", "ragged", "duplicated", "gradient over two ranks", *OPTIONS)


def drawn(count: int, seed: int) -> list[Problem]:
    """The smallest shapes, and `count` more of unit vectors in every geometry, in the order of their size."""
    g = random.Random(seed)
    found = [problem(n, d) for n, d in SMALLEST]
    for _ in range(count):
        geometry, scale = g.choice(("random", "paired", "clustered")), g.choice((1.0, 14.3, 50.0))
        found.append(problem(g.choice(EDGE_SIZES), g.choice(DIMS), scale, geometry, g.randrange(2**16)))
    return sorted(found, key=lambda p: (p.n * p.n * p.d, p.n))


def problem(
    n: int, d: int, scale: float = 14.3, geometry: str = "random", seed: int = 0, options: bool = False
) -> Problem:
    return Problem(
        n=n, m=n, d=d, positives=0 if options else None, id_channels=int(options), distinct_ids=max(2, n // 2),
        logit_scale=scale, geometry=geometry, strided=False, seed=seed,
    )  # fmt: skip


def named(p: Problem) -> str:
    return f"N = {p.n}, D = {p.d}, scale {p.logit_scale:g}, {p.geometry}, seed {p.seed}"


class _Checks:
    """Makes the rows of one report."""

    def __init__(self, battery: Battery, biased: bool, device: str, tell: Callable[[str], None]) -> None:
        self.battery, self.biased, self.device, self.tell = battery, biased, device, tell
        self.left_out = getattr(battery.function, "left_out", ())
        self.rows: list[Row] = []

    def inputs(self, p: Problem, dtype: torch.dtype) -> tuple[Inputs, dict[str, Tensor]]:
        batch = p.build(dtype, self.device)
        bias = torch.tensor(BIAS, device=self.device).to(dtype).requires_grad_()
        scale = batch.logit_scale.detach().to(dtype).requires_grad_()
        return (batch.lhs, batch.rhs, scale, *([bias] if self.biased else [])), batch.options

    def add(self, name: str, result: Result, detail: str = "") -> None:
        self.rows.append(Row(name, result, detail))
        self.tell(name)

    def skips(self, name: str) -> bool:
        """Whether a row has no meaning: the loss says so, or nothing that it compares is right."""
        if name in self.left_out:
            self.add(name, "not offered")
        elif not self.battery.judged and name.startswith(COMPARED):
            self.add(name, "not judged")
        else:
            return False
        return True

    def single(self, name: str, check: Callable[[], str | None]) -> None:
        """A row of one measurement, which may have something to tell."""
        if self.skips(name):
            return
        try:
            self.add(name, "pass", check() or "")
        except NotImportable as fault:
            self.add(name, "not judged", str(fault))
        except Exception as fault:  # any fault of the loss under test is its result
            self.add(name, "fail", told(fault))

    def over(
        self,
        name: str,
        check: Callable[[Inputs], None],
        problems: Iterable[Problem],
        dtype: torch.dtype = torch.float32,
    ) -> bool:
        """A row of several problems, up to the first where the property does not hold."""
        if self.skips(name):
            return True
        fault = self.first_fault(check, problems, dtype)
        self.add(name, "fail" if fault else "pass", fault or "")
        return fault is None

    def first_fault(
        self, check: Callable[[Inputs], None], problems: Iterable[Problem], dtype: torch.dtype
    ) -> str | None:
        for p in problems:
            try:
                check(self.inputs(p, dtype)[0])
            except Exception as fault:  # any fault of the loss under test is its result
                return f"{named(p)}: {told(fault)}"
        return None

    def quantities(self, problems: Sequence[Problem], offered: Sequence[int]) -> None:
        """A row each for the value and the gradients in float32. What is wrong here is left out of the rows below."""
        right = []
        for k, name in enumerate(QUANTITIES[: 4 + self.biased]):
            if k not in offered:
                self.add(name, "not offered")
                continue
            self.battery.judged = [k]
            if self.over(name, self.battery.accurate, problems):
                right.append(k)
        self.battery.judged = right

    def option(self, name: str, needed: Sequence[str], known: set[str]) -> None:
        """Against the dense loss with the same options."""
        if not known.issuperset(needed):
            self.add(name, "not offered")
            return
        if self.skips(name):
            return
        for n, d in ((3, 2), *SMALLEST[2:]):
            p = problem(n, d, seed=1, options=True)
            inputs, options = self.inputs(p, torch.float32)
            ids = {k: options[k][:, 0].clamp(min=0) for k in ("lhs_ids", "rhs_ids")}
            weights = torch.linspace(0, 3, n, device=self.device)
            given = {"weights": weights, "labels": options["labels"].clamp(min=0), **ids}
            try:
                self.battery.accurate(inputs, **{k: given[k] for k in needed})
            except Exception as fault:  # any fault of the loss under test is its result
                self.add(name, "fail", f"{named(p)}: {told(fault)}")
                return
        self.add(name, "pass")


def told(fault: Exception) -> str:
    text = " ".join(str(fault).split())
    return (text if isinstance(fault, AssertionError) else f"{type(fault).__name__}: {text}")[:240]


def check_loss(
    function: Loss,
    against: str | Loss | None = None,
    *,
    constant: Sequence[str] | None = None,
    dtypes: Iterable[torch.dtype] = DTYPES,
    device: str = "cpu",
    draws: int = DRAWS,
    seed: int = 0,
    memory_sizes: tuple[int, int] | None = MEMORY_SIZES,
    compiler: str | None = "aot_eager",
    tell: Callable[[str], None] = lambda name: None,
) -> Report:
    """Holds `function(lhs, rhs, logit_scale[, logit_bias])`, a scalar loss of two (N, D) tensors, against a dense one.

    Value and gradients are held to the accuracy rule of `gcl_kernels.testing.accuracy`. What is wrong in float32 fails its own
    row and is left out of the rows below, so that a fault is named once.

    A function with a parameter `weights` (N,), `labels` (N,), `lhs_ids` and `rhs_ids` (N,) or `process_group` offers what the
    name says, and is held to it; otherwise the row reads "not offered". Attributes of the function say more. `against` and
    `constant` stand for the arguments. `gathers = True` says that it exchanges features over the default process group by
    itself. `left_out` names rows that have no meaning for it. A module with attributes `rank` and `world_size` has them set on
    each rank.

    Args:
        function: the loss under test.
        against: `"clip"` (default), `"siglip"` (which passes a logit_bias), `"rows"` (lhs to rhs only), `"nt_xent"` (two views,
            normalised) or a dense function of the same tensors.
        constant: names, among `"lhs"`, `"rhs"`, `"logit_scale"` and `"logit_bias"`, that get no gradient by design.
        dtypes: where the accuracy rule is applied.
        device: of the inputs.
        draws: problems that are drawn beside the smallest ones.
        seed: of the draws.
        memory_sizes: two N, whose peak memory is compared. None leaves the row out.
        compiler: backend of torch.compile. `"inductor"` is the one that users have; it needs a C++ compiler and a minute. None
            leaves the row out.
        tell: called with the name of each row as it is done.

    Raises:
        ValueError: `against` or `constant` is another string.
    """
    held: str | Loss = getattr(function, "against", "clip") if against is None else against
    if isinstance(held, str) and held not in AGAINST:
        raise ValueError(f"against: expected one of {', '.join(AGAINST)} or a callable, got {held!r}")
    without: Sequence[str] = getattr(function, "constant", ()) if constant is None else constant
    sides = [name.removeprefix("gradient of ") for name in QUANTITIES]
    if not set(without) <= set(sides[1:]):
        raise ValueError(f"constant: expected names among {', '.join(sides[1:])}, got {', '.join(without)}")
    dense = AGAINST[held] if isinstance(held, str) else held
    offered = [k for k, name in enumerate(sides[: 4 + (held == "siglip")]) if name not in without]
    numbers = tuple(k for k, name in enumerate(sides[1:]) if k > 1 and name in without)
    checks = _Checks(Battery(function, dense, offered, numbers), held == "siglip", device, tell)
    battery, known, problems = checks.battery, parameters_of(function), drawn(draws, seed)
    plain = [problem(n, d) for n, d in SMALLEST]

    checks.quantities(problems, offered)
    for t in dtypes:
        if t != torch.float32:
            name = f"accuracy, {str(t).removeprefix('torch.')}"
            checks.over(name, battery.accurate, problems, t)
    by_accuracy = {
        "scale 0": [problem(n, d, 0.0) for n, d in SMALLEST],
        "scale 100": [problem(n, d, 100.0) for n, d in SMALLEST],
        "features of any length": [problem(n, d, geometry="wide") for n, d in SMALLEST],
        "ragged sizes": [problem(n, 7) for n in RAGGED],
    }
    for name, found in by_accuracy.items():
        checks.over(name, battery.accurate, found)
    checks.over("duplicated rows", battery.duplicates, plain)
    if symmetric(dense, checks.inputs(plain[2], torch.float64)[0]):
        checks.over("swap symmetry", battery.swap, plain)
    else:
        checks.add("swap symmetry", "not offered")
    for name, check in {
        "permutation equivariance": battery.permutation,
        "strided inputs": battery.strided,
        "NaN beside the inputs": battery.surrounded,
        "determinism": battery.deterministic,
        "backward twice": battery.retained,
        "inputs unmodified": battery.unmodified,
        "scale as a float": battery.float_scale,
    }.items():
        checks.over(name, check, plain)
    again = all(row.passed for row in checks.rows if row.name == "backward twice")  # which gradcheck does
    if again and set(battery.judged) - {0} and 0 in battery.judged:
        checks.over("gradcheck", battery.gradcheck, plain[:3], torch.float64)
    else:
        checks.add("gradcheck", "not judged")
    for name, needed in OPTIONS.items():
        checks.option(name, needed, known)
    small = checks.inputs(plain[3], torch.float32)[0]
    if compiler is None:
        checks.add("torch.compile", "not judged")
    else:
        checks.single("torch.compile", lambda: check_compiled(battery, small, compiler))
    if memory_sizes is None:
        checks.add("memory linear in N", "not judged")
    else:
        sizes = memory_sizes
        checks.single(
            "memory linear in N",
            lambda: check_memory(battery, lambda n: checks.inputs(problem(n, 16), torch.float32)[0], sizes, device),
        )
    if offers_ranks(function):
        pairs = checks.inputs(problem(16, 8), torch.float32)[0]
        checks.single("gradient over two ranks", lambda: check_ranks(function, pairs, battery.judged))
    else:
        checks.add("gradient over two ranks", "not offered")
    return Report(tuple(checks.rows))


def symmetric(dense: Loss, inputs: Inputs) -> bool:
    """Whether the dense loss is the same with its sides exchanged."""
    with torch.no_grad():
        value, swapped = dense(*inputs), dense(inputs[1], inputs[0], *inputs[2:])
    return bool(torch.isclose(value, swapped))
