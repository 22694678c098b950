"""What the kernels are meant to reach, beside what was measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks._gpu.session import Row, Session

TENSOR = {"element": "e4m3", "scales": "tensor"}
MAIN, LONG, ONE = "64x8k", "1x8k", "decode of 64"


@dataclass(frozen=True)
class Goal:
    """A figure with its bound: at least `least`, or at most `most`; `got` is None where it was not measured."""

    what: str
    got: float | None
    least: float | None = None
    most: float | None = None
    form: str = "{:.2f}"

    @property
    def wanted(self) -> str:
        return (
            f">= {self.form.format(self.least)}"
            if self.least is not None
            else f"<= {self.form.format(self.most)}"
        )

    @property
    def met(self) -> str:
        if self.got is None:
            return "not measured"
        fine = (self.least is None or self.got >= self.least) and (
            self.most is None or self.got <= self.most
        )
        return "met" if fine else "NOT MET"


def goals(session: Session) -> list[Goal]:
    """Every goal, with what this run has to say about it."""

    def one(part: str, what: str, **wanted: Any) -> Row | None:
        found = session.rows(part, what=what, **wanted)
        return found[-1] if found else None

    def best(part: str, *peers: str) -> Row | None:
        return min(
            (row for peer in peers if (row := one(part, peer))),
            key=lambda row: row["us"],
            default=None,
        )

    decode = {
        kind: one("decode", "paged_decode", shape=MAIN, **kind_of)
        for kind, kind_of in KINDS.items()
    }
    prefill = {
        kind: one("prefill", "paged_prefill", shape=LONG, **kind_of)
        for kind, kind_of in KINDS.items()
    }
    fused, unfused = (
        one("write", what, shape=ONE, **TENSOR) for what in ("kv_write", "XLA quantize and scatter")
    )
    ends = {
        kv_dtype: one("end_to_end", "decode", kv_dtype=kv_dtype)
        for kv_dtype in ("bfloat16", "fp8_e4m3")
    }
    fp8, bf16, theirs = decode["fp8"], decode["bf16"], one("peers", "jax paged_attention, FP8")
    product, copied = (
        one("product", what, matrix="14336 x 4096", rows=64)
        for what in ("layer_matmul", "XLA product")
    )
    peers = best("peers", "flashinfer, FP8", "fa3, FP8")
    faster = ratio(ends["fp8_e4m3"], ends["bfloat16"], "tokens_s")
    return [
        Goal(
            "decode, FP8, 64x8k, 32/8 heads of 128: share of copy bandwidth",
            figure(fp8, "share_of_copy"),
            least=0.85,
        ),
        Goal("  against its own bfloat16 pages", ratio(bf16, fp8), least=1.85),
        Goal(
            "  against jax's paged_attention, FP8 with scale pages", ratio(theirs, fp8), least=2.0
        ),
        Goal("  against the best of FlashInfer and FA3, FP8", ratio(peers, fp8), least=1.0),
        Goal(
            "  token-head scales: time against tensor scales",
            ratio(decode["dynamic"], fp8),
            most=1.05,
        ),
        Goal(
            "prefill of 8k, FP8: TFLOP/s",
            figure(prefill["fp8"], "tflops"),
            least=350,
            form="{:.0f}",
        ),
        Goal("  time against bfloat16 pages", ratio(prefill["fp8"], prefill["bf16"]), most=1.05),
        Goal("kv_write of one token each of 64: us", figure(fused, "us"), most=4.0),
        Goal("  against XLA's quantize and scatter", ratio(unfused, fused), least=1.0),
        Goal(
            "product of 64 rows by 14336 x 4096: share of copy bandwidth",
            figure(product, "share_of_copy"),
            least=0.85,
        ),
        Goal("  against XLA's, which copies the matrix first", ratio(copied, product), least=2.0),
        Goal(
            "decode, end to end, equal KV memory: FP8 tokens/s against bfloat16", faster, least=1.7
        ),
    ]


KINDS = {
    "fp8": TENSOR,
    "dynamic": {"element": "e4m3", "scales": "token_head"},
    "bf16": {"element": "bf16"},
}


def figure(row: Row | None, name: str) -> float | None:
    return None if row is None else row.get(name)


def ratio(a: Row | None, b: Row | None, name: str = "us") -> float | None:
    """A figure of one row over another's."""
    one, other = figure(a, name), figure(b, name)
    return one / other if one is not None and other else None


def show(
    found: list[Goal],
    print_table: Callable[[str, list[str], list[list[str]]], None],
    *,
    dry_run: bool,
) -> None:
    """The table of goals."""
    rows = [
        [
            g.what,
            g.wanted,
            "-" if g.got is None else g.form.format(g.got),
            "-" if dry_run else g.met,
        ]
        for g in found
    ]
    title = "Goals; a dry run measures nothing" if dry_run else "Goals"
    print_table(title, ["", "wanted", "measured", ""], rows)
