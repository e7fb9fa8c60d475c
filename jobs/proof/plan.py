"""Which trainings the experiment consists of, and at which scale.

Every training is described by a name, so that its result is one file that can be there or not. The grid is the paper's
comparison (arXiv 2602.23881 tables 1 and 4), the ladder its settings of lambda, and the ablation asks what a draft
loses when it is trained from what a dataset stores in place of the target itself.
"""

from typing import Final

import msgspec

from distill_pipe.consume.drafts.checkpoint import DRAFTS, Arch
from distill_pipe.consume.objective import LossName, Objective
from distill_pipe.consume.train import Precision, TrainSettings

SEEDS: Final = (0, 1, 2)
LOSSES: Final[tuple[LossName, ...]] = ("kl", "tv", "lk-alpha", "lk-hybrid")
LAYERS: Final = (2, 15, 27, 30)
# What is scored by the engine: head entries and tail samples, the same text and the same layers.
CAPTURES: Final = {"k32-8": (32, 8), "k64": (64, 0), "k16-8": (16, 8)}
# What is made from those without an engine: source, and codec of the hidden states or renormalised head.
RECODED: Final = {"k32-8-q8": "q8", "k32-8-q6": "q6", "k32-8-q5": "q5"}
RENORMALISED: Final = "k64-renormalised"
MAIN: Final = "k32-8"


class Scale(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How large everything is, and the type of the drafts' products."""

    rows: int = 300_000
    max_tokens: int = 128
    temperature: float = 0.8
    steps: int = 600
    batch_tokens: int = 512
    lr: float = 1e-3
    draft_vocab: int = 8192
    positions: int = 6
    holdout_every: int = 20
    bench_prompts: int = 12
    bench_tokens: int = 48
    precision: Precision = "bfloat16"


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """One training: a draft and an objective on one of the datasets. `part` is the table it belongs to, `label` its row
    there. With `decode` the draft is also measured by real speculative decoding."""

    part: str
    label: str
    arch: Arch
    objective: Objective
    dataset: str
    seed: int
    decode: bool = False

    @property
    def name(self) -> str:
        """Unique, and fit for a file name."""
        return f"{self.part}-{self.arch}-{self.label}-seed{self.seed}".replace(" ", "-").replace("=", "")

    def settings(self, scale: Scale) -> TrainSettings:
        """What is handed to the trainer."""
        return TrainSettings(arch=self.arch, objective=self.objective, positions=scale.positions,
                             draft_vocab=scale.draft_vocab, steps=scale.steps, lr=scale.lr,
                             batch_tokens=scale.batch_tokens, holdout_every=scale.holdout_every, seed=self.seed,
                             precision=scale.precision)


def trainings() -> list[Training]:
    """All of them, those that matter most first: seed by seed, the grid before ladder and ablation."""
    return [training for seed in SEEDS for training in (*_grid(seed), *_ladder(seed), *_ablation(seed))]


def _grid(seed: int) -> list[Training]:
    return [Training(part="grid", label=loss, arch=arch, objective=Objective(loss=loss), dataset=MAIN, seed=seed,
                     decode=True) for arch in DRAFTS for loss in LOSSES]


def _ladder(seed: int) -> list[Training]:
    settings = [(f"eta={eta:g}", Objective(eta=eta)) for eta in (0.7, 1.0, 10.0)]
    settings.append(("lambda=0.5", Objective(kl_share=0.5)))
    return [Training(part="ladder", label=label, arch="eagle3", objective=objective, dataset=MAIN, seed=seed,
                     decode=True) for label, objective in settings]


def _ablation(seed: int) -> list[Training]:
    """All but 32+8 with bf16 states, which is the grid's eagle3 with lk-hybrid."""
    drop, bucket = Objective(tail="drop"), Objective(tail="bucket")
    cases = [("exact", Objective(tail="exact"), MAIN), ("K=64 drop", drop, "k64"), ("K=64 bucket", bucket, "k64"),
             ("K=64 renormalised", drop, RENORMALISED), ("K=16+8 sampled", Objective(), "k16-8"),
             *((f"K=32+8 {codec}", Objective(), name) for name, codec in RECODED.items())]
    return [Training(part="ablation", label=label, arch="eagle3", objective=objective, dataset=dataset, seed=seed)
            for label, objective, dataset in cases]
