"""What makes one decoder differ from another, as data.

`ModelConfig` holds the numbers and switches of a decoder-only transformer. Reading a family's `config.json` into it is the
job of `models/families/`; the decoder knows no family.
"""

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Norm = Literal["rms", "rms_plus_one", "layer"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split layout, with its scaling for long contexts.

    `kind` and what belongs to it alone:
      - "default"; "linear": positions are divided by `factor`.
      - "dynamic": beyond `original_max_len` tokens theta grows with the length of the text (NTK-aware scaling).
      - "llama3": interpolation by frequency, between `low_freq_factor` and `high_freq_factor` turns over `original_max_len`.
      - "yarn": the same between `beta_slow` and `beta_fast` turns (arXiv:2309.00071), the bounds rounded if `truncate`.
      - "longrope": each frequency is divided by its entry of `short_factors`, or of `long_factors` in a text of more than
        `original_max_len` tokens (arXiv:2402.13753).
    `share` of the head is rotated, from its front; `magnitude` multiplies cosines and sines (yarn, longrope).
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    share: float = 1.0
    magnitude: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def rotated(self, head_dim: int) -> int:
        """Features of a head that are rotated."""
        return int(head_dim * self.share)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in the place of the MLP: each token is sent to `top_k` of `count` experts of width `hidden`.

    Weights are the softmax of the router's logits over all experts, and `normalized` makes those of the chosen sum to 1 (the
    same as a softmax over the chosen). `shared_hidden`: width of one expert that every token also goes through, behind a
    sigmoid gate; 0 is none. `clamped`: the gate of gpt-oss, `(up + 1) * gate * sigmoid(alpha * gate)`, gate and up held
    within `limit`. `layers` lists the layers that have experts; the others keep their MLP.
    """

    count: int
    top_k: int
    hidden: int
    layers: tuple[int, ...]
    normalized: bool = True
    bias: bool = False  # on the router and in the experts
    shared_hidden: int = 0
    clamped: bool = False
    alpha: float = 1.702
    limit: float = 7.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are counts; `head_dim` is independent of `hidden`.

    Tuples by layer (`windows`, `layer_ropes`) are empty where all layers are alike: no window; the first of `ropes`, if any.
    """

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
    # Positions
    ropes: tuple[RopeConfig, ...] = (RopeConfig(),)
    layer_ropes: tuple[
        int, ...
    ] = ()  # by layer: an index into `ropes`, or -1 for a layer that rotates nothing
    learned_positions: bool = False  # a table of `max_len` embeddings, added to those of the tokens
    # Norms
    norm: Norm = "rms"  # "rms_plus_one" multiplies by 1 + weight; "layer" centres and has a bias
    pre_norm: bool = True  # before attention and MLP
    post_norm: bool = False  # on what attention and MLP return, before it is added
    qk_norm: Literal["head", "row"] | None = (
        None  # of queries and keys: each head by itself, or all heads as one row
    )
    # Projections
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True  # down(activation(gate) * up); False: down(activation(up))
    experts: ExpertsConfig | None = None
    # Attention
    windows: tuple[
        int, ...
    ] = ()  # by layer: a query sees this many tokens, itself included; 0 sees all
    sm_scale: float | None = None  # None: head_dim ** -0.5
    scale_by_layer: bool = False  # scores of layer l are divided by l + 1 (an option of GPT-2)
    softcap: float | None = None  # of attention scores
    sinks: bool = False  # a learned logit per head that joins the softmax
    # Embeddings and output
    tied_embeddings: bool = False
    embedding_scale: float = 1.0  # in the weights' type
    residual_scale: float = 1.0  # on what attention and MLP add
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    # Tokens and types
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

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers that have an MLP of their own rather than experts."""
        return tuple(
            i for i in range(self.layers) if self.experts is None or i not in self.experts.layers
        )

    def window(self, layer: int) -> int:
        """Tokens a query of this layer sees, itself included; 0 sees all."""
        return self.windows[layer] if self.windows else 0

    def rope(self, layer: int) -> RopeConfig | None:
        """How this layer rotates queries and keys; None if it does not."""
        which = self.layer_ropes[layer] if self.layer_ropes else 0
        return self.ropes[which] if self.ropes and which >= 0 else None
