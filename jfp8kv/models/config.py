"""`ModelConfig`: the sizes and options of a decoder-only transformer, as data.

`models/families/` converts the `config.json` of each family into it. The decoder does not depend on
families.
"""

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Norm = Literal["rms", "rms_plus_one", "layer"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (RoPE), half-split layout, with its scaling for long contexts.

    Source: Su et al. 2021, arXiv:2104.09864. Values of `kind`:
      - "default": no scaling.
      - "linear": positions are divided by `factor`.
      - "dynamic": beyond `original_max_len` tokens theta grows with the length of the sequence
        (NTK-aware scaling).
      - "llama3": low frequencies are divided by `factor` and high ones are unchanged. Frequencies
        with `low_freq_factor` to `high_freq_factor` rotations in `original_max_len` tokens are
        interpolated.
      - "yarn": the same with `beta_slow` to `beta_fast` rotations (arXiv:2309.00071); the bounds
        are rounded if `truncate`.
      - "longrope": each frequency is divided by its entry of `short_factors`, or of `long_factors`
        in sequences of more than `original_max_len` tokens (arXiv:2402.13753).

    Attributes:
      theta: the base of the frequencies.
      share: the fraction of each head that is rotated, from its start.
      magnitude: the factor on cosines and sines (yarn, longrope).
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
        """Return the number of rotated features per head."""
        return int(head_dim * self.share)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts instead of the MLP: each token is sent to `top_k` of `count` experts.

    Attributes:
      count: experts per layer.
      top_k: experts per token. Their weights are the softmax of the router logits over all experts.
      hidden: width of an expert.
      layers: the layers with experts; the others have an MLP.
      normalized: the weights of the selected experts are normalized to sum to 1.
      bias: whether router and experts have biases.
      shared_hidden: width of the shared expert, which runs on every token; 0 for none. Its
        output is scaled by a sigmoid gate.
      clamped: the gate of gpt-oss, `(up + 1) * gate * sigmoid(alpha * gate)`, with gate and up
        clamped to `limit`.
    """

    count: int
    top_k: int
    hidden: int
    layers: tuple[int, ...]
    normalized: bool = True
    bias: bool = False
    shared_hidden: int = 0
    clamped: bool = False
    alpha: float = 1.702
    limit: float = 7.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Comments explain each field.

    `windows` and `layer_ropes` have one entry per layer, or are empty if all layers are the same:
    no layer has a window, or every layer uses the first of `ropes`.

    Example (a dict as in config.json is also a config for `Params.from_pytree`):
      config = jfp8kv.load("path").config
      config.layers, config.kv_heads, config.head_dim
    """

    architecture: str  # as in config.json, such as "LlamaForCausalLM"
    vocab: int  # rows of the embeddings
    hidden: int  # width of the residual stream
    layers: int
    q_heads: int
    kv_heads: int  # a divisor of `q_heads`
    head_dim: int  # independent of `hidden`
    mlp_hidden: int
    max_len: int  # the context length in tokens
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    # Positions
    ropes: tuple[RopeConfig, ...] = (RopeConfig(),)
    layer_ropes: tuple[int, ...] = ()  # by layer: an index into `ropes`, or -1 for no rotation
    learned_positions: bool = False  # `max_len` embeddings, added to those of the tokens
    # Norms
    norm: Norm = "rms"  # "rms_plus_one" multiplies by 1 + weight; "layer" centers and has a bias
    pre_norm: bool = True  # before attention and MLP
    post_norm: bool = False  # on the outputs of attention and MLP
    qk_norm: Literal["head", "row"] | None = None  # of each head, or of all heads together
    # Projections
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True  # down(activation(gate) * up); False: down(activation(up))
    experts: ExpertsConfig | None = None
    # Attention
    windows: tuple[int, ...] = ()  # by layer: tokens that a query sees, its own included; 0 for all
    sm_scale: float | None = None  # None: head_dim ** -0.5
    scale_by_layer: bool = False  # scores of layer l are divided by l + 1 (an option of GPT-2)
    softcap: float | None = None  # of attention scores
    sinks: bool = False  # a learned logit per head that joins the softmax
    # Embeddings and output
    tied_embeddings: bool = False
    embedding_scale: float = 1.0  # in the type of the weights
    residual_scale: float = 1.0  # on the outputs of attention and MLP
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    # Tokens and types
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # of the weights, according to the checkpoint
    kv_cache_dtype: str | None = None  # the KV cache format that the checkpoint declares

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
        """The layers with an MLP instead of experts."""
        return tuple(
            i for i in range(self.layers) if self.experts is None or i not in self.experts.layers
        )

    def window(self, layer: int) -> int:
        """Return the window of a layer: tokens that a query sees, its own included; 0 for all."""
        return self.windows[layer] if self.windows else 0

    def rope(self, layer: int) -> RopeConfig | None:
        """Return the RoPE of a layer; None if it does not rotate."""
        index = self.layer_ropes[layer] if self.layer_ropes else 0
        return self.ropes[index] if self.ropes and index >= 0 else None
