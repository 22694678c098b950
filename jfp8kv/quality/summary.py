"""From sums to what is reported: means, standard errors, decibels and shares."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jfp8kv.cache.config import CacheConfig
from jfp8kv.engine.buckets import default_prefill_chunk, max_tokens_per_dispatch
from jfp8kv.quality.cache_choices import CacheChoice
from jfp8kv.quality.observers import LOWEST_OCTAVE, OCTAVES
from jfp8kv.quality.quality_report import CacheQuality, Magnitudes, ReconstructionError
from jfp8kv.quality.totals import Piece, Totals

PARTS = 4  # bins of magnitude to an octave


def summary(
    choice: CacheChoice, kv: CacheConfig, totals: Totals, base: Totals, depths: int, longest: int
) -> CacheQuality:
    """What is said of one cache; bytes are those of a text of `longest` tokens, as an engine for such texts counts them."""
    nll, _ = mean_and_error(totals.pieces, lambda piece: piece.nll)
    changes = [
        dataclasses.replace(a, nll=a.nll - b.nll)
        for a, b in zip(totals.pieces, base.pieces, strict=True)
    ]
    change, change_error = mean_and_error(changes, lambda piece: piece.nll)
    kl, kl_error = mean_and_error(totals.pieces, lambda piece: piece.kl)
    agreement, _ = mean_and_error(totals.pieces, lambda piece: piece.agreed)
    rows = (
        [totals.recall[i : i + depths] for i in range(0, len(totals.recall), depths)]
        if depths
        else []
    )
    served = dataclasses.replace(
        kv, max_tokens_per_dispatch=max_tokens_per_dispatch(default_prefill_chunk())
    )
    return CacheQuality(
        label=choice.label,
        kv_dtype=choice.dtype_label,
        kv_scales=choice.scales_label,
        layers=tuple(map(str, kv.specs)),
        bytes_per_token=float(served.bytes_per_token(longest)),
        nll=nll,
        perplexity=_exp(nll),
        nll_change=change,
        nll_change_stderr=change_error,
        kl=kl,
        kl_stderr=kl_error,
        kl_largest=totals.kl_largest,
        top1_agreement=agreement,
        needle_recall=tuple(map(tuple, rows)),
        k=_kept(kv, totals, 0),
        v=_kept(kv, totals, 1),
    )


def mean_and_error(
    pieces: Sequence[Piece], of: Callable[[Piece], float]
) -> tuple[float, float | None]:
    """The mean by token of a sum that each piece has, and its standard error; None for one piece.

    Tokens of a text depend on each other, so pieces are what is drawn. They differ in length: with s_i for the sums, n_i for
    the tokens and r = sum s / sum n, the error of such a ratio is sqrt(m / (m - 1) sum (s_i - r n_i)^2) / sum n, which for
    equal lengths is that of a mean (Cochran, Sampling Techniques, third edition, section 6.4).
    """
    sums = np.array([of(piece) for piece in pieces], np.float64)
    counts = np.array([piece.count for piece in pieces], np.float64)
    mean = sums.sum() / counts.sum()
    if len(pieces) < 2:
        return float(mean), None
    spread = np.sum((sums - mean * counts) ** 2) * len(pieces) / (len(pieces) - 1)
    return float(mean), float(np.sqrt(spread) / counts.sum())


def _exp(x: float) -> float:
    """Infinite for what is too large."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def _kept(kv: CacheConfig, totals: Totals, kind: int) -> ReconstructionError:
    signal, noise, clipped, flushed = (
        totals.fidelity[name][:, kind] for name in ("signal", "noise", "clipped", "flushed")
    )  # [layers, kv_heads]
    values = totals.tokens * kv.config.head_dim  # of one head
    return ReconstructionError(
        snr_db=_tuple(decibels(signal.sum(axis=1), noise.sum(axis=1))),
        clipped=_tuple(clipped.mean(axis=1) / values),
        flushed=_tuple(flushed.mean(axis=1) / values),
        snr_db_by_head=tuple(map(_tuple, decibels(signal, noise))),
        clipped_by_head=tuple(map(_tuple, clipped / values)),
        flushed_by_head=tuple(map(_tuple, flushed / values)),
        limits=_limits(kv, kind),
    )


def decibels(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """10 log10(signal / noise); infinite where there is no noise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(noise == 0, np.inf, 10 * np.log10(signal / noise))


def _limits(kv: CacheConfig, kind: int) -> tuple[tuple[float, float] | None, ...]:
    """The smallest and largest magnitude of each layer, the median of those that its scales give; None where it has no static
    ones, or stores keys less an offset, whose magnitudes are others."""
    if kv.scales is None or (kind == 0 and kv.scales.k_offset is not None):
        return (None,) * len(kv.specs)
    medians = np.median((kv.scales.v if kind else kv.scales.k).astype(np.float64), axis=(1, 2))
    return tuple(
        None
        if kind.dynamic
        else (float(kind.fmt.smallest_subnormal * scale), float(kind.fmt.largest * scale))
        for kind, scale in zip(kv.specs, medians, strict=True)
    )


def magnitudes_of(base: Totals) -> Magnitudes:
    """The histogram of the float32 cache's keys and values, a few bins to an octave."""
    assert base.magnitudes is not None, "the first cache watches magnitudes"
    counts = base.magnitudes.counts[:, :, 0, 0]  # [layers, kinds, bins]
    coarse = counts.reshape(*counts.shape[:2], OCTAVES * PARTS, -1).sum(axis=-1)
    return Magnitudes(
        LOWEST_OCTAVE,
        PARTS,
        *(tuple(tuple(row) for row in coarse[:, kind].tolist()) for kind in (0, 1)),
    )


def _tuple(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())
