"""`jfp8kv generate`: generate from prompts. One output is streamed; several run as one batch."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import add_model, add_quiet
from jfp8kv.cli.engine import add_engine, add_sampling, load, sampling
from jfp8kv.cli.output import print_stream, rate, say
from jfp8kv.core.errors import ConfigError

if TYPE_CHECKING:
    from jfp8kv.engine.request import CompletionOutput, RequestOutput

SUMMARY = "generate from prompts"
ABOUT = "Generate from prompts. A single output is streamed; several run as one batch."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated"
    )
    group.add_argument(
        "--file", metavar="PATH", help="a file with one prompt per line, or - for stdin"
    )
    group.add_argument(
        "--chat", action="store_true", help="send each prompt as a user message of a chat"
    )
    add_engine(parser)
    add_sampling(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, print the outputs, and return the exit status."""
    texts = _prompts(args)
    params = sampling(args)
    llm = load(args)
    prompts = [[{"role": "user", "content": text}] if args.chat else text for text in texts]
    start = time.perf_counter()
    if len(prompts) == 1 and params.n == 1 and params.best_of in (None, 1) and not args.json:
        print_stream(llm.stream(prompts[0], params), [])
    else:
        outputs = llm.generate(prompts, params, progress=False if args.quiet else None)
        (_print_json if args.json else _print_text)(texts, outputs)
    if not args.quiet:
        stats = llm.stats
        speed = rate(stats.generated_tokens, time.perf_counter() - start)
        compiling = ", compilation included" if stats.compilations else ""
        say(
            f"{speed}{compiling}; KV cache ({llm.kv_dtype}): {stats.kv_bytes_per_token:,.0f} bytes "
            f"per token, room for {stats.kv_tokens_capacity:,} tokens"
        )
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of --prompt and the lines of --file.

    Raises `ConfigError` if there are none, or one is empty.
    """
    prompts = [*args.prompt, *([] if args.file is None else _lines(args.file))]
    if not prompts:
        raise ConfigError("no prompt: give --prompt TEXT, or --file PATH with one prompt per line.")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {number} is empty: at least one character is needed.")
    return prompts


def _lines(file: str) -> list[str]:
    """Return the lines of a file, or of stdin for "-", without blank ones."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise ConfigError(f"--file {file}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--file {file}: cannot be read: invalid UTF-8.") from error
    return [line for line in lines if line.strip()]


def _outputs(
    prompts: list[str], outputs: "Sequence[RequestOutput]"
) -> "Iterator[tuple[int, str, RequestOutput, CompletionOutput]]":
    """Yield each output with the number and text of its prompt."""
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for completion in output.outputs:
            yield number, prompt, output, completion


def _print_text(prompts: list[str], outputs: "Sequence[RequestOutput]") -> None:
    for number, prompt, output, completion in _outputs(prompts, outputs):
        label = f"{number}.{completion.index}" if len(output.outputs) > 1 else f"{number}"
        print(f"[{label}] {prompt}\n{completion.text}\n", flush=True)


def _print_json(prompts: list[str], outputs: "Sequence[RequestOutput]") -> None:
    for number, prompt, output, completion in _outputs(prompts, outputs):
        record = {
            "prompt_index": number,
            "prompt": prompt,
            "prompt_tokens": len(output.prompt_token_ids),
            "index": completion.index,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        print(json.dumps(record), flush=True)
