"""The few shapes that compiled steps come in, so that a warm engine never compiles again, and who gets the tokens of a turn."""

import dataclasses

import jax

from jfp8kv.core.errors import ConfigError

DECODE_STEPS = 8  # tokens per dispatch: long enough to hide the host's work, short enough to stream and to admit
DECODE_STEPS_DURING_PREFILL = 2  # while prompts are run beside: those that decode stream on, and prompts keep most of the device
DEFAULT_MAX_NUM_SEQS = 64  # at once, when nobody says
BATCH_INVARIANT_ROWS = 8  # from so many on XLA:CPU adds up the products of a row in one order, however many rows there are (docs/log.md)
MIN_PREFILL_CHUNK = (
    16  # chunks below save little: a CPU or GPU reads all weights for a single token
)


def default_prefill_chunk() -> int:
    """The widest chunk of a prompt when nobody says: what keeps this machine busy."""
    return 512 if jax.default_backend() == "cpu" else 2048


def step_token_budget(chunk: int, max_requests: int) -> int:
    """The budget of a turn that has room for `chunk` tokens of prompts beside a few of every request that decodes."""
    return chunk + DECODE_STEPS_DURING_PREFILL * max(2, _power_of_two(max_requests))


def max_tokens_per_dispatch(chunk: int) -> int:
    """The most tokens that one dispatch adds to a text."""
    return max(chunk, DECODE_STEPS)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Request counts are powers of two. Chunk widths are a prompt's share of a turn, its half and quarter (padding is at most
    as much as the prompt), and from there every fourth part.

    `token_budget`: most tokens of a turn, padding included. Prompts get what a full decode of few steps leaves, always: their
    chunks keep their width whatever decodes beside. `fewest`: the smallest decode batch, 2 where a product with a single row
    is slow (models/linear.py). `drafts`: the most tokens that a step of a decode guesses ahead (engine/speculative.py), which the
    budget does not count (note 017).
    """

    max_requests: int
    token_budget: int
    decode_steps: int = DECODE_STEPS
    min_decode_rows: int = 1
    drafts: int = 0

    @classmethod
    def of(
        cls,
        max_num_seqs: int | None,
        max_num_batched_tokens: int | None,
        *,
        min_decode_rows: int = 1,
        drafts: int = 0,
    ) -> "Buckets":
        """For what a user asked. No budget leaves prompts `default_prefill_chunk` tokens; no number of requests is `DEFAULT_MAX_NUM_SEQS`, or
        as many as leave prompts half of the budget. `ConfigError` if prompts would get nothing."""
        if max_num_seqs is None:
            half = (
                max_num_batched_tokens
                or step_token_budget(default_prefill_chunk(), DEFAULT_MAX_NUM_SEQS)
            ) // 2
            max_num_seqs = max(1, min(DEFAULT_MAX_NUM_SEQS, half // DECODE_STEPS_DURING_PREFILL))
        budget = max_num_batched_tokens or step_token_budget(default_prefill_chunk(), max_num_seqs)
        if budget < (least := step_token_budget(1, max_num_seqs)):
            raise ConfigError(
                f"max_num_batched_tokens={max_num_batched_tokens}: {least - 1} tokens of a turn are for max_num_seqs="
                f"{max_num_seqs} requests that decode, which leaves none for prompts: give at least "
                f"{step_token_budget(MIN_PREFILL_CHUNK, max_num_seqs)}, or a smaller max_num_seqs."
            )
        return cls(max_num_seqs, budget, min_decode_rows=min_decode_rows, drafts=drafts)

    @property
    def max_prefill_chunk(self) -> int:
        """The widest chunk, and the most tokens of prompts in a turn."""
        return self.token_budget - step_token_budget(0, self.max_requests)

    @property
    def max_tokens_per_dispatch(self) -> int:
        """The most tokens that one dispatch adds to a text."""
        return max(
            max_tokens_per_dispatch(self.max_prefill_chunk), self.max_new_tokens(self.decode_steps)
        )

    @property
    def chunks(self) -> tuple[int, ...]:
        """Prefill chunk widths, the narrowest first."""
        widths, part = [self.max_prefill_chunk], 2
        while self.max_prefill_chunk // part >= MIN_PREFILL_CHUNK:
            widths.append(self.max_prefill_chunk // part)
            part *= 2 if part < 4 else 4
        return tuple(reversed(widths))

    def chunk(self, tokens: int) -> int:
        """The narrowest chunk that holds `tokens`, or the widest there is."""
        return next((width for width in self.chunks if width >= tokens), self.max_prefill_chunk)

    def session_chunk(self, tokens: int) -> int:
        """The same for texts of sessions, which often go on by a token: then that is all they run."""
        return 1 if tokens == 1 else self.chunk(tokens)

    def prefill_requests(self, width: int) -> int:
        """How many requests a prefill of chunks of this width may take."""
        return min(1 << (self.max_prefill_chunk // width).bit_length() - 1, self.max_requests)

    def prefill_rows(self, count: int, width: int) -> int:
        """The padded batch for chunks of `count` requests. A token alone, which no chunk is, is as slow as in a decode."""
        return _power_of_two(count) if width in self.chunks else self.decode_rows(count)

    def decode_rows(self, count: int, *, batch_invariant: bool = False) -> int:
        """The padded batch for `count` requests that decode; `alike` where none may see in a last bit how many there are."""
        least = (
            min(BATCH_INVARIANT_ROWS, _power_of_two(self.max_requests)) if batch_invariant else 1
        )
        return max(self.min_decode_rows, least, _power_of_two(count))

    def max_new_tokens(self, steps: int) -> int:
        """The most tokens that a decode of so many steps makes of a request."""
        return steps * (1 + self.drafts)

    def steps(self, count: int, *, few: bool, batch_invariant: bool = False) -> int:
        """Most steps of one decode of `count` requests."""
        return min(
            DECODE_STEPS_DURING_PREFILL if few else self.decode_steps,
            self.token_budget // self.decode_rows(count, batch_invariant=batch_invariant),
        )


def _power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def padded_counts(most: int) -> list[int]:
    """A count for every padded batch that `1 .. most` requests can give."""
    return sorted({min(_power_of_two(count), most) for count in range(1, most + 1)})
