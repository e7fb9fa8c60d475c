"""The results as a dated Markdown page and a plot with error bars.

Every number is a mean over seeds with its standard error. Where there is one seed, the error is not known, and said so.
Gains are paired: each seed's own KL is what a loss is held against, so that what a seed's order of batches and initial
weights do to both cancels out.
"""

import datetime
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from distill_pipe.consume.evaluate import DomainEvaluation, Evaluation
from jobs.proof.one import Result, read_result

DRAFTED = 6
Measure = Callable[[Result], float | None]
Rows = dict[tuple[str, ...], dict[int, Result]]


def write_report(results: Path) -> Path:
    """Write `proof-<date>.md` and `.svg` beside the results, from those that are there."""
    found = [read_result(path) for path in sorted(results.glob("*.json"))]
    if other := next((r for r in found if r.scale != found[0].scale), None):
        raise SystemExit(f"{found[0].training.name} and {other.training.name} are results of different scales, which "
                         "one table must not mix: give each scale a --results folder of its own")
    results.mkdir(parents=True, exist_ok=True)
    page = results / f"proof-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.md"
    lines = ["# LK losses against KL, and compact shards against exact ones", "", *_setting(found), ""]
    lines += ["## Losses by architecture", "", *_grid(found), "", "## Lambda, for eagle3", "", *_ladder(found), "",
              "## What a dataset stores, for eagle3 with lk-hybrid", "", *_ablation(found), "",
              "## Predicted from shards and counted by decoding", "", *_agreement(found), ""]
    page.write_text("\n".join(lines))
    if found:
        plot(found, page.with_suffix(".svg"))
    return page


def tau(temperature: float, drafted: int = DRAFTED) -> Measure:
    """Tokens per step that `evaluate` expects on the held-out rows."""
    def measure(result: Result) -> float | None:
        return _tau_of(result.evaluation, temperature, drafted)
    return measure


def counted_tau(temperature: float, domain: str | None = None) -> Measure:
    """Tokens per step that decoding counted."""
    def measure(result: Result) -> float | None:
        counts = result.decoded.counts if result.decoded else ()
        return next((c.tau for c in counts if (c.temperature, c.domain) == (temperature, domain)), None)
    return measure


def mean_alpha(result: Result) -> float | None:
    """Mean over positions of the held-out acceptance rate at T = 1."""
    whole = _whole(result.evaluation, 1.0)
    return None if whole is None else float(np.mean([p.alpha.mean for p in whole.positions[:DRAFTED]]))


def by_seed(found: Sequence[Result], key: Callable[[Result], tuple[str, ...] | None]) -> Rows:
    """Results by what they are of, then by seed."""
    rows: Rows = defaultdict(dict)
    for result in found:
        name = key(result)
        if name is not None:
            rows[name][result.training.seed] = result
    return dict(rows)


def shown(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean and standard error over seeds."""
    if not values:
        return "-"
    if len(values) == 1:
        return form.format(values[0]) + " (one seed)"
    error = float(np.std(values, ddof=1) / len(values) ** 0.5)
    return form.format(float(np.mean(values))) + " ± " + form.format(error).lstrip("+")


def gains(results: dict[int, Result], base: dict[int, Result], measure: Measure) -> list[float]:
    """By how many per cent each seed is above the same seed of `base`."""
    pairs = [(measure(results[seed]), measure(base[seed])) for seed in sorted(results.keys() & base.keys())]
    return [100 * (value / was - 1) for value, was in pairs if value is not None and was]


def values(results: dict[int, Result], measure: Measure) -> list[float]:
    """The measure of every seed that has it."""
    return [value for seed in sorted(results) if (value := measure(results[seed])) is not None]


def plot(found: Sequence[Result], path: Path) -> None:
    """Gain in tau over KL at T = 1 by architecture and loss, one bar each with its standard error."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    grid = by_seed(found, _grid_key)
    kinds = sorted({arch for arch, _ in grid})
    losses = sorted({loss for _, loss in grid} - {"kl"})
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for number, loss in enumerate(losses):
        made = [gains(grid.get((arch, loss), {}), grid.get((arch, "kl"), {}), tau(1.0)) for arch in kinds]
        at = np.arange(len(kinds)) + 0.8 * (number - (len(losses) - 1) / 2) / max(len(losses), 1)
        errors = [np.std(g, ddof=1) / len(g) ** 0.5 if len(g) > 1 else 0.0 for g in made]
        axes.bar(at, [float(np.mean(g)) if g else 0.0 for g in made], 0.7 / max(len(losses), 1), yerr=errors,
                 label=loss, capsize=3)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("tau over KL at T = 1, %")
    if losses:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _setting(found: Sequence[Result]) -> list[str]:
    if not found:
        return ["No result yet."]
    scale = found[0].scale
    seeds = sorted({r.training.seed for r in found})
    text = (f"Target SmolLM2-135M-Instruct. {scale.rows:,} supervised tokens written at T = {scale.temperature:g}, at "
            f"most {scale.max_tokens} per prompt; {scale.steps} steps of {scale.batch_tokens} tokens, peak learning "
            f"rate {scale.lr:g}, {scale.positions} positions, draft vocabulary {scale.draft_vocab}. {len(found)} "
            f"trainings, seeds {', '.join(map(str, seeds))}. Means over seeds ± standard error; tau is tokens per "
            f"target step with {DRAFTED} drafted tokens, from held-out rows unless it says counted. There, at T = 1, "
            f"{found[0].evaluation.assumptions[1.0]}.")
    return [text]


def _grid(found: Sequence[Result]) -> list[str]:
    rows = by_seed(found, _grid_key)
    lines = _head("draft", "loss", "mean alpha", "tau T=0", "tau T=1", "over KL, % (T=1)", "counted T=0", "counted T=1",
                  "over KL, % (counted T=1)", "certified alpha, first token")
    for (arch, loss), results in sorted(rows.items()):
        base = rows.get((arch, "kl"), {})
        lines.append(_row(arch, loss, shown(values(results, mean_alpha)), shown(values(results, tau(0.0))),
                          shown(values(results, tau(1.0))), shown(gains(results, base, tau(1.0)), "{:+.2f}"),
                          shown(values(results, counted_tau(0.0))), shown(values(results, counted_tau(1.0))),
                          shown(gains(results, base, counted_tau(1.0)), "{:+.2f}"), _certified(results)))
    domains = sorted({c.domain for r in found if r.decoded for c in r.decoded.counts if c.domain})
    lines += ["", "Counted tau at T = 1 by domain:", "", *_head("draft", "loss", *domains)]
    for (arch, loss), results in sorted(rows.items()):
        lines.append(_row(arch, loss, *(shown(values(results, counted_tau(1.0, d))) for d in domains)))
    return lines


def _ladder(found: Sequence[Result]) -> list[str]:
    def key(result: Result) -> tuple[str, ...] | None:
        training = result.training
        if training.part == "ladder":
            return (training.label,)
        names = {"kl": "KL (lambda=1)", "tv": "TV (lambda=0)", "lk-alpha": "-log alpha", "lk-hybrid": "eta=3"}
        return (names[training.label],) if training.part == "grid" and training.arch == "eagle3" else None

    rows = by_seed(found, key)
    base = rows.get(("KL (lambda=1)",), {})
    lines = _head("loss", "mean alpha", "tau T=0", "tau T=1", "over KL, % (T=1)", "counted T=1")
    lines += [_row(label, shown(values(r, mean_alpha)), shown(values(r, tau(0.0))), shown(values(r, tau(1.0))),
                   shown(gains(r, base, tau(1.0)), "{:+.2f}"), shown(values(r, counted_tau(1.0))))
              for (label,), r in sorted(rows.items())]
    return lines


def _ablation(found: Sequence[Result]) -> list[str]:
    def key(result: Result) -> tuple[str, ...] | None:
        training = result.training
        if training.part == "ablation":
            return (training.label,)
        is_main = (training.part, training.arch, training.label) == ("grid", "eagle3", "lk-hybrid")
        return ("K=32+8 sampled",) if is_main else None

    rows = by_seed(found, key)
    exact = rows.get(("exact",), {})
    lines = _head("trained from", "mean alpha", "of exact, %", "tau T=1", "last loss")
    lines += [_row(label, shown(values(r, mean_alpha), "{:.4f}"),
                   shown([100 + g for g in gains(r, exact, mean_alpha)], "{:.2f}"), shown(values(r, tau(1.0))),
                   shown([result.trained.loss_last for result in r.values()]))
              for (label,), r in sorted(rows.items())]
    return lines


def _agreement(found: Sequence[Result]) -> list[str]:
    """The tau that each draft was predicted, and the one that was counted, with its interval over prompts."""
    lines = _head("draft", "loss", "seed", "T", "predicted", "counted", "95 % interval")
    for result in found:
        for predicted in result.predicted:
            temperature = predicted.domains[0].temperature
            whole = _whole(predicted, temperature)
            counts = result.decoded.counts if result.decoded else ()
            count = next((c for c in counts if (c.temperature, c.domain) == (temperature, None)), None)
            if whole is None or count is None:
                continue
            expected = next(length.tau for length in whole.lengths if length.drafted == count.drafted)
            lines.append(_row(result.training.arch, result.training.label, str(result.training.seed),
                              f"{temperature:g}", f"{expected.mean:.3f} ± {expected.error:.3f}", f"{count.tau:.3f}",
                              f"{count.low:.3f} - {count.high:.3f}"))
    return lines


def _grid_key(result: Result) -> tuple[str, ...] | None:
    return (result.training.arch, result.training.label) if result.training.part == "grid" else None


def _certified(results: dict[int, Result]) -> str:
    bounds = [w.positions[0] for r in results.values() if (w := _whole(r.evaluation, 1.0)) is not None]
    return f"{min(b.lower for b in bounds):.3f} - {max(b.upper for b in bounds):.3f}" if bounds else "-"


def _tau_of(evaluation: Evaluation, temperature: float, drafted: int) -> float | None:
    whole = _whole(evaluation, temperature)
    lengths = whole.lengths if whole is not None else ()
    return next((length.tau.mean for length in lengths if length.drafted == drafted), None)


def _whole(evaluation: Evaluation, temperature: float) -> DomainEvaluation | None:
    return next((d for d in evaluation.domains if (d.domain, d.temperature) == (None, temperature)), None)


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
