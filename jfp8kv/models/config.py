"""What makes one decoder differ from another, as data.

`ModelConfig` holds the numbers and switches of a decoder-only transformer. Reading a family's `config.json` into it is the
job of `models/families.py`; the decoder knows no family.
"""

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split layout, with its scaling for long contexts.

    `kind` is "default", "linear" (positions / factor) or "llama3" (per-frequency interpolation of Llama 3.1).
    `low_freq_factor`, `high_freq_factor` and `original_max_len` belong to "llama3" alone.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are counts; `head_dim` is independent of `hidden`."""

    architecture: str
    vocab: int
    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp_hidden: int
    max_len: int
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    sm_scale: float | None = None  # None: head_dim ** -0.5
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # what the checkpoint says its weights are
    kv_cache_dtype: str | None = None  # what the checkpoint declares for its KV cache, in our names

    @property
    def attention_scale(self) -> float:
        """The factor on q . k before the softmax."""
        return self.head_dim**-0.5 if self.sm_scale is None else self.sm_scale

    @property
    def group(self) -> int:
        """Query heads per KV head (GQA); 1 is plain multi-head attention, `q_heads` is MQA."""
        return self.q_heads // self.kv_heads
