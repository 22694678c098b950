"""The warm engines behind `generate`, `logits` and `score`."""

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import jfp8kv
from jfp8kv import ConfigError, DeviceMemoryError, KVScales, engine_registry
from jfp8kv.engine_registry import EngineRegistry, engine_for
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

FOLDER = REFERENCES[0].parent / "llama_bf16"


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(FOLDER)


@pytest.fixture(autouse=True)
def no_engines() -> Iterator[None]:
    yield
    jfp8kv.clear_engines()


def test_an_engine_is_reused_while_nothing_that_needs_another_changes(params) -> None:
    engine = engine_for(params, kv_dtype="fp8_e4m3")
    assert engine_for(params, kv_dtype="fp8_e4m3") is engine
    assert engine_for(params, kv_dtype="fp8") is engine
    assert engine_for(params, kv_dtype="fp8_e5m2") is not engine
    assert engine_for(params, kv_dtype="fp8_e4m3") is engine, "another setting keeps it"
    drafting = engine_for(params, kv_dtype="fp8_e4m3", prompt_lookup=2)
    assert drafting is not engine
    assert engine_for(params, kv_dtype="fp8_e4m3", prompt_lookup=0) is engine
    assert engine_for(params, kv_dtype="fp8_e4m3") in (engine, drafting)
    output = jfp8kv.generate(params, ["hello"], kv_dtype="fp8", max_tokens=4, temperature=0.0)
    assert output[0].text == output[0].outputs[0].text
    assert engine.stats.generated_tokens == 4


def test_scales_count_by_their_values_and_files_by_their_content(params, tmp_path) -> None:
    path = tmp_path / "scales.safetensors"
    ones, twos = (np.full((2, 1, 1), value, np.float32) for value in (1, 2))
    KVScales(k=ones, v=ones, kv_dtype="fp8_e4m3").save(path)
    engine = engine_for(params, kv_dtype="fp8", kv_scales=path)
    same = KVScales(k=ones.copy(), v=ones.copy(), kv_dtype="fp8_e4m3")
    assert engine_for(params, kv_dtype="fp8", kv_scales=same) is engine
    KVScales(k=twos, v=ones, kv_dtype="fp8_e4m3").save(path)
    assert engine_for(params, kv_dtype="fp8", kv_scales=path) is not engine


def test_the_least_recently_used_engine_is_dropped_beyond_the_limit(params) -> None:
    registry = EngineRegistry(max_engines=2)
    first = registry.get(params, kv_dtype="fp8_e4m3")
    dropped = weakref.ref(registry.get(params, kv_dtype="fp8_e5m2"))
    assert registry.get(params, kv_dtype="fp8_e4m3") is first
    registry.get(params, kv_dtype="float32")
    assert len(registry) == 2 and dropped() is None
    assert registry.get(params, kv_dtype="fp8_e4m3") is first


def test_engines_are_dropped_for_a_new_one_while_memory_is_short(params, monkeypatch) -> None:
    registry = EngineRegistry()
    pool = registry.get(params, kv_dtype="fp8_e4m3").stats.kv_bytes_capacity
    monkeypatch.setattr(engine_registry, "free_bytes", lambda device: pool)
    registry.get(params, kv_dtype="fp8_e5m2")
    assert len(registry) == 2, "the second pool may be as large as the first"
    monkeypatch.setattr(engine_registry, "free_bytes", lambda device: pool - 1)
    registry.get(params, kv_dtype="float32")
    assert len(registry) == 1


def test_a_pool_that_does_not_fit_is_tried_again_without_the_other_engines(
    params, monkeypatch
) -> None:
    registry = EngineRegistry()
    other = weakref.ref(registry.get(params, kv_dtype="fp8_e4m3"))
    create = engine_registry.LLM

    def create_alone(*args, **options):
        if other() is not None:
            raise DeviceMemoryError("a KV cache does not fit")
        return create(*args, **options)

    monkeypatch.setattr(engine_registry, "LLM", create_alone)
    assert registry.get(params, kv_dtype="fp8_e5m2").kv_dtype == "fp8_e5m2"
    assert other() is None and len(registry) == 1


def test_invalid_settings_drop_no_engine(params) -> None:
    registry = EngineRegistry(max_engines=1)
    engine = registry.get(params)
    for wrong in ({"kv_dtype": "fp8_e4m4"}, {"kv_scales": "unity"}, {"prompt_lookup": -1}):
        with pytest.raises(ConfigError):
            registry.get(params, **wrong)
    assert registry.get(params) is engine


def test_dropping_the_params_frees_engine_and_weights_at_once() -> None:
    params = jfp8kv.load(FOLDER)
    jfp8kv.score(params, "hello")
    engine = engine_for(params).engine
    weight = jax.tree.leaves(params)[0]
    gone = [weakref.ref(x) for x in (params, engine, engine.pages.k_bits, weight)]
    gc.disable()
    try:
        del params, engine, weight
        assert [reference() for reference in gone] == [None] * 4
    finally:
        gc.enable()


def test_clear_engines_frees_the_memory_and_the_next_call_creates_an_engine(params) -> None:
    want = jfp8kv.score(params, "hello")
    gone = weakref.ref(engine_for(params).engine)
    gc.disable()
    try:
        jfp8kv.clear_engines()
        assert gone() is None
    finally:
        gc.enable()
    np.testing.assert_array_equal(jfp8kv.score(params, "hello"), want)


def test_weights_replaced_in_the_tree_are_used_by_the_next_call() -> None:
    params = jfp8kv.load(FOLDER, dtype="float32")
    before = jfp8kv.logits(params, [1, 40, 50])
    params.tree["norm"]["weight"] = 2 * params.tree["norm"]["weight"]
    np.testing.assert_allclose(jfp8kv.logits(params, [1, 40, 50]), 2 * before, rtol=1e-5)
    assert len(engine_registry._registry) == 1


def test_first_calls_of_several_threads_create_one_engine(monkeypatch) -> None:
    params = jfp8kv.load(FOLDER, dtype="float32")
    created, everyone = [], threading.Barrier(4)
    create = engine_registry.LLM

    def counted(*args, **options):
        created.append(1)
        return create(*args, **options)

    monkeypatch.setattr(engine_registry, "LLM", counted)

    def call() -> np.ndarray:
        everyone.wait(30)
        return jfp8kv.score(params, "hello")

    with ThreadPoolExecutor(4) as pool:
        scores = [run.result(timeout=60) for run in [pool.submit(call) for _ in range(4)]]
    assert len(created) == 1
    for score in scores:
        np.testing.assert_allclose(score, scores[0], rtol=0, atol=1e-4)


def test_a_path_is_loaded_at_each_call_and_leaves_no_engine_behind() -> None:
    assert jfp8kv.generate(str(FOLDER), "hello", max_tokens=2)[0].token_ids
    assert len(engine_registry._registry) == 0
