"""Compiled programs: shared while they are in use, dropped beyond the cache's size."""

import dataclasses
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

import jfp8kv
from jfp8kv.engine.programs import ProgramCache, Programs
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode
from jfp8kv.sampling.params import SamplingParams
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def engine():
    return jfp8kv.LLM(
        jfp8kv.load(REFERENCES[0]), kv_cache_memory="100kB", max_model_len=64, max_num_seqs=1
    ).engine


@pytest.fixture(scope="module")
def batch(engine):
    request = Request([1], SamplingParams(), np.zeros(2, np.uint32), max_tokens=1)
    return engine.batch_builder.decode(ScheduledDecode([request], 1))[0]


def numbered_step(number: int):
    """Return a step unlike all others that compiles fast."""

    def numbered(model, weights, scales, batch, pages):
        return jnp.int32(number), pages

    return numbered


def test_programs_are_shared_up_to_the_size_of_the_cache(engine, batch) -> None:
    """All programs of a process would exhaust its memory maps: a segmentation fault."""
    cache = ProgramCache(size=2)
    steps = [numbered_step(number) for number in range(4)]

    def new_programs() -> Programs:
        weights, scales = engine.programs.weights, engine.programs.scales
        return Programs(engine.model, weights, scales, cache=cache)

    first = new_programs()
    seen = [weakref.ref(first.program(s, batch, engine.pages)) for s in steps]
    assert all(ref() is not None for ref in seen)  # owned by the first engine
    second = new_programs()
    assert second.program(steps[3], batch, engine.pages) is seen[3]() and second.compiled == ()
    del first
    gc.collect()
    assert [ref() is not None for ref in seen] == [False, False, True, True]


def test_the_program_cache_is_safe_to_use_from_many_threads(engine, batch) -> None:
    cache = ProgramCache(size=3)
    program = engine.programs.program(numbered_step(4), batch, engine.pages)
    programs = [dataclasses.replace(program, requests=number) for number in range(8)]

    def use(seed: int) -> bool:
        for number in np.random.default_rng(seed).integers(0, 8, 2000).tolist():
            found = cache.get((number,))
            assert found is None or found is programs[number]
            cache.put((number,), programs[number])
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(4)))
    assert sum(cache.get((number,)) is not None for number in range(8)) == 3


def test_scales_of_a_call_replace_the_engines(engine, batch) -> None:
    def read_scales(model, weights, scales, batch, pages):
        return scales["value"] + 1, pages

    programs = Programs(engine.model, engine.programs.weights, None)
    for value in (1.0, 2.0):
        got, engine.pages = programs.call(
            read_scales, batch, engine.pages, scales={"value": jnp.float32(value)}
        )
        assert got == value + 1
    assert len(programs.compiled) == 1


def test_compiling_is_logged_and_after_a_warm_up_it_is_a_warning(engine, batch, caplog) -> None:
    programs = Programs(engine.model, engine.programs.weights, engine.programs.scales)
    with caplog.at_level(logging.INFO, logger="jfp8kv"):
        programs.program(numbered_step(5), batch, engine.pages)
        programs.mark_warm()
        programs.program(numbered_step(6), batch, engine.pages)
    before, *after = caplog.records
    assert before.levelno == logging.INFO and "compiled step numbered" in before.getMessage()
    assert all(record.levelno == logging.WARNING for record in after)
    assert "while serving" in after[0].getMessage()
