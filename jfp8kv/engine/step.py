"""The step functions: the model runs on one request, `vmap` batches it, `programs.py` compiles it.

- `prefill` runs a chunk of each request, up to the last token but one of its prompt.
- `logprobs` and `logits` do the same and return log-probabilities or logits of the chunk's tokens.
- `last_logits` runs a chunk and returns the logits after its last token.
- `decode` runs the last token and generates several tokens in a loop on the device. The loop ends
  early when all requests are finished.
- `sample` samples from the output of `logits`. For structured output these two replace `decode`,
  because the host computes token bitmasks in between.
- `copy` copies pages, for copy-on-write.

A request *caches* a chunk when the keys and values of its tokens are written to the pool.

The pool is an argument and a result. It is donated and updated in place, and the temporary memory
of a step does not grow with it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from jfp8kv.attention.interface import (
    Attention,
    AttentionMetadata,
    AttentionOptions,
    Write,
    paged_attend,
)
from jfp8kv.cache.copy import PageCopies, copy_pages
from jfp8kv.cache.groups import LayerGroups
from jfp8kv.cache.pool import KVPool, Layer, LayerScales, write
from jfp8kv.core.pytree import pytree
from jfp8kv.engine.batch import (
    DecodeBatch,
    ForwardBatch,
    LogprobsBatch,
    StepOutput,
    TokenCounts,
    TopLogprobs,
)
from jfp8kv.engine.buckets import max_logits_tokens
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.decoder import Decoder, bind
from jfp8kv.models.linear import Matmul, stacked_matmul
from jfp8kv.sampling.penalties import count_token
from jfp8kv.sampling.sample import logprob_at, sample_batch, top_logprobs

T = TypeVar("T")
DecodeState: TypeAlias = tuple[Array, DecodeBatch, StepOutput, KVPool]
"""The number of steps so far, the batch, the output and the pool."""
Weights: TypeAlias = Any
"""The tree of `Params`. On a CPU, 16-bit leaves may be stored as their bits (models/linear.py)."""


@dataclasses.dataclass(frozen=True)
class StepModel:
    """The static argument of a step. Hashable: equal models share compiled programs.

    Attributes:
      config: the model.
      dtype: the dtype of the weights.
      attention: the attention implementation.
      groups: the page table that each layer reads; None if all layers read the same one.
      write: writes keys and values to the pool.
      matmul: the matmul with layer-stacked weights.
    """

    config: ModelConfig
    dtype: np.dtype
    attention: Attention
    groups: LayerGroups | None = None
    write: Write = write
    matmul: Matmul = stacked_matmul

    def bind(self, weights: Weights) -> Decoder:
        """Return the decoder with these weights."""
        return bind(self.config, weights, self.dtype, matmul=self.matmul)

    def options(self, decoder: Decoder) -> AttentionOptions:
        """Return the attention options of this model, with the sinks of `decoder`."""
        config = self.config
        windows = jnp.asarray(config.windows, jnp.int32) if config.windows else None
        return AttentionOptions(
            window=windows,
            sinks=decoder.sinks(),
            sm_scale=config.attention_scale,
            softcap=config.softcap,
        )


@pytree
class Chunk:
    """One request's row of a `ForwardBatch`."""

    tokens: Int[Array, " tokens"]
    page_tables: Int[Array, "groups pages"]
    start: Int[Array, ""]
    length: Int[Array, ""]
    context: Int[Array, ""]
    max_length: Int[Array, ""]

    def metadata(self, groups: LayerGroups | None) -> Callable[[Layer], AttentionMetadata]:
        """Return a function from a layer to the attention metadata of this chunk."""

        def at(layer: Layer) -> AttentionMetadata:
            if groups is None or groups.uniform:
                page_table = self.page_tables[0]
            else:
                page_table = self.page_tables[jnp.asarray(groups.group, jnp.int32)[layer]]
            return AttentionMetadata(page_table, self.start, self.length, self.max_length)

        return at


def _forward(
    model: StepModel, decoder: Decoder, scales: LayerScales | None, chunk: Chunk, pages: KVPool
) -> tuple[Float[Array, "tokens hidden"], KVPool]:
    """Run a chunk of one request. Its keys and values are written before attention reads them."""
    attend = paged_attend(
        model.attention,
        scales,
        model.options(decoder),
        chunk.metadata(model.groups),
        write=model.write,
    )
    positions = chunk.start + jnp.arange(chunk.tokens.shape[0], dtype=jnp.int32)
    return decoder(chunk.tokens, positions, attend=attend, carry=pages, context=chunk.context)


def each_request(
    one: Callable[[Chunk, KVPool], T],
    batch: ForwardBatch,
    pages: KVPool,
    *,
    out_axes: Any,
) -> T:
    """Return `one(chunk, pages)` for each request of the batch. The pool is shared.

    `out_axes` is that of `jax.vmap`.
    """

    def request(
        tokens: Array, tables: Array, start: Array, length: Array, context: Array, pages: KVPool
    ) -> T:
        chunk = Chunk(
            tokens=tokens,
            page_tables=tables,
            start=start,
            length=length,
            context=context,
            max_length=batch.max_length,
        )
        return one(chunk, pages)

    each = jax.vmap(request, in_axes=(0, 0, 0, 0, 0, None), out_axes=out_axes)
    result: T = each(
        batch.tokens, batch.page_tables, batch.start, batch.length, batch.context, pages
    )
    return result


def chunk_logits(
    model: StepModel,
    decoder: Decoder,
    scales: LayerScales | None,
    batch: ForwardBatch,
    pages: KVPool,
) -> tuple[Float[Array, "requests tokens vocab"], KVPool]:
    """Cache a chunk of each request and return the logits after each of its tokens."""

    def one(chunk: Chunk, pages: KVPool) -> tuple[Array, KVPool]:
        hidden, pages = _forward(model, decoder, scales, chunk, pages)
        return decoder.logits(hidden), pages

    return each_request(one, batch, pages, out_axes=(0, None))


def counted(counts: TokenCounts | None) -> TokenCounts | None:
    """Return the counts with `recent` added to the counts of the output."""
    if counts is None or counts.recent is None:
        return counts
    output = jax.vmap(count_token)(counts.output, counts.recent)
    return TokenCounts(prompt=counts.prompt, output=output)


def _sampled(logits: Array, batch: DecodeBatch, top: int) -> StepOutput:
    """Sample one token per request."""
    counts = batch.counts
    tokens, logprobs = sample_batch(
        logits,
        batch.sampler.settings,
        batch.position,
        prompt_counts=None if counts is None else counts.prompt,
        output_counts=None if counts is None else counts.output,
        bitmask=batch.token_bitmask,
    )
    most_likely = top_of(logits, batch.sampler.max_logprobs, top)
    return StepOutput(
        tokens=tokens[:, None],
        logprobs=logprobs[:, None],
        top=jax.tree.map(lambda x: x[:, None], most_likely),
    )


def top_of(
    logits: Float[Array, "rows vocab"], max_logprobs: Int[Array, ""], top: int
) -> TopLogprobs | None:
    """Return the `top` most likely tokens of each row, and their log-probabilities.

    Returns zeros if no request needs them (`max_logprobs` is 0), and None if `top` is 0.
    """
    if not top:
        return None

    def compute() -> TopLogprobs:
        values, ids = jax.vmap(lambda row: top_logprobs(row, top))(logits)
        return TopLogprobs(token_ids=ids, logprobs=values)

    def skip() -> TopLogprobs:
        shape = (logits.shape[0], top)
        return TopLogprobs(
            token_ids=jnp.zeros(shape, jnp.int32), logprobs=jnp.zeros(shape, jnp.float32)
        )

    result: TopLogprobs = lax.cond(max_logprobs > 0, compute, skip)
    return result


def prefill(
    model: StepModel,
    weights: Weights,
    scales: LayerScales | None,
    batch: ForwardBatch,
    pages: KVPool,
) -> tuple[Int[Array, " requests"], KVPool]:
    """Cache a chunk of each request, and return the number of tokens that are cached now."""
    decoder = model.bind(weights)

    def one(chunk: Chunk, pages: KVPool) -> KVPool:
        return _forward(model, decoder, scales, chunk, pages)[1]

    # Computed, because an output that is an input would be ready before the step is finished.
    cached = jnp.maximum(batch.start, batch.length)
    return cached, each_request(one, batch, pages, out_axes=None)


def decode(
    model: StepModel,
    weights: Weights,
    scales: LayerScales | None,
    batch: DecodeBatch,
    pages: KVPool,
    *,
    max_steps: int,
    top: int = 0,
) -> tuple[StepOutput, KVPool]:
    """Generate up to `batch.steps` tokens for each request, at most `max_steps`.

    A request stops at an end token and after `remaining` tokens.
    """
    decoder = model.bind(weights)
    rows = batch.position.shape[0]
    vocab = model.config.vocab
    empty = StepOutput.empty(rows, max_steps, vocab=vocab, top=top)

    def unfinished(state: DecodeState) -> Array:
        step, batch, _, _ = state
        return jnp.logical_and(step < batch.steps, jnp.any(batch.remaining > 0))

    def advance(state: DecodeState) -> DecodeState:
        step, batch, out, pages = state
        active = batch.remaining > 0
        forward = batch.forward
        forward = dataclasses.replace(forward, length=forward.start + active.astype(jnp.int32))
        logits, pages = chunk_logits(model, decoder, scales, forward, pages)
        new = _sampled(logits[:, 0], batch, top)
        token = jnp.where(active, new.tokens[:, 0], vocab)
        new = dataclasses.replace(new, tokens=token[:, None])
        out = jax.tree.map(
            lambda old, token: lax.dynamic_update_slice_in_dim(old, token, step, axis=1), out, new
        )
        return step + 1, _after(batch, token, active, vocab), out, pages

    batch = dataclasses.replace(batch, counts=counted(batch.counts))
    state: DecodeState = (jnp.int32(0), batch, empty, pages)
    _, _, out, pages = lax.while_loop(unfinished, advance, state)
    return out, pages


def _after(
    batch: DecodeBatch, token: Int[Array, " requests"], active: Array, vocab: int
) -> DecodeBatch:
    """Return the batch after `token` was generated for the `active` requests."""
    one = active.astype(jnp.int32)
    # The token `vocab` means that every token was masked.
    ended = jnp.any(token[:, None] == batch.sampler.end_ids, axis=1) | (token == vocab)
    forward = batch.forward
    counts = batch.counts
    if counts is not None:
        counts = dataclasses.replace(counts, output=jax.vmap(count_token)(counts.output, token))
    return dataclasses.replace(
        batch,
        forward=dataclasses.replace(
            forward,
            tokens=jnp.where(active, token, forward.tokens[:, 0])[:, None],
            start=forward.start + one,
        ),
        position=batch.position + one,
        remaining=jnp.where(ended, 0, batch.remaining - one),
        counts=counts,
    )


def logits(
    model: StepModel,
    weights: Weights,
    scales: LayerScales | None,
    batch: ForwardBatch,
    pages: KVPool,
) -> tuple[Float[Array, "requests tokens vocab"], KVPool]:
    """Cache a chunk of each request and return the logits after each of its tokens.

    The caller limits the chunk: `Buckets.max_logits_chunk`.
    """
    decoder = model.bind(weights)
    return chunk_logits(model, decoder, scales, batch, pages)


@pytree
class PromptLogprobs:
    """The log-probability of the token after each token, and the top log-probabilities there."""

    logprobs: Float32[Array, "requests tokens"]
    top: TopLogprobs


PrefillResult: TypeAlias = Array | PromptLogprobs
"""The output of `prefill`, `logits` or `logprobs`."""


def logprobs(
    model: StepModel,
    weights: Weights,
    scales: LayerScales | None,
    batch: LogprobsBatch,
    pages: KVPool,
    *,
    top: int,
) -> tuple[PromptLogprobs, KVPool]:
    """Cache a chunk of each request and return the log-probabilities of `batch.next_tokens`.

    Logits are computed for a block of tokens at a time, to limit them to `MAX_LOGITS_BYTES`.
    """
    decoder = model.bind(weights)

    def one(chunk: Chunk, pages: KVPool) -> tuple[Array, KVPool]:
        return _forward(model, decoder, scales, chunk, pages)

    def score(block: tuple[Array, Array]) -> tuple[Array, TopLogprobs | None]:
        hidden, next_tokens = block
        logits = decoder.logits(hidden)
        return jax.vmap(logprob_at)(logits, next_tokens), top_of(logits, batch.max_logprobs, top)

    hidden, pages = each_request(one, batch.forward, pages, out_axes=(0, None))
    requests, tokens, size = hidden.shape
    count = requests * tokens
    block = min(max_logits_tokens(model.config.vocab), count)
    padding = -count % block
    flat = jnp.pad(hidden.reshape(count, size), ((0, padding), (0, 0)))
    targets = jnp.pad(batch.next_tokens.reshape(count), (0, padding))
    scores = lax.map(score, (flat.reshape(-1, block, size), targets.reshape(-1, block)))
    values, most_likely = jax.tree.map(
        lambda x: x.reshape(count + padding, *x.shape[2:])[:count].reshape(
            requests, tokens, *x.shape[2:]
        ),
        scores,
    )
    return PromptLogprobs(logprobs=values, top=most_likely), pages


def last_logits(
    model: StepModel,
    weights: Weights,
    scales: LayerScales | None,
    batch: ForwardBatch,
    pages: KVPool,
) -> tuple[Float[Array, "requests vocab"], KVPool]:
    """Cache a chunk of each request and return the logits after its last token."""
    decoder = model.bind(weights)

    def one(chunk: Chunk, pages: KVPool) -> tuple[Array, KVPool]:
        hidden, pages = _forward(model, decoder, scales, chunk, pages)
        last = lax.dynamic_slice_in_dim(hidden, chunk.length - chunk.start - 1, 1)
        return decoder.logits(last)[0], pages

    return each_request(one, batch, pages, out_axes=(0, None))


def sample(
    logits: Float[Array, "requests tokens vocab"], batch: DecodeBatch, *, top: int = 0
) -> StepOutput:
    """Sample a token for each request from the logits that `logits` returned after its last one.

    Together they are one step of `decode`. The host computes token bitmasks in between.
    """
    batch = dataclasses.replace(batch, counts=counted(batch.counts))
    return _sampled(logits[:, 0], batch, top)


def copy(
    model: StepModel,
    weights: Weights,
    scales: LayerScales | None,
    copies: PageCopies,
    pages: KVPool,
) -> tuple[None, KVPool]:
    """Copy pages. A step like the others, although it does not run the model."""
    return None, copy_pages(pages, copies.source, copies.target, copies.count)
