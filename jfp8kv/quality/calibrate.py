"""Static FP8 scales from data: run sample prompts, observe keys and values, choose scales.

The forward pass is that of the engine, over a small float32 cache. Prompts run one at a time, in
chunks whose widths depend only on the length of the prompt. So the statistics of a prompt do not
depend on other prompts, to the last bit. Merging statistics is exact, so the order of the prompts
changes nothing. Memory (statistics, and a cache for one prompt) does not grow with their number.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, Unpack

import numpy as np

from jfp8kv.attention import xla
from jfp8kv.cache.config import context_length
from jfp8kv.cache.pool import KVPool
from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint.load import ModelLike, as_params
from jfp8kv.core.compilation_cache import use_compilation_cache
from jfp8kv.core.errors import ConfigError
from jfp8kv.core.formats import KVFormat, kv_format
from jfp8kv.core.options import takes
from jfp8kv.engine.buckets import Buckets, default_prefill_chunk, step_token_budget
from jfp8kv.engine.step import StepModel
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.key_bias import mean_rotated_bias
from jfp8kv.models.linear import backend_weights
from jfp8kv.models.params import Params
from jfp8kv.quality.data import Prompts, TokenSpool, Windows, iterate_prompts, split_prompts
from jfp8kv.quality.key_offsets import CachedKeys, CenteredKeys, KeysBeforeRope, KeyTransform
from jfp8kv.quality.keywords import CalibrationFields
from jfp8kv.quality.observe import (
    PAGE_SIZE,
    CalibrationChunk,
    new_float32_pool,
    run_calibration_step,
)
from jfp8kv.quality.observers import (
    AmaxObserver,
    HistogramObserver,
    MeanObserver,
    MSEObserver,
    Observer,
    ScaleShape,
)
from jfp8kv.quality.options import CalibrationOptions, Granularity

MIN_PROGRESS_PROMPTS = 9  # fewer prompts run without a progress bar
MIN_POOL_TOKENS = 512  # the cache of one sequence has this many tokens, or 4, 16, ... times as many
ObserverT = TypeVar("ObserverT", bound=Observer)


@takes(CalibrationOptions)
def calibrate(
    params: ModelLike,
    prompts: Prompts,
    *,
    progress: bool | None = None,
    **options: Unpack[CalibrationFields],
) -> KVScales:
    """Return static scales for an FP8 cache, from the keys (after RoPE) and values of `prompts`.

    The scales do not depend on the order of the prompts, to the last bit. Memory does not grow with
    their number: an iterable is consumed one prompt at a time. Channels that are always zero get
    scale 1.

        scales = jfp8kv.calibrate(params, prompts, granularity="channel", headroom=2.0)
        scales.save("scales.safetensors")
        jfp8kv.generate(params, "Once", kv_dtype="fp8_e4m3", kv_scales=scales)

    Args:
      params: a `Params`, or a path or hub id as for `load`.
      prompts: as for `generate`, or any iterable of such prompts.
      progress: show a progress bar; None shows one on a terminal for more than 8 prompts.
      **options: the fields of `CalibrationOptions`, listed below.

    Returns:
      Scales to give as `kv_scales` to `generate` or `LLM`, or to save.

    Raises:
      ConfigError: no prompts; a prompt that is empty, too long or of an unknown form; an invalid
        option; NaN or infinity among the keys or values of a layer.
      CheckpointError: a model that cannot be loaded.
    """
    checked = CalibrationOptions.from_fields(also=("progress",), **options)
    return run_calibration(params, prompts, checked, progress=progress).scales


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """Scales, and the number of prompts and tokens that they were computed from."""

    scales: KVScales
    prompts: int
    tokens: int


def run_calibration(
    params: ModelLike,
    prompts: Prompts,
    options: CalibrationOptions,
    *,
    progress: bool | None = None,
) -> CalibrationResult:
    """Return the result of `calibrate` with checked options, and the size of the data."""
    params = as_params(params)
    use_compilation_cache()
    max_tokens = _max_tokens(params.config, options)
    data, count = iterate_prompts(prompts)
    windows = split_prompts(data, params, max_model_len=max_tokens, window=options.window)
    calibrator = Calibrator(params, options.granularity)
    with TokenSpool() as spool:
        passes = _Passes(windows, spool, calibrator, count, progress)
        if options.k_offset:
            scales = _with_k_offset(passes, options, max_tokens)
        else:
            scales = _to_kv_scales(_scales_of_observer(passes, options), options)
    return CalibrationResult(scales, calibrator.prompts, calibrator.tokens)


@dataclasses.dataclass
class _Passes:
    """Passes over the same prompts: either `single`, or `first` and then `second`."""

    windows: Iterable[Windows]
    spool: TokenSpool
    calibrator: "Calibrator"
    count: int | None
    progress: bool | None

    def single(self) -> Iterable[Windows]:
        """Return the prompts, without recording them."""
        return self._bar(self.windows, self.count, None)

    def first(self, description: str) -> Iterable[Windows]:
        """Return the prompts, and record their token ids for `second`."""
        return self._bar(self.spool.record(self.windows), self.count, description)

    def second(self, description: str) -> Iterable[Windows]:
        """Return the recorded prompts."""
        return self._bar(self.spool.replay(), self.calibrator.prompts, description)

    def _bar(
        self, prompts: Iterable[Windows], count: int | None, description: str | None
    ) -> Iterable[Windows]:
        from tqdm import tqdm

        hidden: bool | None = None  # tqdm then shows a bar if stderr is a terminal
        if self.progress is not None:
            hidden = not self.progress
        elif count is not None and count < MIN_PROGRESS_PROMPTS:
            hidden = True
        bar: Iterable[Windows] = tqdm(
            prompts, total=count, desc=description, unit="prompt", disable=hidden
        )
        return bar


def _scales_of_observer(passes: _Passes, options: CalibrationOptions) -> np.ndarray:
    """Return the scales that `options.observer` chooses, `[layers, kinds, heads, channels]`."""
    calibrator = passes.calibrator
    shape = calibrator.shape
    fmt = kv_format(options.kv_dtype)
    if options.observer == "percentile":
        histogram = calibrator.run(passes.single(), HistogramObserver.empty(shape))
        return histogram.scales(fmt, options.percent)
    if options.observer == "mse":
        amax = calibrator.run(passes.first("amax"), AmaxObserver.empty(shape))
        errors = calibrator.run(passes.second("errors"), MSEObserver.of(amax, fmt))
        return errors.scales()
    amax = calibrator.run(passes.single(), AmaxObserver.empty(shape))
    return amax.scales(fmt, options.headroom)


def _with_k_offset(passes: _Passes, options: CalibrationOptions, max_tokens: int) -> KVScales:
    """Return K offsets from a first pass, and scales for keys without them from a second pass."""
    calibrator = passes.calibrator
    fmt = kv_format(options.kv_dtype)
    channels = calibrator.shape.at("channel")
    sums = calibrator.run(passes.first("means"), MeanObserver.empty(channels), KeysBeforeRope())
    mean = sums.mean_keys(calibrator.tokens)
    offset, distance = mean_rotated_bias(calibrator.model.config, mean, max_tokens)
    centered = calibrator.run(
        passes.second("amax"), AmaxObserver.empty(channels), CenteredKeys(mean)
    )
    amax = centered.widen_keys(distance).coarsen(calibrator.shape)
    return _to_kv_scales(amax.scales(fmt, options.headroom), options, offset)


def _to_kv_scales(
    chosen: np.ndarray, options: CalibrationOptions, k_offset: np.ndarray | None = None
) -> KVScales:
    return KVScales(chosen[:, 0], chosen[:, 1], k_offset=k_offset, kv_dtype=options.kv_dtype)


def _max_tokens(config: ModelConfig, options: CalibrationOptions) -> int:
    """Return the maximum length of a sequence. Raises `ConfigError` beyond the model's limit."""
    if options.window is not None and options.window > config.max_len:
        raise ConfigError(
            f"window={options.window}: this model was trained for at most {config.max_len} tokens."
        )
    return context_length(config, options.max_model_len)


def amax_scales(
    amax: AmaxObserver,
    shape: ScaleShape,
    granularity: Granularity,
    formats: Sequence[KVFormat],
    headroom: float = 1.0,
) -> KVScales:
    """Return scales of any granularity from the amax of each channel, for the format of each layer.

    Equal to `calibrate` with that granularity, bit for bit. Layers that are not FP8 get scale 1.
    """
    coarse = amax.coarsen(shape.at(granularity))
    chosen = np.ones_like(coarse.amax)
    for fmt in dict.fromkeys(fmt for fmt in formats if fmt.is_fp8):
        layers = [layer for layer, each in enumerate(formats) if each is fmt]
        chosen[layers] = coarse.scales(fmt, headroom)[layers]
    uniform = formats[0].name if len(set(formats)) == 1 else None
    return KVScales(chosen[:, 0], chosen[:, 1], kv_dtype=uniform)


class Calibrator:
    """Runs prompts through the model, one at a time, and collects statistics on the host.

    Attributes:
      prompts, tokens: the size of the data of the last run.
    """

    def __init__(self, params: Params, granularity: Granularity):
        config = params.config
        self.shape = ScaleShape(config.layers, config.kv_heads, config.head_dim, granularity)
        self.model = StepModel(config, params.dtype, xla.attention)
        self.weights = backend_weights(params.tree, params.dtype)
        self.buckets = Buckets(1, step_token_budget(default_prefill_chunk(), 1))
        self.prompts = 0
        self.tokens = 0
        self._pages: KVPool | None = None

    def run(
        self, prompts: Iterable[Windows], observer: ObserverT, transform: KeyTransform | None = None
    ) -> ObserverT:
        """Return the statistics of all windows of all prompts, on the host.

        Args:
          prompts: the windows of each prompt. Every window is a separate sequence.
          observer: an observer without values.
          transform: selects the observed keys; None observes those written to the cache.

        Raises `ConfigError` without prompts, and for NaN or infinity among the values.
        """
        transform = transform or CachedKeys()
        max_tokens = observer.max_tokens(self.shape)
        total: ObserverT | None = None
        pending = 0  # tokens in the statistics on the device
        self.prompts = 0
        self.tokens = 0
        for number, windows in enumerate(prompts):
            for chunk in (chunk for ids in windows for chunk in self._chunks(ids)):
                if pending and pending + len(chunk.tokens) > max_tokens:
                    total = _merged(total, observer)
                    observer = observer.reset()
                    pending = 0
                self._pages, observer = run_calibration_step(
                    self.model, self.weights, chunk, transform, (self._pages, observer)
                )
                pending += len(chunk.tokens)
            _require_finite(observer, number)
            self.prompts = number + 1
            self.tokens += sum(map(len, windows))
        if not self.prompts:
            raise ConfigError("prompts is empty: give at least one.")
        return _merged(total, observer)

    def _chunks(self, ids: list[int]) -> Iterator[CalibrationChunk]:
        """Yield the chunks of one sequence, after allocating a pool that it fits."""
        pool_tokens = MIN_POOL_TOKENS
        while pool_tokens < len(ids):
            pool_tokens *= 4
        if self._pages is None or self._pages.num_pages * PAGE_SIZE != pool_tokens:
            self._pages = None  # free the old pool before allocating the new one
            self._pages = new_float32_pool(self.model.config, pool_tokens)
        start = 0
        while start < len(ids):
            width = self.buckets.chunk(len(ids) - start)
            tokens = np.full(width, self.model.config.vocab, np.int32)
            end = min(start + width, len(ids))
            tokens[: end - start] = ids[start:end]
            yield CalibrationChunk(tokens, _int32(start), _int32(end), _int32(len(ids)))
            start = end


def _int32(value: int) -> np.ndarray:
    return np.array(value, np.int32)


def _merged(total: ObserverT | None, observer: ObserverT) -> ObserverT:
    on_host = observer.to_host()
    return on_host if total is None else total.merge(on_host)


def _require_finite(observer: Observer, prompt: int) -> None:
    """Raise `ConfigError`, naming the layer, if a key or value seen so far is NaN or infinite."""
    if isinstance(observer, MSEObserver):
        return  # the first pass checked these values
    assert isinstance(observer, AmaxObserver | MeanObserver | HistogramObserver)
    amax = np.asarray(observer.amax)
    bad = np.argwhere(~np.isfinite(amax))
    if len(bad):
        layer, kind, *_ = bad[0].tolist()
        value = "NaN" if np.isnan(amax[tuple(bad[0])]) else "an infinity"
        raise ConfigError(
            f"prompt {prompt} gave {value} among the {'KV'[kind]} of layer {layer}: no scale fits "
            "it; check the weights, or load them with dtype='float32'."
        )
