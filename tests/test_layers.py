"""Catches a word of `--layers` that means other layers than it says, and a choice that is misread, not refused."""

import pytest

from distill_pipe.errors import UsageError
from distill_pipe.produce.layers import default_layers, resolve_layers


@pytest.mark.parametrize(("layers", "wanted"), [(1, (0, 1)), (2, (1, 2)), (4, (1, 2, 4)), (30, (2, 15, 27, 30)),
                                                (61, (2, 30, 58, 61))])
def test_default_layers_are_early_middle_late_and_last(layers: int, wanted: tuple[int, ...]) -> None:
    assert default_layers(layers) == wanted


@pytest.mark.parametrize(("choice", "wanted"), [
    ("3+last", (2, 30, 58, 61)), ("last", (61,)), ("none", ()), ("2,30,last", (2, 30, 61)), ("5, 3,5", (3, 5)),
    ("0", (0,)), ("61,last", (61,)), (" last ", (61,)), ((7, 2, 7), (2, 7)), ((), ())])
def test_words_and_numbers_are_layers_of_the_target(choice: str | tuple[int, ...], wanted: tuple[int, ...]) -> None:
    assert resolve_layers(choice, 61) == wanted


@pytest.mark.parametrize("choice", ["", "4+last", "3+", "first", "2,,3", "-1", "2;3", "1.5", "none,last", "last+3"])
def test_anything_else_is_refused_with_what_can_be_written(choice: str) -> None:
    with pytest.raises(UsageError, match=r"write 3\+last, last, none, or numbers with commas"):
        resolve_layers(choice, 61)


@pytest.mark.parametrize("choice", ["62", (3, 62)])
def test_a_layer_beyond_the_last_is_refused(choice: str | tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"layer 62 is out of range: the target has layers 0 \(embeddings\) to 61"):
        resolve_layers(choice, 61)
