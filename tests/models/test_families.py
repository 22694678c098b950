"""Every family against PyTorch: logits through the paged cache and greedy tokens, whole prefill and chunked."""

from pathlib import Path

import numpy as np
import pytest

import jfp8kv
from tests.models.test_decoder import rms

ROOT = Path(__file__).parent.parent / "references"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/reference.npz"))
SIZES = {
    "kv_dtype": "float32",
    "kv_cache_memory": "2MB",
    "max_model_len": 88,
    "max_num_seqs": 2,
}
WHOLE = {"max_num_batched_tokens": 64, "page_size": 16}
# Chunks of 16 over pages of 4: they begin and end within pages, and windows write their rings over.
CHUNKED = {"max_num_batched_tokens": 16, "page_size": 4}
# Where layers or decoding differ from others': greedy tokens too, after a prefill in chunks.
DECODED = (
    "gemma2_caps",
    "gemma3_new",
    "gemma_mqa",
    "gpt2_saved",
    "gpt_oss_saved",
    "granite_tied",
    "llama_gqa",
    "llama_sharded",
    "mistral_window",
    "mixtral_window",
    "olmo2_gqa",
    "phi3_longrope_cross",
    "phi3_partial",
    "phi3_window",
    "qwen2_bias",
    "qwen2_moe_window",
    "qwen3_bias_window",
    "qwen3_moe_mixed",
    "rope_dynamic_cross",
    "rope_longrope_cross",
    "rope_yarn_mscale",
    "smollm3_window",
)
# Of each kind of attention one the other way round: logits in chunks, and greedy tokens after a whole prefill.
BOTH_WAYS = (
    "gemma2_caps",
    "gemma3_new",
    "gpt2_saved",
    "gpt_oss_saved",
    "phi3_longrope_cross",
    "qwen2_moe_window",
    "smollm3_window",
)

pytestmark = [
    pytest.mark.quick_compile,
    pytest.mark.filterwarnings("ignore:.*(dequantized to|only text is supported)"),
]


def engine(folder: Path, sizes: dict) -> jfp8kv.LLM:
    return jfp8kv.LLM(jfp8kv.load(folder, dtype="float32"), **SIZES, **sizes)


def check_logits(folder: Path, llm: jfp8kv.LLM) -> None:
    """float32 against float32: a hundred times closer than the 2e-4 that the greedy margins of the references need."""
    reference = np.load(folder / "reference.npz")
    assert rms(llm.logits(reference["tokens"]), reference["logits"]) <= 1e-5


def check_greedy_tokens(folder: Path, llm: jfp8kv.LLM) -> None:
    reference = np.load(folder / "reference.npz")
    out = llm.generate(
        reference["tokens"].tolist(), max_tokens=24, temperature=0.0, ignore_eos=True
    )
    # transformers keeps keys of the short factors when a longrope Llama outgrows them; here, as with Phi-3, all are made anew.
    switches = llm.params.config.ropes and llm.params.config.ropes[0].kind == "longrope"
    assert out[0].token_ids == reference["greedy_uncached" if switches else "greedy"].tolist()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_are_those_of_pytorch(folder) -> None:
    check_logits(folder, engine(folder, WHOLE))


@pytest.mark.parametrize("name", DECODED)
def test_greedy_tokens_after_a_prefill_in_chunks_are_those_of_pytorch(name) -> None:
    check_greedy_tokens(ROOT / name, engine(ROOT / name, CHUNKED))


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_logits_in_chunks_and_greedy_tokens_after_a_whole_prefill_are_those_of_pytorch(
    name,
) -> None:
    check_logits(ROOT / name, engine(ROOT / name, CHUNKED))
    check_greedy_tokens(ROOT / name, engine(ROOT / name, WHOLE))
