"""The engine and sampling options of `generate` and `chat`."""

import argparse
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import add_options, given, quiet_jax
from jfp8kv.engine.options import EngineOptions
from jfp8kv.sampling.params import SamplingParams

if TYPE_CHECKING:
    from jfp8kv.llm import LLM

NOT_SHOWN = ("logprobs", "prompt_logprobs", "logit_bias")  # not in the output, or not one word


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options of the engine. --seed is the seed of sampling."""
    add_options(parser.add_argument_group("model and cache"), EngineOptions, omit=("seed",))


def add_sampling(
    parser: argparse.ArgumentParser,
    *,
    omit: Collection[str] = (),
    defaults: dict[str, int | float] | None = None,
) -> None:
    """Add the sampling options."""
    add_options(
        parser.add_argument_group("sampling"),
        SamplingParams,
        omit=(*NOT_SHOWN, *omit),
        repeat=("stop", "choice"),
        defaults=defaults or {},
    )


def sampling(args: argparse.Namespace) -> SamplingParams:
    """Return the sampling parameters. Raises `ConfigError` for an invalid value."""
    return SamplingParams(**given(args, SamplingParams))


def load(args: argparse.Namespace) -> "LLM":
    """Return the engine of the model. Raises `ConfigError` or `CheckpointError`."""
    fields = given(args, EngineOptions)
    fields.pop("seed", None)
    EngineOptions(**fields)  # invalid values are refused before JAX is imported
    from jfp8kv.llm import LLM

    quiet_jax()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack a character
    return LLM(args.model, **fields)
