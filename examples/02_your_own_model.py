# %% [markdown]
# # Your own model
# A model that lives in memory, such as one you are training, generates without a checkpoint in between:
# `Params.from_pytree` wraps its parameters after checking every name and shape. Here they come from a Flax NNX module;
# an `nnx.State` or a dict will do too, with these names or those of Hugging Face, `kernel` leaves included.

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
ask = dict(kv_dtype="fp8_e4m3", temperature=0.0, max_tokens=12, ignore_eos=True)
jfp8kv.generate(params, [prompt], **ask)[0].token_ids

# %% [markdown]
# `logits` are computed by the code that generates, through the cache. So they show what 8 bits cost *this* model.

# %%
exact = jfp8kv.logits(params, prompt, kv_dtype="float32")
for kv_dtype in ("bfloat16", "fp8_e4m3", "fp8_e5m2"):
    error = jfp8kv.logits(params, prompt, kv_dtype=kv_dtype) - exact
    print(
        f"{kv_dtype:9} relative rms error of the logits {np.sqrt(np.mean(error**2) / np.mean(exact**2)):.1e}"
    )

# %% [markdown]
# ## After an update
# `Params` is a pytree: `jax.tree.map`, `jax.jit` and optimizers take it as it is. Nothing is compiled again for new
# weights, so it costs little to look at samples between two steps of a training run.

# %%
keys = iter(jax.random.split(jax.random.key(1), 100))
updated = jax.tree.map(
    lambda w: w + 0.1 * jnp.std(w) * jax.random.normal(next(keys), w.shape, w.dtype), params
)
jfp8kv.generate(updated, [prompt], **ask)[0].token_ids
