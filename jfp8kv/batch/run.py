"""Run a batch: from the input through the engine into the journal, then to the output.

A run that is killed at any moment can be resumed: rows in the journal are done, all others run
again. The output of a row depends only on the config and the row number.
"""

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from jfp8kv.batch import outputs
from jfp8kv.batch.config import Config, InputFile
from jfp8kv.batch.dataset_tasks import DATASET_TASKS
from jfp8kv.batch.engine import BatchEngine, LocalEngine
from jfp8kv.batch.journal import Journal, Totals
from jfp8kv.batch.manifest import (
    Manifest,
    RunFiles,
    check_input_unchanged,
    locked,
    new_session,
    open_manifest,
)
from jfp8kv.batch.openai import check_custom_ids
from jfp8kv.batch.progress import Progress, ProgressDisplay
from jfp8kv.batch.ray_runner import run_on_ray
from jfp8kv.batch.requests import RowResult, TemplatedRequests
from jfp8kv.batch.run_requests import EngineFailed, request_format, run_requests
from jfp8kv.batch.validation import load_config
from jfp8kv.core.errors import ConfigError, Jfp8kvError
from jfp8kv.core.log import logger
from jfp8kv.text.rows import Fields, Row, RowError

FIRST_ROWS = 16  # validated before the model is loaded
OpenEngine: TypeAlias = Callable[[Config, Path], BatchEngine]


class RunStopped(Jfp8kvError):
    """A run that cannot continue. Its finished rows are saved, and the same call resumes it."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
      output: the output file.
      totals: counts of all sessions.
      seconds: duration of this session; 0 if the run was already complete.
      already_complete: whether an earlier session completed the run.
      report: the report of task `compare`.
    """

    output: Path
    totals: Totals
    seconds: float = 0.0
    already_complete: bool = False
    report: Any = None

    @property
    def status(self) -> int:
        """The exit status: 1 if a row failed."""
        return 1 if self.totals.failed else 0


def run_batch(
    config: Config | str | Path,
    overrides: Sequence[str] = (),
    *,
    restart: bool = False,
    display: ProgressDisplay | None = None,
    open_engine: OpenEngine = LocalEngine,
) -> RunResult:
    """Run a batch config, or the rest of it if an earlier call was interrupted.

        from jfp8kv.batch import run_batch
        result = run_batch("configs/batch/demo.yaml", ["sampling.temperature=0.2"])
        print(result.output, result.totals)

    Args:
      config: a path to a YAML file, or a config from `load_config`.
      overrides: assignments `a.b=value` in place of values in the file at that path.
      restart: discard earlier results and start from the first row.
      display: shows the progress on stderr; None shows nothing.
      open_engine: opens the engine, given the config and the file for calibrated scales.

    Raises:
      ConfigError: an invalid config, a locked output, or an output of another run.
      CheckpointError: a model that cannot be loaded.
      RunStopped: the input is unreadable, the disk is full, the engine fails on every row, or an
        unexpected error, whose traceback is logged.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    elif overrides:
        raise ConfigError("overrides need the path of a config, not a loaded one.")
    files = RunFiles(outputs.shard_path(Path(config.output.path), config.shard))
    display = display or ProgressDisplay(quiet=True)
    with locked(files):
        manifest = open_manifest(config, files, restart=restart)
        if manifest.complete:
            files.partial.unlink(missing_ok=True)
            totals = Totals(**manifest.data["totals"])
            return RunResult(files.output, totals, already_complete=True)
        with _removed_if_empty(files):
            if config.task in DATASET_TASKS:
                return _run_dataset_task(config, files, manifest, display)
            return _RowRun(config, files, manifest, display, open_engine).run()


@contextmanager
def _removed_if_empty(files: RunFiles) -> Iterator[None]:
    """Remove the files of a run that fails before it has finished a row."""
    try:
        yield
    except BaseException:
        if not files.partial.exists() or not files.partial.stat().st_size:
            files.partial.unlink(missing_ok=True)
            files.manifest.unlink(missing_ok=True)
        raise


def _run_dataset_task(
    config: Config, files: RunFiles, manifest: Manifest, display: ProgressDisplay
) -> RunResult:
    """Run a task with one result for all rows."""
    session = new_session()
    manifest.save(sessions=[session])
    started = time.monotonic()
    task = DATASET_TASKS[config.task]
    totals, report = task(config, progress=None if display.visible else False)
    seconds = time.monotonic() - started
    session["seconds"] = round(seconds, 3)
    manifest.save(status="complete", sessions=[session], totals=asdict(totals))
    return RunResult(files.output, totals, seconds, report=report)


def validate_first_rows(file: InputFile, validate: Callable[[Row, Fields], object]) -> None:
    """Raise `ConfigError` if none of the first rows is valid: the config or the file is wrong."""
    errors = []
    with closing(iter(file.reader())) as rows:
        for row in itertools.islice(rows, FIRST_ROWS):
            try:
                validate(row, row.fields())
                return
            except RowError as error:
                errors.append(f"{file.path}:{row.line}: {error}")
    if errors:
        several = f" None of the first {len(errors)} rows is valid." if len(errors) > 1 else ""
        raise ConfigError(errors[0] + several)


class _RowRun:
    """One session of a run with an output row for each input row."""

    def __init__(
        self,
        config: Config,
        files: RunFiles,
        manifest: Manifest,
        display: ProgressDisplay,
        open_engine: OpenEngine,
    ):
        self.config = config
        self.files = files
        self.manifest = manifest
        self.display = display
        self.open_engine = open_engine
        index, count = config.shard or (0, 1)
        self.shard = (index, count)
        self.reader = config.input.reader()
        self.engine: BatchEngine | None = None
        self.form = request_format(config, self._token_text, manifest.created)
        self.earlier = Totals()  # of earlier sessions
        self.started = time.monotonic()
        self.rows_read = 0  # rows of the shard
        self.rows_skipped = 0  # how many of them earlier sessions finished
        self.input_error: Exception | None = None

    def run(self) -> RunResult:
        """Run all rows that are not finished and write the output."""
        if isinstance(self.form, TemplatedRequests):
            validate_first_rows(self.config.input, self.form.request)
        else:  # the requests do not depend on the config
            check_custom_ids(self.config.input.reader())
        schema = outputs.output_schema(self.config)
        session = new_session()
        sessions = [*self.manifest.data["sessions"], session]
        started = time.monotonic()
        with Journal(self.files.partial, self.shard) as journal:
            self.earlier = replace(journal.totals)
            if self.earlier.rows:
                self.display.message(f"resuming after {self.earlier.rows:,} finished rows")
            with self._stopping(journal):
                self.manifest.save(sessions=sessions)
            self._run_rows(journal)
            totals = journal.totals
        try:
            check_input_unchanged(self.config, self.manifest)
            outputs.write_output(self.config, self.files.partial, schema)
            seconds = time.monotonic() - started
            session["seconds"] = round(seconds, 3)
            session["rows"] = totals.rows - self.earlier.rows
            self.manifest.save(status="complete", sessions=sessions, totals=asdict(totals))
        except (OSError, ConfigError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise RunStopped(
                f"all rows are finished, but {self.files.output} cannot be written: "
                f"{reason or error}. They are kept in {self.files.partial}; the same command tries "
                "again."
            ) from error
        self.files.partial.unlink()
        return RunResult(self.files.output, totals, seconds)

    def _run_rows(self, journal: Journal) -> None:
        """Open the engine and run the rows that are not in the journal."""
        if self.config.runner == "local":
            self.engine = self.open_engine(self.config, self.files.scales)
        with self._stopping(journal):
            engine = {"runner": "ray"} if self.engine is None else self.engine.description
            self.manifest.save(engine=engine)
            self.started = time.monotonic()
            with self.display.following(lambda: self._progress(journal)):
                self._submit_rows(journal)
            journal.sync()
        if self.input_error is not None:
            message = f"{self.config.input.path}: cannot be read further: {self.input_error}"
            raise self._stopped(journal, message)

    @contextmanager
    def _stopping(self, journal: Journal) -> Iterator[None]:
        """Raise `RunStopped` for errors that stop a run, with the number of finished rows."""
        try:
            yield
        except KeyboardInterrupt:
            self.display.message(f"interrupted: {self._finished(journal)}")
            raise
        except EngineFailed as error:
            raise self._stopped(journal, str(error)) from error
        except OSError as error:
            name = error.filename or self.files.partial
            raise self._stopped(journal, f"{name}: {error.strerror or error}") from error
        except Jfp8kvError:
            raise
        except Exception as error:
            logger.exception("The batch run was stopped by an unexpected error.")
            message = f"unexpected {type(error).__name__}: {error}"
            raise self._stopped(journal, f"{message}. This is a bug; see the log") from error

    def _submit_rows(self, journal: Journal) -> None:
        """Run every row of the shard that is not in the journal."""

        def commit(row: Row, result: RowResult) -> None:
            journal.append(
                row.number,
                outputs.encode(result.output),
                prompt_tokens=result.prompt_tokens,
                completion_tokens=result.completion_tokens,
                ok=result.ok,
            )

        with closing(self._unfinished_rows(journal)) as rows:
            if self.engine is not None:
                run_requests(self.config.task, self.form, self.engine, rows, commit)
            else:
                run_on_ray(
                    self.config,
                    rows,
                    journal,
                    open_engine=self.open_engine,
                    scales=self.files.scales,
                    created=self.manifest.created,
                )

    def _unfinished_rows(self, journal: Journal) -> Generator[Row, None, None]:
        """Yield the rows of the shard that are not finished.

        A read error ends the iteration, so that rows in flight still finish.
        """
        index, count = self.shard
        rows = iter(self.reader)
        while True:
            try:
                row = next(rows, None)
            except (OSError, ValueError) as error:
                self.input_error = error
                return
            if row is None:
                return
            if row.number % count == index:
                self.rows_read += 1
                if row.number in journal.done:
                    self.rows_skipped += 1
                else:
                    yield row

    def _token_text(self, token: int) -> str:
        assert self.engine is not None  # results have log-probabilities only after it is open
        return self.engine.token_text(token)

    def _stopped(self, journal: Journal, reason: str) -> RunStopped:
        return RunStopped(f"{reason.rstrip('.')}. {self._finished(journal)}")

    def _finished(self, journal: Journal) -> str:
        rows = journal.totals.rows
        if not rows:
            return "No row is finished; the same command starts from the first row."
        return f"{rows:,} finished rows are kept in {self.files.partial}; the same command resumes."

    def _progress(self, journal: Journal) -> Progress:
        # The fraction of the input per row, assuming that the rest of the file is similar.
        row_fraction = self.reader.fraction / max(1, self.rows_read)
        session = journal.totals - self.earlier
        # The engine also counts tokens of unfinished rows, but not those of scoring or Ray workers.
        counters = self.engine.counters() if self.engine else {}
        prompt_tokens = max(session.prompt_tokens, counters.get("prompt_tokens", 0))
        generated = max(session.completion_tokens, counters.get("generated_tokens", 0))
        return Progress(
            done=journal.totals.rows,
            failed=journal.totals.failed,
            fraction=min(1.0, journal.totals.rows * row_fraction),
            resumed_fraction=self.rows_skipped * row_fraction,
            seconds=time.monotonic() - self.started,
            prompt_tokens=prompt_tokens,
            completion_tokens=generated,
            counters=counters,
        )
