"""What runs the rows: requests in, results out as they are made, whatever went wrong with one of them in its place.

The engine is fed from an iterator, of which it takes only as many requests as keep it full: memory does not grow with the file.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from jfp8kv.batch.config import CalibrateFirst, Config, KVByLayer
from jfp8kv.batch.inputs import format_of
from jfp8kv.batch.plain import Request
from jfp8kv.batch.whole import scales_first
from jfp8kv.core.errors import ConfigError

Results = Iterator[
    tuple[int, Any]
]  # which of the requests, counted from 0, and its result or the error that it met


class Engine(Protocol):
    """What a run needs of an engine. `about` describes it, for the record; `counters` are of `llm.stats`, for the view."""

    about: dict[str, Any]

    def generate(self, requests: Iterable[Request]) -> Results: ...

    def score(self, requests: Iterable[Request]) -> Results: ...

    def token_text(self, token: int) -> str: ...

    def counters(self) -> dict[str, float]: ...


class Local:
    """A `jfp8kv.LLM` in this process, as the config asks for it. `scales`: where those that it calibrates first are kept."""

    def __init__(self, config: Config, scales: Path):
        from jfp8kv.functional import LLM

        asked = {
            name: value for name, value in config.engine.model_dump().items() if value is not None
        }
        if isinstance(config.kv_scales, CalibrateFirst):
            model, kv_scales = scales_first(config, scales)
        else:
            model, kv_scales = config.model, config.kv_scales
            asked |= {"dtype": config.dtype, "strict": config.strict}
        self.llm = LLM(
            model, kv_dtype=kv_dtype(config), kv_scales=kv_scales, seed=config.seed, **asked
        )
        self.about = about(self.llm)
        if (
            config.task == "generate" and format_of(config.input) != "openai"
        ):  # where a body may say otherwise
            self.llm.check(
                [0], **config.sampling.given()
            )  # what the shortest prompt cannot have is no row's fault

    def generate(self, requests: Iterable[Request]) -> Results:
        """Results as they are made. Requests that were in a step that failed run again alone: one of them may be why."""
        flying: dict[int, Request] = {}

        def asked() -> Iterator[tuple[Any, Any]]:
            for number, request in enumerate(requests):
                flying[number] = request
                yield request.prompt, request.sampling

        for number, result in self.llm.generate_iter(asked()):
            request = flying.pop(number)
            if isinstance(result, Exception) and not isinstance(result, ConfigError):
                result = _tried(
                    lambda request=request: self.llm.generate([request.prompt], **request.sampling)[
                        0
                    ]
                )
            yield number, result

    def score(self, requests: Iterable[Request]) -> Results:
        """Results, of texts of like length together."""
        return self.llm.score_iter((request.prompt, request.completion) for request in requests)

    def token_text(self, token: int) -> str:
        """The text of one token id."""
        tokenizer = self.llm.tokenizer
        return (
            f"<{token}>"
            if tokenizer is None
            else tokenizer.decode([token], skip_special_tokens=False)
        )

    def counters(self) -> dict[str, float]:
        """`llm.stats` by name."""
        return self.llm.stats.to_dict()


def kv_dtype(config: Config) -> Any:
    """The config's, as `LLM` takes it."""
    given = config.kv_dtype
    return given.model_dump() if isinstance(given, KVByLayer) else given


def about(llm: Any) -> dict[str, Any]:
    """What an engine came to be."""
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


def _tried(what: Callable[[], Any]) -> Any:
    """What came of it: a result, or the error that it met."""
    try:
        return what()
    except Exception as error:
        return error
