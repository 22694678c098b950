"""jfp8kv: inference in pure JAX with a paged key/value cache in 8-bit floating point.

    params = jfp8kv.load("path/or/hub-id")
    outs = jfp8kv.generate(params, ["Once upon a time"], kv_dtype="fp8_e4m3", max_tokens=64)
    print(outs[0].text)

Names are imported when they are first used (PEP 562): JAX takes seconds, which `jfp8kv --help` need not wait for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jfp8kv.beam_search import beam_search
    from jfp8kv.cache.plan import KVPlan, LayerPlan
    from jfp8kv.cache.scales import KVScales
    from jfp8kv.checkpoint.export import export
    from jfp8kv.checkpoint.load import load
    from jfp8kv.checkpoint.orbax import save
    from jfp8kv.core.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DeviceMemoryError,
        Jfp8kvError,
        NotSupported,
        StepError,
    )
    from jfp8kv.engine.request import CompletionOutput, RequestOutput
    from jfp8kv.functional import calibrate, compare, generate, inspect, logits, plan_kv, score
    from jfp8kv.llm import LLM
    from jfp8kv.models.config import ModelConfig
    from jfp8kv.models.params import Params
    from jfp8kv.quality.bench import BenchmarkReport, bench
    from jfp8kv.quality.model_report import ModelReport
    from jfp8kv.quality.quality_report import QualityReport
    from jfp8kv.sampling.params import SamplingParams
    from jfp8kv.session import Session, extend_batch

__version__ = "0.1.0.dev0"

__all__ = [
    "LLM",
    "BenchmarkReport",
    "CapacityError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "DeviceMemoryError",
    "Jfp8kvError",
    "KVPlan",
    "KVScales",
    "LayerPlan",
    "ModelConfig",
    "ModelReport",
    "NotSupported",
    "Params",
    "QualityReport",
    "RequestOutput",
    "SamplingParams",
    "Session",
    "StepError",
    "beam_search",
    "bench",
    "calibrate",
    "compare",
    "export",
    "extend_batch",
    "generate",
    "inspect",
    "load",
    "logits",
    "plan_kv",
    "save",
    "score",
]

_HOMES = {
    "functional": ("calibrate", "compare", "generate", "inspect", "logits", "plan_kv", "score"),
    "beam_search": ("beam_search",),
    "cache.plan": ("KVPlan", "LayerPlan"),
    "cache.scales": ("KVScales",),
    "checkpoint.export": ("export",),
    "checkpoint.load": ("load",),
    "checkpoint.orbax": ("save",),
    "core.errors": (
        "CapacityError",
        "CheckpointError",
        "ConfigError",
        "DeviceMemoryError",
        "Jfp8kvError",
        "NotSupported",
        "StepError",
    ),
    "engine.request": ("CompletionOutput", "RequestOutput"),
    "llm": ("LLM",),
    "models.config": ("ModelConfig",),
    "models.params": ("Params",),
    "quality.bench": ("BenchmarkReport", "bench"),
    "quality.model_report": ("ModelReport",),
    "quality.quality_report": ("QualityReport",),
    "sampling.params": ("SamplingParams",),
    "session": ("Session", "extend_batch"),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
