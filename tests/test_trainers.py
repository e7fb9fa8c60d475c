"""Catches a reader that a trainer cannot drive: each quick start of `consume.reader`, run for real on a tiny module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_datasets import make_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill_pipe.consume import Batch, ShardReader, tv_loss

pytestmark = pytest.mark.filterwarnings("default")
PROMPTS = 24


class Draft(nn.Module):
    """The least that learns from hidden states; remembers which traces it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 64)
        self.seen: list[int] = []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.seen += batch.ordinals_B.tolist()
        logits_RV = self.head(batch.hidden[1][batch.rows_R].to(self.head.weight.dtype))
        return {"loss": tv_loss(logits_RV, batch.target).loss}


def as_inputs(batch: Batch) -> dict[str, Batch]:
    return {"batch": batch}


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    make_dataset(tmp_path / "dataset", PROMPTS)
    return ShardReader(tmp_path / "dataset", layers=(1,), batch_tokens=40)


def orders(reader: ShardReader, epochs: int) -> list[int]:
    return [int(o) for epoch in range(epochs) for batch in reader.at_epoch(epoch) for o in batch.ordinals_B]


def test_hugging_face_trainer(reader: ShardReader, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class PackedTrainer(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            loader = DataLoader(self.train_dataset, batch_size=None, collate_fn=as_inputs)
            loader.set_epoch = self.train_dataset.set_epoch
            return loader

    steps = 2 * reader.num_steps()
    expected = orders(reader, 2)
    settings = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=steps, use_cpu=True, report_to=[],
                                 save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=0.1)
    draft = Draft()
    before = draft.head.weight.detach().clone()
    done = PackedTrainer(draft, settings, train_dataset=reader).train()
    assert done.global_step == steps
    assert not torch.equal(draft.head.weight, before)
    assert draft.seen == expected


def test_accelerate(reader: ShardReader) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    draft = Draft()
    draft, optimizer = accelerator.prepare(draft, torch.optim.SGD(draft.parameters(), lr=0.1))
    # Not prepared: Accelerate would share out again what each rank already has to itself.
    loader = DataLoader(reader, batch_size=None)
    for epoch in range(2):
        reader.set_epoch(epoch)
        for batch in loader:
            loss = draft(batch.to(accelerator.device))["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert draft.seen == orders(reader, 2)


def test_lightning_resumes_in_the_middle_of_an_epoch(reader: ShardReader, tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.draft = Draft()

        def training_step(self, batch: Batch) -> Tensor:
            self.trainer.datamodule.state = batch.state_dict()
            return self.draft(batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(lightning.LightningDataModule):
        def __init__(self, reader: ShardReader) -> None:
            super().__init__()
            self.reader = reader
            self.state: dict[str, object] = {}

        def train_dataloader(self) -> DataLoader[Batch]:
            return DataLoader(self.reader, batch_size=None)

        def state_dict(self) -> dict[str, object]:
            return self.state

        def load_state_dict(self, state_dict: dict[str, object]) -> None:
            self.reader.load_state_dict(state_dict)

    def trainer(steps: int) -> lightning.Trainer:
        return lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                                 enable_progress_bar=False, enable_model_summary=False)

    whole = orders(reader, 1)
    first, module = trainer(3), Module()
    first.fit(module, datamodule=Data(reader))
    first.save_checkpoint(tmp_path / "checkpoint")
    again = Module()
    trainer(reader.num_steps()).fit(again, datamodule=Data(reader.at_epoch(0)), ckpt_path=tmp_path / "checkpoint",
                                    weights_only=True)
    assert module.draft.seen + again.draft.seen == whole
