"""The model: layers written in terms of `ds4jax.ops`, and the cache."""

from ds4jax.model.cache import Cache, cache_nbytes, commit, init_cache
from ds4jax.model.transformer import DeepSeekV4, Sequence

__all__ = ["Cache", "DeepSeekV4", "Sequence", "cache_nbytes", "commit", "init_cache"]
