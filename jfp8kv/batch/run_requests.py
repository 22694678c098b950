"""Run rows on an engine: submit a request for each row, and commit each result as it finishes."""

import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import closing

from jfp8kv.batch.config import Config
from jfp8kv.batch.engine import BatchEngine, Result
from jfp8kv.batch.openai import OpenAIRequests
from jfp8kv.batch.requests import RequestFormat, RowRequest, RowResult, TemplatedRequests
from jfp8kv.core.errors import ConfigError, Jfp8kvError
from jfp8kv.text.rows import Fields, Row, RowError

MAX_CONSECUTIVE_FAILURES = 16  # consecutive rows that fail in the engine, each also alone
Commit = Callable[[Row, RowResult], None]


class EngineFailed(Jfp8kvError):
    """The engine fails on every row, so the rows are not the cause."""


def request_format(
    config: Config, token_text: Callable[[int], str], created: int
) -> TemplatedRequests | OpenAIRequests:
    """Return the request format of a run: OpenAI's for an input of OpenAI requests."""
    if config.input.row_format == "openai":
        return OpenAIRequests(config, token_text, created)
    return TemplatedRequests(config, token_text)


def run_requests(
    task: str, form: RequestFormat, engine: BatchEngine, rows: Iterable[Row], commit: Commit
) -> None:
    """Run every row and commit its result; rows that cannot be run are committed as failed.

    An engine failure is committed once a later row succeeds. If none does, the rows stay
    unfinished, so that the next run tries them again.

    Raises:
      EngineFailed: after `MAX_CONSECUTIVE_FAILURES` engine failures without a success.
      Exception: an error that is not a `Jfp8kvError`, which is a bug in the library.
    """
    in_flight: dict[int, tuple[Row, Fields]] = {}
    failures: list[tuple[Row, RowResult]] = []
    work = engine.score if task == "score" else engine.generate
    with (
        closing(_requests(form, rows, commit, in_flight)) as requests,
        closing(work(requests)) as results,
    ):
        for number, result in results:
            row, fields = in_flight.pop(number)
            if _is_engine_error(result):
                message = f"engine error: {_one_line(result)}"
                failures.append((row, form.failure(row, fields, message, engine_error=True)))
                if len(failures) == MAX_CONSECUTIVE_FAILURES:
                    raise EngineFailed(f"the engine fails on every row: {_one_line(result)}")
                continue
            _commit_all(failures, commit)
            if isinstance(result, Jfp8kvError):
                commit(row, form.failure(row, fields, _one_line(result)))
            else:
                commit(row, form.result(row, fields, result))
    _commit_all(failures, commit)


def _requests(
    form: RequestFormat,
    rows: Iterable[Row],
    commit: Commit,
    in_flight: dict[int, tuple[Row, Fields]],
) -> Generator[RowRequest, None, None]:
    """Yield the requests of the rows; commit rows without a valid request as failed."""
    numbers = itertools.count()
    for row in rows:
        fields = None
        try:
            fields = row.fields()
            request = form.request(row, fields)
        except RowError as error:
            commit(row, form.failure(row, fields, str(error)))
            continue
        in_flight[next(numbers)] = (row, fields)
        yield request


def _commit_all(results: list[tuple[Row, RowResult]], commit: Commit) -> None:
    for row, result in results:
        commit(row, result)
    results.clear()


def _is_engine_error(result: Result) -> bool:
    """Return whether the engine failed on a row, as opposed to refusing its request."""
    return isinstance(result, Jfp8kvError) and not isinstance(result, ConfigError)


def _one_line(error: object) -> str:
    """Return an error message on one line, in terms of one prompt."""
    return " ".join(str(error).split()).replace("prompt 0 ", "the prompt ")
