"""What a step of a contrastive loss over many GPUs takes, by formula: a model, not a measurement. No GPU has run it.

What a rank sends is exact, and tested against the collectives that are called. Seconds follow from assumed rates. Latency is
left out. inf-cl's rows are from the source of its version 1.2.1 (`ring.py`, `flash.py`).
"""

from __future__ import annotations

from typing import NamedTuple

GATHER, RING = "process_group, all_gather", "process_group, ring"
SIGMOID_GATHER, SIGMOID_RING = "sigmoid, all_gather", "sigmoid, ring"
OPEN_CLIP, OPEN_CLIP_LOCAL = "open_clip, default", "open_clip, local_loss + gather_with_grad"
INF_CL = "inf-cl, ring (from its source)"
MODELLED = (GATHER, RING, SIGMOID_GATHER, SIGMOID_RING, OPEN_CLIP, OPEN_CLIP_LOCAL, INF_CL)
RINGS = (RING, SIGMOID_RING, INF_CL)

MODEL_N, MODEL_D = 4 * 2**20, 768  # bfloat16 embeddings
MODEL_WORLDS = tuple(2**k for k in range(3, 11))
AGREEMENT = 1024  # bytes of a rank's part


class Rates(NamedTuple):
    """Of one GPU."""

    flops: float  # a second
    bandwidth: float  # bytes sent a second
    link: str

    @property
    def rows_that_hide(self) -> float:
        """2 r² D FLOPs of a step take as long as sending r D numbers of 2 bytes."""
        return self.flops / self.bandwidth

    def text(self) -> str:
        return f"{self.flops / 1e12:.0f} TFLOP/s and {self.bandwidth / 1e9:.0f} GB/s ({self.link}) a GPU assumed"


# 40% of an H100's dense bfloat16 peak, to hold for the loss's products
RATES = Rates(400e12, 50e9, "InfiniBand, 400 Gb/s")
NVLINK = Rates(400e12, 450e9, "NVLink 4, 450 GB/s a direction")

PUBLISHED = {
    "n": 65_536,
    "d": 768,
    "ms": {1: 46.9, 4: 13.1, 8: 10.1},
    "from": "siglip-kernel 0.1.2 on GH200, N = 65,536, D = 768, forward and backward",
    "caution": "The left column is a measurement and the others are a model at an assumed rate, so they show what sends would "
    "add to\nperfectly divided products, not which library is faster. How the authors' GPUs are linked is not known here.",
    "inf-cl": "Inf-CL publishes memory rather than seconds of the loss: 0.18, 0.36, 0.72 and 1.45 GB on 8 A800 (ViT-L/14) at "
    "batches of\n32k, 64k, 128k and 256k, where open_clip takes 2.27, 8.63 and 33.6 GB and then runs out of memory.",
}


class Pass(NamedTuple):
    """What a rank does in a forward or a backward."""

    flops: float = 0.0
    rows: float = 0.0  # bytes of rhs in one of a ring's W - 1 sends, hidden behind that step's products
    gradients: float = (
        0.0  # bytes of drhs in one of its W sends: hidden behind the next step's products, the last behind nothing
    )
    gathered: float = 0.0  # bytes that are waited for
    messages: int = 0


def passes(method: str, world: int, n: int, d: int, size: int = 2) -> tuple[Pass, Pass]:
    """(Forward, backward) of n rows cut evenly over ranks, in numbers of `size` bytes; gradients' parts travel in float32."""
    plane, own, others = n * n * d / world, n * d / world, world - 1
    side = own * others
    # float64. Of softmax: each rank's part of col goes home; col and its gradient come. Of sigmoid: a factor, whether it counts
    col, lines, factors = 8 * n * others / world, 16 * n * others / world, 16 * others
    agreement = AGREEMENT * others
    if method == GATHER:
        return (
            Pass(2 * plane, gathered=agreement + size * side + col, messages=3 * others),
            Pass(6 * plane, gathered=lines + 4 * side, messages=2 * others),
        )
    if method == RING:
        return (
            Pass(2 * plane, rows=size * own, gathered=agreement + col, messages=3 * others),
            Pass(6 * plane, rows=size * own, gradients=4 * own, gathered=lines, messages=2 * others + world),
        )
    if method == SIGMOID_GATHER:  # gradients leave the one round that there is
        return (
            Pass(6 * plane, gathered=agreement + (size + 4) * side, messages=3 * others),
            Pass(gathered=factors, messages=others),
        )
    if method == SIGMOID_RING:
        return (
            Pass(6 * plane, rows=size * own, gradients=4 * own, gathered=agreement, messages=2 * others + world),
            Pass(gathered=factors, messages=others),
        )
    if method == OPEN_CLIP:
        return Pass(2 * plane * world, gathered=2 * size * side, messages=2 * others), Pass(4 * plane * world)
    if method == OPEN_CLIP_LOCAL:
        return (
            Pass(4 * plane, gathered=2 * size * side, messages=2 * others),
            Pass(8 * plane, gathered=2 * size * side, messages=2 * others),
        )
    # inf-cl, each direction: a pass of 2, gradients of 4 and 4, keys twice and their gradient once more round, all in float32
    return (
        Pass(4 * plane, rows=8 * own, messages=2 * others),
        Pass(16 * plane, rows=8 * own, gradients=8 * own, messages=2 * (others + world)),
    )


def sent(step: Pass, world: int) -> float:
    """Bytes."""
    return step.gathered + (world - 1) * step.rows + (world * step.gradients if world > 1 else 0.0)


def seconds(step: Pass, world: int, rates: Rates) -> float:
    """A ring's block of rhs travels during the products with the one before; its gradient leaves after its own products."""
    block, rows, gradients = (
        step.flops / rates.flops / world,
        step.rows / rates.bandwidth,
        step.gradients / rates.bandwidth,
    )
    waited = step.gathered / rates.bandwidth
    if world == 1:
        return block
    first, last = max(block, rows), max(block, gradients) + gradients
    return waited + first + (world - 2) * max(block, rows + gradients) + last


def memory(method: str, world: int, n: int, d: int) -> float:
    """Bytes besides the inputs and their gradients, bfloat16."""
    own = n * d / world
    return {
        GATHER: 10 * n * d,  # rhs, its gradient, and the others' parts of one's own
        SIGMOID_GATHER: 10 * n * d,
        RING: 20 * own,  # two blocks of rhs, four of gradients
        SIGMOID_RING: 20 * own,
        OPEN_CLIP: 6 * 2 * n * n,  # logits, their softmax and its gradient, twice
        OPEN_CLIP_LOCAL: 6 * 2 * n * n / world,
        INF_CL: 64 * own,  # both directions' two sides, four blocks of keys, eight of gradients, in float32
    }[method]


def model(method: str, world: int, n: int = MODEL_N, d: int = MODEL_D, rates: Rates = RATES) -> dict:
    """FLOPs and bytes of one rank by formula, and seconds at the assumed rates."""
    if method == INF_CL:
        rates = rates._replace(flops=rates.flops / 2)
    steps = passes(method, world, n, d)
    flops, bytes_sent = sum(p.flops for p in steps), sum(sent(p, world) for p in steps)
    return {
        "method": method,
        "world": world,
        "flops": flops,
        "sent_bytes": bytes_sent,
        "messages": sum(p.messages for p in steps),
        "memory_bytes": memory(method, world, n, d),
        "compute_s": flops / rates.flops,
        "communication_s": bytes_sent / rates.bandwidth,
        "seconds": sum(seconds(p, world, rates) for p in steps),
    }


def beside_published() -> list[dict]:
    """The sigmoid at the sizes that others have published. Four GPUs share NVLink; eight are two nodes at InfiniBand's pace."""
    rows = []
    for world, published in PUBLISHED["ms"].items():
        rates = NVLINK if world <= 4 else RATES
        ring, gathered = (
            1000 * model(method, world, PUBLISHED["n"], PUBLISHED["d"], rates)["seconds"]
            for method in (SIGMOID_RING, SIGMOID_GATHER)
        )
        link = "" if world == 1 else rates.link
        rows.append(
            {"world": world, "published_ms": published, "ring_ms": ring, "all_gather_ms": gathered, "link": link}
        )
    return rows
