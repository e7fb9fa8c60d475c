"""The Python of README's section on feeding a trainer runs as it stands, on a tiny dataset."""

import math
import re
from pathlib import Path

import pytest
import torch
from export_datasets import normed_dataset
from tiny_datasets import Shape
from torch import Tensor, nn

import distill_pipe.consume
from distill_pipe.store.finalize import finalize
from distill_pipe.store.root import LocalRoot

README = Path(__file__).parent.parent / "README.md"
SHAPE = Shape(num_layers=30, layers=(2, 15, 27, 30), final_norm_eps=1e-5)


def examples() -> list[str]:
    [section] = re.findall(r"^## Feed a trainer$(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


class Draft(nn.Module):
    """Anything with the call that the examples make: states of all tokens, from tokens and hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(SHAPE.vocab_size, SHAPE.hidden_size), nn.Linear(3 * SHAPE.hidden_size,
                                                                                            SHAPE.hidden_size)

    def forward(self, token_ids_T: Tensor, hidden: dict[int, Tensor], position_ids_T: Tensor, cu_seqlens_B1: Tensor
                ) -> Tensor:
        assert len(token_ids_T) == len(position_ids_T) == cu_seqlens_B1[-1]
        return self.embed(token_ids_T) + self.mix(torch.cat([h_TH.float() for h_TH in hidden.values()], 1))


def test_the_section_has_examples() -> None:
    assert examples()


@pytest.mark.parametrize("number", range(len(examples())))
def test_an_example_runs_as_it_stands(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    normed_dataset(tmp_path / "dataset", SHAPE)
    finalize(LocalRoot(tmp_path / "dataset"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    draft, lm_head = Draft(), nn.Linear(SHAPE.hidden_size, SHAPE.vocab_size)
    names: dict[str, object] = {
        "draft": draft, "lm_head": lm_head, "torch": torch,
        "optimizer": torch.optim.SGD([*draft.parameters(), *lm_head.parameters()], 0.01)}
    exec(examples()[number], names)  # noqa: S102 - our own README


def test_the_first_example_trains_and_reports_an_alpha_between_its_bounds(tmp_path: Path, capsys,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    test_an_example_runs_as_it_stands(0, tmp_path, monkeypatch)
    reported = [[float(x) for x in line.split()] for line in capsys.readouterr().out.splitlines()]
    assert reported
    for alpha, lower, upper in reported:
        assert 0 <= lower <= upper <= 1
        # A sampled alpha is unbiased and may leave its bounds, but not by much over a batch.
        assert lower - 0.1 <= alpha <= upper + 0.1
        assert math.isfinite(alpha)


def test_everything_that_consume_names_is_there_and_has_a_docstring() -> None:
    assert sorted(distill_pipe.consume.__all__) == sorted(set(distill_pipe.consume.__all__))
    for name in distill_pipe.consume.__all__:
        thing = getattr(distill_pipe.consume, name)
        assert thing.__doc__ or not callable(thing), name
