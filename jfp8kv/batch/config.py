"""The keys of a batch config, as pydantic models that validate it and print as JSON Schema."""

import os
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from jfp8kv.batch.option_sections import FROM_OPTION, OptionsSection, Section, keys_from
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.types import KV_DTYPES, WeightsDtypeName
from jfp8kv.engine.options import EngineOptions
from jfp8kv.quality.options import CalibrationOptions, CompareOptions
from jfp8kv.sampling.params import SamplingParams
from jfp8kv.text import rows
from jfp8kv.text.chat import ChatOptions
from jfp8kv.text.rows import RowFormat

Task: TypeAlias = Literal["generate", "score", "calibrate", "compare"]
FP8_NAMES = tuple(name for name in KV_DTYPES if name.startswith("fp8"))


def _as_path(given: Any) -> Any:
    """Expand the shorthand `input: FILE` to `input: {path: FILE}`."""
    return {"path": given} if isinstance(given, str) else given


FilePath = Annotated[str, AfterValidator(os.path.expanduser)]


class InputFile(Section):
    """A file of rows."""

    path: FilePath
    """The file, relative to the folder in which the command is started."""
    format: Literal["auto", RowFormat] = "auto"
    """"auto" derives it from the suffix; JSONL that begins with an OpenAI request is "openai"."""

    @property
    def row_format(self) -> RowFormat:
        """The format, derived from the suffix and the first row if it is "auto"."""
        return rows.format_of(self.path, self.format)

    def reader(self) -> rows.Reader:
        """Return the rows of the file."""
        return rows.Reader(self.path, self.format)

    def check(self) -> None:
        """Raise unless the file exists, its format is known and its library is installed."""
        rows.check(self.path, self.format)


Input = Annotated[InputFile, BeforeValidator(_as_path, json_schema_input_type=str | InputFile)]


class OutputFile(Section):
    """The output file: the fields of each row and its result."""

    path: FilePath
    """The file to write. Until the run is complete, finished rows are in PATH.partial."""
    format: Literal["auto", "jsonl", "parquet", "openai"] = "auto"
    """"auto" derives it from the suffix; OpenAI batch requests get OpenAI's output format."""
    unordered: bool = False
    """Write rows in the order in which they finished. From Parquet to Parquet, no effect."""
    prefix: str = ""
    """A prefix of the result names (text, prompt_tokens, ...), for rows that have such fields."""


Output = Annotated[OutputFile, BeforeValidator(_as_path, json_schema_input_type=str | OutputFile)]


class MessageTemplate(Section):
    """One message of a conversation."""

    role: str
    """"system", "user", "assistant", or another role of the model's chat template."""
    content: str
    """A Jinja template over the fields of the row."""


# Engine options that are keys of the config, outside of its section `engine`.
CONFIG_KEYS = ("dtype", "strict", "kv_dtype", "kv_scales", "seed")


@keys_from(EngineOptions, omit=CONFIG_KEYS)
class EngineSection(OptionsSection):
    """Limits of the engine, as in `jfp8kv.LLM`."""

    def options(self) -> EngineOptions:
        """Return the options, with defaults for those outside this section."""
        return EngineOptions.from_fields(**self.given())


@keys_from(SamplingParams, omit=("seed", "prompt_logprobs", "deadline_s"))
class SamplingSection(OptionsSection):
    """Sampling options, as in `jfp8kv.SamplingParams`. Seeds are derived from the run's `seed`."""

    stop: str | list[str] = FROM_OPTION
    json_schema: dict[str, Any] | str | None = FROM_OPTION

    def options(self) -> SamplingParams:
        """Return the options."""
        return SamplingParams.from_fields(**self.given())


@keys_from(ChatOptions)
class ChatSection(OptionsSection):
    """How messages become a prompt, as in `jfp8kv.ChatOptions`."""

    tools: list[dict[str, Any]] | None = FROM_OPTION
    documents: list[dict[str, Any]] | None = FROM_OPTION
    chat_template_kwargs: dict[str, Any] | None = FROM_OPTION


@keys_from(CalibrationOptions, omit=("kv_dtype", "max_model_len"))
class CalibrationSection(OptionsSection):
    """Calibration options, as in `jfp8kv.calibrate`."""

    def options(self) -> CalibrationOptions:
        """Return the options, with defaults for those outside this section."""
        return CalibrationOptions.from_fields(**self.given())


class CalibrationRun(CalibrationSection):
    """A calibration before the run, on the prompts of another file."""

    input: Input
    """The rows to calibrate on; the prompt templates of the config apply to them."""


class CalibrateFirst(Section):
    """Scales that are calibrated before the run and stored next to the output."""

    calibrate: CalibrationRun
    """The prompts and the options of the calibration."""


@keys_from(CompareOptions, omit=("max_model_len",))
class ComparisonSection(OptionsSection):
    """The caches to compare, as in `jfp8kv.compare`."""

    kv_dtypes: list[str] = FROM_OPTION
    kv_scales: list[str] = FROM_OPTION
    calibration: Input | None = None
    """Rows to calibrate scales on. They must not be the rows of the input."""

    def options(self) -> CompareOptions:
        """Return the options."""
        return CompareOptions.from_fields(**self.given())


class KVByLayer(Section):
    """Formats of the KV cache by layer."""

    default: str = "auto"
    """The format of the layers that are not skipped."""
    skip: list[int | str] = []
    """Layers by number (negative from the end), or "sliding_window" or "full_attention"."""
    skip_dtype: str = "bfloat16"
    """The format of the skipped layers."""


class RaySection(Section):
    """The workers of a Ray cluster. Each has the whole model and reads the input by its path."""

    workers: int = Field(default=1, ge=1)
    """Number of workers."""
    gpus: float = Field(default=0, ge=0)
    """GPUs per worker."""
    cpus: float = Field(default=1, ge=0)
    """CPUs per worker."""
    rows_per_block: int = Field(default=256, ge=1)
    """Rows that a worker takes at a time; they run again if it dies."""


def _form(given: Any) -> str | None:
    """Return the tag of a value: a name, a list or a mapping."""
    match given:
        case str():
            return "name"
        case list():
            return "list"
        case dict() | Section():
            return "mapping"
    return None


KVDtypeKey = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[list[str], Tag("list")]
    | Annotated[KVByLayer, Tag("mapping")],
    Discriminator(_form),
]
KVScalesKey = Annotated[
    Annotated[str, Tag("name")] | Annotated[CalibrateFirst, Tag("mapping")], Discriminator(_form)
]


@keys_from(EngineOptions, only=CONFIG_KEYS)
class Config(Section):
    """A run of `jfp8kv batch`: a file of rows through a model, and a file of results."""

    task: Task = "generate"
    """Generate completions, score given ones, calibrate FP8 scales, or compare caches."""
    model: str
    """A Hugging Face folder, a .gguf file or a hub id."""
    dtype: WeightsDtypeName | None = FROM_OPTION
    strict: bool = FROM_OPTION
    kv_dtype: KVDtypeKey = FROM_OPTION
    """Format of the KV cache: a name, a list by layer, `default` and `skip`, or a KVPlan file."""
    kv_scales: KVScalesKey = FROM_OPTION
    """Scales of an FP8 cache: auto, checkpoint, unit, token_head, a path, or `calibrate`."""
    engine: EngineSection = EngineSection()
    """Limits of the engine."""
    sampling: SamplingSection = SamplingSection()
    """Sampling options."""
    prompt: str | None = None
    """A Jinja template over the fields of the row. By default the row has the prompt."""
    messages: list[MessageTemplate] | None = None
    """A conversation instead of a prompt, for models with a chat template."""
    chat: ChatSection = ChatSection()
    """Chat options of messages. Fields tools, documents and chat_template_kwargs of a row win."""
    completion: str | None = None
    """For score: a template of the completion. Without it the whole prompt is scored."""
    input: Input
    """The rows: a path, or a path and a format."""
    output: Output
    """The results: a path, or a path and options."""
    calibration: CalibrationSection = CalibrationSection()
    """For calibrate: its options."""
    comparison: ComparisonSection = ComparisonSection()
    """For compare: the caches to compare."""
    seed: int = FROM_OPTION
    """The seed of the run. Each row's seed is derived from it and the row number."""
    shard: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    """[i, n]: run shard i of n, counted from 0. `jfp8kv batch --merge` joins their outputs."""
    runner: Literal["local", "ray"] = "local"
    """Where the engine runs: in this process, or in the workers of a Ray cluster."""
    ray: RaySection = RaySection()
    """For runner ray: its workers."""


def fp8_format(config: Config) -> str:
    """Return the FP8 format of the cache. Raises `ConfigError` unless there is exactly one."""
    given = config.kv_dtype
    if isinstance(given, KVByLayer):
        names = [given.default]
    else:
        names = [given] if isinstance(given, str) else given
    formats = {name for name in names if name in FP8_NAMES}
    if len(formats) != 1:
        found = " and ".join(sorted(formats or set(names)))
        raise ConfigError(f"kv_dtype is {found}: scales are for one of {', '.join(FP8_NAMES)}.")
    return formats.pop()


def calibration_options(config: Config, section: CalibrationSection) -> CalibrationOptions:
    """Return the options of a calibration, with the FP8 format and the limits of the config.

    Raises `ConfigError` for an invalid combination of options.
    """
    max_model_len = config.engine.options().max_model_len
    return CalibrationOptions.from_fields(
        kv_dtype=fp8_format(config), max_model_len=max_model_len, **section.given()
    )
