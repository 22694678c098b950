"""A config round-trips through JSON: equal, with tuples as tuples."""

import dataclasses
import json

import numpy as np
import pydantic
import pytest

from jfp8kv.checkpoint.orbax import from_json, to_json
from jfp8kv.models.config import ExpertsConfig, ModelConfig, RopeConfig


@dataclasses.dataclass(frozen=True)
class Later:
    """A config with fields of every kind that a later `ModelConfig` may have."""

    ropes: tuple[RopeConfig | None, ...]
    windows: tuple[tuple[int, ...], ...] = ()
    cap: float | None = None
    share: float = 0.1
    name: str = "é"
    on: bool = True


def through_json(value):
    return from_json(type(value), json.loads(json.dumps(to_json(value))))


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(
            "LlamaForCausalLM",
            *(40, 32, 2, 4, 2, 16, 64, 128),
            ropes=(
                RopeConfig(5e5, "llama3", 8.0),
                RopeConfig(kind="longrope", short_factors=(1.0, 2.0), long_factors=(4.0, 8.0)),
            ),
            layer_ropes=(0, -1),
            windows=(8, 0),
            experts=ExpertsConfig(4, 2, 8, (1,)),
            eos_ids=(2, 7),
        ),
        Later(
            (RopeConfig(), None, RopeConfig(1e6)),
            windows=((1, 2), (), (3,)),
            cap=1 / 3,
            share=0.1 + 2**-54,
        ),
        Later((), cap=float("inf"), on=False),
    ],
)
def test_a_config_round_trips_through_json_equal_and_hashable(config):
    back = through_json(config)
    assert back == config and hash(back) == hash(config) and repr(back) == repr(config)


def test_numpy_scalars_become_python_numbers():
    assert through_json(Later((), cap=np.float32(0.5))) == Later((), cap=0.5)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (None, "config"),
        ([], "config"),
        ({"theta": 1.0}, "config.ropes"),
        ({"type": "Later"}, "config.ropes"),
        ({"type": "Later", "ropes": [{"type": "?", "thetas": 1.0}]}, "config.ropes.0.thetas"),
        ({"type": "Later", "ropes": [{"theta": "high"}]}, "config.ropes.0.theta"),
        ({"type": "Later", "ropes": [], "windows": 3}, "config.windows"),
        ({"type": "Later", "ropes": [], "other": 3}, "config.other"),
    ],
)
def test_an_invalid_config_is_refused_with_the_field(value, named):
    with pytest.raises(pydantic.ValidationError) as error:
        from_json(Later, value)
    fields = [".".join(map(str, issue["loc"])) for issue in error.value.errors()]
    assert named in fields
