"""Tiny random Llamas and outputs of PyTorch about them, written once and committed.

Run by hand (README.md has the command and the versions); tests read the files and never import
torch. Each case is a Hugging Face folder: the `config.json` below exactly as written, so old and
new spellings both occur, and safetensors. `reference.npz` then holds what transformers computes
after loading that folder from disk:

    seed                 the seed the weights and the prompt were drawn with
    tokens               int32 [61], the prompt: odd, and past the end of a page of 16
    logits               float32 [61, vocab]
    greedy               int32 [24], the ids that follow
    last_logits_e4m3     float32 [4, vocab]: the last four rows of `logits`, with keys (after RoPE)
    last_logits_e5m2     and values clipped, rounded to FP8 with scale 1 and read back
    greedy_e4m3          int32 [24]
    greedy_e5m2          int32 [24]

Equal greedy ids prove something only if the ids vary and no choice is a near tie, so seeds are
tried in order until each of the three greedy paths has a margin and enough different ids, and none
contains a special id. A key or value half way between two FP8 numbers would round either way with
the order of a sum, and one that does moves the logits by about a thousandth, so seeds with such a
prompt are passed over too: every float32 implementation is to store the same bytes.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

PROMPT_TOKENS = 61
GREEDY_TOKENS = 24
LAST_ROWS = 4
MIN_MARGIN = 0.03  # between the best and the second-best logit, at every greedy step
MIN_SLACK = 1e-6  # distance to a rounding boundary, relative to the largest of the token and head
MIN_DIFFERENT = 14  # ids among the 24
SPECIAL_IDS = 5  # ids below this are special, and never in a prompt

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}

SHARED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder to write. `config` is its `config.json`; `dtype` what the weights are saved in.

    `first_seed` is where the search for a seed starts: the one that was found, counting up from 0.
    After a change of sizes or bounds, set it back to 0; the search takes about ten minutes for all.
    """

    name: str
    first_seed: int
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    shards: int = 1
    rotary_buffers: bool = (
        False  # as old checkpoints have them: tensors that belong to no parameter
    )
    tokenizer: bool = False


CASES = [
    Case(
        "llama_gqa",
        452,
        {
            "vocab_size": 200,
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "dtype": "float32",
        },
    ),
    Case(
        "llama_mqa",
        1053,
        {
            "vocab_size": 200,
            "hidden_size": 40,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 25000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        },
        dtype=torch.float16,
    ),
    Case(  # the oldest spelling: what is not said follows from what is
        "llama_mha_bias",
        120,
        {
            "vocab_size": 257,
            "hidden_size": 16,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-2,
            "attention_bias": True,
            "mlp_bias": True,
            "torch_dtype": "float32",
        },
    ),
    Case(
        "llama_rope3",
        289,
        {
            "vocab_size": 211,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "hidden_act": "silu",
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "tie_word_embeddings": True,
            "dtype": "float32",
        },
    ),
    Case(
        "llama_linear",
        758,
        {
            "vocab_size": 203,
            "hidden_size": 40,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "hidden_act": "gelu",
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        dtype=torch.bfloat16,
    ),
    Case(
        "llama_bf16",
        489,
        {
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        },
        dtype=torch.bfloat16,
        tokenizer=True,
    ),
    Case(
        "llama_sharded",
        323,
        {
            "vocab_size": 201,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 2.0,
                "original_max_position_embeddings": 16,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
        },
        shards=2,
        rotary_buffers=True,
    ),
]


# --- the folder ----------------------------------------------------------------------------------


def random_tensor(name: str, shape: torch.Size, rng: np.random.Generator) -> torch.Tensor:
    """Draw weights that make every part matter: non-uniform attention, norms not one."""
    normal = rng.standard_normal(tuple(shape))
    if "norm" in name:
        value = rng.uniform(0.5, 1.5, tuple(shape))
    elif name.endswith("bias"):
        value = 0.4 * normal
    elif "embed_tokens" in name or "lm_head" in name:
        value = 3.0 * normal / shape[-1] ** 0.5
    elif "q_proj" in name or "k_proj" in name:
        value = 1.6 * normal / shape[-1] ** 0.5
    else:
        value = 2.0 * normal / shape[-1] ** 0.5
    return torch.tensor(value)


def write_checkpoint(case: Case, folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHARED | case.config, indent=2) + "\n")
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    tensors = {
        n: random_tensor(n, p.shape, rng).to(case.dtype).contiguous()
        for n, p in model.named_parameters()
    }
    if case.rotary_buffers:
        for layer, block in enumerate(model.model.layers):
            head_dim = block.self_attn.head_dim
            unscaled = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = unscaled
    save_shards(folder, tensors, case.shards)


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """One `model.safetensors`, or numbered files with an index that says which has what."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    per_file = -(-len(names) // shards)
    where: dict[str, str] = {}
    for i in range(shards):
        part = names[i * per_file : (i + 1) * per_file]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# --- outputs of PyTorch ---------------------------------------------------------------------------


class RoundingCache(DynamicCache):
    """A cache that gives back keys and values as FP8 with scale 1 would have kept them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fp8 = dtype
        self.near_boundary = False

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(self.stored(key_states), self.stored(value_states), *args, **kwargs)

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        slack = MIN_SLACK * x.abs().amax(-1, keepdim=True)
        self.near_boundary |= not torch.equal(self.rounded(x - slack), self.rounded(x + slack))
        return self.rounded(x)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-LARGEST[self.fp8], LARGEST[self.fp8]).to(self.fp8).to(x.dtype)


def run(model: LlamaForCausalLM, ids: list[int], cache: DynamicCache) -> torch.Tensor:
    """Logits `[tokens, vocab]` of a whole sequence, float32, through a fresh cache."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]


def new_cache(fp8: torch.dtype | None) -> DynamicCache:
    return DynamicCache() if fp8 is None else RoundingCache(fp8)


def greedy(model: LlamaForCausalLM, prompt: list[int], fp8: torch.dtype | None) -> list[int] | None:
    """Return greedy ids; None if a step is a near tie, an id is special, or few ids differ."""
    ids = list(prompt)
    for _ in range(GREEDY_TOKENS):
        best = run(model, ids, new_cache(fp8))[-1].topk(2)
        if best.values[0] - best.values[1] < MIN_MARGIN or best.indices[0] < SPECIAL_IDS:
            return None
        ids.append(int(best.indices[0]))
    made = ids[len(prompt) :]
    return made if len(set(made)) >= MIN_DIFFERENT else None


def load(folder: Path) -> LlamaForCausalLM:
    """Load the folder with transformers in float32, with no missing and no unexpected keys."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert all("rotary_emb.inv_freq" in name for name in info["unexpected_keys"]), info
    return model.eval()


def reference(case: Case, folder: Path, seed: int) -> dict[str, np.ndarray] | None:
    """Write the checkpoint of `seed` and compute its arrays; None if the seed makes a weak test."""
    rng = np.random.default_rng(seed)
    write_checkpoint(case, folder, rng)
    model = load(folder)
    vocab = case.config["vocab_size"]
    prompt = [1, *rng.integers(SPECIAL_IDS, vocab, PROMPT_TOKENS - 2).tolist(), vocab - 1]
    formats = {"": None, "_e4m3": torch.float8_e4m3fn, "_e5m2": torch.float8_e5m2}
    arrays = {"seed": np.int64(seed), "tokens": np.int32(prompt)}
    for suffix, fp8 in formats.items():
        cache = new_cache(fp8)
        logits = run(model, prompt, cache).numpy()
        if fp8 and cache.near_boundary:
            return None
        ids = greedy(model, prompt, fp8)
        if ids is None:
            return None
        arrays["greedy" + suffix] = np.int32(ids)
        arrays["last_logits" + suffix if fp8 else "logits"] = logits[-LAST_ROWS:] if fp8 else logits
    return arrays


# --- a tokenizer ---------------------------------------------------------------------------------

CORPUS = [
    "the quick brown fox jumps over the lazy dog and the dog sleeps on",
    "there is another story in the other room, and then the end of the day",
    "un café, s'il vous plaît: le café était fermé hier",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Train a byte-level BPE of `vocab` ids that splits most multi-byte characters."""
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == vocab, tokenizer.get_vocab_size()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": [2, 4]}) + "\n"
    )


def text_reference(folder: Path) -> dict[str, Any]:
    """What transformers makes of a prompt and of a chat: ids in, greedy ids and text out."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    prompt = "the café and 日本語 🙂 "
    messages = [{"role": "user", "content": "the end of the day?"}]
    ids = tokenizer(prompt)["input_ids"]
    chat_ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    made, chat_made = (greedy_text_ids(model, start) for start in (ids, chat_ids))
    return {
        "prompt": prompt,
        "ids": ids,
        "greedy": made,
        "greedy_text": tokenizer.decode(made, skip_special_tokens=True),
        "messages": messages,
        "chat_text": tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        ),
        "chat_ids": chat_ids,
        "chat_greedy": chat_made,
        "chat_greedy_text": tokenizer.decode(chat_made, skip_special_tokens=True),
    }


def greedy_text_ids(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(GREEDY_TOKENS):
        best = run(model, ids, DynamicCache())[-1].topk(2)
        assert best.values[0] - best.values[1] > 1e-3, "a near tie: change the prompt"
        assert best.indices[0] >= SPECIAL_IDS, "the text would end: change the prompt"
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :]


def make(case: Case, folder: Path) -> None:
    for seed in itertools.count(case.first_seed):
        arrays = reference(case, folder, seed)
        if arrays is not None:
            break
    np.savez_compressed(folder / "reference.npz", **arrays)
    if case.tokenizer:
        write_tokenizer(folder, case.config["vocab_size"])
        text = json.dumps(text_reference(folder), indent=1, ensure_ascii=False)
        (folder / "text.json").write_text(text + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{case.name}: seed {seed}, {size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=[case.name for case in CASES], help="which cases (default: all)"
    )
    names = parser.parse_args().names
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        if case.name in names:
            make(case, Path(__file__).parent / case.name)


if __name__ == "__main__":
    main()
