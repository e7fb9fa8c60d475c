"""Catches a token, key or signed address in anything that a run leaves behind: its dataset, its logs, Ray's own files,
and what it prints however it ends. And a Ray of ours that strangers can reach."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from fakes import quarantined, questions
from faults.jobs import marked_processes, running
from runs import prompt_records, write_corpus

from distill_pipe.errors import UsageError
from distill_pipe.produce.targets import resolve_target
from distill_pipe.redact import MASK, redacted

pytestmark = pytest.mark.ray
SECRETS = {
    "HF_TOKEN": "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", "AWS_ACCESS_KEY_ID": "AKIAQ3EXAMPLEKEYID77",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY0",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef",
    "AZURE_STORAGE_SAS_TOKEN": "sv=2024-01-01&sig=c2lnbmF0dXJlIG9mIG5vdGhpbmc", "RAY_AUTH_TOKEN": "f00d" * 16}


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    # Ray's sockets live there, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="dps-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def leaked(*folders: Path) -> dict[str, list[str]]:
    """The files that hold a secret, by its name."""
    found: dict[str, list[str]] = {}
    for path in (p for folder in folders for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        data = path.read_bytes()
        for name, value in SECRETS.items():
            if value.encode() in data:
                found.setdefault(name, []).append(str(path))
    return found


def test_no_secret_is_left_behind_and_no_port_is_open_to_strangers(tmp_path: Path, ray_folder: Path) -> None:
    marked = [*questions(80), "[fault:nan] and [fault:refuse]"]
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records(marked))
    env = {**SECRETS, "RAY_TMPDIR": str(ray_folder), "DISTILL_PIPE_FAKE_FAULTS": "1"}
    addresses: set[str] = set()
    for sent in (signal.SIGKILL, None):
        with running(corpus, tmp_path / "out", "--log-json", tmp_path / "log.jsonl", env=env) as job:
            if sent is not None:
                job.wait_for_commits(tmp_path / "out")
                addresses = {ip for ip, _ in listening(marked_processes(job.mark))}
                job.process.send_signal(sent)
                job.process.wait(60)
            else:
                job.end()
    assert quarantined(tmp_path / "out") == [80]
    assert any(ray_folder.rglob("*.log")), "Ray's own logs were looked at"
    assert leaked(tmp_path, ray_folder) == {}
    assert addresses, "a Ray of ours listens on the loopback interface, and there alone"
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize("code", [
    "from distill_pipe.errors import UsageError; raise UsageError(MESSAGE)",
    "raise KeyError(MESSAGE)"])
def test_what_a_failure_quotes_is_printed_without_secrets(code: str) -> None:
    message = " ".join([*SECRETS.values(), "https://user:pass-word@host/x?X-Amz-Signature=abcdef0123456789"])
    line = ("import sys, distill_pipe.cli as cli\n"
            f"MESSAGE = {message!r}\n"
            f"def fail(*args, **options):\n    {code}\n"
            "cli.app = fail\n"
            "cli.main()\n")
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, env={**os.environ, **SECRETS})
    assert done.returncode in (1, 2)
    assert MASK in done.stderr
    for value in (*SECRETS.values(), "pass-word", "abcdef0123456789"):
        assert value not in done.stderr.replace(f"MESSAGE = {message!r}", "")


@pytest.mark.parametrize(("text", "clean"), [
    ("token hf_abcdefghijklmnop is wrong", f"token {MASK} is wrong"),
    ("s3://b/x?X-Amz-Credential=AKIA/1&X-Amz-Signature=0a", f"s3://b/x?X-Amz-Credential={MASK}&X-Amz-Signature={MASK}"),
    ("https://me:secret@host/path", f"https://{MASK}@host/path"),
    ("Authorization: Bearer abc.def", f"Authorization: {MASK}"),
    ("az://c/x?sv=1&sig=a%2Bb", f"az://c/x?sv=1&sig={MASK}"),
    ("prompt 3 of shard 7 failed after 2 tokens", "prompt 3 of shard 7 failed after 2 tokens"),
    ("/data/out/run.json: the sha256 is not abcdef", "/data/out/run.json: the sha256 is not abcdef")])
def test_secrets_of_a_known_form_are_taken_out_and_other_text_is_left_alone(text: str, clean: str) -> None:
    assert redacted(text) == clean


def test_a_variable_that_says_it_is_secret_hides_its_value_and_one_that_names_a_file_does_not(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_STORE_PASSWORD", "correct horse")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redacted(f"correct horse, {tmp_path}, abc") == f"{MASK}, {tmp_path}, abc"


@pytest.mark.faults
def test_a_ray_of_ours_takes_no_orders_without_its_token(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records(questions(2000)))
    with running(corpus, tmp_path / "out", env={"RAY_AUTH_TOKEN": SECRETS["RAY_AUTH_TOKEN"]}) as job:
        job.wait_for_commits(tmp_path / "out")
        [(_, port)] = listening([p for p in marked_processes(job.mark) if p.name().startswith("gcs_server")])
        assert joins(port, SECRETS["RAY_AUTH_TOKEN"])
        assert not joins(port, "0" * 64)


def joins(port: int, token: str) -> bool:
    """Whether a process of another owner can connect. Ray keeps trying with a wrong token, and never gets in."""
    line = f"import ray; ray.init(address='127.0.0.1:{port}', log_to_driver=False); print('inside')"
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    try:
        done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=60, env=env)
    except subprocess.TimeoutExpired:
        return False
    return "inside" in done.stdout


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Every TCP address that these listen on."""
    found: set[tuple[str, int]] = set()
    for process in processes:
        with suppress(psutil.Error):
            found |= {(c.laddr.ip, c.laddr.port) for c in process.net_connections("tcp")
                      if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.parametrize("name", [
    "../../etc", "/etc/passwd", "smollm2-135m/../x", "..", ".", "a" * 300, "x\x01y", "owner/../name", "~root",
    "file:///etc", "http://host/x", "a\\b", "$(id)", "; id", "%2e%2e/x", "NUL", "-rf", "\u202egnp", "a//b",
    "owner/name/more", "owner/.name", "fake/", "FAKE", "fake ", " fake", "fake.yaml", "{{7*7}}", "'; drop",
    "owner/na me", "", "x\x00y", "owner/" + "n" * 200])
def test_a_hostile_name_of_a_target_leads_nowhere(name: str) -> None:
    with pytest.raises(UsageError):
        resolve_target(name)
