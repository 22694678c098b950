"""The engine of a batch run: requests in, results out in the order in which they finish.

The engine takes requests from an iterator only while it has room, so memory does not grow with the
number of rows.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, Union

from jfp8kv.batch.config import CalibrateFirst, Config, KVByLayer
from jfp8kv.batch.dataset_tasks import load_calibrated
from jfp8kv.batch.requests import RowRequest
from jfp8kv.core.errors import ConfigError, Jfp8kvError

if TYPE_CHECKING:  # the engine is imported once the config is valid
    from jfp8kv.engine.options import KVDtype
    from jfp8kv.engine.request import RequestOutput
    from jfp8kv.engine.scoring import Scored
    from jfp8kv.llm import LLM

Result: TypeAlias = Union["RequestOutput", "Scored", Jfp8kvError]  # noqa: UP007
# The number of a request, counted from 0, and its result or error.
Results: TypeAlias = Generator[tuple[int, Result], None, None]
T = TypeVar("T")


class BatchEngine(Protocol):
    """The interface of an engine that runs rows.

    Attributes:
      description: device, formats and limits, for the manifest.
    """

    description: dict[str, Any]

    def generate(self, requests: Iterable[RowRequest]) -> Results:
        """Yield the completions of each request."""

    def score(self, requests: Iterable[RowRequest]) -> Results:
        """Yield the log-probabilities of each request."""

    def token_text(self, token: int) -> str:
        """Return the text of a token id."""

    def counters(self) -> dict[str, float]:
        """Return the counters of `llm.stats`, which the progress display shows."""


class LocalEngine:
    """A `jfp8kv.LLM` in this process.

    Args:
      config: the config of the run.
      scales: the file of the scales that the run calibrates first.
    """

    def __init__(self, config: Config, scales: Path):
        self.llm = _open_llm(config, scales)
        self.description = describe_engine(self.llm)
        # Sampling options that are invalid even for the shortest prompt are a mistake in the
        # config. OpenAI requests may override them.
        if config.task == "generate" and config.input.row_format != "openai":
            self.llm.check([0], **config.sampling.given())

    def generate(self, requests: Iterable[RowRequest]) -> Results:
        """Yield the completions of each request."""
        return _run(self.llm.generate_iter, requests, lambda r: (r.prompt, r.sampling))

    def score(self, requests: Iterable[RowRequest]) -> Results:
        """Yield the log-probabilities of each request; sequences of similar length run together."""
        return _run(self.llm.score_iter, requests, lambda r: (r.prompt, r.completion))

    def token_text(self, token: int) -> str:
        """Return the text of a token id."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            return f"<{token}>"
        return tokenizer.decode([token], skip_special_tokens=False)

    def counters(self) -> dict[str, float]:
        """Return `llm.stats` by name."""
        return self.llm.stats.to_dict()


def _run(
    run: Callable[[Iterable[T]], Iterator[tuple[int, Result]]],
    requests: Iterable[RowRequest],
    arguments: Callable[[RowRequest], T],
) -> Results:
    """Yield the result of each request.

    A failed step fails every request in it. Each of them runs again alone, so that only the request
    that causes the failure gets the error.
    """
    in_flight: dict[int, RowRequest] = {}

    def items() -> Iterator[T]:
        for number, request in enumerate(requests):
            in_flight[number] = request
            yield arguments(request)

    for number, result in run(items()):
        request = in_flight.pop(number)
        if isinstance(result, Jfp8kvError) and not isinstance(result, ConfigError):
            ((_, result),) = run([arguments(request)])
        yield number, result


def _open_llm(config: Config, scales: Path) -> "LLM":
    """Return the `LLM` of the config. Scales that are calibrated first are stored in `scales`."""
    from jfp8kv.llm import LLM

    fields = config.engine.given()
    kv_dtype = engine_kv_dtype(config)
    if isinstance(config.kv_scales, CalibrateFirst):
        params, kv_scales = load_calibrated(config, scales)
        return LLM(params, kv_dtype=kv_dtype, kv_scales=kv_scales, seed=config.seed, **fields)
    return LLM(
        config.model,
        dtype=config.dtype,
        strict=config.strict,
        kv_dtype=kv_dtype,
        kv_scales=config.kv_scales,
        seed=config.seed,
        **fields,
    )


def engine_kv_dtype(config: Config) -> "KVDtype":
    """Return the `kv_dtype` of the config in the form that `LLM` takes."""
    given = config.kv_dtype
    return given.model_dump() if isinstance(given, KVByLayer) else given


def describe_engine(llm: "LLM") -> dict[str, Any]:
    """Return the device, the formats and the limits of an engine."""
    import jax

    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "kv_dtype": llm.kv_dtype,
        "attention": llm.attention,
        "max_model_len": llm.max_model_len,
        "kv_bytes_per_token": llm.stats.kv_bytes_per_token,
        "kv_tokens_capacity": llm.stats.kv_tokens_capacity,
    }
