"""The backends. `contract` says what a backend is, `choice` which one a tensor gets and why, `settings` what can be set.

Importing this package needs no Triton. Nothing is defined here: the subpackage `torch` would hide the library of that name.
"""

from .choice import (
    BACKENDS,
    Backend,
    architecture,
    choose,
    choose_for_fields,
    choose_with_reason,
    fields_fit,
    load,
    why_not_triton,
)
from .contract import Gradients, Lines, Mean, Need, Want, statistics_dtype
from .settings import settings, workspace_bytes

__all__ = [
    "BACKENDS",
    "Backend",
    "Gradients",
    "Lines",
    "Mean",
    "Need",
    "Want",
    "architecture",
    "choose",
    "choose_for_fields",
    "choose_with_reason",
    "fields_fit",
    "load",
    "settings",
    "statistics_dtype",
    "why_not_triton",
    "workspace_bytes",
]
