"""splitmix64: the hash behind every number of a dataset that looks random and must be the same on every machine."""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64, modulo 2^64."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _FACTORS[0]
    values = (values ^ (values >> np.uint64(27))) * _FACTORS[1]
    return values ^ (values >> np.uint64(31))
