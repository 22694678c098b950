"""`jfp8kv export`, run in this process: the folder, the summary line, errors and exit status."""

from pathlib import Path

import numpy as np
import pytest

import jfp8kv

MODEL = Path(__file__).parent.parent / "references" / "llama_bf16"


def scales_file(path, *shape):
    k, v = np.random.default_rng(0).uniform(0.1, 1, (2, *shape))
    jfp8kv.KVScales(k, v).save(path)
    return path


def test_export_writes_scales_from_a_file_and_prints_a_summary(run, tmp_path):
    scales, out = scales_file(tmp_path / "scales.safetensors", 2, 2, 1), tmp_path / "out"
    status, stdout, stderr = run("export", MODEL, out, "--kv-scales", scales, "--dtype", "float32")
    assert (status, stdout) == (0, "")
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    assert (
        stderr
        == f"jfp8kv: wrote {out}: 5 files, {size:.1f} MB, weights float32, KV scales per head\n"
    )
    back = jfp8kv.load(out)
    assert (
        back.dtype == np.float32
        and back.kv_scales.granularity == "head"
        and back.config.kv_cache_dtype == "fp8_e4m3"
    )
    assert run("export", out, tmp_path / "again", "--quiet") == (0, "", "")
    assert np.array_equal(jfp8kv.load(tmp_path / "again").kv_scales.k, back.kv_scales.k)


@pytest.mark.filterwarnings("always")
def test_scales_that_the_layout_cannot_express_give_a_warning(run, tmp_path):
    scales = scales_file(tmp_path / "scales.safetensors", 2, 2, 16)
    status, _, stderr = run("export", MODEL, tmp_path / "out", "--kv-scales", scales)
    warned, wrote = stderr.splitlines()
    assert status == 0 and warned.startswith(
        "jfp8kv: warning: The layout 'compressed-tensors' cannot express channel scales"
    )
    assert wrote.endswith("weights bfloat16, KV scales per channel")


def test_the_summary_says_when_there_are_no_scales(run, tmp_path):
    status, _, stderr = run("export", MODEL, tmp_path / "out")
    assert status == 0 and stderr.endswith("weights bfloat16, no KV scales\n")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((MODEL, MODEL), f"FOLDER {MODEL}: exists and is not empty"),
        ((MODEL, MODEL / "config.json"), "config.json: exists and is not empty"),
        (
            (MODEL, "OUT", "--layout", "modelopt"),
            "--layout='modelopt': must be one of 'compressed-tensors'.",
        ),
        ((MODEL, "OUT", "--kv-scales", MODEL / "config.json"), "not a KVScales file"),
        ((MODEL, "OUT", "--kv-scales", "OTHER"), "layers=2, kv_heads=2, head_dim=16"),
        ((MODEL, "OUT", "--dtype", "int8"), "dtype='int8'"),
        (
            (MODEL, "OUT", "--kv-scale", "x"),
            "unknown option --kv-scale. Did you mean '--kv-scales'?",
        ),
        ((MODEL.parent / "nowhere", "OUT"), "nowhere: no such file or folder"),
        ((MODEL,), "the following arguments are required: FOLDER"),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(run, tmp_path, argv, named):
    files = {"OUT": tmp_path / "out", "OTHER": scales_file(tmp_path / "other.safetensors", 3, 1, 1)}
    status, stdout, stderr = run("export", *(files.get(arg, arg) for arg in argv))
    assert (status, stdout) == (2, "") and len(stderr.splitlines()) == 1
    assert stderr.startswith("jfp8kv: error: ") and named in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_help_lists_arguments_and_options(run):
    status, stdout, _ = run("export", "--help")
    assert status == 0 and all(
        part in stdout for part in ("MODEL FOLDER", "--kv-scales", "--layout", "--dtype")
    )
