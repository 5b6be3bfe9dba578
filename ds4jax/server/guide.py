"""What a client may ask of single tokens: likelier, rarer, forbidden, or as a grammar has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Matcher(Protocol):
    """A grammar and how far an answer has followed it."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool `[V]`."""

    def accept(self, token: int) -> None:
        """Goes on by a token."""


@dataclasses.dataclass(frozen=True)
class Penalties:
    """Subtracted from the logit of a token that the answer holds: once, and once per occurrence."""

    presence: float = 0.0
    frequency: float = 0.0

    @property
    def neutral(self) -> bool:
        """Whether they change nothing."""
        return self.presence == 0 and self.frequency == 0


class Steering:
    """A guide of tokens (see `engine_session.Guide`): a fixed bias, penalties, and from some token on a grammar."""

    def __init__(self, size: int, fixed: np.ndarray | None, penalties: Penalties) -> None:
        self._fixed = np.zeros(size, np.float32) if fixed is None else fixed
        self._penalties = penalties
        self._counts = np.zeros(size, np.int32)
        self.matcher: Matcher | None = None

    def bias(self) -> np.ndarray:
        """The bias of the next token, float32 `[V]`."""
        bias, counts = self._fixed, self._counts
        if not self._penalties.neutral:
            lowered = self._penalties.presence * (counts > 0) + self._penalties.frequency * counts
            bias = bias - lowered.astype(np.float32)
        return bias if self.matcher is None else np.where(self.matcher.allowed(), bias, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Counts a token and goes on in the grammar."""
        self._counts[token] += 1
        if self.matcher is not None:
            self.matcher.accept(token)


def fixed_bias(size: int, biases: Mapping[int, float], banned: list[int]) -> np.ndarray | None:
    """The bias that holds for every token of an answer, float32 `[V]`; None if there is none."""
    if not biases and not banned:
        return None
    bias = np.zeros(size, np.float32)
    for token, value in biases.items():
        bias[token] = value
    bias[banned] = -np.inf
    return bias
