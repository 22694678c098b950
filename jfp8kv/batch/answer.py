"""Rows answered by an engine: asked, served or refused, and booked one by one as each is finished."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

from jfp8kv.batch.config import Config
from jfp8kv.batch.engine import Engine
from jfp8kv.batch.inputs import Row, format_of
from jfp8kv.batch.openai import OpenAI
from jfp8kv.batch.plain import Plain, Record, Request
from jfp8kv.batch.templates import RowError
from jfp8kv.core.errors import ConfigError, Jfp8kvError

HOPELESS = 16  # rows one after the other that fail in the engine, each alone, until it is given up
Book = Callable[[Row, Record], None]


class EngineFailed(Jfp8kvError):
    """An engine that fails on every row: it is not the rows."""


def form_of(config: Config, token_text: Callable[[int], str], created: int) -> Plain | OpenAI:
    """What makes requests of rows and records of results: in OpenAI's form for OpenAI's requests, else as the config says."""
    return (
        OpenAI(config, token_text, created)
        if format_of(config.input) == "openai"
        else Plain(config, token_text)
    )


def answer(
    task: str, form: Plain | OpenAI, engine: Engine, rows: Iterable[Row], book: Book
) -> None:
    """Have every row answered and booked, those that cannot be as failed. Raises `EngineFailed`; what `book` raises ends it.

    Rows on which the engine fails are booked once it has served another: if it serves none any more they are not finished.
    """
    flying: dict[int, tuple[Row, dict[str, Any]]] = {}
    faults: list[tuple[Row, Record]] = []
    work = engine.score if task == "score" else engine.generate
    with (
        closing(_requests(form, rows, book, flying)) as requests,
        closing(work(requests)) as results,
    ):
        for number, result in results:
            row, fields = flying.pop(number)
            record = _record(form, row, fields, result)
            if not _is_fault(result):
                _book_all(faults, book)
                book(row, record)
                continue
            faults.append((row, record))
            if len(faults) == HOPELESS:
                raise EngineFailed(f"the engine fails on every row: {_words(result)}") from result
    _book_all(faults, book)


def _requests(
    form: Any, rows: Iterable[Row], book: Book, flying: dict[int, tuple[Row, dict[str, Any]]]
) -> Iterator[Request]:
    """What the rows ask; those that ask nothing that can be served are booked as failed."""
    numbers = itertools.count()
    for row in rows:
        fields = None
        try:
            fields = row.fields()
            request = form.request(row, fields)
        except RowError as error:
            book(row, form.failed(row, fields, str(error)))
            continue
        flying[next(numbers)] = row, fields
        yield request


def _record(form: Any, row: Row, fields: dict[str, Any], result: Any) -> Record:
    """What is kept of a row that the engine is done with."""
    if not isinstance(result, Exception):
        return form.record(row, fields, result)
    if not _is_fault(result):
        return form.failed(row, fields, _words(result))
    return form.failed(row, fields, f"the engine failed: {_words(result)}", fault=True)


def _book_all(records: list[tuple[Row, Record]], book: Book) -> None:
    for row, record in records:
        book(row, record)
    records.clear()


def _is_fault(result: Any) -> bool:
    """Whether the engine failed on a row, rather than refused it."""
    return isinstance(result, Exception) and not isinstance(result, ConfigError)


def _words(error: Any) -> str:
    """An error in a line."""
    text = " ".join(str(error).split()).replace("prompt 0 ", "the prompt ")
    return text if isinstance(error, Jfp8kvError) else f"{type(error).__name__}: {text}"
