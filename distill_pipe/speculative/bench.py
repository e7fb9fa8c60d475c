"""`bench-draft`: tokens per step of the target, counted by really decoding with it.

tau = accepted / steps + 1: what a step accepts, and the token that the target adds itself. `Decoded` says what counts
at the end of a text, and where vLLM's own counters differ. Intervals come from a bootstrap over prompts. Speed is not
measured here: the sampler is written to be read, not to be fast.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import torch

from distill_pipe.consume.drafts.checkpoint import load_draft
from distill_pipe.consume.drafts.draft import Draft
from distill_pipe.errors import UsageError
from distill_pipe.produce.chat import Renderer
from distill_pipe.produce.corpus import read_prompts
from distill_pipe.produce.loss_mask import TemplateError
from distill_pipe.produce.replay import load_model
from distill_pipe.produce.targets import Target as TargetModel
from distill_pipe.produce.targets import resolve_target
from distill_pipe.speculative.decode import Decoding, decode
from distill_pipe.speculative.prompts import DOMAINS
from distill_pipe.speculative.target import CachedTarget, Target
from distill_pipe.store.plan import Message

RESAMPLES = 1000


class BenchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is decoded. `drafted`: numbers of tokens per step to try; what the draft was trained for when empty. `vllm`:
    let vLLM decode the same prompts too, greedily, with the first of these numbers."""

    prompts: int = 20
    max_tokens: int = 64
    temperatures: tuple[float, ...] = (0.0, 1.0)
    drafted: tuple[int, ...] = ()
    seed: int = 0
    vllm: bool = False


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per step in one domain, or in all (`domain` is None), with a 95 % interval over prompts."""

    domain: str | None
    temperature: float
    drafted: int
    prompts: int
    steps: int
    accepted: int
    tau: float
    low: float
    high: float


class EngineCount(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM counted over all prompts at T = 0, and what it wrote."""

    drafted: int
    steps: int
    accepted: int
    tau: float
    texts: tuple[tuple[int, ...], ...]


class DraftBench(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted, by our sampler and where it was asked for by vLLM."""

    target: str
    arch: str
    seed: int
    counts: tuple[Count, ...]
    vllm: EngineCount | None = None


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """A prompt as the target reads it."""

    domain: str
    token_ids: tuple[int, ...]


def bench_draft(target: str, draft_folder: Path, corpora: Sequence[str], settings: BenchSettings,
                say: Callable[[str], None] = lambda _: None) -> DraftBench:
    """Decode prompts that the draft was not trained on, at every temperature and number of drafted tokens.

    Args:
        target: a preset, folder or hub id.
        draft_folder: what `train` wrote.
        corpora: domains of `prompts`, or corpus files.
        settings: how much.
        say: told what is done.

    Raises:
        UsageError: the target, the draft or a corpus cannot be used, or vLLM cannot run a draft of this kind.
    """
    found = resolve_target(target)
    draft = load_draft(draft_folder, found.folder)
    prompts = list(bench_prompts(found, corpora, settings.prompts, settings.max_tokens))
    model = CachedTarget(load_model(found, "float32"), draft.layers)
    bench = count_accepted(model, draft, prompts, settings, found.spec.name, stop_tokens(found), say)
    if not settings.vllm:
        return bench
    from distill_pipe.speculative.vllm_decoding import decode_with_vllm

    say("starting vLLM")
    drafted = bench.counts[0].drafted
    count = decode_with_vllm(found, draft_folder, [p.token_ids for p in prompts], drafted, settings.max_tokens)
    return msgspec.structs.replace(bench, vllm=count)


def count_accepted(target: Target, draft: Draft, prompts: Sequence[BenchPrompt], settings: BenchSettings, name: str,
                   stop_ids: frozenset[int], say: Callable[[str], None] = lambda _: None) -> DraftBench:
    """The same with a target and prompts at hand."""
    counts: list[Count] = []
    for temperature in settings.temperatures:
        for drafted in settings.drafted or (draft.positions,):
            how = Decoding(drafted, temperature, settings.max_tokens, stop_ids)
            by_domain: dict[str, list[tuple[int, int]]] = {}
            for number, prompt in enumerate(prompts):
                generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
                accepted = decode(target, draft, prompt.token_ids, how, generator).accepted
                by_domain.setdefault(prompt.domain, []).append((sum(accepted), len(accepted)))
            everything = [pair for pairs in by_domain.values() for pair in pairs]
            counts += [_count(None, how, everything), *(_count(domain, how, of) for domain, of in by_domain.items())]
            say(f"T = {temperature:g}, {drafted} drafted: tau {counts[-1 - len(by_domain)].tau:.3f} over "
                f"{len(everything)} prompts")
    return DraftBench(target=name, arch=draft.arch, seed=settings.seed, counts=tuple(counts))


def bench_prompts(target: TargetModel, corpora: Sequence[str], each: int, room: int) -> Iterator[BenchPrompt]:
    """`each` prompts of every corpus that leave `room` tokens in the target's context; of domains, the held-out ones.
    """
    renderer = Renderer(target.folder)
    for corpus in corpora:
        fitting = (p for p in _rendered(renderer, corpus) if len(p.token_ids) + room < target.max_model_len)
        taken = list(islice(fitting, each))
        if not taken:
            raise UsageError(f"corpus {corpus} holds no prompt that fits the target's context")
        yield from taken


def stop_tokens(target: TargetModel) -> frozenset[int]:
    """The tokens that end a text, by the model's generation_config.json."""
    path = target.folder / "generation_config.json"
    if not path.is_file():
        return frozenset()
    stops = msgspec.json.decode(path.read_bytes()).get("eos_token_id")
    return frozenset([stops] if isinstance(stops, int) else stops or ())


def _rendered(renderer: Renderer, corpus: str) -> Iterator[BenchPrompt]:
    for domain, messages in _conversations(corpus):
        try:
            yield BenchPrompt(domain, tuple(renderer.render(messages, "target").token_ids_T))
        except TemplateError:
            continue


def _conversations(corpus: str) -> Iterator[tuple[str, tuple[Message, ...]]]:
    if corpus in DOMAINS:
        yield from ((p.domain, (Message("user", p.text),)) for p in DOMAINS[corpus]() if p.held_out)
    elif Path(corpus).is_file():
        yield from ((p.domain or Path(corpus).stem, p.messages)
                    for p in read_prompts([corpus], "target", None))
    else:
        raise UsageError(f"--corpus {corpus}: give {', '.join(DOMAINS)}, or a corpus file")


def _count(domain: str | None, how: Decoding, pairs: Sequence[tuple[int, int]]) -> Count:
    accepted_N, steps_N = np.array(pairs, np.float64).T
    drawn_SN = np.random.default_rng(0).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), RESAMPLES)
    taus_S = 1 + drawn_SN @ accepted_N / np.maximum(drawn_SN @ steps_N, 1)
    low, high = np.quantile(taus_S, [0.025, 0.975]).tolist()
    steps = max(int(steps_N.sum()), 1)
    return Count(domain=domain, temperature=how.temperature, drafted=how.drafted, prompts=len(pairs), steps=steps,
                 accepted=int(accepted_N.sum()), tau=1 + float(accepted_N.sum()) / steps, low=low, high=high)
