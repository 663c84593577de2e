"""What the kernels compile to, without a GPU: `python -m bench.aot`."""

from bench.aot.grid import Case
from bench.aot.machine_code import Report, count, inspect, loop_over_d
from bench.aot.table import line, save, title

__all__ = ["Case", "Report", "count", "inspect", "line", "loop_over_d", "save", "title"]
