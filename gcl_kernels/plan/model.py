"""What a prediction is made of: sizes of a batch, phases of work, and what a chip does of each in a second."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..chips import ITEMSIZE, Chip

LABEL = "A model, not a measurement"


@dataclass(frozen=True)
class Phase:
    """A stretch of one kind of work; what is not given is negligible."""

    name: str
    dtype: str = "fp32"  # of its products
    flops: float = 0.0
    exponentials: float = 0.0
    bytes: float = 0.0  # to and from device memory
    host: float = 0.0  # seconds of Python and launches
    link: float = 0.0  # bytes to and from other devices, one way
    # Seconds for which tiles' epilogues, their exponentials included, have a multiprocessor for themselves: no product runs
    # there. 0 where they run beside other tiles' products.
    exposed: float = 0.0

    def parts(self, chip: Chip) -> dict[str, float]:
        """Seconds of each kind of work at the part of the chip's ceilings that is expected."""
        exponentials = self.exponentials / (chip.units * chip.clock * chip.exponentials)
        return {
            "GEMM": self.flops / (chip.rate(self.dtype) * chip.reach.gemm),
            "exp": exponentials,
            "epilogue": max(self.exposed - exponentials, 0.0),
            "HBM": self.bytes / (chip.bandwidth * chip.reach.bandwidth),
            "link": self.link / (chip.link * chip.reach.link) if chip.link else 0.0,
            "host": self.host,
        }

    def on_device(self, chip: Chip) -> float:
        """Seconds, as long as the slowest of its parts: of those that overlap."""
        parts = self.parts(chip)
        if self.exposed:
            parts["GEMM"] += parts["exp"] + parts["epilogue"]
        return max(seconds for kind, seconds in parts.items() if kind != "host")


@dataclass(frozen=True)
class Prediction:
    """Of one step: forward and backward."""

    name: str
    phases: tuple[Phase, ...]
    extra_memory: float  # bytes at the peak, over inputs and their gradients
    remark: str = ""

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    def overlapped(self, chip: Chip) -> float:
        """Seconds if every phase takes as long as the slowest of its parts, and the host runs ahead of the device."""
        return max(sum(phase.on_device(chip) for phase in self.phases), sum(phase.host for phase in self.phases))

    def serial(self, chip: Chip) -> float:
        """Seconds if nothing overlaps."""
        return sum(sum(phase.parts(chip).values()) for phase in self.phases)

    def totals(self, chip: Chip) -> dict[str, float]:
        """Seconds of each kind of work, over all phases."""
        parts = [phase.parts(chip) for phase in self.phases]
        return {kind: sum(p[kind] for p in parts) for kind in parts[0]}


@dataclass(frozen=True)
class Sizes:
    """What one rank computes: n rows of its own against m columns, which are everybody's."""

    n: int
    m: int
    d: int
    dtype: str
    world_size: int = 1
    directions: int = 2

    @classmethod
    def of_batch(cls, batch: int, d: int, dtype: str, world_size: int = 1) -> Sizes:
        return cls(-(-batch // world_size), batch, d, dtype, world_size)

    @property
    def s(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def logits(self) -> float:
        return float(self.n) * self.m

    @property
    def own_columns(self) -> int:
        return -(-self.m // self.world_size)

    @property
    def inputs_and_gradients(self) -> float:
        return 2.0 * (self.n + self.own_columns) * self.d * self.s

    @property
    def gathered(self) -> float:
        """Bytes of columns that other ranks sent."""
        return float(self.m - self.own_columns) * self.d * self.s

    def exchange(self, gathered_sides: int, gradient_itemsize: int) -> Phase:
        """All-gather of the columns, reduce-scatter of their gradient; statistics of the columns are O(M)."""
        if self.world_size == 1:
            return Phase("exchange")
        others = float(self.m - self.own_columns) * self.d
        return Phase("exchange", link=gathered_sides * others * (self.s + gradient_itemsize) + 16.0 * self.m)

    @property
    def gradients(self) -> float:
        """Bytes that are a result, hence not extra."""
        return float(self.n + self.own_columns) * self.d * self.s

    @property
    def exchanged_gradients(self) -> float:
        """Bytes of dlhs, of this rank's parts of drhs and of what the others' parts become; all_gather."""
        return 0.0 if self.world_size == 1 else 4.0 * self.n * self.d + 2 * 4.0 * self.m * self.d

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype, torch.float32)


def packing_bytes(d: int) -> float:
    """What a CPU's matrix library packs operands into."""
    return 2.0**19 + 3 * 2**10 * min(d, 512)
