"""The datasets of the experiment: one text, scored as often as there are captures, and variants made without an engine.

The text is written once by the target at a temperature at which a small model stays coherent, over prompts that are
not held out, until there are enough supervised tokens. Two more texts, at T = 1 and T = 0 over held-out prompts, are
what `evaluate` predicts tau on, to be held against decoding with the same prompts.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from distill_pipe.consume.opened import ShardFiles
from distill_pipe.produce.targets import resolve_target
from distill_pipe.speculative.prompts import DOMAINS, Prompt
from distill_pipe.store.commit import commit_shard, committed_shards
from distill_pipe.store.hidden_codec import decode_hidden, encode_trace
from distill_pipe.store.manifest import RUN, Run, encode_record, require_run
from distill_pipe.store.norm import read_final_norm, write_final_norm
from distill_pipe.store.plan import num_shards, shard_range
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.spec import HiddenCodec
from distill_pipe.store.trace import Trace
from jobs.proof.plan import CAPTURES, LAYERS, MAIN, RECODED, RENORMALISED, Scale

TARGET = "smollm2-135m"
RESPONSES = Path(__file__).with_name("responses.jsonl.zst")


def dataset_names() -> list[str]:
    """In the order in which they can be made."""
    return [*CAPTURES, *RECODED, RENORMALISED, *(f"decoded-t{t}" for t in (0, 1))]


def make_dataset(name: str, folder: Path, scale: Scale) -> None:
    """Make one dataset, or finish it. What it is made from must be there."""
    out = folder / name
    if name in CAPTURES:
        top_k, tail_samples = CAPTURES[name]
        _generate(folder / "scored.jsonl", out, "--responses", "corpus", "--top-k", top_k, "--tail-samples",
                  tail_samples, "--layers", ",".join(map(str, LAYERS)))
    elif name in RECODED:
        recode(folder / MAIN, out, RECODED[name])
    elif name == RENORMALISED:
        recode(folder / "k64", out, "bf16-split", renormalised=True)
    else:
        corpus = _write_corpus(folder / f"{name}.jsonl", bench_prompts(scale.bench_prompts * 4))
        _generate(corpus, out, "--layers", ",".join(map(str, LAYERS)), "--set",
                  f"sampling.temperature={name.removeprefix('decoded-t')}", "--set",
                  f"sampling.max_tokens={scale.bench_tokens}")


def write_text(folder: Path, scale: Scale) -> None:
    """The conversations that are scored: prompts with the target's responses, until there are enough tokens of them.

    Responses that were kept with the results are taken again, so that every machine trains on the same text.
    """
    if (folder / "scored.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    prompts = training_prompts(3 * scale.rows // scale.max_tokens)
    kept = _kept_responses(scale)
    if kept:
        _write_lines(folder / "scored.jsonl", [conversation(p, kept[p.id]) for p in prompts if p.id in kept])
        return
    records: list[dict[str, object]] = []
    rows, first = 0, 0
    while rows < scale.rows and first < len(prompts):
        # A part at a time, because how long responses get is known only afterwards.
        share = max(64, min(len(prompts) // 3, 2 * (scale.rows - rows) // scale.max_tokens))
        part = prompts[first:first + share]
        out = folder / f"text-{first}"
        _generate(_write_corpus(folder / f"text-{first}.jsonl", part), out, "--layers", "none", "--top-k", 1,
                  "--tail-samples", 0, "--set", f"sampling.temperature={scale.temperature}", "--set",
                  f"sampling.max_tokens={scale.max_tokens}")
        written = responses(out)
        records += [conversation(prompt, written[prompt.id][0]) for prompt in part if prompt.id in written]
        rows += sum(tokens for _, tokens in written.values())
        first += share
    _write_lines(folder / "scored.jsonl", records)


def keep_responses(folder: Path, scale: Scale) -> None:
    """Put the responses beside this file, without their prompts: those come from packages."""
    lines = [_origin(scale), *({"id": record["id"], "response": record["messages"][-1]["content"]}
                               for record in map(json.loads, (folder / "scored.jsonl").read_text().splitlines()))]
    with pa.CompressedOutputStream(str(RESPONSES), "zstd") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def _kept_responses(scale: Scale) -> dict[str, str]:
    """What was kept, by prompt id; nothing when it is of another scale."""
    if not RESPONSES.exists():
        return {}
    with pa.input_stream(str(RESPONSES), compression="zstd") as file:
        origin, *lines = map(json.loads, file.read().decode().splitlines())
    return {line["id"]: line["response"] for line in lines} if origin == _origin(scale) else {}


def _origin(scale: Scale) -> dict[str, object]:
    return {"target": TARGET, "rows": scale.rows, "max_tokens": scale.max_tokens, "temperature": scale.temperature}


def training_prompts(count: int) -> list[Prompt]:
    """Prompts that are not held out: of the code all there are, or a third, and of the other two domains equal shares.
    """
    code = [p for p in DOMAINS["code"]() if not p.held_out][:count // 3]
    each = max(1, (count - len(code)) // 2)
    others = [islice((p for p in DOMAINS[name]() if not p.held_out), each) for name in ("general", "maths")]
    mixed = [*code, *chain.from_iterable(others)]
    order = np.random.default_rng(0).permutation(len(mixed))
    return [mixed[i] for i in order[:count]]


def bench_prompts(each: int) -> list[Prompt]:
    """Held-out prompts, `each` of every domain at most."""
    return [p for prompts in DOMAINS.values() for p in islice((p for p in prompts() if p.held_out), each)]


def conversation(prompt: Prompt, response: str) -> dict[str, object]:
    """A corpus record with its response."""
    turns = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": response}]
    return prompt.record() | {"messages": turns}


def responses(root: Path) -> dict[str, tuple[str, int]]:
    """What the target wrote, by prompt id: the text without special tokens, and how many tokens it has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_target(TARGET).folder)
    found = {}
    for trace in _traces(root, ()):
        ids = trace.trace.token_ids_T[trace.trace.loss_mask_T]
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        if text.strip():
            found[trace.trace.prompt_id] = (text, len(ids))
    return found


def recode(source: Path, out: Path, codec: HiddenCodec, *, renormalised: bool = False) -> None:
    """A dataset with the same traces, and its hidden states in another codec or its heads renormalised."""
    old, new = LocalRoot(source), LocalRoot(out)
    run = _recoded_run(require_run(old), codec, renormalised)
    if new.is_unused():
        for part in run.plan:
            with old.fetched(part.name) as path, new.scratch() as scratch:
                copied = scratch / "plan"
                copied.write_bytes(path.read_bytes())
                new.publish(copied, part.name)
        new.create_bytes(encode_record(run), RUN)
        if run.spec.target.final_norm_eps is not None:
            write_final_norm(new, read_final_norm(old, run.spec.target.hidden_size))
    files = ShardFiles(old, require_run(old), run.spec.capture.layers, check_hashes=False)
    for shard in sorted(set(range(num_shards(run))) - committed_shards(new)):
        opened = files.open(shard)
        traces = [_recoded(opened.encoded(row), require_run(old), codec, renormalised)
                  for row in range(len(opened.traces))]
        held = {t.trace.ordinal for t in traces}
        lost = [QuarantinedPrompt(o, f"{o}", "engine", "given up on in the source")
                for o in range(*shard_range(run, shard)) if o not in held]
        commit_shard(new, run, shard, traces, lost)


def _recoded_run(run: Run, codec: HiddenCodec, renormalised: bool) -> Run:
    from msgspec.structs import replace

    capture = replace(run.spec.capture, hidden_codec=codec)
    if renormalised:
        # Finer than the source, so that rounding twice adds nothing.
        capture = replace(capture, logprob_bits=24, tail_samples=0)
    spec = replace(run.spec, capture=capture)
    return replace(run, spec=spec, fingerprint=spec.fingerprint)


def _recoded(encoded: EncodedTrace, run: Run, codec: HiddenCodec, renormalised: bool) -> EncodedTrace:
    trace, capture = encoded.trace, run.spec.capture
    for layer in capture.layers:
        states_TH = decode_hidden(encoded.blobs[layer], capture.hidden_codec, run.spec.target.hidden_size,
                                  dtype=torch.float32)
        trace.hidden[layer] = states_TH.numpy()
    if renormalised:
        trace = _renormalised(trace)
    return encode_trace(trace, codec)


def _renormalised(trace: Trace) -> Trace:
    """Every head scaled to a sum of 1 and nothing outside, as trainers do that keep the top entries alone."""
    from dataclasses import replace

    rows_N = np.repeat(np.arange(trace.num_rows), trace.topk_counts_R)
    mass_R = np.bincount(rows_N, np.exp(trace.topk_logprobs_N.astype(np.float64)), trace.num_rows)
    nothing = {"tail_counts_R": np.zeros_like(trace.tail_counts_R), "tail_ids_N": trace.tail_ids_N[:0],
               "tail_logprobs_N": trace.tail_logprobs_N[:0], "tail_mass_R": np.zeros_like(trace.tail_mass_R)}
    scaled_N = np.minimum(trace.topk_logprobs_N - np.log(mass_R)[rows_N], 0).astype(np.float32)
    return replace(trace, topk_logprobs_N=scaled_N, **nothing)


def _traces(root: Path, layers: Sequence[int]) -> Iterator[EncodedTrace]:
    store = LocalRoot(root)
    files = ShardFiles(store, require_run(store), layers, check_hashes=False)
    for shard in sorted(committed_shards(store)):
        opened = files.open(shard)
        yield from (opened.encoded(row) for row in range(len(opened.traces)))


def _write_corpus(path: Path, prompts: Sequence[Prompt]) -> Path:
    _write_lines(path, [p.record() for p in prompts])
    return path


def _write_lines(path: Path, records: Sequence[dict[str, object]]) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text("".join(json.dumps(r) + "\n" for r in records))
    scratch.replace(path)


def _generate(corpus: Path, out: Path, *options: object) -> None:
    line = [sys.executable, "-m", "distill_pipe.cli", "generate", "--target", TARGET, "--corpus", str(corpus), "--out",
            str(out), *map(str, options)]
    subprocess.run(line, check=True)  # noqa: S603 - our own command line
