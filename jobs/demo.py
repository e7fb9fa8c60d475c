"""`make demo`: real prompts, a real target, real vLLM and Ray, then a draft that learns; on a machine without a GPU.

Writes everything below `demo-out/`. Running it again continues where it stopped. The commands are the ones a user would
type, each in a process of its own; this file only makes the corpus and adds up what they print.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

from distill_pipe.speculative.prompts import code_prompts, general_prompts

OUT = Path("demo-out")
CHAT_PROMPTS, CODE_PROMPTS = 140, 60


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
    prompts = [*islice(general_prompts(), CHAT_PROMPTS), *islice(code_prompts(), CODE_PROMPTS)]
    (OUT / "prompts.jsonl").write_text("".join(json.dumps(p.record()) + "\n" for p in prompts))

    run("generate", "--job", job)
    print(run("verify", OUT / "dataset"))
    print("\n".join(run("inspect", OUT / "dataset", "--trace", 0).splitlines()[-14:]))
    status = json.loads(run("status", OUT / "dataset", "--json"))
    trained = json.loads(run("train", OUT / "dataset", "--loss", "lk-hybrid", "--positions", 3, "--draft-vocab", 8192,
                             "--epochs", 3, "--lr", 1e-3, "--out", OUT / "draft", "--json"))

    before, after = trained["before"][0], trained["after"][0]
    summary = [
        ("prompts", status["prompts"]), ("traces", status["traces"]), ("quarantined", status["quarantined"]),
        ("tokens", status["tokens"]), ("supervised rows", status["rows"]), ("bytes on disk", status["bytes"]),
        ("bytes per token", f"{status['bytes'] / status['tokens']:.0f}"),
        ("mean mass outside the top 32", f"{status['tail_mass_mean']:.3f}"),
        ("held-out alpha before training", f"{before['alpha']:.3f}"),
        ("held-out alpha after training",
         f"{after['alpha']:.3f} in [{after['lower']:.3f}, {after['upper']:.3f}]"),
        ("seconds of training", f"{trained['seconds']:.0f}"), ("seconds in all", f"{time.monotonic() - started:.0f}"),
    ]
    print()
    for name, value in summary:
        print(f"  {name:<32}{value}")
    gained = after["alpha"] - before["alpha"]
    if gained < 0.10:
        raise SystemExit(f"demo failed: held-out alpha rose by {gained:.3f}, expected at least 0.10")
    print(f"\ndemo ok: rows={status['rows']} tokens={status['tokens']} "
          f"bytes_per_token={status['bytes'] / status['tokens']:.0f} alpha_before={before['alpha']:.3f} "
          f"alpha_after={after['alpha']:.3f}")


if __name__ == "__main__":
    main()
