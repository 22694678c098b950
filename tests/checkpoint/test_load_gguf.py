"""A GGUF file loads to the same weights as its Hugging Face folder; a damaged one is refused."""

import gguf
import jax
import numpy as np
import pytest

from jfp8kv.checkpoint import load
from jfp8kv.checkpoint.gguf import read_header
from jfp8kv.checkpoint.tensors import BFLOAT16
from jfp8kv.core.errors import CheckpointError
from jfp8kv.models.params import Params

pytestmark = pytest.mark.filterwarnings("ignore:.*its tokenizer")  # test_tokenizers.py tests them


def same(left: Params, right: Params) -> bool:
    return jax.tree.all(
        jax.tree.map(
            lambda a, b: a.dtype == b.dtype and bool((a == b).all()), left.tree, right.tree
        )
    )


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_weights_equal_the_folder_with_rope_rows_unpermuted(tiny, tmp_path, tied):
    config = tiny.config(tie_word_embeddings=tied, attention_bias=True)
    tensors = tiny.tensors(config)
    from_gguf = load(tiny.gguf(tmp_path / "a.gguf", config, tensors))
    from_hf = load(tiny.folder(tmp_path / "hf", config, tensors))
    assert same(from_gguf, from_hf)
    assert ("head" in from_gguf.tree) is not tied
    for field in (
        "vocab",
        "layers",
        "q_heads",
        "kv_heads",
        "head_dim",
        "mlp_hidden",
        "max_len",
        "ropes",
        "tied_embeddings",
    ):
        assert getattr(from_gguf.config, field) == getattr(from_hf.config, field)


FAMILIES = ["llama", "qwen2", "qwen3", "gemma3"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_equals_its_folder(tiny, tmp_path, family, tied):
    config = tiny.family(family, tie_word_embeddings=tied, torch_dtype="bfloat16")
    tensors = tiny.tensors(config, BFLOAT16)
    from_gguf = load(tiny.gguf(tmp_path / "a.gguf", config, tensors))
    from_hf = load(tiny.folder(tmp_path / "hf", config, tensors))
    assert from_gguf.config == from_hf.config
    assert same(from_gguf, from_hf)
    assert ("head" in from_gguf.tree) is not tied


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"num_key_value_heads": 4, "mlp_bias": True}),
        ("qwen2", {"rope_scaling": YARN, "rms_norm_eps": 1e-6}),
        (
            "qwen3",
            {"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0}},
        ),
        ("qwen3", {"attention_bias": True}),
        (
            "gemma3",
            {
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "final_logit_softcapping": 30.0,
            },
        ),
        (
            "gemma3",
            {"num_hidden_layers": 62, "query_pre_attn_scalar": 8},
        ),  # the number of layers of Gemma 3 27B, whose scale is hidden / heads
    ],
)
def test_each_variant_of_a_family_equals_its_folder(tiny, tmp_path, family, changes):
    config = tiny.family(family, torch_dtype="bfloat16", **changes)
    tensors = tiny.tensors(config, BFLOAT16)
    from_gguf = load(tiny.gguf(tmp_path / "a.gguf", config, tensors))
    from_hf = load(tiny.folder(tmp_path / "hf", config, tensors))
    assert from_gguf.config == from_hf.config
    assert same(from_gguf, from_hf)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_weights_of_each_family_are_within_half_a_step(tiny, tmp_path, family):
    config = tiny.family(family)
    tensors = tiny.tensors(config)
    path = tiny.gguf(tmp_path / "a.gguf", config, tensors, quantize=gguf.GGMLQuantizationType.Q8_0)
    from_gguf, from_hf = (
        load(path, dtype="float32"),
        load(tiny.folder(tmp_path / "hf", config, tensors)),
    )
    # A code is off by half a step, and a step is 1/127 of the block's largest value. The step is
    # off by half a float16 ulp, times at most 127 steps. Together (1/254 + 2**-11) of the block's
    # largest value. Norms are float32; 1 + w - 1 rounds twice.
    for ours, exact in zip(
        jax.tree.leaves(from_gguf.tree), jax.tree.leaves(from_hf.tree), strict=True
    ):
        np.testing.assert_allclose(
            ours, exact, rtol=0, atol=(1 / 254 + 2**-11) * np.abs(exact).max()
        )


def test_the_vocabulary_size_is_that_of_the_embeddings(tiny, tmp_path):
    config = tiny.family("gemma3")
    tensors = tiny.tensors(config)

    def more(writer):
        writer.add_tokenizer_model("none")
        writer.add_token_list([f"[PAD{i}]" for i in range(64)])

    assert load(tiny.gguf(tmp_path / "a.gguf", config, tensors, more=more)).config.vocab == 40
    llama = tiny.family("llama")
    path = tiny.gguf(tmp_path / "b.gguf", llama | {"vocab_size": 48}, tiny.tensors(llama))
    assert load(path).config.vocab == 40


def test_half_precision_files_keep_their_dtype(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    halves = {name: t.astype(np.float16) if t.ndim == 2 else t for name, t in tensors.items()}
    params = load(tiny.gguf(tmp_path / "f16.gguf", config, halves))
    assert params.config.dtype == "float16"
    np.testing.assert_array_equal(params.tree["head"]["weight"], halves["lm_head.weight"])
    params = load(
        tiny.gguf(tmp_path / "bf16.gguf", config, tensors, quantize=gguf.GGMLQuantizationType.BF16)
    )
    assert params.config.dtype == "bfloat16"
    np.testing.assert_array_equal(
        params.tree["head"]["weight"], tensors["lm_head.weight"].astype(params.dtype)
    )


def q8_0(row: np.ndarray) -> np.ndarray:
    """Quantize and dequantize a row by Q8_0: blocks of 32, float16 scale amax / 127, int8 codes."""
    blocks = row.reshape(-1, 32)
    exact = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks / exact)
    return (codes * exact.astype(np.float16).astype(np.float32)).reshape(row.shape)


def test_quantized_weights_are_dequantized_to_bfloat16_or_the_given_dtype(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    path = tiny.gguf(tmp_path / "q8.gguf", config, tensors, quantize=gguf.GGMLQuantizationType.Q8_0)
    fine, usual = load(path, dtype="float32"), load(path)
    assert usual.config.dtype == "bfloat16" and usual.dtype == "bfloat16"
    expected = np.stack(
        [
            [q8_0(row) for row in tensors[f"model.layers.{i}.self_attn.k_proj.weight"]]
            for i in range(2)
        ]
    )
    # A code may differ by one where the float32 quotient is within rounding of a tie.
    np.testing.assert_allclose(
        fine.tree["layers"]["k"]["weight"], expected, atol=np.abs(expected).max() / 127 * 1.01
    )
    assert np.mean(np.asarray(fine.tree["layers"]["k"]["weight"]) == expected) > 0.99
    assert same(usual, jax.tree.map(lambda x: x.astype("bfloat16"), fine))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_small_blocks_are_dequantized_as_by_the_gguf_library(tiny, tmp_path, kind):
    config, kind = tiny.config(), gguf.GGMLQuantizationType[kind]
    tensors = tiny.tensors(config)
    params = load(tiny.gguf(tmp_path / "q.gguf", config, tensors, quantize=kind), dtype="float32")
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(
        params.tree["layers"]["up"]["weight"][1],
        gguf.quants.dequantize(gguf.quants.quantize(up, kind), kind),
    )


def test_rope_divisors_become_llama3_scaling(tiny, tmp_path):
    config = tiny.config(head_dim=32)
    divisors = np.concatenate([np.ones(8), np.full(8, 8.0)]).astype(np.float32)
    wavelengths = 2 * np.pi * 1e6 ** (np.arange(16) / 16)
    between = (wavelengths > 2048) & (wavelengths < 8192)
    divisors[wavelengths < 2048], divisors[wavelengths > 8192] = 1.0, 8.0
    smooth = (8192 / wavelengths[between] - 1) / 3
    divisors[between] = 1 / ((1 - smooth) / 8 + smooth)
    tensors = tiny.tensors(config)
    path = tiny.gguf(
        tmp_path / "rope.gguf",
        config | {"rope_theta": 1e6},
        tensors,
        more=lambda writer: writer.add_tensor("rope_freqs.weight", divisors),
    )
    rope = load(path).config.ropes[0]
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_len) == ("llama3", 1e6, 8.0, 8192)


def test_the_header_equals_what_the_gguf_library_reads(tiny, tmp_path):
    config = tiny.config()

    def more(writer):
        writer.add_array("test.strings", ["a", "", "日本"])
        writer.add_array("test.numbers", [1, -2, 3])
        writer.add_array("test.flags", [True, False])
        writer.add_float64("test.float64", 0.1)
        writer.add_bool("test.bool", True)
        writer.add_int8("test.int8", -3)
        writer.add_uint64("test.uint64", 1 << 40)

    path = tiny.gguf(tmp_path / "a.gguf", config, tiny.tensors(config), more=more)
    fields, tensors = read_header(path)
    theirs = gguf.GGUFReader(path)
    assert fields == {
        k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")
    }
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        t.name: [int(n) for n in t.shape[::-1]] for t in theirs.tensors
    }
    for tensor in theirs.tensors:
        out = np.empty(tensors[tensor.name].shape, np.float32)
        tensors[tensor.name].read_into(out)
        np.testing.assert_array_equal(out, tensor.data)


def refused(path: object, *named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert all(part in str(error.value) for part in named), error.value


@pytest.fixture
def path(tiny, tmp_path):
    config = tiny.config()
    return tiny.gguf(tmp_path / "model.gguf", config, tiny.tensors(config))


@pytest.mark.parametrize("length", [2, 10, 200, 1500, 5000, -1])
def test_a_file_truncated_anywhere_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    refused(path, "model.gguf", "truncated")


def test_a_file_that_is_not_gguf_is_refused(path):
    path.write_bytes(b"GGML" + path.read_bytes()[4:])
    refused(path, "model.gguf", "not a GGUF file")


def test_an_unsupported_version_is_refused(path):
    path.write_bytes(b"GGUF" + (7).to_bytes(4, "little") + path.read_bytes()[8:])
    refused(path, "version 7", "must be 2 or 3")


def test_a_damaged_count_does_not_exhaust_memory(path):
    raw = path.read_bytes()
    path.write_bytes(raw[:24] + (1 << 60).to_bytes(8, "little") + raw[32:])
    refused(path, "damaged")


def test_one_part_of_a_split_file_is_refused(tiny, tmp_path):
    config = tiny.config()
    more = lambda writer: writer.add_uint16("split.count", 3)  # noqa: E731
    refused(
        tiny.gguf(tmp_path / "a.gguf", config, tiny.tensors(config), more=more),
        "one of 3 parts",
        "merge",
    )


def test_a_merged_file_with_a_split_count_of_0_loads(tiny, tmp_path):
    config = tiny.config()
    more = lambda writer: writer.add_uint16("split.count", 0)  # noqa: E731
    assert load(tiny.gguf(tmp_path / "a.gguf", config, tiny.tensors(config), more=more)).size > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.alignment", 0),
        ("general.alignment", "32"),
        ("split.count", "3"),
        ("split.count", -1),
    ],
)
def test_a_malformed_field_of_the_format_is_refused(tiny, tmp_path, key, value):
    config = tiny.config()

    def more(writer):
        writer.add_string(key, value) if isinstance(value, str) else writer.add_int32(key, value)

    refused(
        tiny.gguf(tmp_path / "a.gguf", config, tiny.tensors(config), more=more),
        "a.gguf",
        f"{key}={value!r}",
    )


def test_missing_unexpected_and_misshapen_tensors_are_refused(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    refused(
        tiny.gguf(
            tmp_path / "a.gguf", config, tensors, skip=("model.layers.1.mlp.up_proj.weight",)
        ),
        "a.gguf",
        "missing: blk.1.ffn_up.weight [64, 32]",
    )
    more = lambda writer: writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32))  # noqa: E731
    refused(tiny.gguf(tmp_path / "b.gguf", config, tensors, more=more), "blk.0.attn_q_norm.weight")
    tensors["model.norm.weight"] = np.ones(64, np.float32)
    refused(tiny.gguf(tmp_path / "c.gguf", config, tensors), "output_norm.weight", "[64]", "[32]")


def test_an_integer_tensor_is_refused(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    tensors["model.norm.weight"] = np.ones(32, np.int32)
    refused(tiny.gguf(tmp_path / "a.gguf", config, tensors), "output_norm.weight", "I32")
