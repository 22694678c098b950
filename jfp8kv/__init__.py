"""jfp8kv: inference in pure JAX with a paged key/value cache in 8-bit floating point.

    params = jfp8kv.load("path/or/hub-id")
    outs = jfp8kv.generate(params, ["Once upon a time"], kv_dtype="fp8_e4m3", max_tokens=64)
    print(outs[0].text)
"""

from jfp8kv.api import generate, logits, score
from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.load import load
from jfp8kv.core.errors import CapacityError, CheckpointError, ConfigError, Jfp8kvError, NotSupported
from jfp8kv.engine.request import CompletionOutput, RequestOutput
from jfp8kv.llm import LLM
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.params import Params
from jfp8kv.sampling.params import SamplingParams

__version__ = "0.1.0.dev0"

__all__ = [
    "LLM",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Jfp8kvError",
    "KVScales",
    "ModelConfig",
    "NotSupported",
    "Params",
    "RequestOutput",
    "SamplingParams",
    "generate",
    "load",
    "logits",
    "score",
]
