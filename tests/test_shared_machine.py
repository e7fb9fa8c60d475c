"""Another user of the same machine, in the same world-writable folder, under the loosest umask.

Catches scratch and datasets that a stranger can replace while they are written, a link that was laid where a file of a
guessable name will be, and a `selftest` that passes a place where any of that works. The stranger is real: a process of
another user, so these tests need root to make one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import write_corpus
from tiny_datasets import make_dataset

from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.normalise import prepare_corpus
from distill_pipe.produce.replica import EnginePlan, Replica
from distill_pipe.store.disk import open_to_all, shut_out_strangers
from distill_pipe.store.root import LocalRoot, open_root
from distill_pipe.store.selftest import selftest
from distill_pipe.store.verify import verify

NOBODY = 65534
PROBE = "strangers cannot change what is written"
# Everything that a user can try on a folder and what is in it; a file of the stranger's own shows that it ran.
ATTACK = """
for path in $(find "$2"); do
    echo forged > "$path"; mv "$path" "$path.moved"; rm -rf "$path"; echo forged > "$path/new"
    ln -s /etc/passwd "$path/link"; chmod 777 "$path"
done
echo mine > "$1/was-here"
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp: everybody may write to it, and only to what is their own."""
    folder = Path(tempfile.mkdtemp(prefix="dp-shared-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def loose_umask() -> Iterator[None]:
    """The umask of many containers."""
    before = os.umask(0)
    yield
    os.umask(before)


def attack(shared: Path, folder: Path) -> None:
    subprocess.run(["sh", "-c", ATTACK, "sh", shared, folder], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/",
                   stderr=subprocess.DEVNULL, check=True, timeout=60)
    assert (shared / "was-here").stat().st_uid == NOBODY


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def world_writable(folder: Path) -> list[Path]:
    return [p for p in (folder, *folder.rglob("*")) if p.stat().st_mode & 0o002]


@as_root
@pytest.mark.parametrize("kind", ["local", "objects"])
def test_a_stranger_cannot_touch_scratch(kind: str, shared: Path, loose_umask: None,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    shut_out_strangers()
    root = open_root(shared / "out" if kind == "local" else f"memory://{uuid.uuid4().hex}")
    with root.scratch() as folder, root.scratch() as other:
        assert folder.is_relative_to(shared)
        assert folder.name != other.name
        (folder / "part").write_bytes(b"ours")
        attack(shared, shared)
        assert content(folder) == {"part": b"ours"}
    assert not folder.exists()


@as_root
def test_a_stranger_cannot_touch_a_dataset(shared: Path, loose_umask: None) -> None:
    shut_out_strangers()
    make_dataset(shared / "out", 10)
    before = content(shared / "out")
    attack(shared, shared / "out")
    assert content(shared / "out") == before
    assert verify(LocalRoot(shared / "out")).clean


def test_commands_and_engines_make_nothing_that_everybody_may_change(tmp_path: Path, loose_umask: None) -> None:
    make_dataset(tmp_path / "out", 10)
    loose = world_writable(tmp_path / "out")
    assert loose, "the umask is loose"
    for path in loose:
        path.chmod(0o755)
    line = [sys.executable, "-m", "distill_pipe.cli", "finalize", str(tmp_path / "out")]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, umask=0)
    assert (tmp_path / "out" / "manifest.parquet").exists()
    assert world_writable(tmp_path / "out") == []
    Replica(EnginePlan("", None, EngineOptions(), b"", "", 1, orphan_seconds=1e9))
    assert os.umask(0) == 0o002


def test_a_link_laid_at_a_name_that_could_be_guessed_is_not_followed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": "Hi", "completion": "Hello"}])
    (tmp_path / "victim").write_text("precious")
    for name in (f".out.jsonl.{os.getpid()}.part", ".out.jsonl.part", "out.jsonl.part"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    prepare_corpus([str(corpus)], tmp_path / "out.jsonl", "corpus", None, False, lambda: None)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "out.jsonl").is_symlink()


@pytest.mark.parametrize(("mode", "safe"), [(0o777, False), (0o1777, True), (0o775, True), (0o700, True)])
@pytest.mark.parametrize("kind", ["local", "objects"])
def test_selftest_refuses_a_place_where_strangers_can_replace_scratch(kind, mode, safe, tmp_path, monkeypatch) -> None:
    (above := tmp_path / "above").mkdir()
    (above / "inside").mkdir()
    above.chmod(mode)
    monkeypatch.setattr(tempfile, "tempdir", str(above / "inside"))
    found = selftest(open_root(above / "inside" if kind == "local" else f"memory://{uuid.uuid4().hex}"))
    assert found.failed == (() if safe else (PROBE,))
    assert list((above / "inside").rglob("part")) == []
    [probe] = [probe for probe in found.probes if probe.name == PROBE]
    assert safe or f"every user of this machine may replace what is in {above}: chmod o-w" in probe.detail


def test_what_stands_behind_a_link_is_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "loose")
    assert open_to_all(tmp_path / "link") == tmp_path / "loose"
    assert open_to_all(tmp_path) is None
