"""Quality of SmolLM2 with bfloat16 and FP8 caches, with all kinds of scales, on a text.

    python -m benchmarks.quality --text FILE

The text is split into windows of `--window` tokens, each a separate sequence. Scales are calibrated
on `--calibration`, by default on the rest of the same text. Without `--text` the documentation of
this repository serves, which shows the difference between caches but not the quality of the model.
"""

import argparse
import sys

import numpy as np

import jfp8kv
from benchmarks._common import console, header, parser, smollm2, text_of

KV_DTYPES = "bfloat16,fp8_e4m3,fp8_e5m2"
KV_SCALES = "unit,tensor,head,channel,token_head"
TOLERANCE = 1e-4  # of the mean log-probability: two programs sum float32 in different orders


def verify(params: jfp8kv.Params, report: jfp8kv.QualityReport, windows: list[list[int]]) -> None:
    """Exit unless the float32 cache's mean log-probability equals that of `jfp8kv.score`."""
    scores = [
        jfp8kv.score(params, window, kv_dtype="float32") for window in windows if len(window) > 1
    ]
    expected = -np.concatenate(scores).astype(np.float64).mean()
    nll = report["float32"].nll
    if not abs(nll - expected) <= TOLERANCE * expected:
        sys.exit(
            f"compare finds {nll:.6f} nats per token and jfp8kv.score {expected:.6f}: nothing is "
            "reported."
        )


def arguments() -> argparse.Namespace:
    """Return the command line arguments."""
    options = parser(__doc__)
    options.add_argument("--text", help="a text file")
    options.add_argument("--calibration", help="a text file to calibrate scales on")
    options.add_argument("--window", type=int, default=1024, help="tokens of a window")
    options.add_argument(
        "--windows", type=int, default=6, help="number of windows, from the beginning of the text"
    )
    options.add_argument("--kv-dtypes", default=KV_DTYPES, help=f"default: {KV_DTYPES}")
    options.add_argument(
        "--kv-scales", default=KV_SCALES, help=f"of FP8 caches (default: {KV_SCALES})"
    )
    options.add_argument(
        "--no-needles", action="store_true", help="skip the needle test, which takes half the time"
    )
    options.add_argument("--plot", help="write the figure to a .png, .pdf or .svg file")
    return options.parse_args()


def main() -> None:
    """Measure and print."""
    given = arguments()
    header()
    params = jfp8kv.load(given.model or smollm2(), dtype="float32")
    ids = params.tokenizer.encode(text_of(given.text))
    tokens = given.window * given.windows
    other = ids[tokens:]
    if given.calibration:
        other = params.tokenizer.encode(text_of(given.calibration))
    windows = [ids[i : i + given.window] for i in range(0, min(tokens, len(ids)), given.window)]
    scales = given.kv_scales.split(",")
    calibrated = {"tensor", "head", "channel"} & set(scales)
    report = jfp8kv.compare(
        params,
        windows,
        kv_dtypes=given.kv_dtypes.split(","),
        kv_scales=scales,
        calibration=[other[:tokens]] if calibrated else None,
        window=given.window,
        needle_lengths=() if given.no_needles else None,
    )
    verify(params, report, windows)
    console.print(report)
    if calibrated:
        console.print(f"Scales are calibrated on {len(other[:tokens]):,} other tokens.")
    if given.plot:
        report.plot().savefig(given.plot, dpi=110)


if __name__ == "__main__":
    main()
