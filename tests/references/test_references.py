"""The oracle agrees with PyTorch, in full precision and in FP8, and the references detect errors.

No torch here: `reference.npz` holds what it computed (README.md). The oracle works in float64 and
PyTorch worked in float32, whose rounding through two or three layers is a few 1e-6 of the logits;
1e-5 leaves room for little else.
"""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.references import oracle

HERE = Path(__file__).parent
CASES = sorted(folder.name for folder in HERE.glob("llama_*"))
FOLDERS = sorted(file.parent.name for file in HERE.glob("*/config.json"))
LARGEST_FOLDER_BYTES = 155_000
LARGEST_TOTAL_BYTES = 5_200_000
FLOAT32_ROUNDING = 1e-5
ALLOWED_IN_FLOAT32 = 2e-4  # of the library, whose products may be summed in any order


def relative_rms(x: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((x - expected) ** 2) / np.mean(expected**2)))


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest) -> Path:
    return HERE / request.param


def test_there_are_seven_cases() -> None:
    assert len(CASES) == 7


def folder_bytes(name: str) -> int:
    return sum(file.stat().st_size for file in (HERE / name).iterdir())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_small_and_has_a_reference_of_the_usual_shapes(name: str) -> None:
    config = json.loads((HERE / name / "config.json").read_text())
    vocab = config.get("text_config", config)["vocab_size"]
    reference = np.load(HERE / name / "reference.npz")
    shapes = {"tokens": (61,), "logits": (61, vocab), "greedy": (24,)}
    if "step_logits" in reference:
        shapes |= {"step_logits": (24, vocab), "greedy_uncached": (24,)}
        assert np.array_equal(reference["step_logits"].argmax(-1), reference["greedy"])
    for key, shape in shapes.items():
        assert reference[key].shape == shape
        assert reference[key].dtype == (np.float32 if "logits" in key else np.int32)
    assert np.isfinite(reference["logits"]).all()
    assert reference["logits"][-1].argmax() == reference["greedy"][0]
    assert list((HERE / name).glob("*.safetensors"))
    assert folder_bytes(name) <= LARGEST_FOLDER_BYTES


def test_all_folders_together_are_small_and_the_readme_has_a_row_for_each() -> None:
    readme = (HERE / "README.md").read_text()
    assert [name for name in FOLDERS if f"| `{name}` |" not in readme] == []
    assert sum(map(folder_bytes, FOLDERS)) <= LARGEST_TOTAL_BYTES


def test_the_oracle_gives_the_logits_of_pytorch(folder: Path) -> None:
    reference = np.load(folder / "reference.npz")
    assert (
        relative_rms(oracle.forward(folder, reference["tokens"]), reference["logits"])
        <= FLOAT32_ROUNDING
    )


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_the_oracle_gives_the_logits_of_pytorch_with_keys_and_values_rounded_to_fp8(
    folder: Path, fmt: str
) -> None:
    reference = np.load(folder / "reference.npz")
    expected = reference[f"last_logits_{fmt}"]
    logits = oracle.forward(folder, reference["tokens"], oracle.fp8_store(fmt))[-len(expected) :]
    assert relative_rms(logits, expected) <= FLOAT32_ROUNDING
    assert relative_rms(logits, reference["logits"][-len(expected) :]) > 0.03, (
        "rounding must be visible"
    )


@pytest.mark.parametrize("suffix", ["", "_e4m3", "_e5m2"])
def test_the_oracle_continues_as_pytorch_did(folder: Path, suffix: str) -> None:
    reference = np.load(folder / "reference.npz")
    store = oracle.fp8_store(suffix[1:]) if suffix else None
    expected = reference[f"greedy{suffix}"].tolist()
    assert oracle.greedy(folder, reference["tokens"], len(expected), store) == expected


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama_gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 12000.0}}),
        ("llama_mqa", {"rope_theta": 10000.0}),
        ("llama_mha_bias", {"rms_norm_eps": 1e-5}),
        ("llama_mha_bias", {"rope_theta": 12000.0}),
        ("llama_rope3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        (
            "llama_rope3",
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0}},
        ),
        ("llama_linear", {"rope_scaling": None}),
        ("llama_linear", {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama_linear", {"hidden_act": "silu"}),
        ("llama_sharded", {"rope_scaling": None}),
        ("llama_sharded", {"hidden_act": "gelu"}),
    ],
)
def test_a_setting_read_wrongly_would_be_seen(name: str, change: dict, tmp_path: Path) -> None:
    for file in (HERE / name).glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    config = json.loads((HERE / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    reference = np.load(HERE / name / "reference.npz")
    wrong = relative_rms(oracle.forward(tmp_path, reference["tokens"]), reference["logits"])
    assert wrong > ALLOWED_IN_FLOAT32


def test_the_store_sees_the_keys_and_the_values_of_every_layer_once() -> None:
    seen = []

    def store(x: np.ndarray, layer: int, which: str) -> np.ndarray:
        seen.append((layer, which, x.shape))
        return x

    tokens = np.load(HERE / "llama_gqa" / "reference.npz")["tokens"]
    oracle.forward(HERE / "llama_gqa", tokens, store)
    assert seen == [(layer, which, (61, 2, 16)) for layer in (0, 1) for which in "kv"]


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_rounding_takes_the_nearest_of_all_finite_numbers_and_the_even_one_of_two(fmt: str) -> None:
    dtype, largest = oracle.FORMATS[fmt]
    codes = np.arange(128, dtype=np.uint8)  # the positive half
    numbers = codes.view(dtype).astype(np.float64)
    numbers = numbers[np.isfinite(numbers)]
    assert numbers[-1] == largest
    ties = (numbers[:-1] + numbers[1:]) / 2
    even = np.where(codes[: len(ties)] % 2 == 0, numbers[:-1], numbers[1:])
    one = np.ones((1, 1), np.float32)
    for sign in (1, -1):
        np.testing.assert_array_equal(
            oracle.through_fp8(sign * numbers, one[0], fmt), sign * numbers
        )
        np.testing.assert_array_equal(oracle.through_fp8(sign * ties, one[0], fmt), sign * even)
        np.testing.assert_array_equal(
            oracle.through_fp8(sign * ties * (1 + 1e-6), one[0], fmt), sign * numbers[1:]
        )
        np.testing.assert_array_equal(
            oracle.through_fp8(sign * ties * (1 - 1e-6), one[0], fmt), sign * numbers[:-1]
        )
        np.testing.assert_array_equal(
            oracle.through_fp8(sign * np.array([2.0, 1e9]) * largest, one[0], fmt), sign * largest
        )


def test_scales_of_every_granularity_act_on_the_layer_head_and_channel_they_name() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 2, 4))
    for shape in [(), (1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 2, 4)]:
        scales = rng.uniform(0.001, 0.004, shape)  # small: some values are clipped
        full = np.broadcast_to(np.float32(scales), (3, 2, 4))
        stored = oracle.fp8_store("e4m3", k_scales=scales)(x, 1, "k")
        for t, head, channel in np.ndindex(x.shape):
            scale = full[1, head, channel]
            code = ml_dtypes.float8_e4m3fn(
                np.clip(np.float32(x[t, head, channel]) / scale, -448, 448)
            )
            assert stored[t, head, channel] == np.float32(code) * scale
        np.testing.assert_array_equal(
            oracle.fp8_store("e4m3", k_scales=scales)(x, 1, "v"),
            oracle.fp8_store("e4m3")(x, 1, "v"),
        )


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_a_dynamic_scale_is_the_smallest_power_of_two_that_keeps_its_token_and_head_in_range(
    fmt: str,
) -> None:
    largest = np.float32(oracle.FORMATS[fmt][1])
    x = (
        np.random.default_rng(1).standard_normal((200, 3, 8))
        * np.logspace(-6, 6, 200)[:, None, None]
    )
    x[7, 1] = 0
    x[8, 2] = [largest, *[0] * 7]  # amax / largest is exactly 1
    scales = oracle.token_head_scales(x, fmt)
    assert scales.shape == (200, 3, 1) and scales.dtype == np.float32
    exact = np.abs(np.float32(x)).max(-1, keepdims=True) / largest
    assert np.all(np.frexp(scales)[0] == 0.5)
    assert np.all((scales >= exact) & (scales / 2 < exact), where=exact > 0)
    assert scales[7, 1] == 1 and scales[8, 2] == 1
    spacing = 2.0 ** -(3 if fmt == "e4m3" else 2)
    error = np.abs(oracle.fp8_store(fmt, dynamic=True)(x, 0, "k") - x)
    assert np.all(error <= np.maximum(np.abs(x) * spacing / 2, scales / 1024) * (1 + 1e-6))


def test_scales_beside_dynamic_and_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="dynamic"):
        oracle.fp8_store("e4m3", k_scales=np.ones(1), dynamic=True)
    with pytest.raises(ValueError, match="e4m3fnuz"):
        oracle.fp8_store("e4m3fnuz")
