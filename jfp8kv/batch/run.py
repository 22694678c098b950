"""A run over rows: from the input through the engine into the journal, then the output, whole and in order.

Killed at any moment, the same run goes on where it was: what is in the journal is done, everything else is asked again, and a
row's text depends on nothing but the config and its number.
"""

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jfp8kv.batch import outputs
from jfp8kv.batch.answer import EngineFailed, answer, form_of
from jfp8kv.batch.config import Config, File
from jfp8kv.batch.engine import Engine, Local
from jfp8kv.batch.inputs import Reader, Row
from jfp8kv.batch.journal import Journal, Totals
from jfp8kv.batch.lock import locked
from jfp8kv.batch.on_ray import answer_on_ray
from jfp8kv.batch.plain import Plain, Record
from jfp8kv.batch.record import Paths, begin, session
from jfp8kv.batch.templates import RowError
from jfp8kv.batch.view import Progress, View
from jfp8kv.batch.whole import TASKS
from jfp8kv.core.errors import ConfigError, Jfp8kvError

PEEKED = 16  # first rows that are tried before a model is loaded


class RunStopped(Jfp8kvError):
    """A run that could not go on; what it finished is kept, and the same command goes on from there."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to: totals of all its sessions, whether there was anything left to do, what there is to show."""

    output: Path
    totals: dict[str, int]
    seconds: float = 0.0
    worked: bool = True
    shown: Any = None

    @property
    def status(self) -> int:
        """The exit status: 1 when a row failed."""
        return 1 if self.totals["failed"] else 0


def run(
    config: Config,
    *,
    open_engine: Callable[[Config, Path], Engine] = Local,
    restart: bool = False,
    view: View | None = None,
) -> Outcome:
    """Make the output of a config, or what is left of it to be made. `open_engine` gets the config, and where calibrated scales
    are kept.

    Raises:
      ConfigError: a mistake, another process at work on the output, or an output of another run.
      RunStopped: the input could not be read further, the disk is full, or the engine fails on every row.
    """
    paths, view = (
        Paths(outputs.shard_path(Path(config.output.path), config.shard)),
        view or View(quiet=True),
    )
    with locked(paths.lock):
        record = begin(config, paths, restart=restart)
        if record.complete:
            paths.partial.unlink(missing_ok=True)
            return Outcome(paths.output, record.data["totals"], worked=False)
        with _tidied(paths):
            if (task := TASKS.get(config.task)) is None:
                return _Run(config, paths, record, view).work(open_engine)
            began = time.monotonic()
            totals, shown = task(config, progress=None if view.shown else False)
            seconds = time.monotonic() - began
            record.save(
                status="complete",
                sessions=[session() | {"seconds": round(seconds, 3)}],
                totals=totals,
            )
            return Outcome(paths.output, totals, seconds, shown=shown)


@contextmanager
def _tidied(paths: Paths) -> Iterator[None]:
    """Leave no trace of a run that ends before it has finished a row."""
    try:
        yield
    except BaseException:
        if not paths.partial.exists() or not paths.partial.stat().st_size:
            paths.partial.unlink(missing_ok=True)
            paths.record.unlink(missing_ok=True)
        raise


def peek(file: File, ask: Callable[[Row, dict[str, Any]], Any]) -> None:
    """Try the first rows, before a model is loaded. Raises `ConfigError` if none of them is a row, or one for the config."""
    errors = []
    with closing(iter(Reader(file))) as rows:
        for row in itertools.islice(rows, PEEKED):
            try:
                ask(row, row.fields())
                return
            except RowError as error:
                errors.append(f"{file.path}:{row.line}: {error}")
    if errors:
        raise ConfigError(
            errors[0]
            + (f" None of the first {len(errors)} rows will do." if len(errors) > 1 else "")
        )


class _Run:
    """A run at work in this process."""

    def __init__(self, config: Config, paths: Paths, record: Any, view: View):
        self.config, self.paths, self.record, self.view = config, paths, record, view
        self.shard = tuple(config.shard) if config.shard else (0, 1)
        self.reader = Reader(config.input)
        self.began = self.working = time.monotonic()
        self.engine: Engine | None = None
        self.before = Totals()  # of earlier sessions
        self.unreadable: Exception | None = None
        self.seen = self.skipped = (
            0  # rows of the shard that were read, and those of them that were done before
        )
        self.form = form_of(config, self._token_text, record.created)

    def _token_text(self, token: int) -> str:
        assert self.engine is not None  # opened once the first rows were tried
        return self.engine.token_text(token)

    def work(self, open_engine: Callable[[Config, Path], Engine]) -> Outcome:
        if isinstance(self.form, Plain):  # OpenAI's requests are not the config's
            peek(self.config.input, self.form.request)
        sessions = [*self.record.data["sessions"], session()]
        with Journal(self.paths.partial, self.shard) as journal:
            self.before = before = replace(journal.totals)
            if before.rows:
                self.view.say(f"going on after {before.rows:,} finished rows")
            if self.config.runner == "local":
                self.engine = open_engine(self.config, self.paths.scales)
            self.working = time.monotonic()
            try:
                about = self.engine.about if self.engine else {"runner": self.config.runner}
                self.record.save(sessions=sessions, engine=about)
                with self.view.watching(lambda: self._progress(journal)):
                    self._rows(journal, open_engine)
                journal.sync()
            except KeyboardInterrupt:
                self.view.say(f"interrupted: {self._kept(journal)}")
                raise
            except EngineFailed as error:
                raise self._stopped(journal, str(error)) from error
            except OSError as error:
                raise self._stopped(
                    journal, f"{error.filename or self.paths.partial}: {error.strerror or error}"
                ) from error
            if self.unreadable is not None:
                raise self._stopped(
                    journal, f"{self.config.input.path}: cannot be read further: {self.unreadable}"
                )
            totals = asdict(journal.totals)
        try:
            outputs.finish(self.config, self.paths.partial)
            seconds = time.monotonic() - self.began
            sessions[-1] |= {"seconds": round(seconds, 3), "rows": totals["rows"] - before.rows}
            self.record.save(status="complete", sessions=sessions, totals=totals)
        except (OSError, ConfigError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or error
            raise RunStopped(
                f"all rows are finished, and {self.paths.output} cannot be written: {why}. They are kept in "
                f"{self.paths.partial}; the same command tries again."
            ) from error
        self.paths.partial.unlink()
        return Outcome(self.paths.output, totals, seconds)

    def _stopped(self, journal: Journal, why: str) -> RunStopped:
        return RunStopped(f"{why.rstrip('.')}. {self._kept(journal)}")

    def _kept(self, journal: Journal) -> str:
        if not journal.totals.rows:
            return "No row is finished; the same command begins anew."
        kept = f"{journal.totals.rows:,} finished rows are kept in {self.paths.partial}"
        return f"{kept}; the same command goes on from there."

    def _rows(self, journal: Journal, open_engine: Callable[[Config, Path], Engine]) -> None:
        """Every row of the shard that is not in the journal, into the journal."""
        if self.config.runner == "ray":
            created = self.record.created
            answer_on_ray(
                self.config,
                self._left(journal),
                journal,
                open_engine=open_engine,
                scales=self.paths.scales,
                created=created,
            )
            return

        def book(row: Row, record: Record) -> None:
            tokens = {
                "prompt_tokens": record.prompt_tokens,
                "completion_tokens": record.completion_tokens,
            }
            journal.append(row.number, outputs.line(record.output), **tokens, ok=record.ok)

        assert self.engine is not None
        with closing(self._left(journal)) as rows:
            answer(self.config.task, self.form, self.engine, rows, book)

    def _left(self, journal: Journal) -> Generator[Row, None, None]:
        """Rows of this shard that are not done. What cannot be read further ends them: those in flight are finished."""
        first, step = self.shard
        rows = iter(self.reader)
        while True:
            try:
                row = next(rows, None)
            except (OSError, ValueError) as error:
                self.unreadable = error
                return
            if row is None:
                return
            if row.number % step == first:
                self.seen += 1
                if row.number in journal.done:
                    self.skipped += 1
                else:
                    yield row

    def _progress(self, journal: Journal) -> Progress:
        each = self.reader.share / max(
            1, self.seen
        )  # what a row is of all, if the rest are like those read
        totals, counters = journal.totals, self.engine.counters() if self.engine else {}
        # The engine counts what is not finished, too, but not what it scores, nor is that of a cluster's workers here.
        made = totals - self.before
        return Progress(
            done=totals.rows,
            failed=totals.failed,
            share=min(1.0, totals.rows * each),
            share_before=self.skipped * each,
            seconds=time.monotonic() - self.working,
            prompt_tokens=max(made.prompt_tokens, counters.get("prompt_tokens", 0)),
            completion_tokens=max(made.completion_tokens, counters.get("generated_tokens", 0)),
            counters=counters,
        )
