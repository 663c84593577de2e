"""What `check_loss` found, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Result = Literal["pass", "fail", "not offered", "not judged"]


@dataclass(frozen=True)
class Row:
    """A property of a loss.

    Args:
        name: of the property.
        result: `"pass"`; `"fail"`; `"not offered"`: the loss has no such option; `"not judged"`: a row above says why not.
        detail: the smallest problem where the property does not hold, and what came; or what was measured.
    """

    name: str
    result: Result
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether it does not fail."""
        return self.result != "fail"

    @property
    def cell(self) -> str:
        """The detail, fit for a table."""
        return " ".join(self.detail.split()).replace("|", "/")


@dataclass(frozen=True)
class Report:
    """The `rows` of `check_loss`. `passed` where none fails."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the rows that fail."""
        return tuple(row.name for row in self.rows if not row.passed)

    def __str__(self) -> str:
        return "\n".join(
            [
                "| property | result | smallest failing case, or what was measured |",
                "|---|---|---|",
                *(f"| {row.name} | {row.result} | {row.cell} |" for row in self.rows),
            ]
        )


MARKS: dict[Result, str] = {"pass": "yes", "fail": "**no**", "not offered": "-", "not judged": "(no)"}


def side_by_side(titles: Sequence[str], reports: Sequence[Report]) -> str:
    """Markdown: a line a property, a column a loss, and below it the smallest failing case of each."""
    longest_first = sorted(reports, key=lambda report: -len(report.rows))
    names = list(dict.fromkeys(row.name for report in longest_first for row in report.rows))
    columns = [{row.name: row for row in report.rows} for report in reports]
    numbers = range(1, len(titles) + 1)
    lines = [*(f"{k}. {title}" for k, title in zip(numbers, titles, strict=True)), ""]
    lines += ["| | " + " | ".join(map(str, numbers)) + " |", "|---|" + "---|" * len(titles)]
    for name in names:
        cells = [MARKS[column[name].result] if name in column else MARKS["not offered"] for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "yes: the property holds. **no**: it does not. (no): not judged, since a value or gradient that it needs is wrong. -: the"
        " loss has no such option.",
        "",
        "| loss | property | smallest failing case, or what was measured |",
        "|---|---|---|",
    ]
    for title, report in zip(titles, reports, strict=True):
        told = [row for row in report.rows if row.detail and row.result in ("fail", "pass")]
        lines += [f"| {title} | {row.name}: {row.result} | {row.cell} |" for row in told]
    return "\n".join(lines)
