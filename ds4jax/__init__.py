"""DeepSeek-V4-Flash inference in JAX, from GGUF files.

`ds4jax.load(path)` gives an `Engine`; `build_generate` is the compiled function below it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds4jax.config import ModelConfig as ModelConfig
    from ds4jax.config import Numerics as Numerics
    from ds4jax.decode.generate import build_generate as build_generate
    from ds4jax.decode.sampling import Sampling as Sampling
    from ds4jax.decode.state import Generation as Generation
    from ds4jax.decode.state import Limits as Limits
    from ds4jax.engine import Engine as Engine
    from ds4jax.engine import load as load
    from ds4jax.errors import Ds4Error as Ds4Error
    from ds4jax.runconfig import RunConfig as RunConfig
    from ds4jax.runconfig import load_numerics as load_numerics
    from ds4jax.tokenizer import Decoder as Decoder
    from ds4jax.tokenizer import Tokenizer as Tokenizer

# Imported on first use: `ds4jax --help` must not wait for jax.
_HOME = {
    "Decoder": "tokenizer",
    "Ds4Error": "errors",
    "Engine": "engine",
    "Generation": "decode.state",
    "Limits": "decode.state",
    "ModelConfig": "config",
    "Numerics": "config",
    "RunConfig": "runconfig",
    "Sampling": "decode.sampling",
    "Tokenizer": "tokenizer",
    "build_generate": "decode.generate",
    "load": "engine",
    "load_numerics": "runconfig",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
