"""The GPUs that kernels are compiled for: what XLA has to know of one, and what the static bound is made of."""

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "gpu"

# ptxas calls Hopper's own instructions sm_90a; XLA compiles for them, and for the plain architecture elsewhere.
ARCHITECTURE = {(8, 0): "sm_80", (9, 0): "sm_90a"}


@dataclass(frozen=True)
class Target:
    """A GPU by the text of its target config (`configs/gpu/NAME.txtpb`), and the rates that no config has.

    `clock_hz` is a clock held under load. `fma` is float32 instructions a clock of all warps of a multiprocessor; `tensor` is
    multiply-adds a clock of its tensor cores in 16-bit floating point, by instruction: `mma.sync` (HMMA) reaches little more
    than half of what `wgmma` (HGMMA) does on Hopper.
    """

    name: str
    config: str
    clock_hz: float
    fma: float
    tensor: dict[str, float]

    @classmethod
    def h100(cls) -> "Target":
        tensor = {"HMMA": 1024.0, "HGMMA": 2048.0}
        return cls(
            "h100", (CONFIGS / "h100.txtpb").read_text(encoding="utf-8"), 1.755e9, 4.0, tensor
        )

    @classmethod
    def a100(cls) -> "Target":
        return cls(
            "a100",
            (CONFIGS / "a100.txtpb").read_text(encoding="utf-8"),
            1.41e9,
            2.0,
            {"HMMA": 1024.0},
        )

    def figure(self, field: str) -> int:
        """The first number of that name in the config."""
        found = re.search(rf"\b{field}: (\d+)", self.config)
        assert found, f"configs/gpu/{self.name}.txtpb has no {field}"
        return int(found[1])

    @property
    def capability(self) -> tuple[int, int]:
        """The CUDA compute capability; zeros may be left out of a config."""
        found = re.search(r"cuda_compute_capability \{([^}]*)\}", self.config)
        assert found, f"configs/gpu/{self.name}.txtpb has no cuda_compute_capability"
        figures = dict(re.findall(r"(major|minor): (\d+)", found[1]))
        return int(figures.get("major", 0)), int(figures.get("minor", 0))

    @property
    def architecture(self) -> str:
        return ARCHITECTURE[self.capability]

    @property
    def device_kind(self) -> str:
        found = re.search(r'\bname: "([^"]+)"', self.config)
        assert found, f"configs/gpu/{self.name}.txtpb has no name"
        return found[1]

    @cached_property
    def sharding(self) -> NamedSharding:
        """Where arrays lie that exist only on this GPU, which need not exist."""
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=self.config, topology="1x1x1"
        )
        mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("device",))
        return NamedSharding(mesh, PartitionSpec())

    def tracing(self) -> contextlib.AbstractContextManager:
        """Under it Pallas lowers for this GPU. jax before 0.11 asks for no device, and has no public name for one."""
        try:
            from jax.sharding import AbstractDevice, use_abstract_mesh
        except ImportError:
            return contextlib.nullcontext()
        device = AbstractDevice(device_kind=self.device_kind, num_cores=None, platform="cuda")
        return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def without_a_gpu() -> None:
    """Set JAX up to compile for CUDA on a machine that has no CUDA; leaves with what to do if the plugin is missing."""
    plugin = {
        name.lower().replace("_", "-")
        for found in metadata.distributions()
        if (name := found.metadata["Name"])
    }
    if not any(name.startswith("jax-cuda") for name in plugin):
        sys.exit(
            "JAX's CUDA plugin is not on the path: `make gpu-compile` brings it, beside .venv's packages."
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
