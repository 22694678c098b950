"""The public face: the contract's calls, and every mistake answered before anything runs."""

import shutil

import numpy as np
import pytest

import jfp8kv
from jfp8kv import CapacityError, ConfigError, SamplingParams
from tests.checkpoint.conftest import write_sidecar
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

FOLDER = REFERENCES[0].parent / "llama_bf16"


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(FOLDER)


@pytest.fixture(scope="module")
def llm(params) -> jfp8kv.LLM:
    return jfp8kv.LLM(
        model=params,
        kv_dtype="fp8",
        max_num_batched_tokens=64,
        max_num_seqs=4,
        kv_cache_memory="1MB",
    )


def test_the_fields_seed_example_runs() -> None:
    llm = jfp8kv.LLM(model=str(FOLDER), kv_dtype="fp8", max_num_batched_tokens=64)
    text = (
        llm.generate("Once upon a time", SamplingParams(temperature=0.7, top_p=0.8, max_tokens=8))[
            0
        ]
        .outputs[0]
        .text
    )
    assert isinstance(text, str)


def test_prompts_come_in_every_form_and_results_in_their_order(llm) -> None:
    ids = llm.tokenizer.encode("hello")
    chat = [{"role": "user", "content": "hello"}]
    for prompts, count in (
        ("hello", 1),
        (["hello", "you"], 2),
        ([ids, ids[:1]], 2),
        (ids, 1),
        (chat, 1),
        ([chat, chat], 2),
    ):
        outs = llm.generate(prompts, max_tokens=3, temperature=0.0)
        assert len(outs) == count and all(len(out.outputs) == 1 for out in outs)
    outs = llm.generate(["hello", ids], max_tokens=3, temperature=0.0)
    assert outs[0].prompt == "hello" and outs[1].prompt is None
    assert (
        outs[0].prompt_token_ids == outs[1].prompt_token_ids == ids
        and outs[0].token_ids == outs[1].token_ids
    )
    assert llm.chat(chat, max_tokens=3, temperature=0.0)[0].prompt_token_ids == llm.tokenizer.chat(
        chat
    )


def test_the_stream_is_the_text(llm) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=1.0, seed=2, ignore_eos=True)
    pieces = list(llm.stream("hello", sampling))
    assert "".join(pieces) == llm.generate("hello", sampling)[0].text and len(pieces) > 1


def test_streams_and_calls_share_an_engine_and_nothing_is_lost(llm) -> None:
    from itertools import zip_longest

    sampling = SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)
    want = [llm.generate("hello", sampling, seed=seed)[0].text for seed in (5, 6)]
    stream = llm.stream("hello", sampling, seed=5)
    pieces = [next(stream)]
    assert llm.generate("hello", sampling, seed=6)[0].text == want[1]
    assert "".join([*pieces, *stream]) == want[0]
    both = list(
        zip_longest(*(llm.stream("hello", sampling, seed=seed) for seed in (5, 6)), fillvalue="")
    )
    assert ["".join(pieces) for pieces in zip(*both, strict=True)] == want


def test_a_stream_that_is_not_read_holds_nobody_up(llm) -> None:
    from threading import Thread

    stream = llm.stream("hello", max_tokens=40, ignore_eos=True)
    next(stream)
    other = Thread(target=lambda: llm.generate("hello", max_tokens=4))
    other.start()
    other.join(timeout=60)
    assert not other.is_alive()
    closer = Thread(target=stream.close)
    closer.start()
    closer.join(timeout=60)
    assert llm.stats.kv_tokens_used == 0


def test_the_samples_that_the_model_finds_likeliest_come_first(llm) -> None:
    sampling = {
        "max_tokens": 12,
        "seed": 5,
        "temperature": 1.3,
        "stop_token_ids": list(range(5, 30)),
    }
    every = llm.generate("hello you", n=6, **sampling)[0].outputs
    assert len({len(out.token_ids) for out in every}) > 1, (
        "of different lengths: the mean decides, not the sum"
    )
    ranked = sorted(
        every, key=lambda out: out.cumulative_logprob / len(out.token_ids), reverse=True
    )
    for n in (1, 2, 6):
        best = llm.generate("hello you", n=n, best_of=6, **sampling)[0].outputs
        assert [out.token_ids for out in best] == [out.token_ids for out in ranked[:n]]
        assert [out.index for out in best] == list(range(n))


def test_a_deadline_ends_a_text_with_what_there_is(llm, monkeypatch) -> None:
    sampling = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}
    whole = llm.generate("hello", **sampling)[0]
    late, other = llm.generate(
        ["hello", "you"], [SamplingParams(deadline_s=1e-9, **sampling), SamplingParams(**sampling)]
    )
    assert (late.text, late.token_ids, late.outputs[0].finish_reason) == (
        "",
        [],
        "deadline",
    ) and late.total_s > 0
    assert len(other.token_ids) == 40 and list(llm.stream("hello", deadline_s=1e-9)) == []
    steps, clock = llm.stats.decode_steps, llm._driver._loop.clock
    monkeypatch.setattr(
        llm._driver._loop, "clock", lambda: clock() + 1e6 * (llm.stats.decode_steps > steps + 10)
    )
    cut = llm.generate("hello", deadline_s=1e5, **sampling)[0]
    assert 10 <= len(cut.token_ids) < 40 and cut.outputs[0].finish_reason == "deadline"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and whole.text.startswith(
        cut.text.rstrip("\ufffd")
    )
    assert llm.stats.kv_tokens_used == 0 == llm.stats.kv_bytes_used


def test_a_stop_string_ends_the_text_before_it(llm) -> None:
    whole = llm.generate("hello", max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)[0].text
    stop = whole[10:13]
    out = llm.generate("hello", max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, stop=stop)[
        0
    ].outputs[0]
    assert (
        out.text == whole[: whole.index(stop)]
        and out.finish_reason == "stop"
        and out.stop_reason == stop
    )
    assert len(out.token_ids) < 40
    fields = {"max_tokens": 40, "temperature": 1.0, "seed": 3, "ignore_eos": True, "stop": stop}
    included = llm.generate("hello", include_stop_str_in_output=True, **fields)[0].outputs[0]
    assert included.text == out.text + stop and included.token_ids == out.token_ids


def test_a_stop_token_ends_it_at_the_token(llm) -> None:
    tokens = llm.generate("hello", max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)[
        0
    ].token_ids
    out = llm.generate(
        "hello", max_tokens=20, temperature=1.0, seed=3, ignore_eos=True, stop_token_ids=[tokens[6]]
    )[0].outputs[0]
    assert out.token_ids == tokens[: tokens.index(tokens[6]) + 1] and out.stop_reason == tokens[6]


def test_logprobs_hold_the_sampled_token_and_the_likeliest(llm) -> None:
    out = llm.generate("hello", max_tokens=5, temperature=1.0, seed=1, logprobs=3, ignore_eos=True)[
        0
    ].outputs[0]
    ids = llm.tokenizer.encode("hello")
    logits = llm.logits(ids + out.token_ids[:-1])[len(ids) - 1 :].astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert len(out.logprobs) == 5
    for step, token, row in zip(out.logprobs, out.token_ids, want, strict=True):
        assert (
            token in step
            and set(np.argsort(-row)[:3].tolist()) <= set(step)
            and len(step) in (3, 4)
        )
        assert all(abs(value - row[t]) < 1e-4 for t, value in step.items())
    assert out.cumulative_logprob == pytest.approx(
        sum(s[t] for s, t in zip(out.logprobs, out.token_ids, strict=True))
    )
    assert llm.generate("hello", max_tokens=2)[0].outputs[0].logprobs is None


def test_prompt_logprobs_are_scores_with_the_likeliest(llm) -> None:
    ids = llm.tokenizer.encode("hello you")
    (out,) = llm.generate([ids], max_tokens=1, prompt_logprobs=2)
    assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == len(ids)
    np.testing.assert_allclose(
        [d[t] for d, t in zip(out.prompt_logprobs[1:], ids[1:], strict=True)],
        llm.score(ids),
        atol=1e-6,
    )
    assert all(
        len(d) in (2, 3) and max(d.values()) >= d[t]
        for d, t in zip(out.prompt_logprobs[1:], ids[1:], strict=True)
    )


def test_penalties_bias_and_min_tokens_act(llm) -> None:
    base = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    plain = llm.generate("hello", **base)[0].token_ids
    assert (
        llm.generate("hello", logit_bias={plain[0]: float("-inf")}, **base)[0].token_ids[0]
        != plain[0]
    )
    once = llm.generate(
        "hello", presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=5.0, **base
    )[0].token_ids
    assert len(set(once)) == 12
    stopped = llm.generate(
        "hello", max_tokens=12, temperature=0.0, stop_token_ids=[plain[2]], min_tokens=6
    )[0].token_ids
    assert len(stopped) >= 6


def test_scores_are_log_probabilities_of_the_logits(params) -> None:
    ids = [1, 40, 50, 60, 70]
    logits = jfp8kv.logits(params, ids, kv_dtype="fp8_e4m3").astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    got = jfp8kv.score(params, [ids, ids[:2]], kv_dtype="fp8_e4m3")
    assert [len(x) for x in got] == [4, 1]
    np.testing.assert_allclose(got[0], want[np.arange(4), ids[1:]], atol=1e-5)
    assert jfp8kv.score(params, "hello", kv_dtype="fp8_e4m3").ndim == 1


def test_weights_of_mixed_types_compute_like_float32(params) -> None:
    import jax
    import jax.numpy as jnp

    tree = jax.tree.map(lambda w: w, params.tree)
    tree["layers"]["q"]["weight"] = tree["layers"]["q"]["weight"].astype(jnp.float16)
    tree["norm"]["weight"] = tree["norm"]["weight"].astype(jnp.float32)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), tree)
    mixed, plain = (jfp8kv.Params.from_pytree(t, params.config) for t in (tree, wide))
    got, want = (jfp8kv.logits(p, [1, 40, 50, 60], kv_dtype="float32") for p in (mixed, plain))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_ends_a_text_where_the_config_names_no_end(params) -> None:
    import dataclasses

    tokens = jfp8kv.generate(params, "hello", max_tokens=8, temperature=0.0, ignore_eos=True)[
        0
    ].token_ids
    tokenizer = dataclasses.replace(
        params, config=dataclasses.replace(params.config, eos_ids=())
    ).tokenizer
    before, tokenizer.eos_ids = tokenizer.eos_ids, (tokens[3],)
    try:
        bare = jfp8kv.Params(params.tree, dataclasses.replace(params.config, eos_ids=()), tokenizer)
        out = jfp8kv.generate(bare, "hello", max_tokens=8, temperature=0.0)[0]
    finally:
        tokenizer.eos_ids = before
    assert out.token_ids == tokens[: tokens.index(tokens[3]) + 1]


MISTAKES = [
    ({"prompts": ""}, ConfigError, "prompt 0 is empty"),
    ({"prompts": ["hello", []]}, ConfigError, "prompt 1 is empty"),
    ({"prompts": [[5, 999]]}, ConfigError, "token id 999.*from 0 to 299"),
    ({"prompts": [[5, -1]]}, ConfigError, "token id -1"),
    ({"prompts": []}, ConfigError, "prompts is empty"),
    ({"prompts": "a\ud800"}, ConfigError, "lone surrogate"),
    ({"prompts": 3}, ConfigError, "type int"),
    ({"prompts": [["a", "b"]]}, ConfigError, "prompt 0 is of type list"),
    ({"prompts": [[5] * 4000]}, CapacityError, "max_model_len"),
    ({"temperature": -1.0}, ConfigError, "temperature"),
    ({"prompt_lookup": 99}, ConfigError, "prompt_lookup=99"),
    ({"top_p": 0.0}, ConfigError, "top_p"),
    ({"top_p": 1.5}, ConfigError, "top_p"),
    ({"max_tokens": 0}, ConfigError, "max_tokens"),
    ({"temprature": 0.5}, ConfigError, "Did you mean 'temperature'"),
    ({"kv_dtyp": "fp8"}, ConfigError, "Did you mean 'kv_dtype'"),
    ({"sampling_params": {"temperature": 1}}, ConfigError, "SamplingParams"),
    ({"kv_dtype": "fp8_e4m4"}, ConfigError, "Did you mean 'fp8_e4m3'"),
    ({"kv_dtype": 8}, ConfigError, "kv_dtype=8"),
    ({"kv_scales": "unity"}, ConfigError, "Did you mean 'unit'"),
    ({"kv_scales": "checkpoint", "kv_dtype": "fp8_e4m3"}, ConfigError, "the checkpoint has none"),
    ({"kv_scales": "token_head", "kv_dtype": "bfloat16"}, ConfigError, "FP8"),
    ({"stop_token_ids": [5000]}, ConfigError, "5000"),
]


@pytest.mark.parametrize(
    ("given", "error", "message"), MISTAKES, ids=[str(m[0])[:40] for m in MISTAKES]
)
def test_a_mistake_is_named_before_anything_runs(params, given, error, message) -> None:
    with pytest.raises(error, match=message) as raised:
        jfp8kv.generate(
            params, given.pop("prompts", ["hello"]) if "prompts" in given else ["hello"], **given
        )
    assert isinstance(raised.value, jfp8kv.Jfp8kvError)


def test_one_bad_prompt_among_many_is_refused_before_any_runs(llm) -> None:
    before = llm.stats.prompt_tokens
    with pytest.raises(ConfigError, match="prompt 2 is empty"):
        llm.generate(["a", "b", "", "c"])
    assert llm.stats.prompt_tokens == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 10**9}, "trained for at most"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"page_size": -4}, "page_size=-4"),
        ({"kv_cache_memory": "lots"}, "512MiB"),
        ({"kv_cache_memory": 10}, "is too small: one page"),
        ({"seed": -1}, "seed=-1"),
        ({"dtype": "float32"}, "already"),
        ({"strict": False}, "strict=False: the given Params are loaded already"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype='bfloat16': an alias of kv_dtype"),
        ({"kv_dtpye": "fp8"}, "Did you mean 'kv_dtype'"),
        ({"attention": "flash"}, "attention='flash'"),
        (
            {"prompt_lookup": -1},
            "prompt_lookup=-1: must be a whole number of at least 0 and at most 32; try 4",
        ),
        ({"kv_scales": jfp8kv.KVScales.unit(99)}, "layers=2"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(params, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        jfp8kv.LLM(params, **{"kv_dtype": "fp8"} | options)


def test_a_broken_scale_is_refused_unless_loading_is_not_strict(tmp_path) -> None:
    folder = write_sidecar(shutil.copytree(FOLDER, tmp_path / "model"), [[0.5, 0.0]])
    with pytest.raises(
        jfp8kv.CheckpointError,
        match="layer 1 is 0.*strict=False .--no-strict on the command line",
    ):
        jfp8kv.LLM(str(folder))
    with pytest.warns(UserWarning, match="layer 1 is 0.*: scale 1 is used instead"):
        llm = jfp8kv.LLM(str(folder), strict=False)
    assert llm.kv_dtype == "fp8_e4m3" and llm.params.kv_scales.k.ravel().tolist() == [0.5, 1]


def test_text_needs_a_tokenizer_and_params_must_be_params(params) -> None:
    bare = jfp8kv.Params(params.tree, params.config)
    with pytest.raises(ConfigError, match="no tokenizer"):
        jfp8kv.generate(bare, "hello")
    with pytest.raises(ConfigError, match="must be a Params, a path or a hub id"):
        jfp8kv.generate(params.tree, "hello")


def test_functions_take_a_path_in_place_of_params(params) -> None:
    options = {"max_tokens": 4, "temperature": 0.0}
    (want,) = jfp8kv.generate(params, "hello", **options)
    assert jfp8kv.generate(FOLDER, "hello", **options)[0].token_ids == want.token_ids
    ids = list(want.prompt_token_ids)
    np.testing.assert_array_equal(jfp8kv.logits(str(FOLDER), ids), jfp8kv.logits(params, ids))
    np.testing.assert_array_equal(jfp8kv.score(FOLDER, "hello"), jfp8kv.score(params, "hello"))


def test_two_threads_are_both_served(llm) -> None:
    from concurrent.futures import ThreadPoolExecutor

    want = llm.generate("hello", max_tokens=8, temperature=0.0)[0].token_ids
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(llm.generate, "hello", max_tokens=8, temperature=0.0) for _ in range(4)]
    assert all(run.result()[0].token_ids == want for run in runs)


def test_threads_run_together_rather_than_one_after_another(llm) -> None:
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    prompts, sampling = (
        ["hello", "you", "abc", "x"],
        {"max_tokens": 64, "temperature": 0.0, "ignore_eos": True},
    )
    want = [llm.generate(prompt, **sampling)[0].token_ids for prompt in prompts]
    before, all_there = llm.stats.decode_steps, Barrier(4)

    def call(prompt: str) -> list[int]:
        all_there.wait(30)
        return llm.generate(prompt, **sampling)[0].token_ids

    def branch() -> list[int]:
        all_there.wait(30)
        with llm.session(prompts[3]) as session:
            return session.generate(**sampling).token_ids

    with ThreadPoolExecutor(4) as pool:
        runs = [*(pool.submit(call, prompt) for prompt in prompts[:3]), pool.submit(branch)]
        assert [run.result(timeout=60) for run in runs] == want
    assert llm.stats.decode_steps - before < 3 * 64, (
        "one after another they would take four times 64"
    )
