"""`jfp8kv chat`: a conversation in the terminal, or over a pipe with one message per line."""

import argparse
import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jfp8kv.cli.arguments import add_model, add_quiet
from jfp8kv.cli.engine import add_engine, add_sampling, load, sampling
from jfp8kv.cli.output import print_stream, rate, say
from jfp8kv.core.errors import ConfigError
from jfp8kv.text.chat import ChatOptions
from jfp8kv.text.prompts import ChatPrompt

if TYPE_CHECKING:
    from jfp8kv.llm import LLM
    from jfp8kv.sampling.params import SamplingParams

SUMMARY = "chat with a model"
ABOUT = (
    "Chat with a model. /reset clears the conversation, /exit or Ctrl-D ends the program, Ctrl-C "
    "stops a reply."
)
COMMANDS = "/reset and /exit"
ONE_OUTPUT = ("n", "best_of")  # a reply is one output

Message = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message of the conversation")
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help='Variables of the chat template, such as {"enable_thinking": false}.',
    )
    add_engine(parser)
    add_sampling(parser, omit=ONE_OUTPUT, defaults={"max_tokens": 512, "temperature": 0.7})
    add_quiet(parser, json=False)


def run(args: argparse.Namespace) -> int:
    """Chat until /exit or the end of stdin, and return the exit status."""
    params = sampling(args)
    chat_options = _chat_options(args)
    llm = load(args)
    if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
        raise ConfigError(
            f"{args.model}: has no chat template; try `jfp8kv generate` with plain prompts."
        )
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    context = min(llm.max_model_len, llm.stats.kv_tokens_capacity)
    conversation = Conversation(llm, params, chat_options, system, context, quiet=args.quiet)
    if not args.quiet:
        say(f"chatting with {args.model}; commands are {COMMANDS}, Ctrl-D exits")
    for text in _lines():
        if text == "/exit":
            break
        if text == "/reset":
            conversation.messages.clear()
            say("conversation cleared")
        elif re.fullmatch(r"/\w*", text):
            say(f"unknown command {text}: the commands are {COMMANDS}")
        elif text:
            conversation.reply(text)
    return 0


def _chat_options(args: argparse.Namespace) -> ChatOptions:
    """Return the options of the chat template. Raises `ConfigError` for invalid JSON."""
    if args.chat_template_kwargs is None:
        return ChatOptions()
    try:
        values = json.loads(args.chat_template_kwargs)
    except ValueError as error:
        raise ConfigError(f"--chat-template-kwargs: not valid JSON: {error}.") from None
    return ChatOptions(chat_template_kwargs=values)


def _lines() -> Iterator[str]:
    """Yield the user's lines until the end of stdin or Ctrl-C at the prompt."""
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
    """A conversation within a context of `context` tokens.

    `messages` alternate between user and assistant. The oldest pairs are dropped when the context
    is full; the system message stays.
    """

    llm: "LLM"
    params: "SamplingParams"
    chat_options: ChatOptions
    system: list[Message]
    context: int
    quiet: bool
    messages: list[Message] = dataclasses.field(default_factory=list)

    def reply(self, text: str) -> None:
        """Print a reply to the user's message and add both to the conversation.

        Ctrl-C ends the reply. A message longer than the context is refused.
        """
        message: Message = {"role": "user", "content": text}
        if self._room([], message) < 1:
            say(f"error: this message alone exceeds the context of {self.context} tokens")
            return
        self._drop_oldest(message)
        start = time.perf_counter()
        before = self.llm.stats.generated_tokens
        room = min(self.params.max_tokens, self._room(self.messages, message))
        printed: list[str] = []
        prompt = ChatPrompt([*self.system, *self.messages, message], self.chat_options)
        with contextlib.suppress(KeyboardInterrupt):
            print_stream(self.llm.stream(prompt, self.params, max_tokens=room), printed)
        self.messages += [message, {"role": "assistant", "content": "".join(printed)}]
        if not self.quiet:
            say(rate(self.llm.stats.generated_tokens - before, time.perf_counter() - start))

    def _room(self, messages: list[Message], message: Message) -> int:
        """Return how many tokens the context leaves for a reply to `message` after `messages`."""
        assert self.llm.tokenizer is not None
        prompt = [*self.system, *messages, message]
        return self.context - len(self.llm.tokenizer.chat(prompt, self.chat_options))

    def _drop_oldest(self, message: Message) -> None:
        """Drop the oldest messages until `max_tokens`, or 1/4 of the context, are left."""
        wanted = min(self.params.max_tokens, self.context // 4)
        dropped = 0
        while self.messages and self._room(self.messages, message) < wanted:
            del self.messages[:2]
            dropped += 1
        if dropped:
            count = "message" if dropped == 1 else f"{dropped} messages"
            say(
                f"the context of {self.context} tokens is full: dropped your oldest {count} and "
                "the replies"
            )
