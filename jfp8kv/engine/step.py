"""The step functions. The model runs on one request and `vmap` makes it a batch; `engine/programs.py` compiles them.

Four steps: `prefill` caches a chunk of each request, up to the last token of its prompt; `decode` takes it from there and
makes several tokens per dispatch in a loop on the device, ending early when every request is done; `score` runs a chunk and
returns the logits of every position, from which `pick` makes a token where the host has a say in it; `score_last` returns those
of the last. The pool goes in and comes out: donated, it is updated in place, and what a step needs besides does not grow with
it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jfp8kv.attention.dispatch import Attention, Write
from jfp8kv.attention.interface import AttentionMetadata, AttentionOptions, Layer
from jfp8kv.attention.paged import paged
from jfp8kv.cache.groups import LayerGroups
from jfp8kv.cache.pool import KVPool, LayerScales, write
from jfp8kv.core.pytree import pytree
from jfp8kv.engine.batch import Batch, StepOutput
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.decoder import Decoder, bind
from jfp8kv.models.linear import Matmul, stacked_matmul
from jfp8kv.sampling.penalties import count_token
from jfp8kv.sampling.sample import sample_batch, top_logprobs

Weights = Any  # the tree of `Params`, 16-bit leaves perhaps as their bits


@dataclasses.dataclass(frozen=True)
class StepModel:
    """What a step is compiled for, apart from shapes: hashable, so equal models share compiled programs."""

    config: ModelConfig
    dtype: np.dtype  # of the weights
    attention: Attention
    groups: LayerGroups | None = None  # which page table each layer reads; None: all of them one
    write: Write = write
    matmul: Matmul = stacked_matmul

    def bind(self, weights: Weights) -> Decoder:
        """The decoder around these weights."""
        return bind(self.config, weights, self.dtype, matmul=self.matmul)

    def options(self, decoder: Decoder) -> AttentionOptions:
        """What this model asks of attention, its sinks read from the weights."""
        c = self.config
        windows = jnp.asarray(c.windows, jnp.int32) if c.windows else None
        return AttentionOptions(
            window=windows, sinks=decoder.sinks(), sm_scale=c.attention_scale, softcap=c.softcap
        )


@pytree
class Chunk:
    """One request's share of a batch: the fields of `Batch` that say what it is and where it lies."""

    tokens: Int[Array, " tokens"]
    page_tables: Int[Array, "groups pages"]
    start: Int[Array, ""]
    length: Int[Array, ""]
    context: Int[Array, ""]
    most_tokens: Int[Array, ""]

    def metadata(self, groups: LayerGroups | None) -> Callable[[Layer], AttentionMetadata]:
        """The place of its tokens in each layer."""

        def at(layer: Layer) -> AttentionMetadata:
            group = (
                0
                if groups is None or groups.uniform
                else jnp.asarray(groups.group, jnp.int32)[layer]
            )
            return AttentionMetadata(
                self.page_tables[group], self.start, self.length, self.most_tokens
            )

        return at


def _forward(
    model: StepModel, decoder: Decoder, scales: LayerScales | None, chunk: Chunk, pages: KVPool
) -> tuple[Float[Array, "tokens hidden"], KVPool]:
    """One request's chunk through the model, its keys and values written first."""
    attend = paged(
        model.attention,
        scales,
        model.options(decoder),
        chunk.metadata(model.groups),
        write=model.write,
    )
    positions = chunk.start + jnp.arange(chunk.tokens.shape[0], dtype=jnp.int32)
    return decoder(chunk.tokens, positions, attend=attend, carry=pages, context=chunk.context)


def each_request(one: Callable, batch: Batch, pages: KVPool, *, out_axes: Any) -> Any:
    """`one(chunk, pages)` for every request of the batch, over the pool they share."""

    def request(
        tokens: Array, tables: Array, start: Array, length: Array, context: Array, pages: KVPool
    ) -> Any:
        return one(Chunk(tokens, tables, start, length, context, batch.most_tokens), pages)

    each = jax.vmap(request, in_axes=(0, 0, 0, 0, 0, None), out_axes=out_axes)
    return each(batch.tokens, batch.page_tables, batch.start, batch.length, batch.context, pages)


def chunk_logits(
    model: StepModel, decoder: Decoder, scales: LayerScales | None, batch: Batch, pages: KVPool
) -> tuple[Float[Array, "requests tokens vocab"], KVPool]:
    """Logits after every token of each request's chunk."""

    def one(chunk: Chunk, pages: KVPool) -> tuple[Array, KVPool]:
        hidden, pages = _forward(model, decoder, scales, chunk, pages)
        return decoder.logits(hidden), pages

    return each_request(one, batch, pages, out_axes=(0, None))


def counted(batch: Batch) -> Batch:
    """The batch with all of its outputs' tokens counted."""
    if batch.output_since is None:
        return batch
    return dataclasses.replace(
        batch,
        output_counts=jax.vmap(count_token)(batch.output_counts, batch.output_since),
        output_since=None,
    )


def _sampled(logits: Array, batch: Batch, top: int) -> StepOutput:
    """One token per request."""
    counts = batch.prompt_counts, batch.output_counts
    tokens, logprobs = sample_batch(logits, batch.settings, batch.position, *counts, batch.allowed)
    return StepOutput(
        *(x[:, None] for x in (tokens, logprobs, *likeliest(logits, batch.reported, top)))
    )


def likeliest(logits: Float[Array, "rows vocab"], reported: Array, top: int) -> tuple[Array, ...]:
    """The ids of the `top` likeliest tokens of each row and their log-probabilities: zeros if nothing is `reported`, no arrays
    for a `top` of 0."""
    if not top:
        return ()
    nothing = (
        jnp.zeros((logits.shape[0], top), jnp.float32),
        jnp.zeros((logits.shape[0], top), jnp.int32),
    )
    each = jax.vmap(lambda row: top_logprobs(row, top))
    values, ids = lax.cond(reported > 0, lambda: each(logits), lambda: nothing)
    return ids, values


def prefill(
    model: StepModel, weights: Weights, scales: LayerScales | None, batch: Batch, pages: KVPool
) -> tuple[Int[Array, " requests"], KVPool]:
    """Cache a chunk of each request; how many tokens of each are cached now. Nothing is sampled: a prompt's last token is left
    to `decode`."""
    decoder = model.bind(weights)

    def one(chunk: Chunk, pages: KVPool) -> KVPool:
        return _forward(model, decoder, scales, chunk, pages)[1]

    cached = jnp.maximum(
        batch.start, batch.length
    )  # computed, so that it is there when the step is done and not before
    return cached, each_request(one, batch, pages, out_axes=None)


def decode(
    model: StepModel,
    weights: Weights,
    scales: LayerScales | None,
    batch: Batch,
    pages: KVPool,
    *,
    most_steps: int,
    top: int = 0,
) -> tuple[StepOutput, KVPool]:
    """Up to `batch.steps` (at most `most_steps`) tokens for each request, none after its end token or its `remaining`."""
    decoder = model.bind(weights)
    rows, vocab = batch.start.shape[0], model.config.vocab
    blank = StepOutput.blank(rows, most_steps, vocab=vocab, top=top)

    def unfinished(state: tuple) -> Array:
        step, batch, _, _ = state
        return (step < batch.steps) & jnp.any(batch.remaining > 0)

    def advance(state: tuple) -> tuple:
        step, batch, out, pages = state
        active = batch.remaining > 0
        batch = dataclasses.replace(batch, length=batch.start + active.astype(jnp.int32))
        logits, pages = chunk_logits(model, decoder, scales, batch, pages)
        new = _sampled(logits[:, 0], batch, top)
        token = jnp.where(active, new.tokens[:, 0], vocab)
        new = dataclasses.replace(new, tokens=token[:, None])
        out = jax.tree.map(
            lambda made, one: lax.dynamic_update_slice_in_dim(made, one, step, axis=1), out, new
        )
        return step + 1, _after(batch, token, active, vocab), out, pages

    state = (jnp.int32(0), counted(batch), blank, pages)
    _, _, out, pages = lax.while_loop(unfinished, advance, state)
    return out, pages


def _after(batch: Batch, token: Int[Array, " requests"], active: Array, vocab: int) -> Batch:
    """The batch once `token` was made for the `active` requests."""
    one = active.astype(jnp.int32)
    ended = jnp.any(token[:, None] == batch.end_ids, axis=1) | (
        token == vocab
    )  # past the last: none was left to choose
    counts = batch.output_counts
    return dataclasses.replace(
        batch,
        tokens=jnp.where(active, token, batch.tokens[:, 0])[:, None],
        start=batch.start + one,
        position=batch.position + one,
        remaining=jnp.where(ended, 0, batch.remaining - one),
        output_counts=None if counts is None else jax.vmap(count_token)(counts, token),
    )


def score(
    model: StepModel, weights: Weights, scales: LayerScales | None, batch: Batch, pages: KVPool
) -> tuple[Float[Array, "requests tokens vocab"], KVPool]:
    """Cache a chunk of each request and return the logits after each of its tokens."""
    decoder = model.bind(weights)
    return chunk_logits(model, decoder, scales, batch, pages)


def score_last(
    model: StepModel, weights: Weights, scales: LayerScales | None, batch: Batch, pages: KVPool
) -> tuple[Float[Array, "requests vocab"], KVPool]:
    """Cache a chunk of each request and return the logits after its last token."""
    decoder = model.bind(weights)

    def one(chunk: Chunk, pages: KVPool) -> tuple[Array, KVPool]:
        hidden, pages = _forward(model, decoder, scales, chunk, pages)
        last = lax.dynamic_slice_in_dim(hidden, chunk.length - chunk.start - 1, 1)
        return decoder.logits(last)[0], pages

    return each_request(one, batch, pages, out_axes=(0, None))


def pick(
    logits: Float[Array, "requests tokens vocab"], batch: Batch, *, top: int = 0
) -> StepOutput:
    """A token for each request from what `score` gave after its last one: `decode` in two, for what comes between."""
    return _sampled(logits[:, 0], counted(batch), top)
