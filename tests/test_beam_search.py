"""Beam search finds what a plain loop over logits of whole sequences does, and frees all pages."""

import math

import numpy as np
import pytest

import jfp8kv
from jfp8kv.core.errors import CapacityError, ConfigError
from tests.engines import tiny_llm, used_pages
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

SIZES = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "page_size": 4,
    "max_num_batched_tokens": 64,
    "kv_cache_memory": "1MB",
}
PROMPT = [7, 8, 9, 10, 11, 12]


def engine(family: str = "llama_gqa", **more) -> jfp8kv.LLM:
    return tiny_llm(family, **SIZES | more)


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    return engine()


class Oracle:
    """The same rules with whole sequences instead of sessions, and lists instead of arrays."""

    def __init__(self, llm: jfp8kv.LLM):
        self.llm = llm
        self.known: dict[tuple[int, ...], list[float]] = {}

    def logprobs(self, ids: list[int]) -> list[float]:
        if tuple(ids) not in self.known:
            row = self.llm.logits(ids)[-1].astype(np.float64).tolist()
            total = math.log(sum(map(math.exp, row)))
            self.known[tuple(ids)] = [x - total for x in row]
        return self.known[tuple(ids)]

    def search(
        self, prompt, beams, max_tokens, length_penalty, early_stopping, ends
    ) -> list[tuple[list[int], float]]:
        live: list[tuple[list[int], float]] = [([], 0.0)]
        finished: list[tuple[float, list[int], float]] = []
        for length in range(1, max_tokens + 1):
            every: list[tuple[float, list[int]]] = []
            for ids, total in live:
                every += [
                    (total + x, [*ids, token])
                    for token, x in enumerate(self.logprobs(prompt + ids))
                ]
            every.sort(key=lambda item: -item[0])
            live = [(ids, total) for total, ids in every if ids[-1] not in ends][:beams]
            for total, ids in every[:beams]:
                if ids[-1] in ends or length == max_tokens:
                    finished.append((total / length**length_penalty, ids, total))
            finished = sorted(finished, key=lambda item: -item[0])[:beams]
            if len(finished) == beams:
                longest = max_tokens if early_stopping == "never" and length_penalty > 0 else length
                if (
                    early_stopping is True
                    or live[0][1] / longest**length_penalty <= finished[-1][0]
                ):
                    break
        return [(ids, total) for _, ids, total in finished]


@pytest.fixture(scope="module")
def oracle(llm) -> Oracle:
    return Oracle(llm)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 3.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("beams", "max_tokens"), [(1, 7), (2, 9), (3, 5), (6, 4)])
def test_the_result_is_that_of_a_plain_search_over_whole_sequences(
    llm, oracle, beams, max_tokens, early_stopping, length_penalty
) -> None:
    greedy = llm.generate([PROMPT], max_tokens=8, temperature=0.0, ignore_eos=True)[0].token_ids
    ends = [greedy[2], greedy[5], 3]
    options = {
        "max_tokens": max_tokens,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
    }
    (out,) = jfp8kv.beam_search(
        llm, PROMPT, beams=beams, stop_token_ids=ends, ignore_eos=True, **options
    )
    want = oracle.search(PROMPT, beams=beams, ends=ends, **options)
    assert [each.token_ids for each in out.outputs] == [ids for ids, _ in want]
    np.testing.assert_allclose(
        [each.cumulative_logprob for each in out.outputs], [total for _, total in want], atol=1e-4
    )
    for each in out.outputs:
        ended = each.token_ids[-1] in ends
        assert (each.finish_reason, each.stop_reason) == (
            ("stop", each.token_ids[-1]) if ended else ("length", None)
        )
    assert used_pages(llm) == 0


def test_sliding_windows_do_not_change_the_result() -> None:
    llm = engine("gemma3_new", kv_dtype="fp8_e5m2")
    prompt = np.random.default_rng(0).integers(3, 90, 22).tolist()
    options = {"beams": 3, "max_tokens": 9, "length_penalty": 1.0, "early_stopping": False}
    (out,) = jfp8kv.beam_search(llm, prompt, ignore_eos=True, **options)
    want = Oracle(llm).search(prompt, ends=[], **options)
    assert [each.token_ids for each in out.outputs] == [ids for ids, _ in want] and used_pages(
        llm
    ) == 0


@pytest.mark.parametrize("length", [1, 6, 8])
def test_one_beam_is_greedy_decoding(llm, length) -> None:
    prompts = [PROMPT[:length], (PROMPT * 2)[:length][::-1]]
    greedy = llm.generate(prompts, max_tokens=10, temperature=0.0, stop_token_ids=[5])
    for out, want in zip(
        jfp8kv.beam_search(llm, prompts, beams=1, max_tokens=10, stop_token_ids=[5]),
        greedy,
        strict=True,
    ):
        assert out.token_ids == want.token_ids and out.prompt_token_ids == want.prompt_token_ids
        assert out.outputs[0].finish_reason == want.outputs[0].finish_reason


def test_more_beams_find_more_likely_sequences_and_share_pages(llm, monkeypatch) -> None:
    used, extend_batch = [], jfp8kv.beam_search.__globals__["extend_batch"]

    def watched(sessions, tokens):
        out = extend_batch(sessions, tokens)
        used.append(used_pages(llm))
        return out

    monkeypatch.setitem(jfp8kv.beam_search.__globals__, "extend_batch", watched)
    (out,) = jfp8kv.beam_search(
        llm, PROMPT * 4, beams=4, max_tokens=8, length_penalty=0.0, ignore_eos=True
    )
    (one,) = jfp8kv.beam_search(
        llm, PROMPT * 4, beams=1, max_tokens=8, length_penalty=0.0, ignore_eos=True
    )
    assert out.outputs[0].cumulative_logprob >= one.outputs[0].cumulative_logprob
    assert [each.index for each in out.outputs] == [0, 1, 2, 3]
    assert max(used) <= 6 + 4 * 2, "six shared pages of the prompt, and two more of each beam"


def test_the_end_token_is_not_part_of_the_text() -> None:
    llm = jfp8kv.LLM(jfp8kv.load(REFERENCES[0], dtype="float32"), **SIZES)
    (greedy,) = llm.generate("abc", max_tokens=6, temperature=0.0, ignore_eos=True)
    ends = [greedy.token_ids[-1]]
    want = llm.generate("abc", max_tokens=6, temperature=0.0, ignore_eos=True, stop_token_ids=ends)[
        0
    ]
    (out,) = jfp8kv.beam_search(
        llm, "abc", beams=1, max_tokens=6, ignore_eos=True, stop_token_ids=ends
    )
    assert (out.prompt, out.text, out.token_ids) == ("abc", want.text, want.token_ids)


def test_the_context_length_limits_the_output(llm) -> None:
    (out,) = jfp8kv.beam_search(llm, [5] * 60, beams=2, max_tokens=20, ignore_eos=True)
    assert [len(each.token_ids) for each in out.outputs] == [4, 4]
    with pytest.raises(CapacityError, match="max_model_len=64 leaves no room"):
        jfp8kv.beam_search(llm, [5] * 64)


def test_a_search_that_fails_frees_all_its_pages(monkeypatch) -> None:
    llm = engine()
    tight = engine(kv_cache_memory=17 * llm.engine.cache_config.page_bytes)
    with pytest.raises(CapacityError, match="beams=12 for prompt 0: .* Or try fewer beams"):
        jfp8kv.beam_search(tight, [5] * 20, beams=12, max_tokens=20, ignore_eos=True)
    assert used_pages(tight) == 0
    call, calls = llm.engine.programs.call, []

    def failing(step, *args, **kwargs):
        calls.append(step.__name__)
        if calls.count("last_logits") == 3:
            raise RuntimeError("the device is gone")
        return call(step, *args, **kwargs)

    monkeypatch.setattr(llm.engine.programs, "call", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        jfp8kv.beam_search(llm, PROMPT, beams=3, ignore_eos=True)
    assert used_pages(llm) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beams": 0}, "beams=0"),
        ({"beams": True}, "beams=True"),
        ({"length_penalty": float("nan")}, "must be finite"),
        ({"length_penalty": "1"}, "must be a number"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [10_000]}, "stop_token_ids: id 10000 is outside"),
    ],
)
def test_an_invalid_option_is_refused_before_anything_runs(llm, wrong, message) -> None:
    with pytest.raises(ConfigError, match=message):
        jfp8kv.beam_search(llm, PROMPT, **wrong)


def test_a_model_without_an_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"llm of type str: must be an LLM; try .*LLM\(model\)"):
        jfp8kv.beam_search("path", PROMPT)
