"""Which hidden states `--layers` means.

    3+last         EAGLE-3's early, middle and late state (arXiv 2503.01840) and the last one
    last           the state before the final norm alone, which a multi-token prediction head trains on
    none           no hidden states
    2,15,27,last   canonical numbers: n is the residual stream after n decoder layers, 0 the embeddings

The numbers depend on the target's depth, so a job may keep the word and each target finds its own.
"""

from collections.abc import Sequence

from distill_pipe.errors import UsageError

EAGLE3, LAST, NONE = "3+last", "last", "none"


def resolve_layers(choice: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Canonical layer numbers, ascending.

    Raises:
        UsageError: the choice cannot be read, or a number is out of range.
    """
    layers = _named(choice, num_layers) if isinstance(choice, str) else tuple(sorted(set(choice)))
    if layers and layers[-1] > num_layers:
        raise UsageError(f"layer {layers[-1]} is out of range: the target has layers 0 (embeddings) to {num_layers} "
                         "(before the final norm)")
    return layers


def default_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's early, middle and late state (arXiv 2503.01840) and the last one, as canonical layer numbers."""
    return tuple(sorted({min(2, num_layers), num_layers // 2, max(num_layers - 3, 1), num_layers}))


def _named(text: str, num_layers: int) -> tuple[int, ...]:
    if text.strip() == NONE:
        return ()
    if text.strip() == EAGLE3:
        return default_layers(num_layers)
    try:
        numbers = {num_layers if part.strip() == LAST else int(part) for part in text.split(",")}
    except ValueError:
        numbers = {-1}
    if min(numbers) < 0:
        raise UsageError(f"--layers {text}: write {EAGLE3}, {LAST}, {NONE}, or numbers with commas, for example "
                         "2,15,27,last")
    return tuple(sorted(numbers))
