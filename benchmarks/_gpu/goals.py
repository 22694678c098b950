"""Performance goals of the kernels, compared with the measurements of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks._gpu.session import Row, Session

TENSOR = {"element": "e4m3", "scales": "tensor"}
CACHES = {
    "fp8": TENSOR,
    "dynamic": {"element": "e4m3", "scales": "token_head"},
    "bf16": {"element": "bf16"},
}
DECODE_SHAPE, PREFILL_SHAPE, WRITE_SHAPE = "64x8k", "1x8k", "decode of 64"


@dataclass(frozen=True)
class Goal:
    """A figure that must be at least `minimum` or at most `maximum`; None if not measured."""

    name: str
    measured: float | None
    minimum: float | None = None
    maximum: float | None = None
    form: str = "{:.2f}"

    @property
    def goal(self) -> str:
        """The limit as text."""
        if self.minimum is not None:
            return f">= {self.form.format(self.minimum)}"
        return f"<= {self.form.format(self.maximum)}"

    @property
    def status(self) -> str:
        """Return whether the goal is met, as text."""
        if self.measured is None:
            return "not measured"
        too_small = self.minimum is not None and self.measured < self.minimum
        too_large = self.maximum is not None and self.measured > self.maximum
        return "NOT MET" if too_small or too_large else "met"


def goals(session: Session) -> list[Goal]:
    """Return every goal with the measurement of this run."""

    def find(part: str, what: str, **wanted: Any) -> Row | None:
        found = session.rows(part, what=what, **wanted)
        return found[-1] if found else None

    def fastest(part: str, *names: str) -> Row | None:
        rows = [row for name in names if (row := find(part, name))]
        return min(rows, key=lambda row: row["us"], default=None)

    def attention(kernel: str, part: str, shape: str) -> dict[str, Row | None]:
        return {
            cache: find(part, kernel, shape=shape, **wanted) for cache, wanted in CACHES.items()
        }

    decode = attention("paged_decode", "decode", DECODE_SHAPE)
    prefill = attention("paged_prefill", "prefill", PREFILL_SHAPE)
    fp8, bf16 = decode["fp8"], decode["bf16"]
    jax_fp8 = find("peers", "jax paged_attention, FP8")
    peers = fastest("peers", "flashinfer, FP8", "fa3, FP8")
    write = find("write", "kv_write", shape=WRITE_SHAPE, **TENSOR)
    xla_write = find("write", "XLA quantize and scatter", shape=WRITE_SHAPE, **TENSOR)
    matmul = find("matmul", "layer_matmul", matrix="14336 x 4096", rows=64)
    xla_matmul = find("matmul", "XLA matmul", matrix="14336 x 4096", rows=64)
    engine_fp8 = find("end_to_end", "decode", kv_dtype="fp8_e4m3")
    engine_bf16 = find("end_to_end", "decode", kv_dtype="bfloat16")
    return [
        Goal(
            "decode, FP8, 64x8k, 32/8 heads of 128: fraction of copy bandwidth",
            figure(fp8, "fraction_of_copy"),
            minimum=0.85,
        ),
        Goal("  speedup over bfloat16 pages", ratio(bf16, fp8), minimum=1.85),
        Goal(
            "  speedup over jax's paged_attention, FP8 with scale pages",
            ratio(jax_fp8, fp8),
            minimum=2.0,
        ),
        Goal("  speedup over the best of FlashInfer and FA3, FP8", ratio(peers, fp8), minimum=1.0),
        Goal(
            "  token-head scales: time relative to tensor scales",
            ratio(decode["dynamic"], fp8),
            maximum=1.05,
        ),
        Goal(
            "prefill of 8k, FP8: TFLOP/s",
            figure(prefill["fp8"], "tflops"),
            minimum=350,
            form="{:.0f}",
        ),
        Goal(
            "  time relative to bfloat16 pages",
            ratio(prefill["fp8"], prefill["bf16"]),
            maximum=1.05,
        ),
        Goal(
            "kv_write of one token per request, 64 requests: us", figure(write, "us"), maximum=4.0
        ),
        Goal("  speedup over XLA's quantize and scatter", ratio(xla_write, write), minimum=1.0),
        Goal(
            "matmul of 64 rows by 14336 x 4096: fraction of copy bandwidth",
            figure(matmul, "fraction_of_copy"),
            minimum=0.85,
        ),
        Goal(
            "  speedup over XLA, which copies the matrix first",
            ratio(xla_matmul, matmul),
            minimum=2.0,
        ),
        Goal(
            "decode end to end, equal KV memory: FP8 tokens/s relative to bfloat16",
            ratio(engine_fp8, engine_bf16, "tokens_s"),
            minimum=1.7,
        ),
    ]


def figure(row: Row | None, name: str) -> float | None:
    """Return a figure of a row, or None."""
    return None if row is None else row.get(name)


def ratio(a: Row | None, b: Row | None, name: str = "us") -> float | None:
    """Return the ratio of a figure in two rows, or None."""
    numerator, denominator = figure(a, name), figure(b, name)
    return numerator / denominator if numerator is not None and denominator else None


def show(
    found: list[Goal],
    print_table: Callable[[str, list[str], list[list[str]]], None],
    *,
    dry_run: bool,
) -> None:
    """Print the table of goals."""
    rows = [
        [
            goal.name,
            goal.goal,
            "-" if goal.measured is None else goal.form.format(goal.measured),
            "-" if dry_run else goal.status,
        ]
        for goal in found
    ]
    title = "Goals; a dry run measures nothing" if dry_run else "Goals"
    print_table(title, ["", "goal", "measured", ""], rows)
