"""Which tokens may come next, so that a text becomes what its request asks for: grammars, through llguidance.

A request's *guide* reads what was generated and says, one bit per token, what may follow. It works on the host, so the engine
asks while the device runs the model (`Engine.decode_structured`); the bits join the sampling of that very token. What was generated
stays when a request is preempted, and so does its guide, which only ever reads on.

llguidance says where a text is complete; which tokens then end it (`stop_token_ids` too, none of the model's own under
`ignore_eos`) is the request's business. Ids that the tokenizer does not know are never allowed: models have some, as padding.
"""

import functools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from jfp8kv.core.errors import ConfigError
from jfp8kv.engine.request import Request
from jfp8kv.engine.sampler_state import sampling_state
from jfp8kv.sampling.constraint import Constraint
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text.tokenizer import Tokenizer

NO_END = "<|end of a text, for models without one|>"
COMPILED = 64  # grammars kept ready for more requests
# Between the parts of JSON: nothing, a space, or a line break with indentation. Without a bound small models never leave it.
WHITESPACE = r" ?|\n {0,16}"

Mask = np.ndarray  # uint32 `[words]`: token i's is bit i % 32 of word i // 32


class GrammarMatcher:
    """One request's place in its grammar."""

    def __init__(self, matcher: Any, words: int, *, eos_ids: Iterable[int], end_ids: Iterable[int]):
        self._matcher, self._words = matcher, words
        self._end_ids = list(end_ids)
        self._not_ends = set(eos_ids) - set(self._end_ids)
        self._read = 0

    def read(self, output_ids: list[int]) -> None:
        """Go on to the end of the output, of which earlier calls have had a part."""
        self._matcher.consume_tokens(output_ids[self._read :])
        self._read = len(output_ids)

    @property
    def complete(self) -> bool:
        """Whether nothing more may come."""
        return self._matcher.is_stopped() and self.accepting

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str | None:
        """Why it can say nothing more: a text may run into what is too complex to follow."""
        return (
            self._matcher.get_error().strip().splitlines()[0] if self._matcher.is_error() else None
        )

    def allow(self, mask: Mask) -> None:
        """Set the bits of the tokens that may come next, and no others."""
        accepting = self.accepting
        bits = np.zeros(self._words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        for token in self._not_ends:
            bits[token // 32] &= ~_bit(token)
        for token in self._end_ids if accepting else ():
            bits[token // 32] |= _bit(token)
        mask[:] = (
            0 if self._matcher.is_error() else bits[: len(mask)]
        )  # in an error llguidance allows an end


def _bit(token: int) -> np.uint32:
    return np.uint32(1 << token % 32)


class StructuredOutput:
    """The guides of one model's requests. `eos_ids`: the model's own end-of-sequence tokens."""

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, *, eos_ids: tuple[int, ...]):
        self._tokenizer, self._vocab, self._eos_ids = tokenizer, vocab, eos_ids
        self._compiled = functools.lru_cache(COMPILED)(self._compile)

    def check(self, params: SamplingParams) -> None:
        """Raise `ConfigError` for a constraint that cannot be met, with the reason."""
        if params.constraint is not None:
            self._compiled(params.constraint)

    def of(self, request: Request) -> GrammarMatcher | None:
        """The request's guide, which has read all of its output; None for one that is free."""
        if request.matcher is None and (constraint := request.params.constraint) is not None:
            ids = {
                "eos_ids": self._known.eos_tokens,
                "end_ids": sampling_state(request, self._vocab, self._eos_ids).end_ids,
            }
            words = -(-self._known.vocab_size // 32)
            request.matcher = GrammarMatcher(self._compiled(constraint).deep_copy(), words, **ids)
        if request.matcher is not None:
            request.matcher.read(request.output_ids)
        return request.matcher

    def allowed(self, requests: list[Request], *, rows: int) -> np.ndarray:
        """uint32 `[rows, words]`: a mask for each request, in which a free one may have any token."""
        masks = np.full((rows, -(-self._vocab // 32)), 0xFFFFFFFF, np.uint32)
        for request, mask in zip(requests, masks, strict=False):
            if (guide := self.of(request)) is not None:
                guide.allow(mask)
        return masks

    @functools.cached_property
    def _known(self) -> Any:
        """The tokenizer as llguidance has it. It must have an end: where the model has none, one that no text uses is added."""
        backend = self._tokenizer.backend
        eos_ids = [token for token in self._eos_ids if backend.id_to_token(token) is not None]
        if not eos_ids:
            backend = type(backend).from_str(backend.to_str())
            backend.add_special_tokens([NO_END])
            eos_ids = [backend.token_to_id(NO_END)]
        vocab = max(self._vocab, 1 + max(backend.get_vocab().values()))
        return _llguidance().LLTokenizer(backend.to_str(), n_vocab=vocab, eos_token=eos_ids)

    def _compile(self, constraint: Constraint) -> Any:
        """A matcher at the beginning of a text. Raises `ConfigError`."""
        llguidance = _llguidance(constraint)
        if not callable(getattr(getattr(self._tokenizer, "backend", None), "to_str", None)):
            raise ConfigError(
                f"{constraint}: needs a tokenizer of the `tokenizers` library, and this model has none."
            )
        try:
            grammar = _grammar(llguidance.LLMatcher, constraint)
            matcher = llguidance.LLMatcher(self._known, grammar, log_level=0)
        except ValueError as error:
            raise ConfigError(f"{constraint}: {error}") from error
        if matcher.is_error():
            raise ConfigError(f"{constraint}: {matcher.get_error().strip()}")
        return matcher


def _llguidance(constraint: Constraint | None = None) -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            f"{constraint}: needs llguidance, which is not installed: pip install 'jfp8kv[structured]'."
        ) from None
    return llguidance


def _grammar(matcher: Any, constraint: Constraint) -> str:
    """The constraint as llguidance takes it."""
    match constraint.field:
        case "json_schema":
            return matcher.grammar_from_json_schema(
                constraint.value, defaults={"whitespace_pattern": WHITESPACE}
            )
        case "regex":
            return matcher.grammar_from_regex(constraint.value)
        case "choice":
            return matcher.grammar_from_lark(
                "start: " + " | ".join(json.dumps(text) for text in constraint.value)
            )
    return matcher.grammar_from_lark(constraint.value)
