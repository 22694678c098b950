"""When an `LLM` ends: `close`, `with`, the last reference, the end of the process."""

import gc
import subprocess
import sys
import textwrap
import threading
import weakref

import jax
import pytest

import jfp8kv
from jfp8kv import ConfigError
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

SIZES = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "page_size": 8,
    "max_num_batched_tokens": 64,
    "kv_cache_memory": "200kB",
}
SAMPLING = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


def new_llm() -> jfp8kv.LLM:
    return jfp8kv.LLM(jfp8kv.load(REFERENCES[0], dtype="float32"), kv_dtype="fp8", **SIZES)


def test_calls_after_close_raise_a_clear_error() -> None:
    with new_llm() as llm:
        session = llm.session("hello")
        stream = llm.stream("hello", **SAMPLING)
        next(stream)
        want = llm.stats.to_dict()
    assert llm.stats.to_dict().keys() == want.keys(), "the counters stay readable"
    llm.close()
    for call in (
        lambda: llm.generate("hello", **SAMPLING),
        lambda: llm.chat([{"role": "user", "content": "hello"}], **SAMPLING),
        lambda: llm.stream("hello", **SAMPLING),
        lambda: llm.astream("hello", **SAMPLING),
        lambda: list(llm.generate_iter([("hello", None)])),
        lambda: llm.session("hello"),
        lambda: llm.score("hello"),
        lambda: list(llm.score_iter([("hello", None)])),
        lambda: llm.logits([1, 2]),
        lambda: llm.check("hello"),
        llm.warmup,
        llm.compile_report,
        lambda: llm.params,
        lambda: list(stream),
        lambda: session.extend("a"),
        lambda: session.fork(),
        lambda: session.generate(**SAMPLING),
    ):
        with pytest.raises(ConfigError, match="this LLM is closed: create another"):
            call()
    session.close()
    stream.close()


def test_close_frees_pool_and_weights_though_the_llm_is_still_referred_to() -> None:
    llm = new_llm()
    session = llm.session("hello")
    engine = llm.engine
    gone = [weakref.ref(x) for x in (engine, engine.pages.k_bits, jax.tree.leaves(llm.params)[0])]
    del engine
    llm.close()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert len(session.token_ids) > 0


def test_dropping_the_last_reference_frees_everything_at_once_and_ends_the_thread() -> None:
    llm = new_llm()
    llm.generate(["hello", "you"], **SAMPLING)
    assert "".join(llm.stream("hello", **SAMPLING))
    abandoned = llm.stream("hello", **SAMPLING)
    next(abandoned)
    llm.session("hello").fork().extend("a")
    llm.score("hello")
    llm.stats, llm.compile_report()
    thread, engine = llm._driver._thread, llm.engine
    weight = jax.tree.leaves(llm.params)[0]
    gone = [weakref.ref(x) for x in (llm, engine, engine.pages.k_bits, weight)]
    llm._driver.flush()
    gc.disable()
    try:
        del llm, engine, weight, abandoned
        assert [reference() for reference in gone] == [None] * 4
    finally:
        gc.enable()
    thread.join(20)
    assert not thread.is_alive()


def test_a_session_keeps_its_engine_and_the_last_of_both_frees_it() -> None:
    llm = new_llm()
    session = llm.session("hello")
    gone = weakref.ref(llm.engine)
    del llm
    assert session.extend("a").shape[0] > 0
    session.close()
    assert gone() is not None
    del session
    assert gone() is None


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    for _ in range(3):
        with new_llm() as llm:
            llm.generate("hello", **SAMPLING)
        new_llm().generate("hello", **SAMPLING)
    for thread in threading.enumerate():
        if thread.name == "jfp8kv-engine":
            thread.join(0.01)
    assert threading.active_count() <= before


SCRIPT = f"""
    import threading, warnings
    import jfp8kv
    params = jfp8kv.load({str(REFERENCES[0])!r}, dtype="float32")
    llm = jfp8kv.LLM(params, kv_dtype="fp8", **{SIZES!r})
    stream = llm.stream("hello", max_tokens=100, ignore_eos=True)
    print(len(next(stream)) > 0)
    session = llm.session("hello")
    jfp8kv.score(params, "hello")
    many = lambda: [llm.generate("hello", max_tokens=100, ignore_eos=True) for _ in range(10**6)]
    threading.Thread(target=many, daemon=True).start()
    pairs = (("hello", {{"max_tokens": 9}}) for _ in range(10**6))
    print(next(llm.generate_iter(pairs))[0])
"""


def test_the_process_exits_with_streams_sessions_and_requests_in_flight() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["True", "0"]), done.stderr
    assert "Fatal" not in done.stderr and "terminate" not in done.stderr
