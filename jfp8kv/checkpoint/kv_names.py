"""How checkpoints name the scales of their KV cache: one table of the spellings that tools have published.

A name says the layer and the part: "k", "v", "kv" (one scale for both), "q" or "prob" (queries and probabilities, which
engines that quantize attention itself use). Sources: what compressed-tensors (LLM Compressor), ModelOpt, Quark, AutoFP8 and
vLLM write, and the spellings vLLM reads.
"""

import re
from typing import NamedTuple

from jfp8kv.models.layouts import bare

_LAYER = r"(?:backbone\.|decoder\.)?(?:layers|h)\.(?P<layer>\d+)"
_ATTENTION = r"(?:self_attn|self_attention|attention|attn|mixer)"
_END = r"_(?:scale|(?P<zero_point>zero_point|scale_zero_point))"
_ENTRY = r"(?:scale|(?P<zero_point>zero_point))"
_TABLE = {
    "compressed-tensors": rf"(?P<part>[qkv]){_END}",
    "ModelOpt": rf"(?P<part>[qkv])_proj\.(?P=part){_END}",
    "Quark": rf"(?:(?P<part>[qkv])_proj\.output|(?P<prob>prob)(?:_output)?){_END}",
    "AutoFP8": rf"(?P<part>kv){_END}",
    "fused projection": rf"(?:qk)?qkv_proj\.(?P<part>[qkv]){_END}",
    "attention module": rf"attn\.(?P<part>[qkv]|kv|prob){_END}",
    "cache module": rf"(?P<part>[kv])_cache\.{_ENTRY}",
    "module": rf"(?P<part>[qkv])\.{_ENTRY}",
}
_LAYOUTS = {
    layout: re.compile(rf"{_LAYER}\.{_ATTENTION}\.{rest}") for layout, rest in _TABLE.items()
}
# What nobody has published, but can only be meant as one: reported by name rather than taken for a weight.
_LOOKS_LIKE = re.compile(
    r"(^|\.)((q|k|v|kv|qkv|key|value|query|prob)(_cache)?(_output)?_(scale|scales|scale_inv|zero_point|scale_zero_point)"
    r"|(q|k|v|kv|qkv)_proj\.output_(scale|zero_point)|(k|v|kv|key|value)_cache\.(scale|zero_point)"
    r"|(attn|attention|mixer)\.[qkv]\.(scale|zero_point))$"
)


class ScaleName(NamedTuple):
    """What a tensor's name says of it."""

    layer: int
    part: str
    layout: str
    is_zero_point: bool


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of this name is a scale (or zero point) of the KV cache, of a known spelling or not."""
    return _LOOKS_LIKE.search(name) is not None or scale_name(name) is not None


def scale_name(name: str) -> ScaleName | None:
    """What the name of a tensor says, if it is one of the published spellings."""
    for layout, pattern in _LAYOUTS.items():
        if found := pattern.fullmatch(bare(name)):
            groups = found.groupdict()
            part = groups.get("part") or groups["prob"]
            return ScaleName(int(groups["layer"]), part, layout, groups["zero_point"] is not None)
    return None


def of_layer(source: str, layer: int) -> str:
    """The name of the same tensor in another layer, or the place in the side-car."""
    return re.sub(
        r"((?:^|\.)(?:layers|h)\.|: layer )\d+(?=\.|$)", rf"\g<1>{layer}", source, count=1
    )
