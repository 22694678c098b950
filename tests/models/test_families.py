"""Every family against PyTorch: logits through the paged cache and greedy tokens, whole prefill and chunked."""

from pathlib import Path

import numpy as np
import pytest

import jfp8kv
from tests.models.test_decoder import rms

ROOT = Path(__file__).parent.parent / "references"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/reference.npz"))
SIZES = {"kv_cache_dtype": "float32", "kv_cache_memory": "2MB", "max_model_len": 88, "max_num_seqs": 2}
WHOLE = {"max_num_batched_tokens": 64, "page_size": 16}
# Chunks of 16 over pages of 4: they begin and end within pages, and windows write their rings over.
CHUNKED = {"max_num_batched_tokens": 16, "page_size": 4}


@pytest.mark.filterwarnings("ignore:.*(dequantized to|only text is served)")
@pytest.mark.parametrize("sizes", [WHOLE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_and_greedy_tokens_are_those_of_pytorch(folder, sizes) -> None:
    """float32 against float32: a hundred times closer than the 2e-4 that the greedy margins of the references need."""
    reference = np.load(folder / "reference.npz")
    llm = jfp8kv.LLM(jfp8kv.load(folder, dtype="float32"), **SIZES, **sizes)
    assert rms(llm.logits(reference["tokens"]), reference["logits"]) <= 1e-5
    out = llm.generate(reference["tokens"].tolist(), max_tokens=24, temperature=0.0, ignore_eos=True)
    # transformers keeps keys of the short factors when a longrope Llama outgrows them; here, as with Phi-3, all are made anew.
    switches = llm.params.config.ropes and llm.params.config.ropes[0].kind == "longrope"
    assert out[0].token_ids == reference["greedy_uncached" if switches else "greedy"].tolist()
