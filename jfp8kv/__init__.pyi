# The public names, declared once: type checkers read this file, and `__init__.py` imports each name
# from its module when it is first used.

from jfp8kv.beam_search import beam_search as beam_search
from jfp8kv.cache.plan import KVPlan as KVPlan
from jfp8kv.cache.plan import LayerPlan as LayerPlan
from jfp8kv.cache.scales import KVScales as KVScales
from jfp8kv.checkpoint.export import export as export
from jfp8kv.checkpoint.load import load as load
from jfp8kv.checkpoint.orbax import save as save
from jfp8kv.core.compilation_cache import disable_compilation_cache as disable_compilation_cache
from jfp8kv.core.errors import CapacityError as CapacityError
from jfp8kv.core.errors import CheckpointError as CheckpointError
from jfp8kv.core.errors import ConfigError as ConfigError
from jfp8kv.core.errors import DeviceMemoryError as DeviceMemoryError
from jfp8kv.core.errors import Jfp8kvError as Jfp8kvError
from jfp8kv.core.errors import NotSupported as NotSupported
from jfp8kv.core.errors import StepError as StepError
from jfp8kv.engine.engine import Engine as Engine
from jfp8kv.engine.options import EngineOptions as EngineOptions
from jfp8kv.engine.programs import CompileReport as CompileReport
from jfp8kv.engine.request import CompletionOutput as CompletionOutput
from jfp8kv.engine.request import RequestOutput as RequestOutput
from jfp8kv.engine.scoring import Scored as Scored
from jfp8kv.engine.stats import Stats as Stats
from jfp8kv.engine_registry import clear_engines as clear_engines
from jfp8kv.functional import generate as generate
from jfp8kv.functional import logits as logits
from jfp8kv.functional import score as score
from jfp8kv.llm import LLM as LLM
from jfp8kv.models.config import ModelConfig as ModelConfig
from jfp8kv.models.params import Params as Params
from jfp8kv.quality.bench import BenchmarkReport as BenchmarkReport
from jfp8kv.quality.bench import bench as bench
from jfp8kv.quality.calibrate import calibrate as calibrate
from jfp8kv.quality.compare import compare as compare
from jfp8kv.quality.mixed_precision import plan_kv as plan_kv
from jfp8kv.quality.model_report import ModelReport as ModelReport
from jfp8kv.quality.model_report import inspect as inspect
from jfp8kv.quality.options import BenchOptions as BenchOptions
from jfp8kv.quality.options import CalibrationOptions as CalibrationOptions
from jfp8kv.quality.options import CompareOptions as CompareOptions
from jfp8kv.quality.options import PlanOptions as PlanOptions
from jfp8kv.quality.quality_report import QualityReport as QualityReport
from jfp8kv.sampling.params import SamplingParams as SamplingParams
from jfp8kv.session import Session as Session
from jfp8kv.session import extend_batch as extend_batch
from jfp8kv.text.chat import ChatOptions as ChatOptions
from jfp8kv.text.prompts import ChatPrompt as ChatPrompt
from jfp8kv.text.tokenizer import Tokenizer as Tokenizer

__version__: str
