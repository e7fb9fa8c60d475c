"""The page about a dataset: that its figures are those of the data, that text of a model stays text, and that a browser
shows it, by mouse and by keyboard, in light and dark, wide and narrow.

Shapes: R supervised rows, V vocabulary.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, Page, browser
from hypothesis import given
from hypothesis import strategies as st
from tiny_datasets import Shape, random_trace, start_run, trace_from_logits

from distill_pipe.cli import main
from distill_pipe.errors import DamageError
from distill_pipe.report.collect import MOST_STEPS, Commit, collect, throughput
from distill_pipe.report.facts import Report
from distill_pipe.report.page import embedded, render
from distill_pipe.report.viewed import CANDIDATES, MOST_TOKENS, entropy_bounds, viewed_trace
from distill_pipe.store.column_sizes import column_sizes
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.plan import shard_range
from distill_pipe.store.root import open_root
from distill_pipe.store.shard import QuarantinedPrompt, main_table, traces_from_table
from distill_pipe.store.status import status

HOSTILE = {0: "</script><script>window.broken = 1</script>", 1: "<img src=x onerror='window.broken = 1'>", 2: "\n",
           3: " \u202egnp.exe", 4: "<!--", 5: "\u2028\x1b[31m", 6: '"', 7: "\\u003c"}


def text_of(token: int) -> str:
    return HOSTILE.get(token, f" word{token}")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards, the last with a prompt that was given up on."""
    folder = tmp_path_factory.mktemp("report") / "dataset"
    run = start_run(folder, 18)
    lost = QuarantinedPrompt(17, "prompt-17", "too_long", "<b>9,000 tokens</b> do not fit")
    for shard in range(5):
        held = [encode_trace(random_trace(i), "bf16-split") for i in range(*shard_range(run, shard)) if i != 17]
        commit_shard(open_root(folder), run, shard, held, [lost] if shard == 4 else [])
    return folder


@pytest.fixture(scope="module")
def facts(dataset: Path) -> Report:
    return collect(open_root(dataset), text_of, traces=6)


def test_the_figures_are_those_of_the_dataset(dataset, facts) -> None:
    known = status(open_root(dataset))
    for name in ("shards", "shards_done", "prompts", "traces", "quarantined", "tokens", "rows", "bytes"):
        assert getattr(facts, name) == getattr(known, name), name
    assert facts.tail_mass_mean == pytest.approx(known.tail_mass_mean)
    assert [(r.code, r.prompts) for r in facts.reasons] == [("too_long", 1)]
    assert [sum(b.count for b in d.bars) for d in facts.distributions] == [known.rows] * 3 + [known.traces]
    quarantine = sum(p.stat().st_size for p in (dataset / "_quarantine").rglob("*.parquet"))
    assert sum(c.bytes for c in facts.columns) == known.bytes - quarantine
    assert facts.coverage[-1].tokens == 1
    assert facts.coverage[-1].mass == pytest.approx(1, abs=1e-6)
    assert len(facts.viewed) == 6
    assert len({t.ordinal for t in facts.viewed}) == 6


def test_every_shard_of_many_is_in_the_figures_though_few_are_opened(dataset, facts, monkeypatch) -> None:
    monkeypatch.setattr("distill_pipe.report.collect.MOST_SHARDS_READ", 2)
    few = collect(open_root(dataset), text_of)
    assert (few.sampled_shards, few.shards_done) == (2, 5)
    assert (few.tokens, few.bytes, few.distributions) == (facts.tokens, facts.bytes, facts.distributions)
    assert sum(c.bytes for c in few.columns) == pytest.approx(sum(c.bytes for c in facts.columns), rel=0.5)


def test_a_run_without_a_shard_has_a_page_too(tmp_path) -> None:
    start_run(tmp_path / "empty", 3)
    empty = collect(open_root(tmp_path / "empty"), text_of)
    assert (empty.shards_done, empty.viewed, empty.steps, empty.coverage) == (0, (), (), ())
    assert "distill-pipe" in render(empty)


commits = st.builds(Commit, st.floats(0, 1e6), st.integers(0, 1000), st.integers(0, 9), st.integers(0, 3))


@given(st.lists(commits, max_size=300))
def test_throughput_covers_the_whole_time_and_loses_nothing(held) -> None:
    steps = throughput(held)
    ordered = sorted(held, key=lambda c: c.time)
    if not steps:
        assert len({c.time for c in held}) < 2
        return
    assert len(steps) <= MOST_STEPS
    assert steps[0].start == 0
    assert steps[-1].stop == pytest.approx(ordered[-1].time - ordered[0].time)
    assert all(a.stop == pytest.approx(b.start) for a, b in pairwise(steps))
    assert all(s.stop > s.start for s in steps)
    assert sum(s.tokens for s in steps) == sum(c.tokens for c in ordered[1:])
    assert sum(s.quarantined for s in steps) == sum(c.quarantined for c in ordered)


@given(st.integers(0, 10_000), st.integers(1, 63), st.floats(0.1, 8), st.sampled_from([3, 5, 7, 12, 24]))
def test_the_entropy_of_the_whole_row_lies_between_the_bounds(seed, top_k, spread, bits) -> None:
    logits_TV = np.random.default_rng(seed).normal(0, spread, (6, 64)).astype(np.float32)
    trace = trace_from_logits(0, np.arange(6, dtype=np.int32), np.arange(6) > 2, logits_TV, {}, Shape(top_k=top_k))
    logp_RV = logits_TV[trace.positions_R].astype(np.float64)
    logp_RV -= np.log(np.exp(logp_RV).sum(1, keepdims=True))
    entropy_R = -(np.exp(logp_RV) * logp_RV).sum(1)
    (stored,) = traces_from_table(main_table([trace], bits)[0], 64)
    low_R, high_R = entropy_bounds(stored, 64, bits)
    assert (low_R <= entropy_R + 1e-4).all()
    assert (entropy_R <= high_R + 1e-4).all()
    if top_k == 63 and bits >= 12:
        np.testing.assert_allclose(low_R, high_R, atol=1e-3 + (24 - bits) * 2e-4)


def test_a_token_is_shown_beside_the_distribution_that_the_target_had_before_it() -> None:
    trace = random_trace(3, Shape(top_k=12))
    shown = viewed_trace(trace, 64, 24)
    supervised = [t for t, token in enumerate(shown.tokens) if token.row is not None]
    assert supervised == [t + 1 for t in trace.positions_R]
    starts_R = trace.topk_counts_R.cumsum() - trace.topk_counts_R
    for r, t in enumerate(supervised):
        row = shown.tokens[t].row
        assert row is not None
        assert row.next_logprob == pytest.approx(float(trace.next_logprob_R[r]), rel=1e-3)
        assert [c for c, _ in row.candidates] == trace.topk_ids_N[starts_R[r]:starts_R[r] + CANDIDATES].tolist()
        assert sum(p for _, p in row.candidates) + row.head_left + row.tail_mass == pytest.approx(1, abs=5e-3)
        assert row.entropy_low <= row.entropy <= row.entropy_high


def test_no_text_can_end_the_block_that_carries_it(facts) -> None:
    carried = embedded(facts)
    assert not set("<>&\u2028\u2029") & set(carried)
    again = msgspec.json.decode(carried, type=Report)
    assert again == facts
    # Numbers may be any token; a block that says `</script>` would be one more here.
    assert render(facts).count("</script>") == 2


def test_the_longest_traces_fit_into_three_megabytes(facts) -> None:
    length, vocab = 2 * MOST_TOKENS, 4096
    random = np.random.default_rng(0)
    long = trace_from_logits(0, random.integers(0, vocab, length).astype(np.int32), np.arange(length) > 0,
                             random.normal(0, 2, (length, vocab)).astype(np.float32), {},
                             Shape(vocab_size=vocab, top_k=32, tail_samples=8))
    shown = viewed_trace(long, vocab, 24)
    assert len(shown.tokens) == MOST_TOKENS
    assert shown.num_tokens == length
    text = {i: f" {i:>12}" for i in range(vocab)}
    assert len(render(msgspec.structs.replace(facts, viewed=(shown,) * 6, token_text=text)).encode()) < 3_000_000


def test_column_sizes_are_those_of_the_footer_and_a_damaged_footer_is_an_error(dataset, tmp_path) -> None:
    [path, *_] = sorted((dataset / "data").rglob("*.parquet"))
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    assert column_sizes(path) == {c.path_in_schema.partition(".")[0]: c.total_compressed_size for c in columns}
    data = path.read_bytes()
    for cut in (8, len(data) // 2, len(data) - 4):
        (tmp_path / "cut").write_bytes(data[:cut])
        with pytest.raises(DamageError, match="cut"):
            column_sizes(tmp_path / "cut")


def test_the_command_writes_the_page_and_refuses_what_it_cannot_write(dataset, tmp_path, monkeypatch, capsys) -> None:
    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["distill-pipe", "report", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            main()
        return (int(done.value.code or 0), *capsys.readouterr())

    code, out, err = call(dataset, "--html", tmp_path / "r.html", "--traces", 2, "--json")
    assert code == 0
    assert "token ids are shown as numbers" in err
    assert len(json.loads(out)["viewed"]) == 2
    assert "</html>" in (tmp_path / "r.html").read_text()
    code, _, err = call(dataset, "--html", tmp_path / "no" / "r.html")
    assert (code, "give a file in a folder that exists" in err) == (2, True)
    assert call(tmp_path, "--html", tmp_path / "r.html")[0] == 4


def test_the_pages_parts_are_in_an_installed_package() -> None:
    code = "from distill_pipe.report.page import _part; print(len(_part('page.js')))"
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True)) > 1000


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    # Some systems have a script of this name, which only says how to install it.
    if CHROMIUM is None or subprocess.run([CHROMIUM, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("there is no Chromium on this machine")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(page: Page, facts: Report, tmp_path: Path) -> Page:
    """The page in a browser, wide and light. Its first trace starts with the hostile tokens."""
    hostile = trace_from_logits(99, np.arange(20, dtype=np.int32), np.arange(20) > 2,
                                np.random.default_rng(1).normal(0, 2, (20, 64)).astype(np.float32), {}, Shape())
    viewed = (viewed_trace(hostile, 64, 24), *facts.viewed)
    text = {i: text_of(i) for i in range(64)}
    file = tmp_path / "report.html"
    file.write_text(render(msgspec.structs.replace(facts, viewed=viewed, token_text=text, target="<i>tiny</i>")))
    page.errors.clear()
    page.requests.clear()
    page.open(file)
    return page


def current(page: Page) -> int:
    return int(page.evaluate("document.activeElement.dataset.place ?? -1"))


def test_the_page_opens_without_an_error_and_without_the_network(opened: Page) -> None:
    opened.until("document.querySelectorAll('.chart svg').length === 6")
    assert opened.evaluate("document.querySelectorAll('#columns tr').length") > 10
    assert "<b>9,000 tokens</b> do not fit" in opened.evaluate("document.querySelector('#reasons').textContent")
    assert opened.errors == []
    assert len(opened.requests) == 1


def test_text_of_a_model_is_shown_and_never_run(opened: Page) -> None:
    shown = opened.evaluate("document.querySelector('#tokens').textContent")
    assert shown.startswith(f"{HOSTILE[0]}{HOSTILE[1]}\u21b5\n")
    assert "\u27e8202e\u27e9gnp.exe" in shown
    assert "\u27e82028\u27e9\u27e81b\u27e9[31m" in shown
    assert "\\u003c" in shown
    assert opened.evaluate("typeof window.broken") == "undefined"
    assert opened.evaluate("document.querySelectorAll('img, i, b').length") == 0
    assert opened.evaluate("document.querySelector('h1').textContent") == "<i>tiny</i>"


def test_a_script_that_is_not_ours_is_refused_by_the_page(opened: Page) -> None:
    opened.evaluate("document.body.append(Object.assign(document.createElement('script'), "
                    "{textContent: 'window.broken = 1'}))")
    assert opened.evaluate("typeof window.broken") == "undefined"


def test_the_viewer_works_by_keyboard_alone(opened: Page) -> None:
    for _ in range(3):
        opened.press("Tab")
    assert current(opened) == 3
    assert opened.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, expected in (("ArrowRight", 4), ("ArrowLeft", 3), ("ArrowLeft", 2), ("End", 19), ("ArrowRight", 19),
                          ("Home", 0), ("ArrowLeft", 0)):
        opened.press(key)
        assert current(opened) == expected, key
    opened.press("ArrowDown")
    below = current(opened)
    assert below > 0
    opened.press("ArrowUp")
    assert current(opened) < below
    told = opened.evaluate("document.querySelector('#row').textContent")
    assert "Not supervised" in told
    assert opened.evaluate("document.querySelectorAll('[role=option][tabindex=\"0\"]').length") == 1


def test_pointing_at_a_token_shows_what_the_target_expected(opened: Page) -> None:
    x, y = opened.evaluate("(r => [r.x + r.width / 2, r.y + r.height / 2])"
                           "(document.querySelector('[data-place=\"9\"]').getBoundingClientRect())")
    opened.point(x, y)
    opened.until("document.querySelector('.current').dataset.place === '9'")
    assert opened.evaluate("document.querySelector('.context').textContent") == "\u00b7word9"
    assert opened.evaluate("document.querySelectorAll('.candidates li').length") == CANDIDATES + 1
    assert "between" in opened.evaluate("document.querySelector('.numbers').textContent")


def test_another_measure_shades_otherwise_and_another_trace_has_other_tokens(opened: Page) -> None:
    shades = "[...document.querySelectorAll('.supervised')].map(s => s.style.getPropertyValue('--shade'))"
    before = opened.evaluate(shades)
    opened.evaluate("(m => { m.selectedIndex = 1; m.dispatchEvent(new Event('change')) })"
                    "(document.querySelector('#measure'))")
    assert opened.evaluate(shades) != before
    opened.evaluate("(t => { t.selectedIndex = 2; t.dispatchEvent(new Event('change')) })"
                    "(document.querySelector('#trace'))")
    assert opened.evaluate("document.querySelectorAll('#tokens .token').length") != 20
    assert opened.errors == []


@pytest.mark.parametrize("width", [320, 390, 700, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window_and_text_stands_out_from_its_ground(opened: Page, tmp_path, width,
                                                                              dark) -> None:
    opened.open(tmp_path / "report.html", width=width, dark=dark)
    opened.until("document.querySelectorAll('.chart svg').length === 6")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    paper, ink = (opened.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)")
                  for name in ("backgroundColor", "color"))
    assert (sum(paper) < sum(ink)) == dark
    assert abs(sum(paper) - sum(ink)) > 450
    assert opened.errors == []
