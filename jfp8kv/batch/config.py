"""What a batch config may say, key by key: the models that check it, and that print as JSON Schema.

Each key's sentence is here and nowhere else. Values that the library checks itself (formats, sampling) are checked there, by
`check`, so that every range is said once.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)

TASKS = ("generate", "score", "calibrate", "compare")


class Section(BaseModel):
    """A mapping that takes no key it does not know and no value of another type."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


Name = Annotated[str, AfterValidator(os.path.expanduser)]


def _as_path(given: Any) -> Any:
    """`input: FILE` for `input: {path: FILE}`."""
    return {"path": given} if isinstance(given, str) else given


def _kind(given: Any) -> str | None:
    """Which of its forms a value has."""
    known = {
        str: "name",
        list: "list",
        dict: "mapping",
        KVByLayer: "mapping",
        CalibrateFirst: "mapping",
    }
    return known.get(type(given))


class Engine(Section):
    """What the engine may take; what is left out is as for `jfp8kv.LLM`."""

    kv_cache_memory: int | str | None = None
    """Bytes of the KV cache, such as 2GiB. Left out: a share of what is free on the device."""
    max_model_len: int | None = None
    """Most tokens of a row, prompt and output. Left out: what the model was trained for."""
    max_num_seqs: int | None = Field(None, ge=1)
    """Most texts that run at once. Left out: 64, or as many as max_num_batched_tokens has room for."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Prompt tokens per dispatch. Left out: 512 on a CPU and 2048 elsewhere."""
    page_size: int = Field(64, ge=1)
    """Tokens per page of the cache."""
    attention: Literal["pallas", "pallas_interpret", "reference", "xla"] | None = None
    """What attends. Left out: the fastest that runs."""
    prefix_caching: bool = True
    """Whether texts that begin alike share what is cached of their beginning."""
    prompt_lookup: int = Field(0, ge=0)
    """Tokens to guess ahead where a text has said its last words before; 0 guesses none."""


class Sampling(Section):
    """How texts are continued; what is left out is as for `jfp8kv.SamplingParams`. Seeds come from the run's `seed`."""

    max_tokens: int | None = None
    """Most tokens to make (128)."""
    temperature: float | None = None
    """0 takes the likeliest token each time (1.0)."""
    top_k: int | None = None
    """Sample from this many of the likeliest tokens; 0 is all."""
    top_p: float | None = None
    """Sample from the likeliest tokens that hold this share of the probability."""
    min_p: float | None = None
    """Sample from tokens at least this share as likely as the likeliest."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of tokens that came before."""
    presence_penalty: float | None = None
    """Subtracted from the logit of a token that the output holds."""
    frequency_penalty: float | None = None
    """Subtracted for each time that the output holds the token."""
    stop: str | list[str] | None = None
    """End the text before one of these."""
    stop_token_ids: list[int] | None = None
    """End the text at one of these tokens."""
    include_stop_str_in_output: bool | None = None
    """End the text with that string rather than before it."""
    ignore_eos: bool | None = None
    """Go on past the model's own end of text."""
    n: int | None = None
    """Continuations of each prompt; `text` is then a list."""
    best_of: int | None = None
    """Make so many continuations and keep the `n` likeliest."""
    logprobs: int | None = None
    """Keep the log-probability of each token made and of that many likeliest ones."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of token ids."""
    min_tokens: int | None = None
    """No end before so many tokens."""

    json_schema: dict[str, Any] | str | None = None
    """The text is JSON that satisfies this schema."""
    regex: str | None = None
    """The text is a full match of this regular expression."""
    choice: list[str] | None = None
    """The text is one of these."""
    grammar: str | None = None
    """The text is derived from this grammar (Lark, with llguidance's extensions)."""

    def given(self) -> dict[str, Any]:
        """What the config says, by name."""
        return self.model_dump(exclude_none=True)


class Message(Section):
    """One message of a conversation; its content is a template."""

    role: str
    """"system", "user", "assistant", or what else the model's chat template knows."""
    content: str
    """A Jinja template over the row's fields."""


class KVByLayer(Section):
    """Formats of the cache by layer."""

    default: str = "auto"
    """Of the layers that are not skipped."""
    skip: list[int | str] = []
    """Layers by number (from the end if negative), or "sliding_window" or "full_attention" for all of a kind."""
    skip_dtype: str = "bfloat16"
    """Of the layers that are skipped."""


class Observed(Section):
    """How scales are found, as in `jfp8kv.calibrate`."""

    granularity: Literal["tensor", "head", "channel"] = "head"
    """What shares a scale in a layer."""
    observer: Literal["amax", "percentile", "mse"] = "amax"
    """How values become a scale."""
    percentile: float | None = None
    """Of magnitudes that need no clipping, for that observer."""
    window: int | None = None
    """Cut prompts into pieces of so many tokens."""
    k_offset: bool = False
    """Store keys less a constant: for models with large K biases."""
    headroom: float = 1.0
    """Times the largest value seen that scales hold."""


class File(Section):
    """A file of rows."""

    path: Name
    """Where it is, from the folder in which the command is started."""
    format: Literal["auto", "jsonl", "csv", "parquet", "lines", "openai"] = "auto"
    """"auto" goes by the name, and takes JSONL whose first row is an OpenAI batch request for that format."""


Input = Annotated[File, BeforeValidator(_as_path, json_schema_input_type=str | File)]


class Calibrated(Observed):
    """Scales found before the run, on prompts of another file."""

    input: Input
    """Rows whose prompts scales are found on, through this run's templates."""


class CalibrateFirst(Section):
    """Scales that the run finds for itself before it begins; they are kept beside the output."""

    calibrate: Calibrated
    """On what, and how."""


class Output(Section):
    """Where results go: each row's fields and its result."""

    path: Name
    """The file to write; while it is being made, finished rows are in PATH.partial."""
    format: Literal["auto", "jsonl", "parquet", "openai"] = "auto"
    """"auto" goes by the name; OpenAI batch requests get OpenAI's format."""
    unordered: bool = False
    """Keep the order in which rows finished, not the input's."""
    prefix: str = ""
    """Before the names of results (text, prompt_tokens, ...), where rows have such fields already."""


class Comparison(Section):
    """What caches are compared, as in `jfp8kv.compare`."""

    kv_dtypes: list[str] = ["bfloat16", "fp8_e4m3", "fp8_e5m2"]
    """Formats to compare with the float32 cache."""
    kv_scales: list[str] = ["auto", "token_head"]
    """Of the FP8 ones: "auto", "unit", "token_head", "checkpoint", files; "tensor", "head" or "channel" are calibrated."""
    calibration: Input | None = None
    """Texts to calibrate scales on; not those of the input."""
    window: int | None = None
    """Cut texts into pieces of so many tokens."""
    needle_lengths: list[int] | None = None
    """Tokens of the haystacks; [] leaves that task out."""
    needle_depths: list[float] | None = None
    """Where the needle is, from 0 to 1."""


class Ray(Section):
    """The workers of a Ray cluster; each holds the whole model, and reads the input by its path."""

    workers: int = Field(1, ge=1)
    """How many there are."""
    gpus: float = Field(0, ge=0)
    """Of each."""
    cpus: float = Field(1, ge=0)
    """Of each."""
    rows_per_block: int = Field(256, ge=1)
    """Rows that a worker takes at a time: what is asked again when it dies."""


KVDtype = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[list[str], Tag("list")]
    | Annotated[KVByLayer, Tag("mapping")],
    Discriminator(_kind),
]
KVScales = Annotated[
    Annotated[str, Tag("name")] | Annotated[CalibrateFirst, Tag("mapping")], Discriminator(_kind)
]


class Config(Section):
    """A run of `jfp8kv batch`: a file of rows through a model, and a file of results."""

    task: Literal["generate", "score", "calibrate", "compare"] = "generate"
    """Continue prompts, score given completions, find scales for an FP8 cache, or compare caches."""
    model: str
    """A Hugging Face folder, a .gguf file or a hub id."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the weights. Left out: the file's."""
    strict: bool = True
    """Whether KV scales that are missing or broken in the checkpoint are an error."""
    kv_dtype: KVDtype = "auto"
    """Of the KV cache: a format, one for each layer, formats by layer, or a file of a KVPlan."""
    kv_scales: KVScales = "auto"
    """Of an FP8 cache: auto, checkpoint, unit, token_head, a file of KVScales, or scales to be calibrated first."""
    engine: Engine = Engine()
    """Limits of the engine."""
    sampling: Sampling = Sampling()
    """How texts are continued."""
    prompt: str | None = None
    """A Jinja template over the row's fields. Left out, with messages: the row's `prompt`, `messages` or `text`."""
    messages: list[Message] | None = None
    """A conversation instead of a prompt, for models with a chat template."""
    completion: str | None = None
    """For score: a template of what is scored after the prompt. Left out: all of the prompt's text is scored."""
    input: Input
    """Where rows come from: a path, or a path and a format."""
    output: Annotated[Output, BeforeValidator(_as_path, json_schema_input_type=str | Output)]
    """Where results go: a path, or a path and how."""
    calibration: Observed = Observed()
    """For calibrate: how scales are found."""
    comparison: Comparison = Comparison()
    """For compare: which caches."""
    seed: int = Field(0, ge=0, lt=2**64)
    """What every row's own seed is made from, with the row's number."""
    shard: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    """[i, n]: of n shards, counted from 0, run the i-th; `jfp8kv batch --merge` joins their outputs."""
    runner: Literal["local", "ray"] = "local"
    """What runs the engine: this process, or the workers of a Ray cluster."""
    ray: Ray = Ray()
    """For runner ray: its workers."""
