"""Tables as people meet them: lines on a terminal, plain text in a pipe, HTML in a notebook."""

import abc
import html
import io
from collections.abc import Iterable
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

LINES = box.SIMPLE_HEAD  # between a table's parts, on a terminal
_WIDE = 100_000  # columns: nothing is wrapped that is not for a terminal


class Report(abc.ABC):
    """A report that prints as tables: with lines on a terminal, plain as text, as HTML in a notebook."""

    @abc.abstractmethod
    def _layout(self, lines: box.Box | None) -> Group:
        """Its tables; `lines` is what is drawn between their parts."""

    def __str__(self) -> str:
        return plain(self._layout(None))

    def __rich__(self) -> Group:
        return self._layout(LINES)

    def _repr_html_(self) -> str:
        return as_html(self._layout(None))


def empty_table(lines: box.Box | None, *columns: str, text: Iterable[str] = ()) -> Table:
    """A table of these columns, without rows. The first and those named in `text` are aligned left, numbers right."""
    made, left = Table(box=lines, header_style="bold", pad_edge=False), set(text)
    for i, name in enumerate(columns):
        side: Literal["left", "right"] = "right" if i and name not in left else "left"
        made.add_column(name, justify=side)
    return made


def plain(shown: RenderableType) -> str:
    """Tables as text that a pipe can carry: no lines, no colours, nothing wrapped."""
    out = io.StringIO()
    Console(file=out, width=_WIDE, color_system=None).print(shown)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def as_html(shown: Group) -> str:
    """The same as HTML: tables are tables, lines of text paragraphs."""
    return "".join(map(_part, shown.renderables))


def _part(shown: RenderableType) -> str:
    if not isinstance(shown, Table):
        return f"<p>{html.escape(str(shown))}</p>"

    def row(tag: str, cells: list[str]) -> str:
        sides = [column.justify for column in shown.columns]
        made = (
            f'<{tag} style="text-align: {side}">{html.escape(c)}</{tag}>'
            for c, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    head = row("th", [str(column.header) for column in shown.columns])
    columns = [list(map(str, column.cells)) for column in shown.columns]
    body = "".join(row("td", list(cells)) for cells in zip(*columns, strict=True))
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
