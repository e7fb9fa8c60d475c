"""Writes the JSON Schemas in this folder from the structs that the code decodes with, so that the two cannot drift.

    python schemas/generate.py            write them
    python schemas/generate.py --check    write nothing; exit 1 and name the files that are not current

The trade-off of generating: the layout of the schemas is msgspec's, and a new msgspec may change it. Docstrings are
cleaned here, because some versions keep their indentation and some do not.
"""

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from distill_pipe.produce.job import Job
from distill_pipe.store.finalize import DatasetStatistics
from distill_pipe.store.manifest import Fragment, Run, ShardInfo
from distill_pipe.store.sidecar import SidecarInfo
from distill_pipe.store.spec import FORMAT_VERSION

FOLDER = Path(__file__).resolve().parent
DIALECT = "https://json-schema.org/draft/2020-12/schema"
STRUCTS = {"run": Run, "fragment": Fragment, "shard_info": ShardInfo, "sidecar": SidecarInfo,
           "statistics": DatasetStatistics, "job": Job}


def schema_texts() -> dict[str, str]:
    """What each schema file should hold, by file name."""
    return {f"{name}.schema.json": json.dumps({"$schema": DIALECT, **_schema(struct)}, indent=2, sort_keys=True) + "\n"
            for name, struct in STRUCTS.items()}


def _schema(struct: type[msgspec.Struct]) -> Any:
    """A struct's schema. What a dataset holds is always written whole and in this version; a job leaves things out."""
    schema = msgspec.json.schema(struct)
    for definition in schema["$defs"].values():
        if "description" in definition:
            definition["description"] = inspect.cleandoc(definition["description"])
    if struct is Job:
        return schema
    for definition in schema["$defs"].values():
        properties = definition.get("properties", {})
        definition["required"] = sorted(properties)
        if "format_version" in properties:
            properties["format_version"] = {"const": FORMAT_VERSION}
    return schema


def stale_files(folder: Path) -> list[str]:
    """The schema files in `folder` that are missing or not what `schema_texts` says."""
    paths = {folder / name: text for name, text in schema_texts().items()}
    return [path.name for path, text in paths.items()
            if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main() -> None:
    parser = argparse.ArgumentParser(description="JSON Schemas of the dataset's records and of job files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not current")
    stale = stale_files(FOLDER)
    if parser.parse_args().check:
        if stale:
            sys.exit(f"not current: {', '.join(stale)}; run `make schemas`")
        return
    for name in stale:
        (FOLDER / name).write_text(schema_texts()[name], encoding="utf-8")


if __name__ == "__main__":
    main()
