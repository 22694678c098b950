"""A reference case: a configuration, how its weights are drawn, how its folder is written."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Family:
    """A folder to write.

    `config` is what its model is built from. `as_is` keeps that dictionary as `config.json`, in the
    words of an older checkpoint; otherwise the folder is what `save_pretrained` writes. `relayout`
    changes the tensors of the file after that, `fused_experts` has 5.23 write experts the way it
    holds them. `first_seed` is where the search starts.
    """

    name: str
    first_seed: int
    config: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    as_is: bool = False
    relayout: Callable[[Tensors], Tensors] | None = None
    fused_experts: bool = False
    fp8: bool = False  # also with keys and values rounded, as the Llamas have it
    embedding: float = (
        3.0  # standard deviation of the embeddings, times the root of the hidden size
    )
    slow_key_bias: bool = False  # 20 to 60 where RoPE hardly turns, as Qwen2 has it
    min_different: int = 14  # ids among the 24

    @property
    def text(self) -> dict[str, Any]:
        """The part of the configuration that describes the language model."""
        return self.config.get("text_config", self.config)


def saved(
    name: str, first_seed: int, model_type: str, sizes: dict[str, Any], /, **config: Any
) -> Family:
    """Return a folder as 5.23 writes it. Keywords are fields of `Family` or configuration."""
    return _family(name, first_seed, {"model_type": model_type} | IDS | sizes, config)


def old(
    name: str,
    first_seed: int,
    architecture: str,
    model_type: str,
    sizes: dict[str, Any],
    /,
    **config: Any,
) -> Family:
    """A folder whose `config.json` is exactly this dictionary: older spellings, absent keys."""
    start = {"architectures": [architecture], "model_type": model_type} | IDS | sizes
    return _family(name, first_seed, start, {"as_is": True} | config)


def _family(name: str, first_seed: int, start: dict[str, Any], given: dict[str, Any]) -> Family:
    fields = {field.name for field in dataclasses.fields(Family)}
    rest = {key: value for key, value in given.items() if key not in fields}
    case = Family(
        name,
        first_seed,
        start | rest,
        **{key: value for key, value in given.items() if key in fields},
    )
    if not case.as_is:
        return case
    return dataclasses.replace(
        case, config=case.config | {"torch_dtype": str(case.dtype).removeprefix("torch.")}
    )


def sizes(
    vocab: int, hidden: int, mlp: int, layers: int, q_heads: int, kv_heads: int | None, **more: Any
) -> dict[str, Any]:
    """Return the common sizes of a configuration; `kv_heads=None` leaves that key out."""
    found = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
    }
    return {key: value for key, value in found.items() if value is not None} | more
