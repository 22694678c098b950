"""The default size of the KV cache: what the largest step leaves free."""

import dataclasses
import logging

import jax
import pytest

import jfp8kv
from jfp8kv.cache.capacity import RESERVE_SHARE
from jfp8kv.core.errors import CapacityError
from jfp8kv.engine import memory
from jfp8kv.engine.buckets import Buckets
from jfp8kv.engine.engine import Engine
from jfp8kv.engine.options import EngineOptions
from jfp8kv.engine.programs import ProgramCache, Programs
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile


@dataclasses.dataclass(frozen=True)
class FakeAccelerator:
    """A device of which only the memory matters."""

    limit: int
    in_use: int = 0
    platform: str = "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": self.in_use}


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(REFERENCES[0], dtype="float32")


def options(**fields) -> EngineOptions:
    sizes = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 144}
    return EngineOptions(**sizes | fields)


def compiled_bytes(engine: Engine) -> int:
    """Return the memory of the engine's largest step, from compiled programs."""
    programs = Programs(
        engine.model, engine.programs.weights, engine.programs.scales, cache=ProgramCache(size=0)
    )
    pool = jax.eval_shape(lambda: engine.pages)
    return memory.compiled_step_bytes(programs, engine.batch_builder, pool)


@pytest.mark.parametrize("prompt_lookup", [0, 8])
def test_the_estimate_covers_what_xla_allocates(params, prompt_lookup) -> None:
    engine = Engine(params, options(prompt_lookup=prompt_lookup, kv_cache_memory="1MB"))
    needed = compiled_bytes(engine)
    estimate = memory.estimated_step_bytes(params.config, engine.buckets)
    assert estimate / 16 < needed < memory.AMPLE * estimate


def test_drafts_with_penalties_count_in_the_memory_of_a_step(params) -> None:
    """Token counts and logits are materialized for each draft: `[requests, 1 + drafts, vocab]`."""
    plain, drafting = (
        compiled_bytes(Engine(params, options(prompt_lookup=drafts, kv_cache_memory="1MB")))
        for drafts in (0, 32)
    )
    one_array = 4 * 8 * 33 * params.config.vocab
    assert drafting > plain and drafting >= 2 * one_array


def test_the_logits_of_prompts_are_counted_up_to_their_cap(params) -> None:
    large = dataclasses.replace(params.config, vocab=10_000_000)
    buckets = Buckets(max_requests=1, token_budget=4096)
    small_vocab = memory.estimated_step_bytes(params.config, buckets)
    assert memory.estimated_step_bytes(large, buckets) - small_vocab < 1 << 31


def test_an_accelerators_pool_is_what_the_largest_step_leaves(params, monkeypatch, caplog) -> None:
    limited = Engine(params, options(kv_cache_memory="1MB"))
    needed = compiled_bytes(limited)
    page_bytes = limited.cache_config.page_bytes
    free = int((needed + 20 * page_bytes) / (1 - RESERVE_SHARE))
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeAccelerator(limit=free)])
    with caplog.at_level(logging.INFO, logger="jfp8kv"):
        engine = Engine(params, options())
    monkeypatch.undo()
    assert 18 <= engine.num_pages <= 20
    assert engine.stats.kv_bytes_capacity + needed <= free * (1 - RESERVE_SHARE)
    assert engine.programs.compiled == (), "the programs that measure are not the engine's"
    assert f"KV cache: {engine.num_pages} pages" in caplog.text


def test_nothing_is_compiled_where_memory_is_ample(params, monkeypatch, caplog) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeAccelerator(limit=1 << 40)])
    with caplog.at_level(logging.INFO, logger="jfp8kv"):
        engine = Engine(params, options())
    monkeypatch.undo()
    assert engine.num_pages == engine.requirements.total_pages(256) * 8, (
        "all requests at full length"
    )
    assert "compiled step" not in caplog.text


def test_a_device_too_small_for_a_step_is_refused(params, monkeypatch) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeAccelerator(limit=1 << 20)])
    with pytest.raises(CapacityError, match=r"no memory is left .* 1048576 bytes are free"):
        Engine(params, options())
