"""`jfp8kv generate`: continue prompts, streaming a single one and running several as one batch."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import load, sampling
from jfp8kv.cli.output import print_stream, rate, say
from jfp8kv.core.errors import ConfigError

if TYPE_CHECKING:
    import jfp8kv.functional


def run(args: argparse.Namespace) -> int:
    """Continue the prompts and print what came; the exit status."""
    texts, params = _prompts(args), sampling(args)
    llm = load(args)
    prompts = [[{"role": "user", "content": text}] if args.chat else text for text in texts]
    began = time.perf_counter()
    if len(prompts) == 1 and params.n == 1 and not args.json:
        print_stream(llm.stream(prompts[0], params), [])
    else:
        outputs = llm.generate(prompts, params, progress=False if args.quiet else None)
        (_print_json if args.json else _print_text)(texts, outputs)
    if not args.quiet:
        speed, stats = rate(llm.stats.generated_tokens, time.perf_counter() - began), llm.stats
        say(
            f"{speed}{', compiling included' if stats.compilations else ''}; KV cache ({llm.kv_dtype}): "
            f"{stats.kv_bytes_per_token:,.0f} bytes per token, room for {stats.kv_tokens_capacity:,} tokens"
        )
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    """The texts given by --prompt, then the lines of --file. Raises `ConfigError` if there is none or one is empty."""
    texts = list(args.prompt)
    if args.file is not None:
        try:
            content = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
            lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--file {args.file}: cannot be read as UTF-8 text: {reason}."
            ) from error
        texts += [line for line in lines if line.strip()]
    if not texts:
        raise ConfigError(
            "no prompt: give --prompt TEXT, or --file PATH with a prompt on each line."
        )
    for number, text in enumerate(texts):
        if not text:
            raise ConfigError(f"prompt {number} is empty: at least one character is needed.")
    return texts


def _print_text(texts: list[str], outputs: "Sequence[jfp8kv.functional.RequestOutput]") -> None:
    for number, (text, output) in enumerate(zip(texts, outputs, strict=True)):
        for made in output.outputs:
            which = f"{number}.{made.index}" if len(output.outputs) > 1 else f"{number}"
            print(f"[{which}] {text}\n{made.text}\n", flush=True)


def _print_json(texts: list[str], outputs: "Sequence[jfp8kv.functional.RequestOutput]") -> None:
    for number, (text, output) in enumerate(zip(texts, outputs, strict=True)):
        for made in output.outputs:
            record = {
                "prompt_index": number,
                "prompt": text,
                "prompt_tokens": len(output.prompt_token_ids),
                "index": made.index,
                "text": made.text,
                "token_ids": made.token_ids,
                "finish_reason": made.finish_reason,
                "stop_reason": made.stop_reason,
            }
            print(json.dumps(record), flush=True)
