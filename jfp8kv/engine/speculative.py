"""Speculative decoding without a second model: several tokens of a request in one pass, where its own text foretells them.

A wide pass runs each request's last token and the drafts after it (`engine/lookup.py`) as one chunk. A token is sampled at each
place of it, from that place's logits and with the request's key folded with the position, exactly as when decoding one by one.
It counts if all drafts before it are what was sampled there. For drafts made without chance this is rejection sampling (draft x
is kept with its probability, and what stands in for it is drawn from the others by theirs), and more than that: noise belongs
to request and position, so the text is that of plain decoding, greedy or not, as far as logits are (note 017).

Keys and values of drafts that failed lie past the text: nothing sees them, the next pass writes over them, and no page is found
by them, for pages are kept by the tokens of the text.

A wide pass costs more than a plain one where products take time. So there is one only when some request's draft is likely to be
right; drafts of the others, which would not be worth it, then go with it.
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
from jfp8kv.engine.lookup import draft
from jfp8kv.sampling.penalties import count_token
from jfp8kv.sampling.sample import sample_batch

LIKELY = 3  # tokens that must speak for a draft to make it worth a wide pass (docs/log.md)

Text = Int[Array, " text"]
Chunk = Int[
    Array, " chunk"
]  # what a pass runs of a request: its last token, then drafts, `vocab` past them
Count = Int[Array, ""]
Counts = (
    Int[Array, "requests chunk vocab"] | None
)  # of tokens in the output before each place, where penalties ask


@pytree
class Drafts:
    """Of one request, or of several with a leading axis: `vocab` past the `count` to try; whether they are worth a pass."""

    tokens: Int[Array, "*requests drafts"]
    count: Int[Array, "*requests"]
    likely: Bool[Array, "*requests"]


@pytree
class State:
    """Between two passes: what they came to so far, and the drafts for the next."""

    passes: Count
    batch: DecodeBatch
    drafts: Drafts
    out: StepOutput
    pages: KVPool


def decode_ahead(
    model: step.StepModel,
    weights: step.Weights,
    scales: LayerScales | None,
    batch: DecodeBatch,
    pages: KVPool,
    *,
    most_steps: int,
    drafts: int,
    top: int = 0,
) -> tuple[StepOutput, KVPool]:
    """The tokens of `step.decode`, in up to `batch.steps` (at most `most_steps`) passes of up to `1 + drafts` tokens each.

    `batch.sequences` is what drafts are looked up in.
    """
    decoder = model.bind(weights)
    batch = dataclasses.replace(batch, counts=step.counted(batch.counts))
    rows, vocab, first = batch.position.shape[0], model.config.vocab, batch.position
    none = jnp.zeros(rows, jnp.int32)
    empty = StepOutput.empty(rows, most_steps * (1 + drafts), vocab=vocab, top=top)
    empty = dataclasses.replace(empty, drafts=DraftCounts(verified=none, accepted=none))

    def unfinished(state: State) -> Array:
        return (state.passes < batch.steps) & jnp.any(state.batch.remaining > 0)

    def likely(state: State) -> Array:
        return jnp.any(state.drafts.likely)

    def wide(state: State) -> State:
        return run(state, state.drafts.tokens, state.drafts.count)

    def plain(state: State) -> State:
        return run(state, state.drafts.tokens[:, :0], none)

    def run(state: State, guess: Array, tried: Array) -> State:
        """A pass over each request's last token and these drafts."""
        batch = state.batch
        active = batch.remaining > 0
        chunks = jnp.concatenate([_last(batch), guess], axis=1)
        forward = batch.forward
        forward = dataclasses.replace(
            forward, tokens=chunks, length=forward.start + jnp.where(active, 1 + tried, 0)
        )
        logits, pages = step.chunk_logits(model, decoder, scales, forward, state.pages)
        counts = (
            None if batch.counts is None else jax.vmap(_counts_along)(batch.counts.output, chunks)
        )
        new = _sampled(logits, batch, counts, top)
        end_ids = batch.sampler.end_ids
        made = jnp.where(active, jax.vmap(_made)(new.tokens, chunks, tried, end_ids), 0)
        places = jnp.arange(chunks.shape[1], dtype=jnp.int32)
        new = dataclasses.replace(
            new,
            tokens=jnp.where(places < made[:, None], new.tokens, vocab),
            drafts=DraftCounts(verified=tried, accepted=jnp.maximum(made - 1, 0)),
        )
        out = _joined(state.out, new, batch.position - first)
        batch = _after(batch, new.tokens, made, counts, vocab)
        return State(state.passes + 1, batch, propose(batch), out, pages)

    def propose(batch: DecodeBatch) -> Drafts:
        return jax.vmap(lambda *request: _drafts(*request, drafts, vocab))(
            batch.sequences, batch.forward.start, batch.remaining
        )

    def alternate(state: State) -> State:
        """Plain passes up to the next likely draft, wide ones while there are such. (Branches instead would copy the pool.)"""
        state = lax.while_loop(lambda state: unfinished(state) & ~likely(state), plain, state)
        return lax.while_loop(lambda state: unfinished(state) & likely(state), wide, state)

    state = lax.while_loop(
        unfinished, alternate, State(jnp.int32(0), batch, propose(batch), empty, pages)
    )
    return state.out, state.pages


def _last(batch: DecodeBatch) -> Int[Array, "requests 1"]:
    """The token that each request is about to run."""
    return jax.vmap(lambda text, start: text[start][None])(batch.sequences, batch.forward.start)


def _drafts(text: Text, start: Count, remaining: Count, most: int, vocab: int) -> Drafts:
    """What to try of a request's drafts: none that would take it past its last token."""
    guess, length = draft(text, start + 1, count=most)
    count = jnp.where(length > 0, jnp.clip(remaining - 1, 0, most), 0)
    guess = jnp.where(jnp.arange(most, dtype=jnp.int32) < count, guess, vocab)
    return Drafts(guess, count, (count > 0) & (length >= LIKELY))


def _counts_along(counts: Int[Array, " vocab"], chunk: Chunk) -> Int[Array, "chunk vocab"]:
    """How often each token stands in the output before each place, were all drafts right."""

    def count(counts: Array, token: Array) -> tuple[Array, Array]:
        counts = count_token(counts, token)
        return counts, counts

    return jnp.concatenate([counts[None], lax.scan(count, counts, chunk[1:])[1]])


def _sampled(logits: Array, batch: DecodeBatch, counts: Counts, top: int) -> StepOutput:
    """A token at every place of every request."""
    rows, width, vocab = logits.shape

    def places(x: Array) -> Array:
        """What each request has, for each of its places: their axes in one."""
        return jnp.repeat(jnp.asarray(x), width, axis=0)

    position = (batch.position[:, None] + jnp.arange(width, dtype=jnp.int32)).reshape(-1)
    logits = logits.reshape(-1, vocab)
    tokens, logprobs = sample_batch(
        logits,
        jax.tree.map(places, batch.sampler.settings),
        position,
        prompt_counts=None if batch.counts is None else places(batch.counts.prompt),
        output_counts=None if counts is None else counts.reshape(-1, vocab),
    )
    most_likely = step.top_of(logits, batch.sampler.max_logprobs, top)
    return StepOutput(
        tokens=tokens.reshape(rows, width),
        logprobs=logprobs.reshape(rows, width),
        top=jax.tree.map(lambda x: x.reshape(rows, width, top), most_likely),
    )


def _made(sampled: Chunk, chunk: Chunk, tried: Count, end_ids: Int[Array, " ends"]) -> Count:
    """How many of the sampled tokens count: those up to the first that is not its draft, or ends the text."""
    place = jnp.arange(chunk.shape[0] - 1, dtype=jnp.int32)
    ends = jnp.any(sampled[:, None] == end_ids, axis=1)
    right = (sampled[:-1] == chunk[1:]) & (place < tried) & ~ends[:-1]
    return 1 + jnp.sum(jnp.cumprod(right.astype(jnp.int32)))


def _joined(out: StepOutput, new: StepOutput, at: Int[Array, " requests"]) -> StepOutput:
    """Return `out` with the tokens of one more pass, from place `at` of each request on."""
    assert out.drafts is not None and new.drafts is not None
    drafts = jax.tree.map(jnp.add, out.drafts, new.drafts)
    tokens = dataclasses.replace(out, drafts=None)
    more = dataclasses.replace(new, drafts=None)
    joined = jax.tree.map(lambda all, some: jax.vmap(_written)(all, at, some), tokens, more)
    return dataclasses.replace(joined, drafts=drafts)


def _after(
    batch: DecodeBatch,
    new: Int[Array, "requests chunk"],
    made: Int[Array, " requests"],
    counts: Counts,
    vocab: int,
) -> DecodeBatch:
    """The batch once the tokens `new` were made, `made` of each request and `vocab` past them. `counts`: as along the chunk."""
    place = jnp.maximum(made - 1, 0)
    last = jax.vmap(lambda tokens, place: tokens[place])(new, place)
    # `vocab`, past the last token, means that no token was left to sample.
    ended = jnp.any(last[:, None] == batch.sampler.end_ids, axis=1) | (last == vocab)
    forward, token_counts = batch.forward, batch.counts
    if token_counts is not None:
        output = jax.vmap(lambda c, at, token: count_token(c[at], token))(counts, place, last)
        token_counts = dataclasses.replace(token_counts, output=output)
    return dataclasses.replace(
        batch,
        forward=dataclasses.replace(forward, start=forward.start + made),
        position=batch.position + made,
        remaining=jnp.where(ended, 0, batch.remaining - made),
        counts=token_counts,
        sequences=jax.vmap(_written)(batch.sequences, forward.start + 1, new),
    )


def _written(row: Array, at: Count, values: Array) -> Array:
    """`row` with these values from place `at` on, as far as it goes."""
    return row.at[at + jnp.arange(values.shape[0], dtype=jnp.int32)].set(values, mode="drop")
