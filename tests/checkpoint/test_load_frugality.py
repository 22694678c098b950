"""Peak memory of loading is close to the size of the weights, and torch is not imported."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jfp8kv.checkpoint.safetensors import open_safetensors

MEASURE = """
import re, sys
import jax, jax.numpy as jnp
from jfp8kv.checkpoint import load

def kib(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

jnp.zeros(1).block_until_ready()
before = kib("VmRSS")
params = load(sys.argv[1], dtype=sys.argv[2])
print((kib("VmHWM") - before) * 1024 / params.nbytes, params.nbytes)
"""


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory):
    """About 100 MB of bfloat16 in two shards, most of it in stacked layers."""
    config = tiny.config(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        head_dim=64,
    )
    ones = {
        n: np.ones(t.shape, ml_dtypes.bfloat16)
        for n, t in tiny.tensors(config | {"num_hidden_layers": 1}).items()
    }
    tensors = dict(ones)
    for layer in range(1, 6):
        tensors |= {
            n.replace("layers.0.", f"layers.{layer}."): t
            for n, t in ones.items()
            if "layers.0." in n
        }
    return tiny.folder(tmp_path_factory.mktemp("large"), config, tensors, shards=2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_peaks_below_1_3_times_the_weights(tiny, large, dtype):
    ratio, nbytes = map(float, tiny.run_python(MEASURE, large, dtype).split())
    assert nbytes > 90e6
    assert 0.9 < ratio < 1.3


@pytest.fixture(scope="module")
def large_fp8(large, tmp_path_factory):
    """The same model with its projections in float8, in blocks of 128 x 128."""
    tensors = {}
    for file in sorted(large.glob("*.safetensors")):
        for name, tensor in open_safetensors(file).items():
            quantized = "_proj" in name
            tensors[name] = np.ones(
                tensor.shape, ml_dtypes.float8_e4m3fn if quantized else ml_dtypes.bfloat16
            )
            if quantized:
                tensors[name + "_scale_inv"] = np.ones(
                    [-(-size // 128) for size in tensor.shape], np.float32
                )
    config = json.loads((large / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = tmp_path_factory.mktemp("large_fp8")
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_peaks_below_1_3_times_dequantized_float8_weights(tiny, large_fp8):
    ratio, nbytes = map(float, tiny.run_python(MEASURE, large_fp8, "bfloat16").split())
    assert nbytes > 90e6
    assert 0.9 < ratio < 1.3


FAKE_TORCH = "raise AssertionError('torch was imported')"
TORCH = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import jfp8kv.checkpoint
slow = {"transformers", "huggingface_hub", "gguf", "tokenizers", "orbax", "tensorstore"}
heavy = slow & set(sys.modules)
assert not heavy, heavy
params = jfp8kv.checkpoint.load(sys.argv[2])
params.tokenizer.chat([{"role": "user", "content": "hello"}])
warnings.simplefilter("ignore")
jfp8kv.checkpoint.load(sys.argv[3])
assert "torch" not in sys.modules
"""
BROKEN_TORCH = """
import sys
sys.path.insert(0, sys.argv[1])
import jfp8kv
try:
    jfp8kv.load(sys.argv[2])
except jfp8kv.CheckpointError as error:
    print(error)
"""


def test_torch_is_not_imported_for_gguf_files_and_plain_tokenizers(tiny, tmp_path):
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").write_text(FAKE_TORCH)
    (tmp_path / "site" / "torch-2.9.0.dist-info").mkdir()
    (tmp_path / "site" / "torch-2.9.0.dist-info" / "METADATA").write_text(
        "Name: torch\nVersion: 2.9.0\n"
    )
    config = tiny.config(vocab_size=266)
    tensors = tiny.tensors(config)
    folder = tiny.tokenizer(tiny.folder(tmp_path / "hf", config, tensors))
    tiny.run_python(
        TORCH, tmp_path / "site", folder, tiny.gguf(tmp_path / "a.gguf", config, tensors)
    )
    own_class = tiny.tokenizer(folder, tokenizer_class="GPT2Tokenizer")
    (tmp_path / "site" / "torch" / "__init__.py").write_text("raise ImportError('broken')")
    out = tiny.run_python(BROKEN_TORCH, tmp_path / "site", own_class)
    assert "tokenizer.json: transformers, which reads it, cannot be imported" in out
