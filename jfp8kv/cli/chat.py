"""`jfp8kv chat`: a conversation in the terminal, or over a pipe with a message on each line."""

import argparse
import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import load, sampling
from jfp8kv.cli.output import print_stream, rate, say
from jfp8kv.core.errors import ConfigError

if TYPE_CHECKING:
    import jfp8kv.functional

COMMANDS = "/reset and /exit"

Message = dict[str, str]


def run(args: argparse.Namespace) -> int:
    """Talk until /exit or the end of stdin; the exit status."""
    params = sampling(args)
    llm = load(args)
    if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
        raise ConfigError(
            f"{args.model}: has no chat template; try `jfp8kv generate` with plain prompts."
        )
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    context = min(llm.max_model_len, llm.stats.kv_tokens_capacity)
    conversation = Conversation(llm, params, system, context, quiet=args.quiet)
    if not args.quiet:
        say(f"{args.model} listens; {COMMANDS} are commands, Ctrl-D leaves")
    for text in _lines():
        if text == "/exit":
            break
        if text == "/reset":
            conversation.turns.clear()
            say("forgotten: a new conversation begins")
        elif re.fullmatch(r"/\w*", text):
            say(f"no command {text}: the commands are {COMMANDS}")
        elif text:
            conversation.ask(text)
    return 0


def _lines() -> Iterator[str]:
    """What the user says, line by line, until the end of stdin or Ctrl-C at the prompt."""
    terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and history)
    while sys.stdin is not None:
        try:
            text = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()
            return
        yield text.strip()


@dataclasses.dataclass
class Conversation:
    """What was said so far, kept within `context` tokens. `turns` are the user's and the model's in turn."""

    llm: "jfp8kv.functional.LLM"
    params: "jfp8kv.functional.SamplingParams"
    system: list[Message]
    context: int
    quiet: bool
    turns: list[Message] = dataclasses.field(default_factory=list)

    def ask(self, text: str) -> None:
        """Print the answer and remember both. Ctrl-C ends an answer; a message that can never fit is refused."""
        asked: Message = {"role": "user", "content": text}
        if self._room([], asked) < 1:
            say(
                f"error: this message alone exceeds the context of {self.context} tokens: say it in fewer words"
            )
            return
        self._forget(asked)
        began, before = time.perf_counter(), self.llm.stats.generated_tokens
        room = min(self.params.max_tokens, self._room(self.turns, asked))
        said: list[str] = []
        stream = self.llm.stream([*self.system, *self.turns, asked], self.params, max_tokens=room)
        with contextlib.suppress(KeyboardInterrupt):
            print_stream(stream, said)
        self.turns += [asked, {"role": "assistant", "content": "".join(said)}]
        if not self.quiet:
            say(rate(self.llm.stats.generated_tokens - before, time.perf_counter() - began))

    def _room(self, turns: list[Message], asked: Message) -> int:
        """Tokens that the context leaves for an answer to `asked` after these turns."""
        assert self.llm.tokenizer is not None
        return self.context - len(self.llm.tokenizer.chat([*self.system, *turns, asked]))

    def _forget(self, asked: Message) -> None:
        """Drop the oldest turns while an answer has less room than it may take, and than a quarter of the context."""
        wanted = min(self.params.max_tokens, self.context // 4)
        forgotten = 0
        while self.turns and self._room(self.turns, asked) < wanted:
            del self.turns[:2]
            forgotten += 1
        if forgotten:
            what = "message" if forgotten == 1 else f"{forgotten} messages"
            say(
                f"the context of {self.context} tokens is full: forgot your oldest {what} and what came in answer"
            )
