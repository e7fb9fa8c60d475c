"""Catches a lock file that does not pin what the package needs, pins without hashes, or names a place on a machine."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;]+)(?: ; [^\\]+)? \\$")
HASH = re.compile(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$")


def test_every_line_is_a_pin_or_a_hash() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    body = [line for line in lines if not line.startswith("#")]
    for line, following in zip(body, [*body[1:], "end==0 \\"], strict=True):
        assert PIN.match(line) or HASH.match(line), line
        if PIN.match(line):
            assert HASH.match(following), f"{line} has no hash"


def test_what_the_package_needs_is_pinned_within_its_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins: dict[str, set[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if pin := PIN.match(line):
            pins.setdefault(canonicalize_name(pin[1]), set()).add(pin[2])
    for text in [*project["dependencies"], *project["optional-dependencies"]["train"]]:
        needed = Requirement(text)
        found = pins.get(canonicalize_name(needed.name), set())
        assert found, f"{needed.name} is not pinned"
        assert all(needed.specifier.contains(version, prereleases=True) for version in found), (text, found)
