"""JAX's persistent compilation cache: a process-wide setting, changed once and only by default."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from jfp8kv import ConfigError
from jfp8kv.core import compilation_cache
from jfp8kv.core.compilation_cache import disable_compilation_cache, use_compilation_cache


class FakeConfig(SimpleNamespace):
    """JAX's configuration in a new process."""

    jax_compilation_cache_dir: str | None = None

    def update(self, name: str, value: object) -> None:
        setattr(self, name, value)


@pytest.fixture
def config(monkeypatch, tmp_path: Path) -> FakeConfig:
    config = FakeConfig()
    monkeypatch.setattr(compilation_cache, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(compilation_cache, "_decided", False)
    monkeypatch.setenv("JFP8KV_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JFP8KV_COMPILATION_CACHE", raising=False)
    return config


def test_the_cache_is_turned_on_by_default(config: FakeConfig, tmp_path: Path) -> None:
    use_compilation_cache()
    assert config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    assert config.jax_persistent_cache_min_compile_time_secs == 0.2


@pytest.mark.parametrize("variable", ["JFP8KV_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"])
def test_an_environment_variable_leaves_the_configuration_alone(
    config: FakeConfig, monkeypatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "0")
    use_compilation_cache()
    assert vars(config) == {}


def test_disabling_the_cache_leaves_the_configuration_alone(config: FakeConfig) -> None:
    disable_compilation_cache()
    use_compilation_cache()
    assert vars(config) == {}


def test_a_cache_that_is_configured_already_is_kept(config: FakeConfig) -> None:
    config.update("jax_compilation_cache_dir", "/elsewhere")
    use_compilation_cache()
    assert vars(config) == {"jax_compilation_cache_dir": "/elsewhere"}


def test_a_later_change_of_the_configuration_is_kept(config: FakeConfig) -> None:
    use_compilation_cache()
    config.update("jax_compilation_cache_dir", None)
    use_compilation_cache()
    assert config.jax_compilation_cache_dir is None


def test_an_invalid_switch_is_refused(config: FakeConfig, monkeypatch) -> None:
    monkeypatch.setenv("JFP8KV_COMPILATION_CACHE", "no")
    with pytest.raises(ConfigError, match="JFP8KV_COMPILATION_CACHE='no': must be 0"):
        use_compilation_cache()
