"""The card of a dataset on the Hub: the one it was started with, and what is known once there are shards."""

from collections.abc import Sequence

from distill_pipe.store.card import CARD, card_text
from distill_pipe.store.manifest import FileRef, Fragment, Run
from distill_pipe.store.root import Root

_MORE = """
## What is here

{done} of {shards} shards: {traces:,} traces, {tokens:,} tokens, {rows:,} supervised rows, {quarantined:,} prompts given
up on.

| part | files | bytes | bytes per token |
|---|---|---|---|
{sizes}

Mean probability outside the head: {tail_mass:.4f}. Rounding put a total variation of at most {head_error:.2g} into the
head of a row.

## Quick start

```python
from datasets import load_dataset

traces = load_dataset("{repository}", split="train", streaming=True)   # tokens, masks, distributions
```

```
pip install "distill-pipe[train]"
distill-pipe pull {repository} dataset
distill-pipe verify dataset
distill-pipe train dataset --arch eagle3 --loss lk-hybrid
```

```python
from distill_pipe.consume import ShardReader, lk_hybrid_loss

for batch in ShardReader("dataset", layers={layers}, batch_tokens=8192, seed=0):
    ...   # batch.token_ids_T, batch.rows_R, batch.target, batch.hidden
```
"""


def hub_card(root: Root, run: Run, fragments: Sequence[Fragment], repository: str) -> bytes:
    """The card to push. One that somebody edited is theirs and stays as it is."""
    stored, started = root.read(CARD), card_text(run)
    if stored is not None and stored != started.encode():
        return stored
    infos = [f.info for f in fragments]
    rows = sum(i.rows for i in infos)
    more = _MORE.format(
        done=len(fragments), shards=run.spec.num_shards, traces=sum(i.traces for i in infos),
        tokens=sum(i.tokens for i in infos), rows=rows, quarantined=sum(i.quarantined for i in infos),
        sizes=_sizes(fragments), tail_mass=sum(i.measured.tail_mass_mean * i.rows for i in infos) / max(rows, 1),
        head_error=max((i.measured.head_tv_error_max for i in infos), default=0.0), repository=repository,
        layers=run.spec.capture.layers)
    return (started + more).encode()


def _sizes(fragments: Sequence[Fragment]) -> str:
    tokens = max(sum(f.info.tokens for f in fragments), 1)
    parts: dict[str, list[FileRef]] = {
        "target distribution": [f.file for f in fragments],
        "hidden states": [f.info.hidden for f in fragments if f.info.hidden],
        "prompts given up on": [f.info.quarantine for f in fragments if f.info.quarantine]}
    return "\n".join(f"| {name} | {len(refs):,} | {sum(r.size for r in refs):,} | "
                     f"{sum(r.size for r in refs) / tokens:,.1f} |" for name, refs in parts.items() if refs)
