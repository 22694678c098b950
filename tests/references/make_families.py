"""Write tiny random checkpoints of every decoder family and their outputs in PyTorch.

Run by hand, like `make_references.py`, whose pieces this uses; `cases/` says what is in each folder
and FAMILIES.md what the families compute. `reference.npz` holds what transformers computes, in
float32, after loading the folder from disk:

    seed                 the seed the weights and the prompt were drawn with
    tokens               int32 [61], the prompt
    logits               float32 [61, vocab]
    greedy               int32 [24], the ids that `generate` appends, with its cache

and where keys and values were also rounded to FP8, as in `make_references.py`: `last_logits_*`,
`greedy_*`. Where recomputing the whole sequence at each step can give something else than the cache
does, because RoPE depends on the length:

    step_logits          float32 [24, vocab], what `generate` chose `greedy` from
    greedy_uncached      int32 [24], what recomputing everything at each step chooses

Seeds are tried in order until every choice has a margin, the ids vary, and no router's choice of
experts is a near tie.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from cases import dense, gemma, moe, mxfp4, rope
from cases.case import Family
from make_references import (
    GREEDY_TOKENS,
    LAST_ROWS,
    MIN_MARGIN,
    PROMPT_TOKENS,
    SPECIAL_IDS,
    new_cache,
    run,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

CASES = [*dense.CASES, *gemma.CASES, *rope.CASES, *moe.CASES]
MIN_ROUTER_GAP = (
    1e-3  # between the last expert that is chosen and the first that is not, in the router's logits
)
EXACT = {"attn_implementation": "eager", "experts_implementation": "eager"}

# Left over when a folder is loaded: buffers of GPT-2's first files.
IGNORED = ("attn.bias", "attn.masked_bias")


# --- the folder ----------------------------------------------------------------------------------


def random_tensor(
    case: Family, name: str, shape: torch.Size, rng: np.random.Generator
) -> torch.Tensor:
    """Draw weights as `make_references.py` does; Gemma stores norms minus one."""
    normal = rng.standard_normal(tuple(shape))
    transposed = (
        "c_attn" in name
        or "c_proj" in name
        or "c_fc" in name
        or name.endswith(("gate_up_proj", "experts.down_proj"))
    )
    width = (
        shape[-2]
        if transposed and case.text["model_type"] in ("gpt2", "gpt_oss") and len(shape) > 1
        else shape[-1]
    )
    if name.endswith("k_proj.bias") and case.slow_key_bias:
        value = slow_key_bias(normal, rng)
    elif name.endswith("sinks"):
        value = 1 + normal
    elif name.endswith("bias"):
        value = 0.4 * normal
    elif is_norm(name):
        value = norm_weight(case, name, shape, rng)
    elif name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")):
        value = case.embedding * normal / width**0.5
    elif "wpe" in name or any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "c_attn")):
        value = 1.6 * normal / width**0.5
    else:
        value = 2.0 * normal / width**0.5
    return torch.tensor(value)


def is_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


def norm_weight(case: Family, name: str, shape: torch.Size, rng: np.random.Generator) -> np.ndarray:
    """Draw norms around one; larger on q and k, and on Gemma's branches and last norm."""
    gemma_like = case.text["model_type"].startswith("gemma")
    low, high = 0.5, 1.5
    if "q_norm" in name or "k_norm" in name:
        low, high = 0.8, 2.2
    elif gemma_like and ("post_" in name or name.endswith("model.norm.weight")):
        low, high = 1.0, 3.0
    return rng.uniform(low, high, tuple(shape)) - gemma_like


def slow_key_bias(normal: np.ndarray, rng: np.random.Generator, head_dim: int = 8) -> np.ndarray:
    """Draw K biases that are large where RoPE rotates slowly, as in Qwen2."""
    pair = np.arange(len(normal)) % (head_dim // 2)
    return np.where(pair >= 2, np.sign(normal) * rng.uniform(20, 60, normal.shape), normal)


def draw(
    case: Family, config: transformers.PretrainedConfig, seed: int
) -> tuple[PreTrainedModel, list[int]]:
    """A float32 model whose weights are exact in `case.dtype`, and a prompt."""
    rng = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EXACT).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                stored_exactly(case, name, random_tensor(case, name, parameter.shape, rng))
            )
    vocab = case.text["vocab_size"]
    return model, [1, *rng.integers(SPECIAL_IDS, vocab, PROMPT_TOKENS - 2).tolist(), vocab - 1]


def stored_exactly(case: Family, name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` as the file will hold it."""
    if is_packed(case) and name.endswith(mxfp4.PACKED):
        return mxfp4.unpack(*mxfp4.pack(value))
    return value.to(case.dtype)


def write(case: Family, model: PreTrainedModel, folder: Path) -> None:
    """The folder, from a drawn model, which is rounded to `case.dtype`."""
    model.to(case.dtype).save_pretrained(folder, save_original_format=not case.fused_experts)
    if case.as_is:
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    if case.relayout is not None:
        file = folder / "model.safetensors"
        save_file(case.relayout(load_file(file)), file, metadata={"format": "pt"})


# --- outputs of PyTorch ---------------------------------------------------------------------------


def load(case: Family, folder: Path) -> PreTrainedModel:
    """Load the folder with transformers in float32, with no missing and no unexpected keys."""
    how = EXACT | ({"quantization_config": Mxfp4Config(dequantize=True)} if is_packed(case) else {})
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **how
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert all(name.endswith(IGNORED) for name in info["unexpected_keys"]), info
    return model.eval()


def is_packed(case: Family) -> bool:
    """Return whether the experts are MXFP4, which transformers can unpack without its kernels."""
    return "quantization_config" in case.config


def greedy(
    case: Family, model: PreTrainedModel, prompt: list[int], fp8: torch.dtype | None = None
) -> list[int] | None:
    """Return greedy ids without a cache; None if a step is a near tie or an id is special."""
    ids = list(prompt)
    for _ in range(GREEDY_TOKENS):
        row = run(model, ids, new_cache(fp8))[-1]
        if not clear(row):
            return None
        ids.append(int(row.argmax()))
    made = ids[len(prompt) :]
    return made if len(set(made)) >= case.min_different else None


def clear(row: torch.Tensor) -> bool:
    """Whether the largest logit leads by a margin, and its id is an ordinary one."""
    best = row.topk(2)
    return bool(best.values[0] - best.values[1] >= MIN_MARGIN and best.indices[0] >= SPECIAL_IDS)


def generated(
    case: Family, model: PreTrainedModel, prompt: list[int]
) -> tuple[list[int], np.ndarray] | None:
    """Return the ids of `generate` and their logits `[24, vocab]`; None as for `greedy`."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    rows = torch.cat(out.logits)
    made = out.sequences[0, len(prompt) :].tolist()
    good = all(map(clear, rows)) and len(set(made)) >= case.min_different
    return (made, rows.numpy()) if good else None


def routers_are_clear(model: PreTrainedModel, ids: list[int]) -> bool:
    """Whether no router, at any token, is near to choosing another set of experts."""
    gaps = [np.inf]

    def note(router: torch.nn.Module, _: tuple, output: tuple) -> None:
        best = output[0].sort(dim=-1, descending=True).values
        gaps.append(float((best[:, router.top_k - 1] - best[:, router.top_k]).min()))

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(note) for router in routers]
    run(model, ids, new_cache(None))
    for hook in hooks:
        hook.remove()
    return min(gaps) >= MIN_ROUTER_GAP


def rounded(
    case: Family, model: PreTrainedModel, prompt: list[int]
) -> dict[str, np.ndarray] | None:
    """The arrays with keys and values rounded to FP8; None when the seed makes a weak test."""
    arrays: dict[str, np.ndarray] = {}
    for suffix, fp8 in {"_e4m3": torch.float8_e4m3fn, "_e5m2": torch.float8_e5m2}.items():
        cache = new_cache(fp8)
        logits = run(model, prompt, cache).numpy()
        ids = None if cache.near_boundary else greedy(case, model, prompt, fp8)
        if ids is None:
            return None
        arrays |= {"last_logits" + suffix: logits[-LAST_ROWS:], "greedy" + suffix: np.int32(ids)}
    return arrays


def search(case: Family, config: transformers.PretrainedConfig) -> int:
    """The first seed that makes a good test, without touching the disk."""
    for seed in itertools.count(case.first_seed):
        model, prompt = draw(case, config, seed)
        if case.fp8 and rounded(case, model, prompt) is None:  # first: the rarest to hold
            continue
        ids = greedy(case, model, prompt)
        if ids is None or not routers_are_clear(model, prompt + ids):
            continue
        if generated(case, draw(case, config, seed)[0], prompt) is not None:
            return seed
    raise AssertionError


def reference(case: Family, folder: Path, seed: int, prompt: list[int]) -> dict[str, np.ndarray]:
    """Compute the arrays, each with a freshly loaded model: dynamic RoPE is state of a model."""
    arrays = {"seed": np.int64(seed), "tokens": np.int32(prompt)}
    arrays["logits"] = run(load(case, folder), prompt, new_cache(None)).numpy()
    uncached = greedy(case, load(case, folder), prompt)
    made, rows = generated(case, load(case, folder), prompt)
    arrays["greedy"] = np.int32(made)
    recomputed = run(load(case, folder), prompt + made, new_cache(None)).numpy()[
        PROMPT_TOKENS - 1 : -1
    ]
    if depends_on_length(case) or np.abs(recomputed - rows).max() > 1e-3:
        print(
            f"  {case.name}: cached and whole passes differ by "
            f"{np.abs(recomputed - rows).max():.2g}, "
            f"{uncached == made=}"
        )
        arrays |= {"step_logits": rows, "greedy_uncached": np.int32(uncached)}
    return arrays | (rounded(case, load(case, folder), prompt) if case.fp8 else {})


def depends_on_length(case: Family) -> bool:
    """Whether the RoPE of a token depends on how long the sequence is when it is computed."""
    rope = case.text.get("rope_parameters") or case.text.get("rope_scaling") or {}
    return rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope", "su")


def make(case: Family, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    seed = search(case, config)
    model, prompt = draw(case, config, seed)
    expected = run(model, prompt, new_cache(None)).numpy()
    write(case, model, folder)
    arrays = reference(case, folder, seed, prompt)
    np.testing.assert_array_equal(
        arrays["logits"], expected, err_msg="the file does not hold what was drawn"
    )
    np.savez_compressed(folder / "reference.npz", **arrays)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{case.name}: seed {seed}, {len(set(arrays['greedy'].tolist()))} ids, "
        f"{size / 1000:.0f} kB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=[case.name for case in CASES], help="which cases (default: all)"
    )
    names = parser.parse_args().names
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for case in CASES:
        if case.name in names:
            make(case, Path(__file__).parent / case.name)


if __name__ == "__main__":
    main()
