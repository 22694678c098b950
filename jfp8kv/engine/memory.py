"""The memory that steps need besides the weights and the KV cache.

The default size of the KV cache is what the largest step leaves free. A step's temporaries do not
depend on the size of the pool, so they are known before the pool is allocated:

- On an accelerator the largest prefill and the largest decode are compiled over a small abstract
  pool, and XLA's memory analysis is read. The pool's size is part of a program's shapes, so these
  programs are not used again. They are compiled only if `kv_cache_memory` is None and an estimate
  does not show that memory is ample. Later processes read them from the compilation cache.
- On a CPU the memory is estimated from shapes. The KV cache takes a small share of it, so compiling
  would only delay the start.
"""

import jax
import numpy as np

from jfp8kv.cache.capacity import default_bytes, free_bytes
from jfp8kv.cache.pool import KVPool
from jfp8kv.engine import step
from jfp8kv.engine.batch import BatchBuilder, DecodeBatch, ForwardBatch
from jfp8kv.engine.buckets import MAX_LOGITS_BYTES, Buckets
from jfp8kv.engine.programs import Program, ProgramCache, Programs
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode, ScheduledPrefill
from jfp8kv.engine.speculative import decode_speculative
from jfp8kv.models.config import ModelConfig
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.sampling.state import FULL, SamplerVariant

# Arrays of the size of the logits that live at once: in a decode the logits, the adjusted logits
# and two token counts; in scoring the logits, their softmax and the output.
LOGITS_COPIES = 4
ACTIVATION_COPIES = 4  # of the widest activations of a layer
AMPLE = 4  # Memory is ample if the largest useful cache leaves this many times the estimate.


def idle_requests(count: int) -> list[Request]:
    """Return requests without pages: running them writes nothing."""
    params = SamplingParams(max_tokens=1)
    return [Request([0], params, np.zeros(2, np.uint32), max_tokens=1) for _ in range(count)]


def _decode_program(
    programs: Programs, batch: DecodeBatch, pages: KVPool, buckets: Buckets, variant: SamplerVariant
) -> Program:
    """Return the decode program of this batch, speculative if `buckets.drafts`."""
    top = min(variant.top, programs.model.config.vocab)
    if buckets.drafts:
        return programs.program(
            decode_speculative,
            batch,
            pages,
            variant=variant.name,
            drafts=buckets.drafts,
            max_steps=buckets.decode_steps,
            top=top,
        )
    return programs.program(
        step.decode, batch, pages, variant=variant.name, max_steps=buckets.decode_steps, top=top
    )


def default_cache_bytes(
    programs: Programs, builder: BatchBuilder, pages: KVPool, *, limit: int
) -> int:
    """Return the size of the KV cache if none is given.

    Args:
      programs: the engine's programs, which are not changed.
      builder: builds batches for `pages`.
      pages: an abstract pool of any size.
      limit: the size of the largest useful cache. If it leaves ample memory, nothing is compiled.

    Raises `CapacityError` if the largest step leaves no memory.
    """
    device = jax.local_devices()[0]
    step_bytes = estimated_step_bytes(programs.model.config, builder.buckets)
    ample = free_bytes(device) - limit >= AMPLE * step_bytes
    if device.platform != "cpu" and not ample:
        measured = Programs(
            programs.model, programs.weights, programs.scales, cache=ProgramCache(size=0)
        )
        step_bytes = compiled_step_bytes(measured, builder, pages)
    return default_bytes(device, step_bytes=step_bytes)


def compiled_step_bytes(programs: Programs, builder: BatchBuilder, pages: KVPool) -> int:
    """Return the memory that the largest step needs, read from compiled programs.

    Args:
      programs: compiles the steps.
      builder: builds their batches.
      pages: an abstract pool of any size.
    """
    buckets = builder.buckets
    width = buckets.max_prefill_chunk
    prefill_batch = builder.prefill(ScheduledPrefill(idle_requests(1), [1], width))
    prefill = programs.program(step.prefill, prefill_batch, pages)
    plan = ScheduledDecode(idle_requests(buckets.max_requests), 1)
    decode_batch, variant = builder.decode(plan, FULL)
    decode = _decode_program(programs, decode_batch, pages, buckets, variant)
    return max(
        # A step that returns logits is a prefill that also needs this memory.
        _step_bytes(prefill, prefill_batch)
        + LOGITS_COPIES * _prompt_logits_bytes(builder.vocab, width),
        _step_bytes(decode, decode_batch),
    )


def estimated_step_bytes(config: ModelConfig, buckets: Buckets) -> int:
    """Return an estimate of the memory that the largest step needs, from shapes alone."""
    decode_tokens = buckets.decode_rows(buckets.max_requests) * (1 + buckets.drafts)
    width = buckets.max_prefill_chunk
    logits_bytes = max(4 * config.vocab * decode_tokens, _prompt_logits_bytes(config.vocab, width))
    widest = max(config.hidden, config.mlp_hidden, config.q_heads * config.head_dim)
    if config.experts is not None:
        widest = max(widest, config.experts.top_k * config.experts.hidden)
    activation_bytes = 4 * widest * max(width, decode_tokens)
    return LOGITS_COPIES * logits_bytes + ACTIVATION_COPIES * activation_bytes


def _prompt_logits_bytes(vocab: int, width: int) -> int:
    """Return the bytes of the logits that one step computes for the tokens of prompts."""
    return min(MAX_LOGITS_BYTES, 4 * vocab * width)


def _step_bytes(program: Program, batch: ForwardBatch | DecodeBatch) -> int:
    """Return the bytes of temporaries, of outputs other than the pool, and of the batch."""
    memory = program.memory
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    inputs = sum(int(x.size) * x.dtype.itemsize for x in jax.tree.leaves(batch))
    needed: int = memory.temp_size_in_bytes + max(0, outputs) + inputs
    return needed
