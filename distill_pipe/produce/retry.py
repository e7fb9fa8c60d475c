"""The prompts that a finished run gave up on, as a run of their own with the same settings.

They go to a dataset of their own, because a committed shard never changes: a reader of the first never sees a prompt
appear, and each of the two holds every prompt of its plan exactly once. Trainers read both. The prompts keep their ids
and get new ordinals.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from distill_pipe.errors import UsageError
from distill_pipe.produce.job import CaptureOptions, Job, load_job
from distill_pipe.store.manifest import Run, require_run
from distill_pipe.store.quarantine import FAILED, quarantined_prompts
from distill_pipe.store.root import Root

_COMMIT_CHARACTERS = 40


def retry_job(root: Root, folder: Path, settings: Sequence[str], options: dict[str, object], *, every: bool) -> Job:
    """A job that runs again the prompts of `root` that failed in the engine or in capture, or `every` one that was
    quarantined. What it needs is written to `folder`; the same prompts make the same files. `settings` and `options` go
    over those of the first run, as in `load_job`.

    Raises:
        UsageError: there are no such prompts.
    """
    run = require_run(root)
    prompts = [prompt for prompt, _ in quarantined_prompts(root, run, None if every else FAILED)]
    if not prompts:
        hint = "" if every else "; --all takes those that the corpus is to blame for as well"
        raise UsageError(f"{root} has no quarantined prompt to run again{hint}")
    corpus, job = folder / "quarantined.jsonl", folder / "job.yaml"
    corpus.write_bytes(b"".join(msgspec.json.encode({"id": p.prompt_id, "domain": p.domain, "messages": p.messages})
                                + b"\n" for p in prompts))
    # JSON is YAML.
    job.write_bytes(msgspec.json.encode({"target": run.spec.target.name, **_settings(run)}))
    return load_job(job, settings, {**options, "corpus": str(corpus)})


def _settings(run: Run) -> dict[str, object]:
    """What decides the bytes of a run, as settings of a job."""
    spec, capture = run.spec, run.spec.capture
    rows = CaptureOptions(tail_samples=capture.tail_samples, layers=capture.layers, hidden_codec=capture.hidden_codec,
                          logprob_bits=capture.logprob_bits, coverage=capture.coverage,
                          top_k=capture.top_k if capture.coverage is None else None,
                          top_k_max=None if capture.coverage is None else capture.top_k)
    found: dict[str, object] = {
        "responses": spec.responses, "dtype": spec.target.dtype, "max_model_len": spec.engine.max_model_len,
        "prompts_per_shard": spec.prompts_per_shard, "capture": rows}
    if spec.sampling is not None:
        found["sampling"] = spec.sampling
    if len(spec.target.revision) == _COMMIT_CHARACTERS:
        found["revision"] = spec.target.revision
    return found
