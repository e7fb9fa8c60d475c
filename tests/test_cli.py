"""The command line as its user meets it: one clear line and the documented exit code for every mistake, an untouched
disk, and the facts it prints. Bad input is tried in this process; what needs the engine runs as a command of its own.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from runs import GENERATE, PROMPTS, command, prompt_records, stored_traces, write_corpus

from distill_pipe import __version__
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.verify import verify


def corpus(tmp_path: Path, text: str = '{"prompt": "hello"}\n') -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("text", "says"), [
    ("", "the file is empty"),
    ("\n\n", "holds no records"),
    ('{"prompt": "a"}\n{oops\n', "corpus.jsonl:2: this line is not JSON"),
    ('{"prompt": "a"}\n["b"]\n', "corpus.jsonl:2: this line is JSON but not an object"),
    ('{"text": "a"}\n', "corpus.jsonl:1: the record has none of the fields `messages`, `conversations`, `prompt`"),
    ('{"prompt": " "}\n', "corpus.jsonl:1: the prompt is empty"),
    ('{"messages": [{"role": "wizard", "content": "a"}]}\n', "corpus.jsonl:1: a turn has an unknown role"),
])
def test_a_bad_corpus_is_named_by_line_and_leaves_the_disk_untouched(cli, tmp_path, text, says) -> None:
    code, out, err = cli("generate", "--target", "smollm2-135m", "--corpus", corpus(tmp_path, text), "--out",
                         tmp_path / "out")
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "says"), [
    (["--corpus", "nowhere.jsonl"], "there is no such file"),
    (["--corpus", "/"], "this is a folder; give the files in it"),
    (["--target", "llama-9"], "unknown target 'llama-9': give one of "),
    (["--top-k", "49153"], "more than the 49152 tokens"),
    (["--top-k", "0"], "$.capture.top_k"),
    (["--layers", "2,31"], "layer 31 is out of range"),
    (["--layers", "two"], "or numbers with commas"),
    (["--responses", "corpus"], "corpus.jsonl:1: there is no response to score"),
    (["--set", "capture.topk=3"], "unknown field `topk`"),
    (["--set", "sampling"], "write it as name=value"),
    (["--set", "max_model_len=9000"], "more than the 8192 tokens"),
    (["--set", "dtype=float99"], "dtype 'float99' is not one of bfloat16, float16, float32"),
    (["--job", "nowhere.yaml"], "job file nowhere.yaml cannot be read"),
    (["--out", "ftp://host/data"], "a dataset's place is a folder, or starts with s3"),
])
def test_a_bad_option_gets_one_line_with_the_fix(cli, tmp_path, options, says) -> None:
    given = {"--target": "smollm2-135m", "--corpus": str(corpus(tmp_path)), "--out": str(tmp_path / "out")}
    names, values = options[::2], options[1::2]
    given |= dict(zip(names, values, strict=True))
    code, out, err = cli("generate", *(part for pair in given.items() for part in pair))
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_path_that_no_file_system_takes_is_refused_in_one_line(cli, tmp_path) -> None:
    long = tmp_path / f"{'a' * 300}.jsonl"
    for line in (("status", long), ("prepare", corpus(tmp_path), "--out", long)):
        code, out, err = cli(*line)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "File name too long; choose another place" in err


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(cli, tmp_path) -> None:
    long, limit = corpus(tmp_path, '{"prompt": "hello"}\n' * 20_000), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        code, out, err = cli("prepare", long, "--out", tmp_path / "prepared.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (code, out, len(err.splitlines())) == (5, "", 1)
    assert "free some room, then run the same command again" in err
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_an_output_folder_with_other_things_in_it_is_refused_and_left_alone(cli, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, err = cli("generate", "--target", "smollm2-135m", "--corpus", corpus(tmp_path), "--out", tmp_path / "out")
    assert code == 2
    assert "is not a distill-pipe dataset" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(cli, tmp_path) -> None:
    code, out, _ = cli("generate", "--target", "smollm2-135m", "--corpus", corpus(tmp_path), "--out", tmp_path / "out",
                       "--dry-run", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["prompts"], facts["shards"], facts["layers"]) == (1, 1, [2, 15, 27, 30])
    assert [c["codec"] for c in facts["codecs"]] == ["none", "f32", "bf16", "bf16-split", "fp8", "q8", "q6", "q5"]
    assert facts["probe"] is None
    assert not (tmp_path / "out").exists()


def test_plan_prints_what_a_dry_run_prints_and_writes_nothing(cli, tmp_path) -> None:
    line = ("--target", "smollm2-135m", "--corpus", corpus(tmp_path), "--out", tmp_path / "out")
    _, dry, _ = cli("generate", *line, "--dry-run", "--json")
    code, planned, _ = cli("plan", *line, "--json")
    assert code == 0
    assert json.loads(planned) | {"free_bytes": 0} == json.loads(dry) | {"free_bytes": 0}
    code, shown, _ = cli("plan", *line)
    assert code == 0
    assert all(word in shown for word in ("supervised rows", "layer_30", "bf16-split", "KV cache", "max_tokens"))
    assert not (tmp_path / "out").exists()


def test_plan_refuses_a_gpu_that_is_too_small_with_the_numbers(cli, tmp_path) -> None:
    code, out, err = cli("plan", "--target", "smollm2-135m", "--corpus", corpus(tmp_path), "--out", tmp_path / "out",
                         "--gpu-memory", "0.25")
    assert (code, out) == (2, "")
    assert "smollm2-135m does not fit: 0.50 GiB of float32 weights" in err
    assert len(err.splitlines()) == 1


def test_an_adaptive_head_is_an_option_of_its_own(cli, tmp_path) -> None:
    line = ("plan", "--target", "smollm2-135m", "--corpus", corpus(tmp_path), "--out", tmp_path / "out", "--json")
    _, out, _ = cli(*line, "--coverage", "0.9", "--top-k-max", "64")
    assert (json.loads(out)["coverage"], json.loads(out)["top_k"]) == (0.9, 64)
    code, _, err = cli(*line, "--coverage", "0.9", "--top-k", "64")
    assert code == 2
    assert "give one of them" in err


def test_the_version_is_an_option(cli) -> None:
    assert cli("--version") == (0, f"distill-pipe {__version__}\n", "")


WITHOUT = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1].split(","))
sys.argv[:2] = ["distill-pipe"]
from distill_pipe.cli import main
main()
"""


def without(packages: str, *args: object) -> subprocess.CompletedProcess[str]:
    """`distill-pipe` where some packages are not installed."""
    return subprocess.run([sys.executable, "-c", WITHOUT, packages, *map(str, args)], capture_output=True, text=True,
                          check=False)


@pytest.mark.parametrize(("args", "says"), [
    (("train", "{}"), "this needs torch, which is not installed: pip install 'distill-pipe[train]'"),
    (("export", "{}", "--to", "axolotl", "--out", "{}/out"), "pip install 'distill-pipe[train]'"),
    (("generate", "--target", "fake", "--corpus", "{}/corpus.jsonl", "--out", "{}/out"),
     "this needs ray, which is not installed: pip install 'distill-pipe[cuda]', or 'distill-pipe[cpu]' where there"),
])
def test_a_command_whose_packages_are_not_installed_says_how_to_get_them(tmp_path, args, says) -> None:
    corpus(tmp_path)
    done = without("torch,ray,vllm,transformers", *(arg.format(tmp_path) for arg in args))
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_plan_needs_neither_torch_nor_an_engine_nor_a_tokenizer(tmp_path) -> None:
    done = without("torch,ray,vllm,transformers,tokenizers,safetensors", "plan", "--target", "deepseek-v3", "--gpus",
                   "8xH200", "--corpus", corpus(tmp_path), "--layers", "3+last", "--hidden-codec", "q6")
    assert done.returncode == 0, done.stderr
    assert "hours for the run" in done.stdout


def test_what_a_terminal_has_no_characters_for_is_escaped() -> None:
    golden = Path(__file__).parent / "golden" / "v1" / "dataset"
    done = subprocess.run([sys.executable, "-m", "distill_pipe.cli", "status", golden], capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=True)
    assert re.search(r"target +tiny/ziel-\\xe9\s", done.stdout)


def test_commands_on_a_folder_that_is_no_dataset_say_so(cli, tmp_path) -> None:
    for name in ("status", "verify", "inspect"):
        code, _, err = cli(name, tmp_path)
        assert code == 4
        assert "it has no run.json" in err


@pytest.mark.engine
def test_another_run_in_the_same_folder_is_refused_with_the_fields_that_differ(cli, generated) -> None:
    before = sorted(p for p in generated.rglob("*"))
    code, _, err = cli("generate", "--corpus", generated.parent / "c.jsonl", "--out", generated, *GENERATE, "--top-k",
                       "16")
    assert code == 4
    assert "capture.top_k: stored 32, given 16" in err
    assert sorted(p for p in generated.rglob("*")) == before


@pytest.mark.engine
def test_a_finished_run_is_finished_at_once_and_nothing_is_written_again(cli, generated) -> None:
    before = {p: p.stat().st_mtime_ns for p in generated.rglob("*.parquet")}
    code, out, _ = cli("generate", "--corpus", generated.parent / "c.jsonl", "--out", generated, *GENERATE, "--json")
    assert code == 0
    assert json.loads(out)["shards_done"] == 2
    assert {p: p.stat().st_mtime_ns for p in generated.rglob("*.parquet")} == before


@pytest.mark.engine
def test_a_prompt_over_the_context_length_is_quarantined_and_the_run_goes_on(cli, generated) -> None:
    report = verify(LocalRoot(generated))
    assert report.clean, report
    assert (report.traces, report.quarantined) == (len(PROMPTS), 1)
    [quarantine] = (generated / "_quarantine").rglob("*.parquet")
    [row] = pq.read_table(quarantine).to_pylist()
    assert (row["ordinal"], row["code"]) == (len(PROMPTS), "too_long")
    assert "do not fit the context length of 128" in row["message"]
    code, _, err = cli("inspect", generated, "--trace", len(PROMPTS))
    assert code == 2
    assert "was quarantined" in err


@pytest.mark.engine
def test_inspect_shows_tokens_candidates_and_tail_mass(cli, generated) -> None:
    code, out, _ = cli("inspect", generated, "--trace", 0, "--json")
    rows = json.loads(out)
    [trace] = [t for t in stored_traces(generated) if t.ordinal == 0]
    assert code == 0
    assert [row["token_id"] for row in rows] == trace.token_ids_T.tolist()
    first = rows[int(trace.positions_R[0])]
    assert first["candidates"][0][0] == trace.topk_ids_N[0]
    assert first["tail_mass"] == pytest.approx(float(trace.tail_mass_R[0]))
    assert rows[-1]["candidates"] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.engine
def test_a_full_disk_ends_the_run_cleanly_and_the_same_command_goes_on_with_more_room(small_disk, tmp_path) -> None:
    line = ("generate", "--corpus", write_corpus(tmp_path / "c.jsonl", prompt_records(PROMPTS[:2])), "--out",
            small_disk / "out", *GENERATE, "--set", "sampling.temperature=0")
    full = command(*line)
    assert full.returncode == 5, full.stderr
    assert "No space left on device; free some room, then run the same command again" in full.stderr.splitlines()[-1]
    assert not [p for p in (small_disk / "out" / ".tmp").rglob("*") if p.is_file()]
    assert not list((small_disk / "out").rglob("shard-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert command(*line).returncode == 0
    assert verify(LocalRoot(small_disk / "out")).clean
    [answer] = [t for t in stored_traces(small_disk / "out") if t.ordinal == 0]
    assert "Paris" in decoded(answer.token_ids_T[answer.loss_mask_T].tolist())


def decoded(token_ids: list[int]) -> str:
    from transformers import AutoTokenizer

    from distill_pipe.produce.smollm2 import materialise_smollm2

    return str(AutoTokenizer.from_pretrained(materialise_smollm2()).decode(token_ids))
