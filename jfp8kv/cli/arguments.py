"""What may be asked on the command line, and the model and sampling parameters that were asked for."""

import argparse
import logging
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from jfp8kv.core.errors import ConfigError, did_you_mean, invalid_choice

if TYPE_CHECKING:
    import jfp8kv.functional

SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n")


class _Parser(argparse.ArgumentParser):
    """Raises `ConfigError` for a mistake, where argparse prints its usage and leaves."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`.")

    def option(self, name: str, metavar: str, text: str, kind: type = str, **rest: Any) -> None:
        """One that takes a value."""
        self.add_argument(name, metavar=metavar, type=kind, help=text, **rest)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked as far as that goes without a model.

    Raises:
      ConfigError: a mistake; for an unknown option or command it names the nearest known one.
      SystemExit: after --help and --version.
    """
    for given in argv:
        if any(
            "\ud800" <= character <= "\udfff" for character in given
        ):  # how Python hands over stray bytes
            raise ConfigError(f"argument {given!r}: must be UTF-8 text.")
    parser, commands = _parsers()
    if argv and argv[0] not in commands and not argv[0].startswith("-"):
        raise invalid_choice("command", argv[0], commands)
    args, unknown = parser.parse_known_args(argv)
    for given in unknown:
        if not given.startswith("-"):
            raise ConfigError(
                f"unexpected argument {given!r}: put quotes around a text, and --prompt before it."
            )
        option = given.partition("=")[0]
        known = re.findall(r"--[a-z-]+", commands[args.command].format_help())
        raise ConfigError(
            f"unknown option {option}.{did_you_mean(option, known)} See `jfp8kv {args.command} --help`."
        )
    return args


def sampling(args: argparse.Namespace) -> "jfp8kv.functional.SamplingParams":
    """The sampling parameters asked for. Raises `ConfigError` for a value out of its range."""
    from jfp8kv.functional import SamplingParams

    return SamplingParams(**{name: getattr(args, name) for name in SAMPLING if hasattr(args, name)})


def load(args: argparse.Namespace) -> "jfp8kv.functional.LLM":
    """The model asked for, with its cache. Raises `ConfigError` or `CheckpointError`."""
    from jfp8kv.functional import LLM

    quiet_jax()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a terminal that lacks a character still shows the others
    return LLM(
        args.model,
        kv_dtype=args.kv_dtype,
        kv_scales=args.kv_scales,
        kv_cache_memory=args.kv_cache_memory,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        strict=not args.lenient,
    )


def names(given: str) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in given.split(",") if name.strip()]


def quiet_jax() -> None:
    """JAX's own remarks are for its developers."""
    logging.getLogger("jax").setLevel(logging.ERROR)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    about = "Run language models in JAX with a paged key/value cache in 8-bit floating point."
    parser = _Parser("jfp8kv", description=about, allow_abbrev=False)
    version = sys.modules["jfp8kv"].__version__  # of the package around this one, installed or not
    parser.add_argument("--version", action="version", version=f"jfp8kv {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    about = "Continue prompts. One is streamed as it is made; several run as one batch."
    generate = commands.add_parser(
        "generate", help="continue prompts", description=about, allow_abbrev=False
    )
    _add_running(_add_model(generate))
    asked = generate.add_argument_group("prompts")
    asked.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given again"
    )
    asked.add_argument(
        "--file", metavar="PATH", help="prompts, one a line, empty lines left out; - is stdin"
    )
    asked.add_argument(
        "--chat", action="store_true", help="ask as a user, through the model's chat template"
    )
    asked.add_argument(
        "--n", type=int, default=1, metavar="N", help="continuations of each prompt (default 1)"
    )
    asked.add_argument(
        "--json", action="store_true", help="print one JSON object a line for each continuation"
    )
    _add_sampling(generate, max_tokens=128, temperature=1.0)

    about = "Talk with a model. /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."
    chat = commands.add_parser(
        "chat", help="talk with a model", description=about, allow_abbrev=False
    )
    _add_running(_add_model(chat))
    chat.add_argument(
        "--system", metavar="TEXT", help="what the model is told before the conversation"
    )
    _add_sampling(chat, max_tokens=512, temperature=0.7)

    about = "Run a file of rows through a model, as a config file says. The same command goes on with a run that was broken off."
    batch = commands.add_parser(
        "batch", help="run a file of rows, from a config", description=about, allow_abbrev=False
    )
    _add_batch(batch)

    about = "Say what a model is, what its KV cache costs and what scales it brings. Config and headers are read, not the weights."
    inspect = commands.add_parser(
        "inspect",
        help="what a model is and what its cache costs",
        description=about,
        allow_abbrev=False,
    )
    group = _add_model(inspect)
    group.add_argument(
        "--page-size", type=int, default=64, metavar="N", help="tokens per page (default 64)"
    )
    inspect.add_argument("--json", action="store_true", help="print a JSON object")

    about = (
        "Find scales for an FP8 cache from data, and write them to a file that --kv-scales takes."
    )
    calibrate = commands.add_parser(
        "calibrate", help="find scales for an FP8 cache", description=about, allow_abbrev=False
    )
    _add_calibration(calibrate)

    about = "Compare what KV caches cost in quality and in bytes, over a text, against a float32 cache of the same weights."
    compare = commands.add_parser(
        "compare", help="what caches cost in quality", description=about, allow_abbrev=False
    )
    _add_comparison(compare)

    about = "Choose the format and scales of each layer's cache by what they lose, and write a plan that --kv-dtype takes."
    plan = commands.add_parser(
        "plan", help="choose a cache layer by layer", description=about, allow_abbrev=False
    )
    _add_plan(plan)

    about = "Write a model as a Hugging Face folder, with its scales for an FP8 cache where vLLM and others look for them."
    export = commands.add_parser(
        "export", help="write a Hugging Face folder", description=about, allow_abbrev=False
    )
    _add_export(export)

    about = "Measure how fast caches are here: the same requests through each of them, in turn, and what each has room for."
    bench = commands.add_parser(
        "bench", help="how fast caches are here", description=about, allow_abbrev=False
    )
    _add_bench(bench)
    made = {
        "generate": generate,
        "chat": chat,
        "batch": batch,
        "inspect": inspect,
        "calibrate": calibrate,
        "compare": compare,
        "plan": plan,
        "export": export,
        "bench": bench,
    }
    return parser, made


def _add_batch(parser: _Parser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a YAML file; configs/batch has commented ones"
    )
    setting = (
        "in place of what the config says, such as sampling.temperature=0.2; may be given again"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
    parser.add_argument(
        "--restart", action="store_true", help="begin anew, and replace what there is of the output"
    )
    dry = "look at everything, run nothing: tokens, what fits the cache, roughly how long"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.add_argument(
        "--merge", action="store_true", help="join the outputs of all shards into the one output"
    )
    parser.add_argument(
        "--print-schema", action="store_true", help="print the JSON Schema of configs, for editors"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")


def _add_calibration(parser: _Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file or a hub id"
    )
    data = "a text file with a prompt on each line, or a .jsonl file with a prompt in each record"
    parser.add_argument("data", metavar="DATA", help=data)

    option = parser.option
    option("--out", "FILE", "where the scales go (safetensors)", required=True)
    option("--kv-dtype", "DTYPE", "fp8_e4m3 (or fp8, default) or fp8_e5m2", default="fp8_e4m3")
    option(
        "--granularity",
        "WHAT",
        "what shares a scale: tensor, head (default) or channel",
        default="head",
    )
    option("--observer", "NAME", "amax (default), percentile or mse", default="amax")
    option(
        "--percentile",
        "X",
        "of magnitudes that need no clipping (default 99.99), for --observer percentile",
        float,
    )
    parser.add_argument(
        "--k-offset",
        action="store_true",
        help="store keys less a constant: for models with large K biases",
    )
    option(
        "--headroom",
        "X",
        "times the largest value seen that scales hold (default 1), for amax",
        float,
        default=1.0,
    )
    option(
        "--window",
        "N",
        "cut prompts into pieces of N tokens; a text file is then one text, not a prompt a line",
        int,
    )
    option(
        "--field", "NAME", "of a record that holds the prompt (default: text, prompt or messages)"
    )
    option("--max-model-len", "N", "most tokens of a prompt (default: the model's)", int)
    option("--dtype", "DTYPE", "of the weights: bfloat16, float16 or float32 (default: the file's)")
    _add_lenient(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument(
        "--quiet", action="store_true", help="print the summary alone: no progress, no remarks"
    )


def _add_comparison(parser: _Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file or a hub id"
    )
    parser.add_argument(
        "text", metavar="TEXT", help="a text file, or a .jsonl file with a text in each record"
    )
    scales = (
        "of the FP8 ones, by commas: auto, unit, token_head, checkpoint, files of KVScales, or tensor, head, channel, found on "
        "--calibration (default auto,token_head)"
    )

    option = parser.option
    dtypes = "bfloat16,fp8_e4m3,fp8_e5m2"
    option(
        "--kv-dtypes",
        "LIST",
        f"formats to compare, or files of KVPlans, by commas (default {dtypes})",
        default=dtypes,
    )
    option("--kv-scales", "LIST", scales, default="auto,token_head")
    option("--calibration", "FILE", "texts to calibrate scales on, as TEXT; not the same ones")
    option(
        "--window",
        "N",
        "cut texts into pieces of N tokens (default: the most that the model takes)",
        int,
    )
    option(
        "--needle-lengths",
        "LIST",
        "tokens of the haystacks, by commas, or none (default 256,1024, if the model takes them)",
    )
    option(
        "--needle-depths",
        "LIST",
        "where the needle is, 0 the beginning, 1 the end, by commas (default 0,0.5,1)",
    )
    option("--field", "NAME", "of a record that holds the text (default: text, prompt or messages)")
    option("--max-model-len", "N", "most tokens of a piece (default: the model's)", int)
    option("--dtype", "DTYPE", "of the weights: bfloat16, float16 or float32 (default: the file's)")
    _add_lenient(parser)
    option("--plot", "FILE", "draw it, too: a .png, .pdf or .svg file")
    parser.add_argument(
        "--by-layer", action="store_true", help="print what is kept layer by layer, too"
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument(
        "--quiet", action="store_true", help="print the result alone: no progress, no remarks"
    )


def _add_plan(parser: _Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file or a hub id"
    )
    parser.add_argument(
        "text", metavar="TEXT", help="a text file, or a .jsonl file with a text in each record"
    )

    option = parser.option
    option("--out", "FILE", "where the plan goes (safetensors)", required=True)
    option(
        "--budget",
        "BYTES",
        "the least loss within so many bytes per token: 2048, 2KiB, or 60%% of what bfloat16 takes",
    )
    option(
        "--max-loss",
        "X",
        "or the fewest bytes within so many nats of KL divergence per token, such as 0.01",
        float,
    )
    option(
        "--kv-dtypes",
        "LIST",
        "formats to choose from (default bfloat16,fp8_e4m3)",
        default="bfloat16,fp8_e4m3",
    )
    option("--window", "N", "cut texts into pieces of N tokens (default 512)", int)
    option("--field", "NAME", "of a record that holds the text (default: text, prompt or messages)")
    option(
        "--max-model-len",
        "N",
        "tokens of the longest text that is meant (default: the model's)",
        int,
    )
    option("--dtype", "DTYPE", "of the weights: bfloat16, float16 or float32 (default: the file's)")
    _add_lenient(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    parser.add_argument(
        "--quiet", action="store_true", help="print the plan alone: no progress, no remarks"
    )


def _add_export(parser: _Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file or a hub id"
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="where to: a folder that is empty, or not there yet"
    )
    scales = "a file of KVScales, as calibrate writes it (default: the scales that the model has, if any)"
    parser.add_argument("--kv-scales", metavar="FILE", help=scales)
    layout = (
        "of the scales: compressed-tensors (default), as LLM Compressor writes and vLLM reads them"
    )
    parser.add_argument("--layout", default="compressed-tensors", metavar="NAME", help=layout)
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="of the weights: bfloat16, float16 or float32 (default: the file's)",
    )
    _add_lenient(parser)
    parser.add_argument("--quiet", action="store_true", help="no remarks on what was written")


def _add_bench(parser: _Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file or a hub id"
    )

    option = parser.option
    dtypes = "bfloat16,fp8_e4m3"
    option(
        "--kv-dtypes",
        "LIST",
        f"formats to measure, or files of KVPlans, by commas (default {dtypes})",
        default=dtypes,
    )
    scales = "of the FP8 ones, by commas: auto (default), unit, token_head, checkpoint, or files of KVScales"
    option("--kv-scales", "LIST", scales, default="auto")
    option("--requests", "N", "how many at once (default 8)", int, default=8)
    option("--prompt-tokens", "N", "of each (default 128)", int, default=128)
    option("--output-tokens", "N", "of each (default 64)", int, default=64)
    option("--rounds", "N", "timed ones, of which medians are taken (default 3)", int, default=3)
    option(
        "--kv-cache-memory",
        "SIZE",
        "of each cache, such as 64MiB (default: what it needs for all requests)",
    )
    option("--attention", "NAME", "pallas, xla or reference (default: the fastest that runs here)")
    option("--dtype", "DTYPE", "of the weights: bfloat16, float16 or float32 (default: the file's)")
    _add_lenient(parser)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_model(parser: _Parser) -> argparse._ArgumentGroup:
    """The model and its cache; what else belongs to them may be added to the group."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder, a .gguf file or a hub id"
    )
    group = parser.add_argument_group("model and cache")
    kv_dtype = (
        "of the KV cache: fp8_e4m3 (or fp8), fp8_e5m2, bfloat16, float16, float32, a file of a KVPlan, or auto (default): "
        "the checkpoint's FP8 if it declares one, else the type of the weights"
    )
    kv_scales = (
        "of an FP8 cache: checkpoint, unit, token_head (dynamic), a file of KVScales, or auto (default): the checkpoint's, "
        "else unit, less large K biases"
    )
    limit = "most tokens of prompt and output (default: the model's)"
    group.add_argument("--kv-dtype", default="auto", metavar="DTYPE", help=kv_dtype)
    group.add_argument("--kv-scales", default="auto", metavar="SCALES", help=kv_scales)
    group.add_argument("--max-model-len", type=int, metavar="N", help=limit)
    return group


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--kv-cache-memory",
        metavar="SIZE",
        help="of the KV cache, such as 2GiB (default: a share of what is free)",
    )
    group.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="of the weights: bfloat16, float16 or float32 (default: the file's)",
    )
    _add_lenient(group)
    group.add_argument(
        "--quiet", action="store_true", help="print the text alone: no statistics, no progress"
    )


def _add_lenient(group: argparse._ActionsContainer) -> None:
    lenient = "scale 1 stands in for KV scales of the checkpoint that are missing or broken, with a warning"
    group.add_argument("--lenient", action="store_true", help=lenient)


def _add_sampling(parser: _Parser, *, max_tokens: int, temperature: float) -> None:
    group = parser.add_argument_group("sampling")

    def number(name: str, kind: type, default: float | None, text: str) -> None:
        shown = "" if default is None else f" (default {default})"
        group.add_argument(
            name, type=kind, default=default, metavar="N" if kind is int else "X", help=text + shown
        )

    number("--max-tokens", int, max_tokens, "most tokens to make")
    number("--temperature", float, temperature, "0 takes the likeliest token each time")
    number(
        "--top-p",
        float,
        1.0,
        "sample from the likeliest tokens that hold this share of the probability",
    )
    number("--top-k", int, 0, "sample from this many of the likeliest tokens; 0 is all")
    number(
        "--min-p", float, 0.0, "sample from tokens at least this share as likely as the likeliest"
    )
    number("--seed", int, None, "the same seed gives the same text")
    stop = "end before this text; may be given again"
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help=stop)
