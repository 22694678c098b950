"""What SmolLM2 loses under bf16 and FP8 caches with every kind of scales, on a text: `jfp8kv.compare` as a benchmark.

    python -m benchmarks.quality --text FILE

The text is cut into windows of `--window` tokens, each a text of its own. Scales are calibrated on `--calibration`, by default
on what follows the windows in the same text. Without `--text` the documentation of this repository serves, which says something
of the difference between caches and nothing of the model.
"""

import sys

import numpy as np

import jfp8kv
from benchmarks._common import console, header, parser, smollm2, text_of

KV_DTYPES, KV_SCALES = "bfloat16,fp8_e4m3,fp8_e5m2", "unit,tensor,head,channel,token_head"
TOLERANCE = 1e-4  # of the mean log-probability: two programs round float32 sums in different orders


def verify(params: jfp8kv.Params, report: jfp8kv.QualityReport, windows: list[list[int]]) -> None:
    """Leave unless the float32 cache's mean log-probability is that of `jfp8kv.score`, which measures nothing else."""
    scores = [
        jfp8kv.score(params, window, kv_dtype="float32") for window in windows if len(window) > 1
    ]
    wanted, found = -np.concatenate(scores).astype(np.float64).mean(), report["float32"].nll
    if not abs(found - wanted) <= TOLERANCE * wanted:
        sys.exit(
            f"compare finds {found:.6f} nats per token where jfp8kv.score finds {wanted:.6f}: nothing is reported."
        )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--text", help="a text file")
    arguments.add_argument(
        "--calibration", help="a text file to calibrate scales on; as many windows of it are used"
    )
    arguments.add_argument("--window", type=int, default=1024, help="tokens of a window")
    arguments.add_argument(
        "--windows", type=int, default=6, help="how many windows, from the beginning of the text"
    )
    arguments.add_argument(
        "--kv-dtypes", default=KV_DTYPES, help=f"by commas (default {KV_DTYPES})"
    )
    arguments.add_argument(
        "--kv-scales", default=KV_SCALES, help=f"of FP8 caches, by commas (default {KV_SCALES})"
    )
    arguments.add_argument(
        "--no-needles",
        action="store_true",
        help="leave the needles out: they take half of the time",
    )
    arguments.add_argument("--plot", help="draw it, too: a .png, .pdf or .svg file")
    given = arguments.parse_args()
    header()
    params = jfp8kv.load(given.model or smollm2(), dtype="float32")
    ids, most = params.tokenizer.encode(text_of(given.text)), given.window * given.windows
    other = params.tokenizer.encode(text_of(given.calibration)) if given.calibration else ids[most:]
    windows = [ids[i : i + given.window] for i in range(0, min(most, len(ids)), given.window)]
    scales = given.kv_scales.split(",")
    calibrated = {"tensor", "head", "channel"} & set(scales)
    report = jfp8kv.compare(
        params,
        windows,
        kv_dtypes=given.kv_dtypes.split(","),
        kv_scales=scales,
        calibration=[other[:most]] if calibrated else None,
        window=given.window,
        needle_lengths=() if given.no_needles else None,
    )
    verify(params, report, windows)
    console.print(report)
    if calibrated:
        console.print(f"Scales are calibrated on {len(other[:most]):,} other tokens.")
    if given.plot:
        report.plot().savefig(given.plot, dpi=110)


if __name__ == "__main__":
    main()
