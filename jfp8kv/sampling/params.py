"""What a request asks of its sampler, checked before anything runs.

The order in which the fields act is that of `sampling.sample`: bias, penalties, min_tokens, what a grammar allows, then
temperature, top-k, top-p, min-p. The defaults sample from the model's own distribution.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, no_type_check

from jfp8kv.core.errors import ConfigError, unknown_keyword
from jfp8kv.sampling.constraint import (
    CONSTRAINTS,
    Constraint,
    choices,
    pattern,
    refuse_several,
    schema_text,
)

MAX_LOGPROBS = 20
MAX_RATE = (
    1000  # of temperature and repetition penalty: past it nothing changes but float32 overflows
)
MAX_BIAS = 1e6
MAX_SEED = 2**64 - 1
MAX_ID = 2**31 - 1  # the device pads id lists with this one


@no_type_check  # at run time: what is given meets the rules below, whose errors are the user's, and no other checker
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Raises `ConfigError` for a value outside its range.

    Length: at most `max_tokens` tokens are made. No end-of-sequence or stop token is picked before `min_tokens` of
    them; `ignore_eos` continues past the model's own end-of-sequence tokens. `stop` (a string or several) ends the
    text before the match, or with it if `include_stop_str_in_output` (`min_tokens` does not hold it off);
    `stop_token_ids` end it at the token.

    Choice: `temperature` 0 is greedy (ties: the lowest id). `top_k` keeps the k most likely tokens (0 or -1: all),
    `top_p` the smallest set of likely tokens that holds that share of the probability, `min_p` those at least that
    share as likely as the likeliest. `seed` fixes the text whatever runs beside it (for which few texts are decoded in 8
    rows: a text alone takes longer); `n` samples differ from each other and sample 0 is the text of `n=1`.

    `best_of` makes that many samples and returns the `n` of highest mean log-probability per token, best first. Those that end
    in a dead end or at a deadline, or at `max_tokens` before their structure is complete, come after all others.

    Penalties: `repetition_penalty` divides positive and multiplies negative logits of tokens of the prompt and the
    output (CTRL, arXiv:1909.05858, section 4.1). `presence_penalty` is subtracted from the logit of a token the
    output already holds, `frequency_penalty` once for each time it holds it. `logit_bias` is added to the logits of
    the given ids; `-inf` forbids a token.

    Structure: the text is JSON that satisfies `json_schema` (a dict, JSON, or a class with `model_json_schema()`), a full match
    of `regex`, one of the strings of `choice`, or derived from `grammar` (Lark, with llguidance's extensions). It ends where
    that is complete; until then no end-of-sequence token is picked, and `min_tokens` makes it no longer. What `max_tokens`,
    `stop` or `stop_token_ids` cut short may not be complete. Where `logit_bias` and `min_tokens` leave no token that is
    allowed, it ends with the finish reason "dead_end". Needs the extra `jfp8kv[structured]`.

    Report: `logprobs` gives the log-probability of each token made and of that many likeliest alternatives (up to 20),
    `prompt_logprobs` the same for the prompt. Both speak of the model's distribution, before anything above is applied.

    Time: `deadline_s` seconds after the call the text ends with what it has by then, perhaps nothing, and finish reason
    "deadline".
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Iterable[str] = ()
    stop_token_ids: int | Iterable[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    min_tokens: int = 0
    best_of: int | None = None
    deadline_s: float | None = None
    json_schema: Any = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for rule in _RULES:
            self._set(rule.name, rule.checked(getattr(self, rule.name)))
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set("logit_bias", _bias(self.logit_bias))
        self._set("json_schema", schema_text(self.json_schema))
        self._set("regex", pattern("regex", self.regex))
        self._set("choice", choices(self.choice))
        self._set("grammar", pattern("grammar", self.grammar))
        refuse_several(self._constraints)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name}={value!r}: must be True or False.")
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens}: must not exceed max_tokens={self.max_tokens}; "
                f"try max_tokens={self.min_tokens} or more."
            )

        if self.best_of is not None and self.best_of < self.n:
            raise ConfigError(
                f"best_of={self.best_of}: must be at least n={self.n}, the number to return; try best_of={self.n}."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_fields(
        cls, base: "SamplingParams | None" = None, *, also: Iterable[str] = (), **fields: Any
    ) -> "SamplingParams":
        """`base` (or the defaults) with `fields` in place of its own.

        Raises `ConfigError` for an unknown field, naming the nearest of the known ones and of `also`, the other keywords of
        whoever passes the fields on.
        """
        if base is not None and not isinstance(base, cls):
            raise ConfigError(
                f"sampling_params={base!r}: must be a SamplingParams or None; try SamplingParams(temperature=0.7)."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise unknown_keyword(name, [*also, *known])
        return dataclasses.replace(base or cls(), **fields)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken every time."""
        return self.temperature == 0

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty needs to know which tokens came before."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @functools.cached_property
    def constraint(self) -> Constraint | None:
        """What the text must look like, if anything is asked."""
        return next(iter(self._constraints), None)

    @property
    def _constraints(self) -> list[Constraint]:
        values = ((name, getattr(self, name)) for name in CONSTRAINTS)
        return [Constraint(name, value) for name, value in values if value is not None]

    def check_vocab(self, vocab: int) -> None:
        """Raise `ConfigError` if `stop_token_ids` or `logit_bias` name an id the model does not have."""
        stop_ids = cast(tuple[int, ...], self.stop_token_ids)
        for name, ids in (
            ("stop_token_ids", stop_ids),
            ("logit_bias", tuple(self.logit_bias or ())),
        ):
            for token in ids:
                if token >= vocab:
                    raise ConfigError(
                        f"{name}: id {token} is outside the vocabulary; ids go from 0 to {vocab - 1}."
                    )


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The kind and range of one numeric field, in code and in words."""

    name: str
    kind: Callable[[Any], Any]  # int or float
    fits: Callable[[Any], bool]
    allowed: str
    advice: str
    optional: bool = False

    def checked(self, value: Any) -> Any:
        """`value` as a plain Python number, or a `ConfigError`."""
        if value is None and self.optional:
            return None
        whole = self.kind is int
        right_kind = isinstance(
            value, numbers.Integral if whole else numbers.Real
        ) and not isinstance(value, bool)
        if not right_kind or not self.fits(value):
            noun = "a whole number" if whole else "a number"
            raise ConfigError(
                f"{self.name}={value!r}: must be {noun} {self.allowed}; {self.advice}."
            )
        return self.kind(value)


def _up_to(limit: int) -> Callable[[Any], bool]:
    return lambda x: 0 <= x <= limit


def _is_bias(x: Any) -> bool:
    return abs(x) <= MAX_BIAS or x == -math.inf


def _penalty(x: Any) -> bool:
    return -2 <= x <= 2


_RULES = (
    _Rule("max_tokens", int, lambda x: x >= 1, "of at least 1", "try 128"),
    _Rule("min_tokens", int, lambda x: x >= 0, "of at least 0", "0 is no minimum"),
    _Rule("n", int, lambda x: x >= 1, "of at least 1", "try 1"),
    _Rule("best_of", int, lambda x: x >= 1, "of at least 1", "None is n", optional=True),
    _Rule(
        "deadline_s",
        float,
        lambda x: 0 < x < math.inf,
        "of seconds above 0",
        "None is no deadline",
        optional=True,
    ),
    _Rule(
        "temperature",
        float,
        _up_to(MAX_RATE),
        f"of at least 0 and at most {MAX_RATE}",
        "try 0 for greedy decoding, 0.7 for variety",
    ),
    _Rule("top_k", int, lambda x: x >= -1, "of at least 1, or 0 or -1 for no limit", "try 50"),
    _Rule(
        "top_p",
        float,
        lambda x: 0 < x <= 1,
        "above 0 and at most 1",
        "1.0 keeps every token, try 0.9",
    ),
    _Rule(
        "min_p", float, lambda x: 0 <= x <= 1, "between 0 and 1", "0 keeps every token, try 0.05"
    ),
    _Rule(
        "repetition_penalty",
        float,
        lambda x: 1 / MAX_RATE <= x <= MAX_RATE,
        f"from {1 / MAX_RATE} to {MAX_RATE}",
        "1.0 is none, try 1.1",
    ),
    _Rule("presence_penalty", float, _penalty, "between -2 and 2", "0 is none"),
    _Rule("frequency_penalty", float, _penalty, "between -2 and 2", "0 is none"),
    _Rule(
        "logprobs",
        int,
        _up_to(MAX_LOGPROBS),
        f"from 0 to {MAX_LOGPROBS}",
        "None reports nothing",
        optional=True,
    ),
    _Rule(
        "prompt_logprobs",
        int,
        _up_to(MAX_LOGPROBS),
        f"from 0 to {MAX_LOGPROBS}",
        "None reports nothing",
        optional=True,
    ),
    _Rule(
        "seed",
        int,
        _up_to(MAX_SEED),
        "from 0 to 2**64 - 1",
        "None takes the engine's",
        optional=True,
    ),
)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stop = () if stop is None else stop
    strings = (
        (stop,)
        if isinstance(stop, str)
        else _sequence("stop", stop, "a string or a list of strings")
    )
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ConfigError(
                f"stop={stop!r}: each stop must be a string of at least one character, not {string!r}."
            )
    return strings


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    ids = () if ids is None else ids
    ids = (ids,) if isinstance(ids, numbers.Number) else _sequence(name, ids, "a list of token ids")
    return tuple(_token_id(name, token) for token in ids)


def _token_id(name: str, token: Any) -> int:
    whole = isinstance(token, numbers.Integral) and not isinstance(token, bool)
    if not whole or not 0 <= token < MAX_ID:
        raise ConfigError(f"{name}: {token!r} is not a token id; ids are whole numbers from 0.")
    return int(token)


def _sequence(name: str, values: Any, wanted: str) -> tuple:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ConfigError(f"{name}={values!r}: must be {wanted}.")
    return tuple(values)


def _bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias={bias!r}: must map token ids to numbers; try {{50: -1.5}}.")
    for token, value in bias.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not _is_bias(value):
            raise ConfigError(
                f"logit_bias: {value!r} for id {token!r} must be a number between {-MAX_BIAS:g} and {MAX_BIAS:g}, "
                "or -inf to forbid the token; try -100."
            )
    return {_token_id("logit_bias", token): float(value) for token, value in bias.items()}
