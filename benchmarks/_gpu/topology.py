"""GPUs that kernels are compiled for: their XLA target configs, and rates for the static bound."""

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

# XLA compiles for sm_90a on Hopper, which has instructions that later GPUs lack.
ARCHITECTURE = {(8, 0): "sm_80", (9, 0): "sm_90a"}


@dataclass(frozen=True)
class Target:
    """A GPU that kernels are compiled for.

    Attributes:
      name: of `configs/gpu/NAME.txtpb`.
      config: text of the XLA target config.
      clock_hz: clock rate under load.
      fma: float32 instructions per clock of all warps of a multiprocessor.
      tensor: multiply-adds per clock of a multiprocessor's tensor cores in 16-bit floating point,
        by instruction. On Hopper, `mma.sync` (HMMA) reaches about half of `wgmma` (HGMMA).
    """

    name: str
    config: str
    clock_hz: float
    fma: float
    tensor: dict[str, float]

    @classmethod
    def h100(cls) -> "Target":
        """Return an H100 SXM."""
        config = (CONFIGS / "h100.txtpb").read_text(encoding="utf-8")
        return cls("h100", config, 1.755e9, 4.0, {"HMMA": 1024.0, "HGMMA": 2048.0})

    @classmethod
    def a100(cls) -> "Target":
        """Return an A100 SXM."""
        config = (CONFIGS / "a100.txtpb").read_text(encoding="utf-8")
        return cls("a100", config, 1.41e9, 2.0, {"HMMA": 1024.0})

    def figure(self, field: str) -> int:
        """Return the first number with this name in the config."""
        found = re.search(rf"\b{field}: (\d+)", self.config)
        assert found, f"configs/gpu/{self.name}.txtpb has no {field}"
        return int(found[1])

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability. Configs may omit zeros."""
        found = re.search(r"cuda_compute_capability \{([^}]*)\}", self.config)
        assert found, f"configs/gpu/{self.name}.txtpb has no cuda_compute_capability"
        figures = dict(re.findall(r"(major|minor): (\d+)", found[1]))
        return int(figures.get("major", 0)), int(figures.get("minor", 0))

    @property
    def architecture(self) -> str:
        """Architecture for ptxas."""
        return ARCHITECTURE[self.capability]

    @property
    def device_kind(self) -> str:
        """Device kind for JAX."""
        found = re.search(r'\bname: "([^"]+)"', self.config)
        assert found, f"configs/gpu/{self.name}.txtpb has no name"
        return found[1]

    @cached_property
    def sharding(self) -> NamedSharding:
        """Sharding of arrays on this GPU, which need not be present."""
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=self.config, topology="1x1x1"
        )
        mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("device",))
        return NamedSharding(mesh, PartitionSpec())

    def tracing(self) -> contextlib.AbstractContextManager:
        """Return a context in which Pallas lowers for this GPU; jax before 0.11 needs none."""
        try:
            from jax.sharding import AbstractDevice, use_abstract_mesh
        except ImportError:
            return contextlib.nullcontext()
        device = AbstractDevice(device_kind=self.device_kind, num_cores=None, platform="cuda")
        return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def configure_without_gpu() -> None:
    """Configure JAX to compile for CUDA without CUDA. Exit with a hint if the plugin is missing."""
    installed = {
        name.lower().replace("_", "-")
        for found in metadata.distributions()
        if (name := found.metadata["Name"])
    }
    if not any(name.startswith("jax-cuda") for name in installed):
        sys.exit(
            "JAX's CUDA plugin is not on the path: `make gpu-compile` installs it and runs this."
        )
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
