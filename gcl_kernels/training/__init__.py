"""Training harness: GCL on pairs of queries and documents with open_clip models.

`python -m gcl_kernels.training` on the command line; from Python:

```python
from gcl_kernels.training import TrainOptions, train

run = train(TrainOptions(train_data="pairs.csv", left_keys=["query"], right_keys=["title"], weight_key="score"))
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gcl_kernels.training.run import Run, train
    from gcl_kernels.training.train_options import TrainOptions

__all__ = ["TrainOptions", "Run", "train"]


def __getattr__(name: str) -> Any:
    """Imported when first asked for: readers of data need neither open_clip nor the rest of a run."""
    if name == "TrainOptions":
        from gcl_kernels.training.train_options import TrainOptions

        return TrainOptions
    if name in ("Run", "train"):
        from gcl_kernels.training import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
