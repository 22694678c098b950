"""The few shapes that compiled steps come in, so that a warm engine never compiles again."""

import dataclasses

import jax

DECODE_STEPS = 8  # tokens per dispatch: long enough to hide the host's work, short enough to stream and to admit


def default_token_budget() -> int:
    """Prompt tokens per dispatch when nobody says: what keeps this machine busy."""
    return 512 if jax.default_backend() == "cpu" else 2048


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Request counts are powers of two; prefill chunks are powers of four up to a token budget.

    `fewest`: the smallest batch, 2 where a product with a single row is slow (models/linear.py).
    """

    max_requests: int
    token_budget: int
    decode_steps: int
    fewest: int = 1

    @property
    def span(self) -> int:
        """The most tokens that one dispatch adds to a text."""
        return max(self.token_budget, self.decode_steps)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Prefill chunk widths, in tokens: 16, 64, 256, ... and the budget itself."""
        widths = []
        width = 16
        while width < self.token_budget:
            widths.append(width)
            width *= 4
        return (*widths, self.token_budget)

    def chunk(self, tokens: int) -> int:
        """The narrowest chunk that holds `tokens`, or the widest there is."""
        return next((width for width in self.chunks if width >= tokens), self.token_budget)

    def extension(self, tokens: int) -> int:
        """The same for texts of sessions, which often go on by a token: then that is all they run."""
        return 1 if tokens == 1 else self.chunk(tokens)

    def prefill_requests(self, width: int) -> int:
        """How many requests a prefill of chunks of this width may take."""
        return max(1, min(self.token_budget // width, self.max_requests))

    def requests(self, count: int) -> int:
        """The padded batch for `count` requests."""
        return max(self.fewest, 1 << (count - 1).bit_length())

    def request_counts(self, most: int) -> list[int]:
        """Every padded batch that `1 .. most` requests can give."""
        return sorted({self.requests(count) for count in range(1, most + 1)})
