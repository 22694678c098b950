"""`runner: ray`: blocks of rows on the engines of a Ray cluster, through Ray Data.

Each worker is an actor that holds an engine, reads its blocks from the input itself, and gives back finished output lines; this
process books them in the journal. A worker that dies is replaced by Ray, and its block is asked again. Whether a block was
asked once or twice, on which worker, or in an earlier session, does not show: what is booked is booked once.
"""

import importlib.util
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jfp8kv.batch import outputs
from jfp8kv.batch.answer import EngineFailed, answer, form_of
from jfp8kv.batch.config import Config
from jfp8kv.batch.engine import Engine
from jfp8kv.batch.inputs import Reader, Row
from jfp8kv.batch.journal import Journal
from jfp8kv.core.errors import NotSupported


def check() -> None:
    """Raise `NotSupported` unless Ray Data is there."""
    if importlib.util.find_spec("ray") is None:
        raise NotSupported("ray needs Ray Data, which is not installed: pip install 'jfp8kv[ray]'.")


def answer_on_ray(
    config: Config,
    left: Iterable[Row],
    journal: Journal,
    *,
    open_engine: Callable[[Config, Path], Engine],
    scales: Path,
    created: int,
) -> None:
    """Have the rows that are `left` answered by the workers of a cluster, and booked. Starts Ray here if none is running."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    blocks = [
        {"block": json.dumps(numbers)} for numbers in _blocks(left, config.ray.rows_per_block)
    ]
    if not blocks:
        return
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    DataContext.get_current().enable_progress_bars = False  # the run shows its own
    logging.getLogger("ray.data").setLevel(
        logging.CRITICAL
    )  # what a worker fails with is raised here, too
    done = from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        Worker,
        fn_constructor_args=(config, scales.resolve(), created, open_engine),
        batch_size=1,
        compute=ActorPoolStrategy(size=config.ray.workers),
        num_cpus=config.ray.cpus,
        num_gpus=config.ray.gpus,
    )
    try:
        for row in done.iter_rows():
            if row["row"] not in journal.done:
                tokens = {"prompt_tokens": row["in"], "completion_tokens": row["out"]}
                journal.append(row["row"], row["output"], **tokens, ok=row["ok"])
    except ray.exceptions.RayError as error:
        raise EngineFailed(f"a worker failed: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    """What a worker's error says after its traceback."""
    return next(
        (line.strip() for line in reversed(str(error).splitlines()) if line.strip()),
        type(error).__name__,
    )


def _blocks(left: Iterable[Row], size: int) -> Iterator[list[tuple[int, int]]]:
    """Ranges of row numbers, of `size` rows together."""
    numbers = (row.number for row in left)
    while block := list(itertools.islice(numbers, size)):
        yield _ranges(block)


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges `[first, stop)`."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


class Worker:
    """An engine on a machine of the cluster, and the input open beside it."""

    def __init__(
        self,
        config: Config,
        scales: Path,
        created: int,
        open_engine: Callable[[Config, Path], Engine],
    ):
        self.config = config
        self.engine = open_engine(config, scales)
        self.form = form_of(config, self.engine.token_text, created)
        self._rows: Iterator[Row] = iter(())
        self._next = 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """The rows of a block, answered: numbers, output lines, tokens, whether each succeeded."""
        found: dict[str, list[Any]] = {"row": [], "output": [], "in": [], "out": [], "ok": []}

        def book(row: Row, record: Any) -> None:
            values = (
                row.number,
                outputs.line(record.output),
                record.prompt_tokens,
                record.completion_tokens,
                record.ok,
            )
            for name, value in zip(found, values, strict=True):
                found[name].append(value)

        (block,) = batch["block"]
        answer(self.config.task, self.form, self.engine, self._read(json.loads(block)), book)
        return found

    def _read(self, ranges: list[list[int]]) -> Iterator[Row]:
        """The rows in these ranges. The input is read on from where it is, or anew."""
        for first, stop in ranges:
            if first < self._next or self._next == 0:
                self._rows, self._next = iter(Reader(self.config.input)), 0
            for row in itertools.islice(self._rows, first - self._next, stop - self._next):
                self._next = row.number + 1
                yield row
