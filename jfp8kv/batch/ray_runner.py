"""`runner: ray`: blocks of rows run on the engines of a Ray cluster, through Ray Data.

Each worker is an actor with an engine. It reads its blocks from the input and returns finished
output lines, and this process commits them to the journal. Ray replaces a worker that dies and runs
its block again. A row that ran twice, or in an earlier session, is committed once.
"""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jfp8kv.batch import outputs
from jfp8kv.batch.config import Config
from jfp8kv.batch.engine import BatchEngine
from jfp8kv.batch.journal import Journal
from jfp8kv.batch.requests import RowResult
from jfp8kv.batch.run_requests import EngineFailed, request_format, run_requests
from jfp8kv.text.rows import Row


def run_on_ray(
    config: Config,
    rows: Iterable[Row],
    journal: Journal,
    *,
    open_engine: Callable[[Config, Path], BatchEngine],
    scales: Path,
    created: int,
) -> None:
    """Run rows on the workers of a cluster and commit their results to the journal.

    Connects to a running cluster, or starts Ray on this machine.

    Args:
      config: the config of the run.
      rows: the unfinished rows.
      journal: the open journal.
      open_engine: opens the engine of a worker.
      scales: the file for scales that the run calibrates first.
      created: the start of the run, in Unix seconds.

    Raises `EngineFailed` when a worker fails.
    """
    import ray
    from ray.data import ActorPoolStrategy, from_items

    blocks = [{"block": json.dumps(ranges)} for ranges in _blocks(rows, config.ray.rows_per_block)]
    if not blocks:
        return
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with _quiet_ray_data():
        results = from_items(blocks, override_num_blocks=len(blocks)).map_batches(
            Worker,
            fn_constructor_args=(config, scales.resolve(), created, open_engine),
            batch_size=1,
            compute=ActorPoolStrategy(size=config.ray.workers),
            num_cpus=config.ray.cpus,
            num_gpus=config.ray.gpus,
        )
        try:
            for result in results.iter_rows():
                if result["row"] not in journal.done:
                    journal.append(
                        result["row"],
                        result["output"],
                        prompt_tokens=result["in"],
                        completion_tokens=result["out"],
                        ok=result["ok"],
                    )
        except ray.exceptions.RayError as error:
            raise EngineFailed(f"a worker failed: {_last_line(error)}") from error


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Turn off Ray Data's progress bars and log; both settings are global to the process.

    The run shows its progress, and errors of workers are raised.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    logger = logging.getLogger("ray.data")
    progress_bars = context.enable_progress_bars
    level = logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars = progress_bars
        logger.setLevel(level)


def _last_line(error: BaseException) -> str:
    """Return the message of a worker's error, which follows its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _blocks(rows: Iterable[Row], size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield blocks of `size` rows, each as ranges of row numbers."""
    numbers = (row.number for row in rows)
    while block := list(itertools.islice(numbers, size)):
        yield _ranges(block)


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Return ascending numbers as ranges `[first, stop)`."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges


class Worker:
    """An actor of the cluster with an engine and the open input."""

    def __init__(
        self,
        config: Config,
        scales: Path,
        created: int,
        open_engine: Callable[[Config, Path], BatchEngine],
    ):
        self.config = config
        self.engine = open_engine(config, scales)
        self.form = request_format(config, self.engine.token_text, created)
        self._rows: Iterator[Row] = iter(())
        self._next = 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Run the rows of a block.

        Returns columns: row numbers, output lines, prompt and completion tokens, success.
        """
        columns: dict[str, list[Any]] = {"row": [], "output": [], "in": [], "out": [], "ok": []}

        def commit(row: Row, result: RowResult) -> None:
            columns["row"].append(row.number)
            columns["output"].append(outputs.encode(result.output))
            columns["in"].append(result.prompt_tokens)
            columns["out"].append(result.completion_tokens)
            columns["ok"].append(result.ok)

        (block,) = batch["block"]
        rows = self._read(json.loads(block))
        run_requests(self.config.task, self.form, self.engine, rows, commit)
        return columns

    def _read(self, ranges: list[list[int]]) -> Iterator[Row]:
        """Yield the rows in ranges of row numbers. Reopens the input to go back to earlier rows."""
        for first, stop in ranges:
            if first < self._next or self._next == 0:
                self._rows = iter(self.config.input.reader())
                self._next = 0
            for row in itertools.islice(self._rows, first - self._next, stop - self._next):
                self._next = row.number + 1
                yield row
