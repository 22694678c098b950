"""What is added up while texts run through a cache: float64 and Python integers on the host."""

import dataclasses

import numpy as np

from jfp8kv.quality.metrics import Scores
from jfp8kv.quality.observers import HistogramObserver
from jfp8kv.quality.quantization_stats import QuantStats, Seen


@dataclasses.dataclass
class Piece:
    """MeanObserver over one text's predictions."""

    count: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0


class Totals:
    """All that was seen of one cache."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.tokens = 0  # whose keys and values were stored
        self.fidelity: dict[
            str, np.ndarray
        ] = {}  # the fields of `QuantStats`, `[layers, kinds, kv_heads]`
        self.magnitudes: HistogramObserver | None = None
        self.kl_largest = 0.0
        self.recall: list[float] = []  # by needle

    def begin(self) -> None:
        """A new text."""
        self.pieces.append(Piece())

    def add(self, found: Scores, seen: Seen, predicted: int, tokens: int) -> None:
        """A chunk of `tokens` tokens, of which the first `predicted` have one that follows."""
        piece = self.pieces[-1]
        piece.count += predicted
        piece.nll += float(np.sum(found.nll[:predicted], dtype=np.float64))
        piece.kl += float(np.sum(found.kl[:predicted], dtype=np.float64))
        piece.agreed += int(np.sum(found.agrees[:predicted]))
        self.kl_largest = float(np.max(found.kl[:predicted], initial=self.kl_largest))
        self.tokens += tokens
        self._add_fidelity(seen.fidelity)
        if seen.magnitudes is not None:
            new = seen.magnitudes.host()
            self.magnitudes = new if self.magnitudes is None else self.magnitudes.merge(new)

    def _add_fidelity(self, new: QuantStats) -> None:
        for field in dataclasses.fields(new):
            values = np.asarray(getattr(new, field.name), np.float64)
            self.fidelity[field.name] = self.fidelity.get(field.name, 0.0) + values
