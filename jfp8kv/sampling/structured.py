"""Structured output: outputs that match a JSON schema, a regular expression or a grammar.

Each constrained request has a grammar matcher (llguidance), which follows its output and computes a
token bitmask: which tokens may come next. The matcher runs on the host while the device runs the
forward pass (`Engine.decode_structured`), and the bitmask is applied when that token is sampled.
A preemption preserves output tokens and matcher, so the matcher only moves forward.

llguidance decides where an output may end. The tokens that end it depend on the request: the
model's end-of-sequence tokens unless `ignore_eos`, and `stop_token_ids`. Ids that the tokenizer
does not know, such as the padding of some vocabularies, are never allowed.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jfp8kv.core.errors import ConfigError
from jfp8kv.sampling.constraint import Constraint
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.tokenizer import Tokenizer

END_TOKEN = "<|end of sequence, for tokenizers without one|>"
CACHED_GRAMMARS = 64
# Between the parts of JSON: nothing, a space, or a line break with indentation. If white space were
# unbounded, small models would generate it forever.
WHITESPACE = r" ?|\n {0,16}"

Bitmask = np.ndarray
"""uint32 `[words]`: token i is bit i % 32 of word i // 32."""


class GrammarMatcher:
    """The position of one request in its grammar.

    Args:
      matcher: an `llguidance.LLMatcher` at the start of the grammar.
      words: the length of llguidance's bitmask.
      eos_ids: the tokens that llguidance allows at the end.
      end_ids: the tokens that end this request.
    """

    def __init__(self, matcher: Any, words: int, *, eos_ids: Iterable[int], end_ids: Iterable[int]):
        self._matcher = matcher
        self._words = words
        self._end_ids = list(end_ids)
        self._other_eos_ids = set(eos_ids) - set(self._end_ids)
        self._accepted = 0

    def accept_output(self, output_ids: Sequence[int]) -> None:
        """Move to the end of the output. Tokens accepted by earlier calls are skipped."""
        self._matcher.consume_tokens(list(output_ids[self._accepted :]))
        self._accepted = len(output_ids)

    @property
    def terminated(self) -> bool:
        """Whether the output matches the grammar and cannot be continued."""
        return bool(self._matcher.is_stopped()) and self.accepting

    @property
    def accepting(self) -> bool:
        """Whether the output matches the grammar as a whole."""
        return bool(self._matcher.is_accepting())

    @property
    def error(self) -> str | None:
        """The reason why the matcher failed, such as a state too complex to follow; or None."""
        if not self._matcher.is_error():
            return None
        message: str = self._matcher.get_error()
        return message.strip().splitlines()[0]

    def fill_bitmask(self, bitmask: Bitmask) -> None:
        """Set the bits of the tokens that may come next, and clear the others."""
        bits = np.zeros(self._words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        for token in self._other_eos_ids:
            bits[token // 32] &= ~_bit(token)
        if self.accepting:
            for token in self._end_ids:
                bits[token // 32] |= _bit(token)
        # After an error llguidance allows the end, which would pass for a complete output.
        bitmask[:] = 0 if self._matcher.is_error() else bits[: len(bitmask)]


def _bit(token: int) -> np.uint32:
    return np.uint32(1 << token % 32)


class StructuredOutput:
    """The grammars and matchers of one model's requests.

    Args:
      tokenizer: the model's tokenizer, or None.
      vocab: the vocabulary size of the model.
      eos_ids: the end-of-sequence tokens of the model.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, *, eos_ids: tuple[int, ...]):
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._eos_ids = eos_ids
        self._grammar = functools.lru_cache(CACHED_GRAMMARS)(self._compile)

    def check(self, params: SamplingParams) -> None:
        """Compile the request's grammar. Raises `ConfigError` with the reason if that fails."""
        if params.constraint is not None:
            self._grammar(params.constraint)

    def new_matcher(self, constraint: Constraint, end_ids: Iterable[int]) -> GrammarMatcher:
        """Return a matcher at the start of an output that ends with one of `end_ids`."""
        return GrammarMatcher(
            self._grammar(constraint).deep_copy(),
            words=-(-self._ll_tokenizer.vocab_size // 32),
            eos_ids=self._ll_tokenizer.eos_tokens,
            end_ids=end_ids,
        )

    def token_bitmask(self, matchers: Sequence[GrammarMatcher | None], *, rows: int) -> np.ndarray:
        """Return a bitmask for each matcher, uint32 `[rows, words]`.

        All tokens are allowed where there is no matcher, and in padding rows.
        """
        bitmasks = np.full((rows, -(-self._vocab // 32)), 0xFFFFFFFF, np.uint32)
        for matcher, bitmask in zip(matchers, bitmasks, strict=False):
            if matcher is not None:
                matcher.fill_bitmask(bitmask)
        return bitmasks

    @property
    def _special_texts(self) -> Iterable[str]:
        return () if self._tokenizer is None else self._tokenizer.special_ids

    @functools.cached_property
    def _ll_tokenizer(self) -> Any:
        """The tokenizer as an `llguidance.LLTokenizer`.

        It must have an end token. If the model has none, one that no output uses is added.
        """
        assert self._tokenizer is not None, "a grammar was compiled"
        backend = self._tokenizer.backend
        eos_ids = [token for token in self._eos_ids if backend.id_to_token(token) is not None]
        if not eos_ids:
            backend = type(backend).from_str(backend.to_str())
            backend.add_special_tokens([END_TOKEN])
            eos_ids = [backend.token_to_id(END_TOKEN)]
        vocab = max(self._vocab, 1 + max(backend.get_vocab().values()))
        return _llguidance().LLTokenizer(backend.to_str(), n_vocab=vocab, eos_token=eos_ids)

    def _compile(self, constraint: Constraint) -> Any:
        """Return an `llguidance.LLMatcher` at the start of the grammar. Raises `ConfigError`."""
        llguidance = _llguidance(constraint)
        if not callable(getattr(getattr(self._tokenizer, "backend", None), "to_str", None)):
            raise ConfigError(
                f"{constraint}: needs a tokenizer of the `tokenizers` library, "
                "and this model has none."
            )
        try:
            grammar = _grammar(llguidance.LLMatcher, constraint, self._special_texts)
            matcher = llguidance.LLMatcher(self._ll_tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise ConfigError(f"{constraint}: {error}") from error
        if matcher.is_error():
            raise ConfigError(f"{constraint}: {matcher.get_error().strip()}")
        return matcher


def _llguidance(constraint: Constraint | None = None) -> Any:
    """Import llguidance. Raises `ConfigError` if it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            f"{constraint}: needs llguidance, which is not installed: "
            "pip install 'jfp8kv[structured]'."
        ) from None
    return llguidance


def _grammar(matcher: Any, constraint: Constraint, special: Iterable[str]) -> str:
    """Return the constraint as a grammar of llguidance.

    Where only one text is possible, llguidance forces its tokens, and tokenizes the text of a
    special token as that token. Constraints that contain such a text are compiled without forcing:
    the text is then spelled with ordinary tokens.
    """
    forcing = not _mentions(constraint, special)
    grammar: str
    match constraint.field:
        case "json_schema":
            defaults = {"whitespace_pattern": WHITESPACE}
            grammar = matcher.grammar_from_json_schema(constraint.value, defaults=defaults)
            return grammar if forcing else _without_forcing(grammar)
        case "regex":
            grammar = matcher.grammar_from_regex(constraint.value)
            return grammar if forcing else _without_forcing(grammar)
        case "choice":
            alternatives = " | ".join(json.dumps(text) for text in constraint.value)
            lark = f"start: {alternatives}"
        case _:
            lark = str(constraint.value)
    grammar = matcher.grammar_from_lark(lark if forcing else f"{_NO_FORCING}\n{lark}")
    return grammar


def _without_forcing(grammar: str) -> str:
    """Return a JSON grammar as a rule of a Lark grammar that does not force tokens."""
    (rule,) = json.loads(grammar)["grammars"]
    start = {"name": "start", "lark_grammar": f"{_NO_FORCING}\nstart: @constraint"}
    return json.dumps({"grammars": [start, rule | {"name": "constraint"}]})


def _mentions(constraint: Constraint, special: Iterable[str]) -> bool:
    """Return whether a constraint contains the text of a special token, escaped or not."""
    value = constraint.value
    if constraint.field == "json_schema":
        value = json.dumps(json.loads(str(value)), ensure_ascii=False)
    texts = (value,) if isinstance(value, str) else value
    plain = [_PUNCTUATION.sub("", text) for text in texts]
    tokens = {_PUNCTUATION.sub("", token) for token in special} - {""}
    return any(token in text for token in tokens for text in plain)


_NO_FORCING = '%llguidance {"no_forcing": true}'
_PUNCTUATION = re.compile(r"[\\()\[\]]")  # of regular expressions
