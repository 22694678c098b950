"""Speculative decoding by prompt lookup: several tokens of a request per forward pass.

Outputs often repeat parts of the prompt or of themselves: names, code, quotations, edits. If the
last few tokens occurred before, the tokens after that occurrence are the *draft* of the next ones.
No draft model is needed (Saxena 2023, "Prompt lookup decoding"). A wrong draft only costs time.

A wide pass runs the last token of each request and its draft tokens as one chunk. A token is
sampled at each position of the chunk, from the logits of that position and with the request's key
folded with the position, exactly as in plain decoding. It is accepted if all draft tokens before it
equal the tokens sampled there. For a deterministic draft this is rejection sampling: a draft token
is accepted with its probability, and its replacement is drawn from the other tokens. Because noise
depends only on request and position, the output also equals that of plain decoding, greedy or not,
up to rounding of the logits (note 017).

Keys and values of rejected draft tokens are past the end of the sequence. No query sees them, the
next pass overwrites them, and they do not enter the prefix cache, whose hashes are computed from
the sequence.

A wide pass costs more than a plain one where matmuls are compute-bound. So it runs only if the
draft of some request is likely to be accepted. The drafts of the other requests are then verified
as well.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jfp8kv.cache.pool import KVPool, LayerScales
from jfp8kv.core.pytree import pytree
from jfp8kv.engine import step
from jfp8kv.engine.batch import DecodeBatch, DraftCounts, StepOutput
from jfp8kv.sampling.penalties import count_token
from jfp8kv.sampling.sample import sample_batch

MAX_NGRAM = 3  # tokens compared; longer matches are not followed more reliably (docs/log.md)
MIN_LIKELY_NGRAM = 3  # matched tokens that make a draft worth a wide pass (docs/log.md)

Sequence = Int[Array, " positions"]
Chunk = Int[Array, " chunk"]
"""The tokens of one pass: the last token of a request, draft tokens, and `vocab` as padding."""
Count = Int[Array, ""]
ChunkCounts = Int[Array, "requests chunk vocab"] | None
"""Token counts of the output before each position of the chunk, for penalties."""


def draft(sequence: Sequence, length: Count, *, count: int) -> tuple[Int[Array, " count"], Count]:
    """Return `count` draft tokens and the number of tokens that matched.

    The draft follows the longest earlier occurrence of the last tokens (at most `MAX_NGRAM` of
    them), and the latest one on ties. If nothing matched, the draft is meaningless. If the draft
    reaches the end of the sequence, it repeats the tokens since the occurrence.

    Args:
      sequence: the tokens of a request, padded.
      length: the number of tokens without padding, at least 1.
      count: the number of draft tokens.
    """
    size = sequence.shape[0]
    position = jnp.arange(size, dtype=jnp.int32)
    last = length - 1
    equal = position < last
    matched = jnp.zeros(size, jnp.int32)
    for back in range(MAX_NGRAM):
        shifted = jnp.pad(sequence, (back, 0))[:size]  # the token `back` before each position
        equal &= (position >= back) & (shifted == sequence[last - back])
        matched += equal.astype(jnp.int32)
    best = jnp.max(jnp.where(matched > 0, matched * size + position, 0))  # longest, then latest
    end = best % size
    period = jnp.maximum(last - end, 1)
    return sequence[end + 1 + jnp.arange(count, dtype=jnp.int32) % period], best // size


@pytree
class Drafts:
    """The drafts of one request, or of several with a leading axis.

    Attributes:
      tokens: draft tokens, padded with `vocab`.
      count: the number of draft tokens.
      likely: whether the draft is worth a wide pass.
    """

    tokens: Int[Array, "*requests drafts"]
    count: Int[Array, "*requests"]
    likely: Bool[Array, "*requests"]


@pytree
class State:
    """The state between two passes. `drafts` are those of the next pass."""

    passes: Count
    batch: DecodeBatch
    drafts: Drafts
    output: StepOutput
    pages: KVPool


def decode_speculative(
    model: step.StepModel,
    weights: step.Weights,
    scales: LayerScales | None,
    batch: DecodeBatch,
    pages: KVPool,
    *,
    max_steps: int,
    drafts: int,
    top: int = 0,
) -> tuple[StepOutput, KVPool]:
    """Generate the tokens of `step.decode`, up to `1 + drafts` per pass.

    There are up to `batch.steps` passes, at most `max_steps`. Drafts are looked up in
    `batch.sequences`.
    """
    decoder = model.bind(weights)
    batch = dataclasses.replace(batch, counts=step.counted(batch.counts))
    rows = batch.position.shape[0]
    vocab = model.config.vocab
    first = batch.position
    zeros = jnp.zeros(rows, jnp.int32)
    empty = StepOutput.empty(rows, max_steps * (1 + drafts), vocab=vocab, top=top)
    empty = dataclasses.replace(empty, drafts=DraftCounts(verified=zeros, accepted=zeros))

    def unfinished(state: State) -> Array:
        return jnp.logical_and(state.passes < batch.steps, jnp.any(state.batch.remaining > 0))

    def any_likely(state: State) -> Array:
        return jnp.any(state.drafts.likely)

    def wide_pass(state: State) -> State:
        return run(state, state.drafts.tokens, state.drafts.count)

    def plain_pass(state: State) -> State:
        return run(state, state.drafts.tokens[:, :0], zeros)

    def run(state: State, draft_tokens: Array, draft_count: Array) -> State:
        """Run the last token of each request and its draft tokens."""
        batch = state.batch
        active = batch.remaining > 0
        chunks = jnp.concatenate([_last_tokens(batch), draft_tokens], axis=1)
        forward = dataclasses.replace(
            batch.forward,
            tokens=chunks,
            length=batch.forward.start + jnp.where(active, 1 + draft_count, 0),
        )
        logits, pages = step.chunk_logits(model, decoder, scales, forward, state.pages)
        counts = None
        if batch.counts is not None:
            counts = jax.vmap(_counts_along)(batch.counts.output, chunks)
        sampled = _sample(logits, batch, counts, top)
        accepted = jax.vmap(_num_new_tokens)(
            sampled.tokens, chunks, draft_count, batch.sampler.end_ids
        )
        num_new = jnp.where(active, accepted, 0)
        is_new = jnp.arange(chunks.shape[1], dtype=jnp.int32) < num_new[:, None]
        new = dataclasses.replace(
            sampled,
            tokens=jnp.where(is_new, sampled.tokens, vocab),
            drafts=DraftCounts(verified=draft_count, accepted=jnp.maximum(num_new - 1, 0)),
        )
        output = _append(state.output, new, batch.position - first)
        batch = _after(batch, new.tokens, num_new, counts, vocab)
        return State(
            passes=state.passes + 1,
            batch=batch,
            drafts=propose(batch),
            output=output,
            pages=pages,
        )

    def propose(batch: DecodeBatch) -> Drafts:
        def one(sequence: Array, start: Array, remaining: Array) -> Drafts:
            return _propose(sequence, start, remaining, drafts, vocab)

        assert batch.sequences is not None
        proposed: Drafts = jax.vmap(one)(batch.sequences, batch.forward.start, batch.remaining)
        return proposed

    def alternate(state: State) -> State:
        """Run plain passes until a draft is likely, then wide ones while there are likely drafts.

        These are two loops and not a branch, because `lax.cond` would copy the pool.
        """
        state = lax.while_loop(
            lambda state: unfinished(state) & ~any_likely(state), plain_pass, state
        )
        return lax.while_loop(lambda state: unfinished(state) & any_likely(state), wide_pass, state)

    initial = State(
        passes=jnp.int32(0), batch=batch, drafts=propose(batch), output=empty, pages=pages
    )
    final = lax.while_loop(unfinished, alternate, initial)
    return final.output, final.pages


def _last_tokens(batch: DecodeBatch) -> Int[Array, "requests 1"]:
    """Return the last token of each request, which is the next one to run."""

    def one(sequence: Array, start: Array) -> Array:
        return sequence[start][None]

    assert batch.sequences is not None
    return jax.vmap(one)(batch.sequences, batch.forward.start)


def _propose(sequence: Sequence, start: Count, remaining: Count, limit: int, vocab: int) -> Drafts:
    """Return the draft of a request, limited to the tokens that remain to be generated."""
    tokens, matched = draft(sequence, start + 1, count=limit)
    count = jnp.where(matched > 0, jnp.clip(remaining - 1, 0, limit), 0)
    tokens = jnp.where(jnp.arange(limit, dtype=jnp.int32) < count, tokens, vocab)
    likely = (count > 0) & (matched >= MIN_LIKELY_NGRAM)
    return Drafts(tokens=tokens, count=count, likely=likely)


def _counts_along(counts: Int[Array, " vocab"], chunk: Chunk) -> Int[Array, "chunk vocab"]:
    """Return the token counts of the output before each position, if all drafts are accepted."""

    def count(counts: Array, token: Array) -> tuple[Array, Array]:
        counts = count_token(counts, token)
        return counts, counts

    _, later = lax.scan(count, counts, chunk[1:])
    return jnp.concatenate([counts[None], later])


def _sample(logits: Array, batch: DecodeBatch, counts: ChunkCounts, top: int) -> StepOutput:
    """Sample a token at each position of each request's chunk."""
    rows, width, vocab = logits.shape

    def by_position(x: Array) -> Array:
        """Repeat the values of each request once for each of its positions."""
        return jnp.repeat(jnp.asarray(x), width, axis=0)

    position = (batch.position[:, None] + jnp.arange(width, dtype=jnp.int32)).reshape(-1)
    logits = logits.reshape(-1, vocab)
    tokens, logprobs = sample_batch(
        logits,
        jax.tree.map(by_position, batch.sampler.settings),
        position,
        prompt_counts=None if batch.counts is None else by_position(batch.counts.prompt),
        output_counts=None if counts is None else counts.reshape(-1, vocab),
    )
    most_likely = step.top_of(logits, batch.sampler.max_logprobs, top)
    return StepOutput(
        tokens=tokens.reshape(rows, width),
        logprobs=logprobs.reshape(rows, width),
        top=jax.tree.map(lambda x: x.reshape(rows, width, top), most_likely),
    )


def _num_new_tokens(
    sampled: Chunk, chunk: Chunk, draft_count: Count, end_ids: Int[Array, " ends"]
) -> Count:
    """Return the number of new tokens.

    They end with the first that differs from its draft or is an end token.
    """
    position = jnp.arange(chunk.shape[0] - 1, dtype=jnp.int32)
    ends = jnp.any(sampled[:, None] == end_ids, axis=1)
    matching = (sampled[:-1] == chunk[1:]) & (position < draft_count) & ~ends[:-1]
    return 1 + jnp.sum(jnp.cumprod(matching.astype(jnp.int32)))


def _append(output: StepOutput, new: StepOutput, at: Int[Array, " requests"]) -> StepOutput:
    """Return `output` with the new tokens of a pass, written from index `at` of each request."""
    assert output.drafts is not None and new.drafts is not None
    drafts = jax.tree.map(jnp.add, output.drafts, new.drafts)
    joined: StepOutput = jax.tree.map(
        lambda old, added: jax.vmap(_write)(old, at, added),
        dataclasses.replace(output, drafts=None),
        dataclasses.replace(new, drafts=None),
    )
    return dataclasses.replace(joined, drafts=drafts)


def _after(
    batch: DecodeBatch,
    new_tokens: Int[Array, "requests chunk"],
    num_new: Int[Array, " requests"],
    counts: ChunkCounts,
    vocab: int,
) -> DecodeBatch:
    """Return the batch after `num_new[i]` of `new_tokens[i]`, padded with `vocab`.

    `counts` are the token counts along the chunk.
    """
    assert batch.sequences is not None
    index = jnp.maximum(num_new - 1, 0)
    last = jax.vmap(lambda tokens, index: tokens[index])(new_tokens, index)
    # The token `vocab` means that every token was masked.
    ended = jnp.any(last[:, None] == batch.sampler.end_ids, axis=1) | (last == vocab)
    forward = batch.forward
    token_counts = batch.counts
    if token_counts is not None:
        output = jax.vmap(lambda c, at, token: count_token(c[at], token))(counts, index, last)
        token_counts = dataclasses.replace(token_counts, output=output)
    return dataclasses.replace(
        batch,
        forward=dataclasses.replace(forward, start=forward.start + num_new),
        position=batch.position + num_new,
        remaining=jnp.where(ended, 0, batch.remaining - num_new),
        counts=token_counts,
        sequences=jax.vmap(_write)(batch.sequences, forward.start + 1, new_tokens),
    )


def _write(row: Array, at: Count, values: Array) -> Array:
    """Return `row` with `values` written from index `at` on. Values past its end are dropped."""
    return row.at[at + jnp.arange(values.shape[0], dtype=jnp.int32)].set(values, mode="drop")
