"""`compare` on tiny models: its metrics match NumPy on the logits of engines with these caches."""

import json
import math
from functools import cache

import numpy as np
import pytest
from matplotlib import pyplot as plt

import jfp8kv
from jfp8kv import ConfigError
from jfp8kv.cache.config import resolve_cache
from jfp8kv.engine import buckets
from jfp8kv.quality import compare as comparison
from jfp8kv.quality.needle import CUE_TOKENS, NEEDLE_TOKENS, create_needles
from tests.cache.test_default_scales import with_bias
from tests.quality.test_calibrate import load, prompts

pytestmark = pytest.mark.quick_compile

NAME = "qwen2_bias"
LONGEST, WINDOW, DEPTHS = 64, 40, (0.0, 1.0)
MIX = {"default": "fp8_e4m3", "skip": [0]}


def texts() -> list[list[int]]:
    """Return texts whose windows have 40, 40, 33 and 1 tokens; the last predicts nothing."""
    return prompts(NAME, 80, 33, 1)


def windows() -> list[list[int]]:
    whole, other, _ = texts()
    return [whole[:WINDOW], whole[WINDOW:], other]


def calibration() -> list[list[int]]:
    return [text[::-1] for text in prompts(NAME, 40, 30)]


@cache
def mixed_plan() -> jfp8kv.KVPlan:
    """Return a plan with a K offset in one layer and dynamic scales in the other."""
    scales = jfp8kv.calibrate(
        load(NAME), calibration(), granularity="channel", k_offset=True, max_model_len=LONGEST
    )
    layers = (
        jfp8kv.LayerPlan("fp8_e4m3", "channel", k_offset=True),
        jfp8kv.LayerPlan("fp8_e4m3", "token_head", k_offset=True),
    )
    return jfp8kv.KVPlan(layers, jfp8kv.KVScales(scales.k, scales.v, scales.k_offset), 0.0)


@pytest.fixture(scope="module")
def report() -> jfp8kv.QualityReport:
    return jfp8kv.compare(
        load(NAME),
        texts(),
        kv_dtypes={"half": "bfloat16", "e4m3": "fp8_e4m3", "mix": MIX, "planned": mixed_plan()},
        kv_scales=["unit", "head"],
        calibration=calibration(),
        window=WINDOW,
        needle_lengths=[LONGEST],
        needle_depths=DEPTHS,
        max_model_len=LONGEST,
        progress=False,
    )


CACHES = {
    "float32": lambda: ("float32", "unit"),
    "e4m3 head": lambda: ("fp8_e4m3", jfp8kv.calibrate(load(NAME), calibration(), window=WINDOW)),
    "mix unit": lambda: (MIX, "unit"),
    "planned": lambda: (mixed_plan(), "auto"),
}


@cache
def engine(label: str) -> jfp8kv.LLM:
    kv_dtype, kv_scales = CACHES[label]()
    settings = {"max_model_len": LONGEST, "max_num_seqs": 1, "max_num_batched_tokens": LONGEST}
    return jfp8kv.LLM(load(NAME), kv_dtype=kv_dtype, kv_scales=kv_scales, **settings)


@cache
def log_probabilities(label: str) -> list[np.ndarray]:
    logits = [engine(label).logits(ids).astype(np.float64) for ids in windows()]
    return [
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
        for x in logits
    ]


def ratio_and_error(sums: list[float], counts: list[int]) -> tuple[float, float]:
    """Return a mean per token over sequences, and its standard error, by loops."""
    mean, m = sum(sums) / sum(counts), len(sums)
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, math.sqrt(squares * m / (m - 1)) / sum(counts)


@pytest.mark.parametrize("label", CACHES)
def test_metrics_match_numpy_on_the_logits_of_an_engine(report, label):
    """Another program sums in another order: 1e-6 of a logit, and sometimes an FP8 value: 1%."""
    found, counts = report[label], [len(ids) - 1 for ids in windows()]
    each = list(zip(log_probabilities("float32"), log_probabilities(label), windows(), strict=True))
    nll = [-sum(q[i, ids[i + 1]] for i in range(len(ids) - 1)) for _, q, ids in each]
    base = [-sum(p[i, ids[i + 1]] for i in range(len(ids) - 1)) for p, _, ids in each]
    kl = [np.sum((np.exp(p) * (p - q))[:-1]) for p, q, _ in each]
    agreed = [np.sum((p.argmax(-1) == q.argmax(-1))[:-1]) for p, q, _ in each]
    largest = max(np.max((np.exp(p) * (p - q)).sum(-1)[:-1]) for p, q, _ in each)
    change, change_error = ratio_and_error([a - b for a, b in zip(nll, base, strict=True)], counts)
    mean, error = ratio_and_error(kl, counts)
    near = {"rel": 0.01, "abs": 1e-6}
    assert found.nll == pytest.approx(sum(nll) / sum(counts), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / sum(counts)), rel=1e-3)
    assert found.nll_change == pytest.approx(change, rel=0.01, abs=1e-4)
    assert found.nll_change_stderr == pytest.approx(change_error, rel=0.02, abs=1e-4)
    assert found.kl == pytest.approx(mean, **near) and found.kl_stderr == pytest.approx(
        error, rel=0.02, abs=1e-6
    )
    assert found.kl_largest == pytest.approx(largest, **near)
    assert found.top1_agreement == pytest.approx(sum(agreed) / sum(counts), abs=1.5 / sum(counts))
    if label == "float32":
        assert (found.kl, found.kl_largest, found.nll_change, found.top1_agreement) == (0, 0, 0, 1)
    else:
        assert mean > 1e-3, "otherwise this test shows nothing"


@pytest.mark.parametrize("label", CACHES)
def test_bytes_per_token_match_an_engine(report, label):
    settings = {"max_model_len": LONGEST, "kv_cache_memory": "1MB"}
    kv_dtype, kv_scales = CACHES[label]()
    stats = jfp8kv.LLM(load(NAME), kv_dtype=kv_dtype, kv_scales=kv_scales, **settings).stats
    assert report[label].bytes_per_token == stats.kv_bytes_per_token


@pytest.mark.parametrize("label", ["float32", "planned"])
def test_recall_is_the_share_of_most_likely_tokens_after_the_cue(report, label):
    ids = np.concatenate([np.asarray(text, np.int32) for text in texts()])
    for depth, needle in enumerate(create_needles(ids, (LONGEST,), DEPTHS)):
        most_likely = engine(label).logits(needle.ids).argmax(-1)
        options = range(LONGEST - NEEDLE_TOKENS + CUE_TOKENS, LONGEST)
        expected = np.mean([most_likely[i - 1] == needle.ids[i] for i in options])
        assert report[label].needle_recall[0][depth] == expected


def test_the_report_has_every_cache_and_its_formats_by_layer(report):
    expected = [
        "float32",
        "half",
        *(f"{name} {scales}" for name in ("e4m3", "mix") for scales in ("unit", "head")),
        "planned",
    ]
    assert [cache.label for cache in report.caches] == expected
    assert (report.tokens, report.sequences, report.window) == (113, 3, WINDOW)
    assert report["mix head"].layers == ("bfloat16", "fp8_e4m3")
    assert report["planned"].layers == ("fp8_e4m3", "fp8_e4m3 with token_head scales")
    with pytest.raises(KeyError, match="'mix unit'"):
        report["mixed"]


def test_reconstruction_error_follows_from_the_formats(report):
    base, half, mix = report["float32"], report["half"], report["mix unit"]
    assert (
        base.k.snr_db == (math.inf, math.inf)
        and base.k.mean_snr_db == math.inf
        and base.v.flushed_share == 0
    )
    assert all(50 < each < 60 for each in half.k.snr_db), "a mantissa of 8 bits: about 56 dB"
    assert mix.k.snr_db[0] == half.k.snr_db[0] and mix.v.snr_db[1] == pytest.approx(31.5, abs=1), (
        "a mantissa of 4 bits: about 31.5 dB"
    )
    assert mix.k.worst_layer == 1
    assert report["planned"].k.snr_db[0] > report["e4m3 head"].k.snr_db[0] + 10, (
        "an offset removes the bias"
    )
    assert report["e4m3 head"].k.clipped_share > 0 == report["e4m3 unit"].k.clipped_share
    assert np.shape(mix.k.snr_db_by_head) == (2, load(NAME).config.kv_heads)


def test_limits_are_given_for_static_scales_without_offsets(report):
    assert report["e4m3 unit"].k.limits == ((2.0**-9, 448.0),) * 2
    assert report["planned"].k.limits == (None, None)
    lowest, largest = report["planned"].v.limits[0]
    assert (
        largest == pytest.approx(448 * np.median(mixed_plan().scales.v[0]))
        and report["planned"].v.limits[1] is None
    )
    assert lowest == pytest.approx(largest / 448 / 512)


def test_magnitudes_count_every_value_that_was_cached(report):
    c = load(NAME).config
    for kind in (report.magnitudes.k, report.magnitudes.v):
        assert [sum(layer) for layer in kind] == [
            report.tokens * c.kv_heads * c.head_dim
        ] * c.layers


def test_the_report_is_json(report):
    saved = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [cache["label"] for cache in saved["caches"]] == [cache.label for cache in report.caches]
    assert saved["caches"][0]["k"]["snr_db"] == [None, None], "JSON has no infinity"
    assert saved["caches"][3]["kl"] == report.caches[3].kl
    assert saved["caches"][3]["v"]["clipped_share"] == report.caches[3].v.clipped_share > 0, (
        "properties are included"
    )


def test_tables_have_a_row_for_every_cache_and_every_layer(report):
    text, lines = str(report), str(report).splitlines()
    for choice in report.caches:
        assert sum(line.startswith(f"{choice.label}  ") for line in lines) == (
            2 if choice.label == "float32" else 3
        )
        assert f"{choice.bytes_per_token:,.0f}" in text and f"{choice.perplexity:.3f}" in text
    (row,) = (line for line in lines if line.startswith("mix unit ") and "±" in line)
    assert f"{report['mix unit'].top1_agreement:.2%}" in row
    assert f"{math.expm1(report['mix unit'].nll_change):+.2%} ± " in row
    layers = report.by_layer()
    assert (
        layers.count("fp8_e4m3 with token_head scales") == 1
        and layers.count("K SNR dB") == len(report.caches) - 1
    )
    assert repr(report).startswith("QualityReport(float32, half, ")


def test_a_notebook_gets_html_tables(report):
    page = report._repr_html_()
    assert page.count("<table>") == 3 and "±" in page
    assert page.count("<td") == sum(
        len(report.caches[skip:]) * columns for skip, columns in ((0, 7), (1, 7), (0, 3))
    )
    named = jfp8kv.QualityReport(**{**vars(report), "caches": (report.caches[0],)})
    assert "float32" in named._repr_html_()


def test_the_figure_labels_its_axes_and_all_caches(report, tmp_path):
    figure = report.plot()
    titles = [panel.get_title() for panel in figure.axes]
    assert [title.split(":")[0] for title in titles] == [
        "Keys",
        "Keys",
        "Quality against size",
        "Values",
        "Values",
        "Needle in a haystack",
    ]
    assert all(panel.get_xlabel() for panel in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        cache.label for cache in report.caches[1:]
    ]
    assert not plt.get_fignums(), "a notebook shows an open figure twice"
    figure.savefig(tmp_path / "report.png", dpi=40)
    assert (tmp_path / "report.png").stat().st_size > 10_000


def compare(name: str = NAME, given=None, **options) -> jfp8kv.QualityReport:
    usual = {
        "kv_dtypes": "fp8_e4m3",
        "kv_scales": "unit",
        "max_model_len": LONGEST,
        "progress": False,
        "needle_lengths": (),
    }
    return jfp8kv.compare(
        load(name), prompts(name, LONGEST) if given is None else given, **(usual | options)
    )


def test_a_single_sequence_has_no_stderr_and_no_needles_have_no_table():
    found = compare()
    assert found["fp8_e4m3 unit"].kl_stderr is None and found["fp8_e4m3 unit"].mean_recall is None
    assert "needle" not in str(found) and "±" not in str(found)
    assert found.needle_depths == () and len(found.plot().axes) == 6


def test_sliding_windows_and_chunks_change_only_the_bytes(monkeypatch):
    """A model with sliding windows of 8 tokens, in reused pools, in chunks of 16 tokens."""
    name = "gemma3_new"
    params, ids = load(name), prompts(name, 60, 50)
    monkeypatch.setattr(buckets, "MAX_LOGITS_BYTES", 4 * params.config.vocab * 16)
    found = compare(name, ids, max_model_len=256)["fp8_e4m3 unit"]
    settings = {
        "kv_dtype": "fp8_e4m3",
        "kv_scales": "unit",
        "max_model_len": 256,
        "max_num_seqs": 1,
    }
    llm = jfp8kv.LLM(params, **settings)
    scores = np.concatenate([llm.score(text) for text in ids])
    assert found.nll == pytest.approx(-scores.astype(np.float64).mean(), rel=1e-4)
    assert found.bytes_per_token == llm.stats.kv_bytes_per_token
    assert max(params.config.windows) < 50, "otherwise no window slides"


def test_scales_that_depend_on_max_model_len_match_an_engine():
    """RoPE rotates the bias: over the 16 tokens of the text it is constant, over 64 it is not, and
    its layer stays bfloat16."""
    params = with_bias(40.0, pair=1)
    sizes = {"max_model_len": 64, "progress": False, "needle_lengths": ()}
    with pytest.warns(UserWarning, match="Keys of layers 1 have a K bias"):
        found = jfp8kv.compare(
            params, [[5, 6, 7, 8] * 4], kv_dtypes=["fp8_e4m3"], kv_scales="auto", **sizes
        )
        kv = resolve_cache(
            params, "fp8_e4m3", "auto", page_size=64, max_tokens_per_dispatch=64, max_model_len=64
        )
    assert found["fp8_e4m3 auto"].layers == tuple(map(str, kv.specs)) == ("fp8_e4m3", "bfloat16")
    assert found["fp8_e4m3 auto"].bytes_per_token == kv.bytes_per_token(64)


MISTAKES = {
    "no texts": ({"given": []}, ConfigError, "texts is empty"),
    "an empty text": ({"given": [[1, 2], []]}, ConfigError, "text 1 is empty"),
    "texts of another type": ({"given": 3}, ConfigError, "texts of type int"),
    "a token outside the vocabulary": (
        {"given": [[1, 10**6]]},
        ConfigError,
        "text 0 has the token id 1000000",
    ),
    "texts of one token": ({"given": [[1], [2]]}, ConfigError, "no two consecutive tokens"),
    "a text without a tokenizer": ({"given": ["once"]}, ConfigError, "text 0"),
    "an empty window": ({"window": 0}, ConfigError, "window=0"),
    "a window beyond the model": ({"window": 10**6, "max_model_len": None}, ConfigError, "1000000"),
    "a context beyond the model": ({"max_model_len": 10**6}, ConfigError, "max_model_len=1000000"),
    "a needle beyond the model": (
        {"needle_lengths": [65]},
        ConfigError,
        "at most 64, the context",
    ),
    "a depth beyond the end": ({"needle_depths": [2]}, ConfigError, "needle_depths"),
    "an unknown format": ({"kv_dtypes": ["fp9"]}, ConfigError, "fp9"),
    "calibrated scales without prompts": (
        {"kv_scales": "head"},
        ConfigError,
        "fp8_e4m3 head: these scales are calibrated",
    ),
    "unused calibration prompts": ({"calibration": [[1, 2]]}, ConfigError, "no cache uses it"),
    "an empty calibration prompt": (
        {"kv_scales": "head", "calibration": [[]]},
        ConfigError,
        "calibration prompt 0 is empty",
    ),
    "no calibration prompts": (
        {"kv_scales": "head", "calibration": iter([])},
        ConfigError,
        "calibration is empty",
    ),
    "calibration of another type": (
        {"kv_scales": "head", "calibration": 5},
        ConfigError,
        "calibration of type int",
    ),
    "an unknown keyword": ({"kv_scale": "unit"}, ConfigError, "Did you mean 'kv_scales'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_arguments_are_refused_before_anything_runs(mistake, monkeypatch):
    monkeypatch.setattr(
        comparison, "_create_runs", lambda *_, **__: pytest.fail("an engine was created")
    )
    options, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        compare(**options)


def test_a_model_of_another_type_is_refused():
    with pytest.raises(ConfigError, match="must be a Params"):
        jfp8kv.compare({}, [[1, 2]])
