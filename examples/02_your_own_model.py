# %% [markdown]
# # Your own model A model in memory, such as one you are training, generates without a checkpoint:
# `Params.from_pytree` checks every parameter name and shape and wraps the tree. Here it is a Flax
# NNX module; an `nnx.State` or a dict works too, with these names or those of Hugging Face,
# `kernel` leaves included.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jfp8kv
from jfp8kv.models.decoder import Decoder

config = jfp8kv.ModelConfig(
    architecture="LlamaForCausalLM",
    vocab=96,
    hidden=64,
    layers=2,
    q_heads=4,
    kv_heads=2,
    head_dim=16,
    mlp_hidden=128,
    max_len=256,
    dtype="float32",
)
model = Decoder(config, rngs=nnx.Rngs(0))  # a Flax NNX module
params = jfp8kv.Params.from_pytree(model, config)
params

# %%
prompt = [3, 1, 4, 1, 5, 9, 2, 6]  # no tokenizer: prompts are token ids
options = dict(kv_dtype="fp8_e4m3", temperature=0.0, max_tokens=12, ignore_eos=True)
jfp8kv.generate(params, [prompt], **options)[0].token_ids

# %% [markdown]
# `logits` runs the code that generates, through the same cache. So it shows what FP8 costs *this*
# model.

# %%
exact = jfp8kv.logits(params, prompt, kv_dtype="float32")
for kv_dtype in ("bfloat16", "fp8_e4m3", "fp8_e5m2"):
    error = jfp8kv.logits(params, prompt, kv_dtype=kv_dtype) - exact
    relative_rms = np.sqrt(np.mean(error**2) / np.mean(exact**2))
    print(f"{kv_dtype:9} relative RMS error of the logits {relative_rms:.1e}")

# %% [markdown]
# ## After an update `Params` is a pytree: it works with `jax.tree.map`, `jax.jit` and optimizers.
# New weights compile nothing, so sampling between two training steps is cheap.

# %%
keys = iter(jax.random.split(jax.random.key(1), 100))
updated = jax.tree.map(
    lambda w: w + 0.1 * jnp.std(w) * jax.random.normal(next(keys), w.shape, w.dtype), params
)
jfp8kv.generate(updated, [prompt], **options)[0].token_ids
