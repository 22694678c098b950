"""Compiled programs are shared while they are wanted, and let go when they are not."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

import jfp8kv
from jfp8kv.engine import programs
from jfp8kv.engine.programs import Programs
from jfp8kv.engine.request import Request
from jfp8kv.engine.scheduler import ScheduledDecode
from jfp8kv.sampling.params import SamplingParams
from tests.models.test_decoder import REFERENCES


@pytest.fixture
def engine():
    return jfp8kv.LLM(
        jfp8kv.load(REFERENCES[0]), kv_cache_memory="100kB", max_model_len=64, max_num_seqs=1
    )._engine


def step(number: int):
    """A step of its own, small enough to compile at once."""

    def counted(model, weights, scales, batch, pages):
        return jnp.int32(number), pages

    return counted


def test_programs_outlive_their_engine_up_to_a_number_and_are_shared_meanwhile(
    engine, monkeypatch
) -> None:
    """All of them for ever would end in a segmentation fault, when the process has no memory maps left."""
    monkeypatch.setattr(programs, "KEPT", 2)
    monkeypatch.setattr(programs, "_recent", programs.OrderedDict())
    request = Request([1], SamplingParams(), np.zeros(2, np.uint32), max_tokens=1)
    batch = engine.batch_builder.decode(ScheduledDecode([request], 1))[0]
    steps = [step(number) for number in range(4)]

    def fresh() -> Programs:
        return Programs(engine.model, engine.programs.weights, engine.programs.scales)

    first = fresh()
    seen = [weakref.ref(first.program(s, batch, engine.pages)) for s in steps]
    assert all(ref() is not None for ref in seen)  # the engine's own
    second = fresh()
    assert second.program(steps[3], batch, engine.pages) is seen[3]() and second.built == []
    del first
    gc.collect()
    assert [ref() is not None for ref in seen] == [False, False, True, True]
