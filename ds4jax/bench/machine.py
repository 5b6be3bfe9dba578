"""What a measurement was made on and with: card, versions, and a hash of the numerics."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from importlib import metadata
from pathlib import Path

import jax

from ds4jax.config import ModelConfig, Numerics
from ds4jax.errors import DeviceError

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Columns that every line of a table carries; `numerics` is a name and the hash of all fields."""

    card: str
    driver: str
    jax: str
    ds4jax: str
    numerics: str

    @staticmethod
    def of(name: str, numerics: Numerics) -> Machine:
        """This machine with numerics of the given name."""
        return Machine(
            jax.local_devices()[0].device_kind,
            driver_version(_DRIVER),
            jax.__version__,
            package_version(),
            f"{name} {config_hash(numerics)}",
        )

    def __str__(self) -> str:
        return f"{self.card}, driver {self.driver}, jax {self.jax}, ds4jax {self.ds4jax}, numerics {self.numerics}"


def config_hash(config: Numerics | ModelConfig) -> str:
    """Eight hexadecimal digits that change with any field."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:8]


def package_version() -> str:
    """Version of ds4jax; "source" where it runs from its source tree without being installed."""
    try:
        return metadata.version("ds4jax")
    except metadata.PackageNotFoundError:
        return "source"


def driver_version(file: Path) -> str:
    """Version of the NVIDIA driver, "unknown" where the kernel module does not show it."""
    found = re.search(r"\s(\d{3}\.[\d.]+)\s", file.read_text()) if file.is_file() else None
    return found[1] if found else "unknown"


def require_gpu(what: str) -> None:
    """Raises DeviceError unless JAX runs on a GPU."""
    if (found := jax.default_backend()) != "gpu":
        raise DeviceError(
            f"{what}: expected an NVIDIA GPU, found {found}; install ds4jax[cuda13] on a machine that has one"
        )
