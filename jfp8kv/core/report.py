"""Base class of reports: tables on a terminal, plain text, HTML in a notebook, JSON types."""

import abc
import dataclasses
import html
import io
import math
from collections.abc import Iterable
from typing import Any, Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

LINES = box.SIMPLE_HEAD  # between the parts of a table on a terminal
_WIDE = 100_000  # columns; text that is not for a terminal never wraps


class Report(abc.ABC):
    """A dataclass that prints as tables."""

    @abc.abstractmethod
    def _layout(self, lines: box.Box | None) -> Group:
        """Return the tables, with `lines` between their parts."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and properties as JSON types; infinity and NaN become None."""
        fields: dict[str, Any] = to_json(self)
        return fields

    def __str__(self) -> str:
        return plain(self._layout(None))

    def __rich__(self) -> Group:
        return self._layout(LINES)

    def _repr_html_(self) -> str:
        return as_html(self._layout(None))


def to_json(value: Any) -> Any:
    """Return a value as JSON types. Dataclasses become dicts of their fields and properties."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += [name for name, each in vars(type(value)).items() if isinstance(each, property)]
        return {name: to_json(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def gap(lines: box.Box | None) -> list[str]:
    """Return the separator of two tables: an empty line, or nothing if tables have ruled lines."""
    return [] if lines else [""]


def empty_table(
    lines: box.Box | None,
    *columns: str,
    text: Iterable[str] = (),
    first: Literal["left", "right"] = "left",
    fold: bool = False,
) -> Table:
    """Return a table without rows.

    Args:
      columns: headers. Numbers are aligned right.
      text: the columns that are aligned left.
      first: the alignment of the first column.
      fold: wrap long cells on a terminal instead of cutting them off.
    """
    table = Table(box=lines, header_style="bold", pad_edge=False)
    left = set(text)
    for i, name in enumerate(columns):
        justify: Literal["left", "right"] = "left" if name in left else "right"
        if i == 0:
            justify = first
        table.add_column(name, justify=justify, overflow="fold" if fold else "ellipsis")
    return table


def plain(content: RenderableType) -> str:
    """Return tables as text without lines, colours or wrapping."""
    out = io.StringIO()
    Console(file=out, width=_WIDE, color_system=None).print(content)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def as_html(group: Group) -> str:
    """Return tables as HTML tables, and lines of text as paragraphs."""
    return "".join(map(_part, group.renderables))


def _part(content: RenderableType) -> str:
    if not isinstance(content, Table):
        return f"<p>{html.escape(str(content))}</p>"
    columns = [[str(cell) for cell in column.cells] for column in content.columns]
    head = _row(content, "th", [str(column.header) for column in content.columns])
    body = "".join(_row(content, "td", list(cells)) for cells in zip(*columns, strict=True))
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(table: Table, tag: str, cells: list[str]) -> str:
    parts = [
        f'<{tag} style="text-align: {column.justify}">{html.escape(cell)}</{tag}>'
        for cell, column in zip(cells, table.columns, strict=True)
    ]
    return f"<tr>{''.join(parts)}</tr>"
