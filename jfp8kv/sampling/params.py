"""`SamplingParams`: how one request is sampled. Values are checked before anything runs.

`sampling.sample` applies the fields in this order: logit bias, penalties, min_tokens, structured
output, then temperature, top-k, top-p and min-p. The defaults sample from the model's distribution.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from jfp8kv.core.errors import ConfigError
from jfp8kv.core.options import Options, option, options
from jfp8kv.sampling.constraint import (
    CONSTRAINTS,
    Constraint,
    check_single,
    choices,
    pattern,
    schema_json,
)
from jfp8kv.text.tokenizer import Tokenizer

MAX_LOGPROBS = 20
MAX_RATE = 1000  # temperature, repetition penalty: larger values only overflow float32
MAX_BIAS = 1e6
MAX_SEED = 2**64 - 1
MAX_ID = 2**31 - 1  # padding of id lists on the device


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stop = () if stop is None else stop
    several = (stop,) if isinstance(stop, str) else stop
    strings = _as_tuple("stop", several, "a string or a list of strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ConfigError(
                f"stop={stop!r}: each stop string must be a string of at least one character, "
                f"not {string!r}."
            )
    return strings


def _stop_token_ids(ids: Any) -> tuple[int, ...]:
    ids = () if ids is None else ids
    several = (ids,) if isinstance(ids, numbers.Number) else ids
    ids = _as_tuple("stop_token_ids", several, "a list of token ids")
    return tuple(_token_id("stop_token_ids", token) for token in ids)


def _token_id(name: str, token: Any) -> int:
    integer = isinstance(token, numbers.Integral) and not isinstance(token, bool)
    if not integer or not 0 <= token < MAX_ID:
        raise ConfigError(f"{name}: {token!r} is not a token id; ids are whole numbers from 0.")
    return int(token)


def _as_tuple(name: str, values: Any, wanted: str) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ConfigError(f"{name}={values!r}: must be {wanted}.")
    return tuple(values)


def _logit_bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias={bias!r}: must map token ids to numbers; try {{50: -1.5}}.")
    for token, value in bias.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not (abs(value) <= MAX_BIAS or value == -math.inf):
            raise ConfigError(
                f"logit_bias: {value!r} for id {token!r} must be a number between {-MAX_BIAS:g} "
                f"and {MAX_BIAS:g}, or -inf to forbid the token; try -100."
            )
    return {_token_id("logit_bias", token): float(value) for token, value in bias.items()}


@options
class SamplingParams(Options):
    """Sampling parameters of one request.

        SamplingParams(max_tokens=64, temperature=0.7, top_p=0.9, stop=["\\n\\n"])

    Structured output needs the extra `jfp8kv[structured]` and one of `json_schema`, `regex`,
    `choice` and `grammar`. The output ends when it is complete. Until then no end-of-sequence token
    is sampled, and `min_tokens` does not extend a complete output. An output that ends by
    `max_tokens`, `stop` or `stop_token_ids` may be incomplete. If `logit_bias` and `min_tokens`
    leave no allowed token, the finish reason is "dead_end".

    A request with a `seed` generates the same tokens in every batch. Batches of such requests have
    at least 8 rows, which is slower for a single request.

    Constraints describe text. Where `choice`, `regex` or `json_schema` contain the text of a
    special token, it is spelled with ordinary tokens: the special token is never sampled for it.
    `grammar` can name a special token without quotes: `start: <|tool_call|>`.

    `logprobs` and `prompt_logprobs` report the model's distribution before any other field applies.

    Raises `ConfigError` for a value outside its range.
    """

    ARGUMENT = "sampling_params"

    max_tokens: int = option(
        default=128, help="Maximum number of tokens to generate.", minimum=1, hint="try 128"
    )
    temperature: float = option(
        default=1.0,
        help="Divisor of the logits. 0 is greedy: the most likely token, the lowest id in a tie.",
        minimum=0,
        maximum=MAX_RATE,
        hint="try 0 for greedy decoding, 0.7 for variety",
    )
    top_k: int = option(
        default=0,
        help="Sample from the k most likely tokens. 0 or -1 takes all.",
        minimum=-1,
        hint="0 and -1 take all tokens, try 50",
    )
    top_p: float = option(
        default=1.0,
        help="Sample from the most likely tokens that together have at least this probability.",
        above=0,
        maximum=1,
        hint="1.0 takes all tokens, try 0.9",
    )
    min_p: float = option(
        default=0.0,
        help="Sample from tokens with at least this fraction of the highest token probability.",
        minimum=0,
        maximum=1,
        hint="0 takes all tokens, try 0.05",
    )
    repetition_penalty: float = option(
        default=1.0,
        help=(
            "Divides positive and multiplies negative logits of tokens in the prompt or the output "
            "(CTRL, arXiv:1909.05858, section 4.1)."
        ),
        minimum=1 / MAX_RATE,
        maximum=MAX_RATE,
        hint="1.0 turns it off, try 1.1",
    )
    presence_penalty: float = option(
        default=0.0,
        help="Subtracted from the logit of each token that occurs in the output.",
        minimum=-2,
        maximum=2,
        hint="0 turns it off",
    )
    frequency_penalty: float = option(
        default=0.0,
        help="Subtracted from the logit of a token once for each occurrence in the output.",
        minimum=-2,
        maximum=2,
        hint="0 turns it off",
    )
    stop: Sequence[str] = option(
        default=(),
        help=(
            "Strings that end the output before their first match, also before min_tokens. One "
            "that is the text of a special token ends it at that token too."
        ),
        convert=_stop_strings,
    )
    stop_token_ids: Sequence[int] = option(
        default=(), help="Token ids that end the output.", convert=_stop_token_ids
    )
    ignore_eos: bool = option(
        default=False, help="Continue past the end-of-sequence tokens of the model."
    )
    include_stop_str_in_output: bool = option(
        default=False, help="Include the matched stop string in the text."
    )
    skip_special_tokens: bool = option(default=True, help="Leave special tokens out of the text.")
    spaces_between_special_tokens: bool = option(
        default=True,
        help=(
            "With skip_special_tokens=False, keep the spaces that some tokenizers decode between "
            "two special tokens."
        ),
    )
    n: int = option(default=1, help="Number of outputs per prompt.", minimum=1, hint="try 1")
    logprobs: int | None = option(
        default=None,
        help="Return the log-probability of each output token and of this many most likely tokens.",
        minimum=0,
        maximum=MAX_LOGPROBS,
        hint="None returns none",
    )
    prompt_logprobs: int | None = option(
        default=None,
        help="Return the same for each token of the prompt.",
        minimum=0,
        maximum=MAX_LOGPROBS,
        hint="None returns none",
    )
    seed: int | None = option(
        default=None,
        help="Seed of the request. By default derived from the engine's seed.",
        minimum=0,
        maximum=MAX_SEED,
        hint="None derives one from the engine's seed",
    )
    logit_bias: Mapping[int, float] | None = option(
        default=None,
        help="Added to the logits of the given token ids; -inf forbids a token.",
        convert=_logit_bias,
        hash=False,
    )
    min_tokens: int = option(
        default=0,
        help="Minimum number of tokens before an end-of-sequence or stop token can be sampled.",
        minimum=0,
        hint="0 sets no minimum",
    )
    best_of: int | None = option(
        default=None,
        help=(
            "Number of outputs to generate. The n with the highest mean log-probability per token "
            "are returned, best first; incomplete ones come last. By default n."
        ),
        minimum=1,
        hint="None is n",
    )
    deadline_s: float | None = option(
        default=None,
        help='Seconds after the call at which the output ends, with the finish reason "deadline".',
        above=0,
        hint="None sets no deadline",
    )
    json_schema: str | Mapping[str, Any] | type | None = option(
        default=None,
        help="JSON schema of the output: a dict, a string, or a class with model_json_schema().",
        convert=schema_json,
    )
    regex: str | None = option(
        default=None,
        help="Regular expression that the whole output matches.",
        convert=functools.partial(pattern, "regex"),
    )
    choice: Sequence[str] | None = option(
        default=None, help="Strings to choose from: the output is one of them.", convert=choices
    )
    grammar: str | None = option(
        default=None,
        help="Grammar of the output, in Lark syntax with the extensions of llguidance.",
        convert=functools.partial(pattern, "grammar"),
    )

    def check(self) -> None:
        """Raise `ConfigError` for an invalid combination of fields."""
        check_single(self._constraints)
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens}: must not exceed max_tokens={self.max_tokens}; "
                f"try max_tokens={self.min_tokens} or more."
            )
        if self.best_of is not None and self.best_of < self.n:
            raise ConfigError(
                f"best_of={self.best_of}: must be at least n={self.n}, the number of returned "
                f"outputs; try best_of={self.n}."
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken every time."""
        return self.temperature == 0

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty needs the counts of earlier tokens."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @functools.cached_property
    def constraint(self) -> Constraint | None:
        """The structured-output constraint, if one is given."""
        return next(iter(self._constraints), None)

    @property
    def _constraints(self) -> list[Constraint]:
        values = ((name, getattr(self, name)) for name in CONSTRAINTS)
        return [Constraint(name, value) for name, value in values if value is not None]

    def check_vocab(self, vocab: int) -> None:
        """Raise `ConfigError` for a stop token id or a biased id outside the vocabulary."""
        given = {"stop_token_ids": self.stop_token_ids, "logit_bias": self.logit_bias or ()}
        for name, ids in given.items():
            for token in ids:
                if token >= vocab:
                    raise ConfigError(
                        f"{name}: id {token} is outside the vocabulary; "
                        f"ids go from 0 to {vocab - 1}."
                    )


def params_by_prompt(
    given: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> Sequence[SamplingParams | None]:
    """Return the sampling parameters of each prompt, from one for all or one for each."""
    if not isinstance(given, list | tuple):
        return [cast(SamplingParams | None, given)] * prompts
    if len(given) != prompts:
        raise ConfigError(
            f"{len(given)} sampling parameters for {prompts} prompts: give one for all, or one for "
            "each."
        )
    return given


def special_stops(params: SamplingParams, tokenizer: Tokenizer | None) -> dict[int, str]:
    """Return the stop strings that are the text of one special token, by its id."""
    special = {} if tokenizer is None else tokenizer.special_ids
    return {special[stop]: stop for stop in params.stop if stop in special}


def with_stop_tokens(
    params: SamplingParams, tokenizer: Tokenizer | None, vocab: int
) -> SamplingParams:
    """Return `params` with the ids of stop strings that are special tokens."""
    added = [token for token in special_stops(params, tokenizer) if token < vocab]
    if not added:
        return params
    return dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *added))
