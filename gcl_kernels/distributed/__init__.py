"""The primitive over a process group: rank r holds some rows of lhs and some of rhs, and only rhs travels.

The N x M plane is cut by rows, so a rank does 8 N M D / world and nothing twice. Two transports of rhs:

`"all_gather"`: every rank gets all of rhs at once and keeps it for the backward, O(M D) memory.
`"ring"`: rank to rank, one rank's rows at a time, sent on while they are used. rhs is never whole anywhere, O(M D / world).

Besides rhs (and, in the backward, its gradient in float32) what travels is O(M) a rank: ids, and each rank's part of col.

`agreement` is the first exchange of every call, `exchange` moves bytes, `primitive` is the softmax's statistics over ranks,
`pointwise` the sigmoid's sums, `graphs` all of them as operators of a compiled graph.
"""

from .agreement import Ranks, agree_on_parts, first_column, shared_failure
from .exchange import all_rows
from .graphs import GraphRanks, agree, softplus_of_parts, statistics_of_parts, sum_gradients, sum_values, total

__all__ = [
    "GraphRanks",
    "Ranks",
    "agree",
    "agree_on_parts",
    "all_rows",
    "first_column",
    "shared_failure",
    "softplus_of_parts",
    "statistics_of_parts",
    "sum_gradients",
    "sum_values",
    "total",
]
