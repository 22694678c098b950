"""Config-driven runs over files of prompts: `jfp8kv batch CONFIG.yaml`, or `run_batch` in Python.

    from jfp8kv.batch import run_batch
    result = run_batch("configs/batch/demo.yaml")

`validation` loads a config (`config`, `option_sections`, `yaml_source`), and `run` runs it. Rows of
the input (`text.rows`) are converted to requests (`requests`, `templates`, `openai`). An engine
(`engine`) runs them (`run_requests`, or `ray_runner` on a cluster). Finished rows are appended to a
journal (`journal`), from which the output is written (`outputs`, `parquet_schema`, `parquet`,
`merge`). The manifest (`manifest`) identifies the run, and `progress` shows it. `dataset_tasks` are
the tasks with one result for all rows, and `dry_run` reports on a run without running it.
"""

from jfp8kv.batch.config import Config
from jfp8kv.batch.dry_run import DryRun, dry_run
from jfp8kv.batch.journal import Totals
from jfp8kv.batch.merge import merge
from jfp8kv.batch.progress import ProgressDisplay
from jfp8kv.batch.run import RunResult, RunStopped, run_batch
from jfp8kv.batch.validation import json_schema, load_config

__all__ = [
    "Config",
    "DryRun",
    "ProgressDisplay",
    "RunResult",
    "RunStopped",
    "Totals",
    "dry_run",
    "json_schema",
    "load_config",
    "merge",
    "run_batch",
]
