"""Drift between the code and what `schemas/` says about it: generated files, the prose of FORMAT.md, its examples."""

import ast
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_datasets import make_dataset, start_run

from distill_pipe.errors import MismatchError
from distill_pipe.produce.head import row_uniforms
from distill_pipe.produce.job import load_job
from distill_pipe.produce.worker import _CODES
from distill_pipe.store.codec import HiddenBlob
from distill_pipe.store.commit import adopt_shard, commit_shard
from distill_pipe.store.finalize import MANIFEST, STATISTICS, SUCCESS, TOKENS, finalize
from distill_pipe.store.hidden_codec import decode_hidden, encode_hidden, relative_errors
from distill_pipe.store.manifest import FINAL_NORM, RUN, Fragment, fragment_name, require_run, shard_name
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import MAIN_SCHEMA, QUARANTINE_SCHEMA, QuarantinedPrompt, read_main, traces_from_table
from distill_pipe.store.spec import HiddenCodec, Sha256

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEMAS = REPOSITORY / "schemas"
FORMAT = (SCHEMAS / "FORMAT.md").read_text(encoding="utf-8")

sys.path.insert(0, str(SCHEMAS))
import generate  # noqa: E402 - a script beside the package, not a module of it


def section(number: str) -> str:
    """The text of one numbered section of FORMAT.md."""
    found = re.search(rf"^##+ {re.escape(number)}\.? .*?(?=^##+ |\Z)", FORMAT, re.MULTILINE | re.DOTALL)
    assert found, f"FORMAT.md has no section {number}"
    return found[0]


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table row whose first cell is one name in code quotes, without the quotes."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


def columns_of(schema: pa.Schema) -> list[tuple[str, str]]:
    """Column names and types of an Arrow schema as FORMAT.md spells them."""
    spelled = {field.name: re.sub(r"\w+: ", "", str(field.type)) for field in schema}
    return [(name, re.sub(r"\bfloat\b", "float32", kind)) for name, kind in spelled.items()]


def block(text: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, f"no {language} block"
    return found[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LocalRoot:
    """Two shards of random traces."""
    path = tmp_path_factory.mktemp("data")
    make_dataset(path, 6)
    return LocalRoot(path)


def validator(name: str) -> Any:
    """A validator for one schema file; `jsonschema` comes with the engine, so tests without one skip."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def footer(path: Path) -> Any:
    return json.loads(pq.read_metadata(path).metadata[b"distill_pipe"])


def test_generated_schemas_are_current() -> None:
    assert generate.stale_files(SCHEMAS) == []


def test_check_names_stale_and_missing_files_and_writes_nothing(tmp_path: Path) -> None:
    for name, text in generate.schema_texts().items():
        (tmp_path / name).write_text(text)
    (tmp_path / "run.schema.json").write_text("{}\n")
    (tmp_path / "job.schema.json").unlink()
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert sorted(generate.stale_files(tmp_path)) == ["job.schema.json", "run.schema.json"]
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


def test_check_exits_1_when_a_file_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit, match=r"run\.schema\.json"):
        generate.main()
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    generate.main()
    assert generate.stale_files(tmp_path) == []


def test_records_of_a_dataset_match_their_schemas(dataset: LocalRoot) -> None:
    validator("run").validate(json.loads(dataset.local(RUN).read_bytes()))
    run = require_run(dataset)
    for shard in range(2):
        validator("fragment").validate(json.loads(dataset.local(fragment_name(shard)).read_bytes()))
        validator("shard_info").validate(footer(dataset.local(shard_name(shard))))
        hidden = adopt_shard(dataset, run, shard).info.hidden
        assert hidden is not None
        validator("sidecar").validate(footer(dataset.local(hidden.name)))


def test_schemas_refuse_unknown_fields_and_bad_hashes(dataset: LocalRoot) -> None:
    record = json.loads(dataset.local(RUN).read_bytes())
    assert not validator("run").is_valid(record | {"surprise": 1})
    assert not validator("run").is_valid(record | {"fingerprint": "0" * 63})
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert("0" * 63, Sha256)


# Templates for clusters lie beside them, and are the files of other programs.
JOB_FILES = sorted(path for folder in ("jobs", "jobs/targets") for path in (REPOSITORY / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda p: p.name)
def test_job_files_match_the_job_schema(path: Path) -> None:
    # As loaded: a file may give `corpus` as one string, and its target's preset adds to it.
    job = load_job(path, (), {})
    validator("job").validate(json.loads(msgspec.json.encode(job)))


def test_format_names_every_column_of_a_main_shard_with_its_type() -> None:
    assert [(name, kind) for name, kind, *_ in table_rows(section("5"))] == columns_of(MAIN_SCHEMA)


def test_format_names_the_columns_of_sidecar_quarantine_plan_and_norm(dataset: LocalRoot) -> None:
    run = require_run(dataset)
    hidden = adopt_shard(dataset, run, 0).info.hidden
    assert hidden is not None
    stored = [("layer_NN" if n.startswith("layer_") else n, kind)
              for n, kind in columns_of(pq.read_schema(dataset.local(hidden.name)))]
    assert [(name, kind) for name, kind, *_ in table_rows(section("7"))[:2]] == list(dict.fromkeys(stored))
    quarantine = [(row[0], row[1]) for row in table_rows(section("9")) if len(row) == 3]
    assert quarantine == columns_of(QUARANTINE_SCHEMA)
    assert [(n, kind) for n, kind, *_ in table_rows(section("4"))] == columns_of(
        pq.read_schema(dataset.local(run.plan[0].name)))
    assert f"`{FINAL_NORM}`: one column `weight`, float32" in section("8")


def test_format_names_every_quarantine_code_that_is_given_out() -> None:
    given = set(_CODES.values())
    for path in (REPOSITORY / "distill_pipe").rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        codes = [n.args[2] for n in calls if getattr(n.func, "id", "") == "QuarantinedPrompt" and len(n.args) == 4]
        given |= {code.value for code in codes if isinstance(code, ast.Constant)}
    assert {row[0] for row in table_rows(section("9")) if len(row) == 2} == given


def test_format_names_every_codec() -> None:
    assert [row[0] for row in table_rows(section("7.1"))] == list(get_args(HiddenCodec))


def test_format_describes_every_field_of_a_shard_record(dataset: LocalRoot) -> None:
    described = set(re.findall(r"`(\w+)`", section("6")))
    assert set(footer(dataset.local(shard_name(0)))) <= described
    assert set(footer(dataset.local(shard_name(0)))["measured"]) <= described


def decoder() -> Any:
    """`decode` as FORMAT.md prints it; run so that it cannot be wrong."""
    scope: dict[str, Any] = {}
    exec(block(section("7.2"), "python"), scope)  # noqa: S102 - our own file
    return scope["decode"]


def test_byte_example_of_the_format_is_what_the_codecs_write_and_its_decoder_reads() -> None:
    lines = dict(line.split(None, 1) for line in block(section("7.2"), "text").splitlines())
    values_NH = torch.tensor([float(v) for v in lines.pop("values").split()]).view(2, 2)
    assert set(lines) == set(get_args(HiddenCodec))
    for codec, text in lines.items():
        data, _, scales = text.partition("  scales ")
        blob = encode_hidden(values_NH, codec)
        scale_N = np.frombuffer(bytes.fromhex(scales), "<f4")
        assert (blob.data, 0 if blob.scale_T is None else blob.scale_T.tobytes()) == (
            bytes.fromhex(data), scale_N.tobytes() or 0), codec
        decoded_NH = torch.tensor(decoder()(blob.data, scale_N if scales else None, codec, 2))
        assert relative_errors(values_NH, decoded_NH).max() < 0.1, codec
        assert torch.equal(decoded_NH, values_NH) or codec[0] in "fq", codec


@pytest.mark.parametrize("codec", get_args(HiddenCodec))
@pytest.mark.parametrize("width", [1, 7, 12, 64])
def test_decoder_of_the_format_agrees_with_the_codec(codec: HiddenCodec, width: int) -> None:
    rows_NH = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    blob = encode_hidden(rows_NH, codec)
    decoded_NH = decode_hidden(blob, codec, width, dtype=torch.float32)
    read_NH = torch.tensor(decoder()(blob.data, blob.scale_T, codec, width))
    assert torch.allclose(read_NH, decoded_NH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", ["bf16", "bf16-split", "f32"])
def test_decoder_of_the_format_reads_every_finite_bfloat16_value(codec: HiddenCodec) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    exact_NH = bits[(bits & 0x7F80) != 0x7F80].view(torch.bfloat16).view(-1, 8)
    read_NH = torch.tensor(decoder()(encode_hidden(exact_NH, codec).data, None, codec, 8))
    assert torch.equal(read_NH.view(torch.int32), exact_NH.float().view(torch.int32))


def test_decoder_of_the_format_reads_every_finite_fp8_value() -> None:
    data = bytes(b for b in range(256) if b & 0x7F != 0x7F)
    read = decoder()(data, [1.0], "fp8", len(data))[0]
    wanted_1H = decode_hidden(HiddenBlob(data, np.ones(1, np.float32)), "fp8", len(data), dtype=torch.float32)
    assert read == wanted_1H[0].tolist()


def test_fingerprint_can_be_had_from_the_text_of_run_json_as_the_format_says(tmp_path: Path) -> None:
    spec = start_run(tmp_path, 3).spec
    # A name that is not ASCII, and a number that other JSON writers spell differently.
    spec = msgspec.structs.replace(spec, target=msgspec.structs.replace(spec.target, name="ziel-é/\u2028",
                                                                        final_norm_eps=1e-5))
    text = msgspec.json.format(msgspec.json.encode(spec), indent=1).decode()
    assert "0.00001" in text

    class Verbatim(str):
        """A number as it was spelled."""

    def canonical(value: Any) -> str:
        if isinstance(value, Verbatim):
            return str(value)
        if isinstance(value, dict):
            return "{" + ",".join(f"{canonical(k)}:{canonical(v)}" for k, v in sorted(value.items())) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(canonical, value)) + "]"
        return json.dumps(value, ensure_ascii=False)

    plain = json.loads(text, parse_float=Verbatim, parse_int=Verbatim)
    assert hashlib.sha256(canonical(plain).encode()).hexdigest() == spec.fingerprint


def test_uniform_numbers_of_the_format_are_those_of_the_sampler() -> None:
    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    assert all(f"0x{n}" in section("5.2") for n in ("9E3779B97F4A7C15", "BF58476D1CE4E5B9", "94D049BB133111EB"))
    expected = [(mix(mix(mix(7) ^ 11) ^ t) >> 40) * 2.0**-24 for t in range(50)]
    assert row_uniforms(7, 11, np.arange(50)).tolist() == expected


def test_parquet_settings_that_the_format_promises(dataset: LocalRoot) -> None:
    run = require_run(dataset)
    hidden = adopt_shard(dataset, run, 0).info.hidden
    assert hidden is not None
    for name in (shard_name(0), hidden.name, run.plan[0].name):
        group = pq.read_metadata(dataset.local(name)).row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        assert {c.compression for c in columns} == {"ZSTD"}, name
        assert not any(c.has_dictionary_page for c in columns), name
        assert {e for c in columns for e in c.encodings} <= {"PLAIN", "RLE", "BYTE_STREAM_SPLIT"}, name
        assert all(c.path_in_schema.endswith(".list.element") for c in columns if "." in c.path_in_schema)
    assert pq.read_metadata(dataset.local(run.plan[0].name)).num_row_groups == 2


def test_a_shard_whose_prompts_are_all_quarantined_reads_as_the_format_says(tmp_path: Path) -> None:
    run = start_run(tmp_path, 2)
    root = LocalRoot(tmp_path)
    fragment = commit_shard(root, run, 0, [], [QuarantinedPrompt(i, f"p{i}", "too_long", "why") for i in range(2)])
    assert (fragment.info.hidden, fragment.info.traces, fragment.info.quarantined) == (None, 0, 2)
    main = pq.read_table(root.local(shard_name(0)))
    assert (main.num_rows, columns_of(main.schema)) == (0, columns_of(MAIN_SCHEMA))
    assert fragment.info.quarantine is not None
    assert re.fullmatch(r"_quarantine/0000/shard-0000000-[0-9a-f]{8}\.parquet", fragment.info.quarantine.name)
    validator("shard_info").validate(footer(root.local(shard_name(0))))


def test_reader_ignores_unknown_columns_and_the_order_of_columns(dataset: LocalRoot) -> None:
    main = pq.read_table(dataset.local(shard_name(0)))
    wider = main.select(main.column_names[::-1]).append_column("new", pa.array([1] * main.num_rows))
    assert [t.ordinal for t in traces_from_table(wider)] == main["ordinal"].to_pylist()


def test_reader_ignores_unknown_columns_in_a_file_that_a_later_version_wrote(tmp_path: Path) -> None:
    run = make_dataset(tmp_path, 2)
    path = tmp_path / shard_name(0)
    info = adopt_shard(LocalRoot(tmp_path), run, 0).info
    table = pq.read_table(path)
    wider = table.append_column("new", pa.array(["x" * 10_000] * table.num_rows))
    pq.write_table(wider, path, compression="zstd", use_dictionary=False, write_page_checksum=True,
                   column_encoding={f"{f.name}.list.element": "BYTE_STREAM_SPLIT" for f in table.schema
                                    if pa.types.is_list(f.type) and not pa.types.is_boolean(f.type.value_type)})
    assert read_main(path, info, run.spec.capture).equals(table)


def test_records_of_a_later_version_may_hold_more(dataset: LocalRoot) -> None:
    path = dataset.local(fragment_name(0))
    record = json.loads(path.read_bytes())
    record["info"]["measured"]["new"] = record["info"]["new"] = record["new"] = {"a": [1]}
    assert msgspec.json.decode(json.dumps(record), type=Fragment) == msgspec.json.decode(path.read_bytes(),
                                                                                         type=Fragment)
    validator("fragment").validate(record)


def test_format_names_the_summary_and_its_columns(tmp_path: Path) -> None:
    make_dataset(tmp_path, 6)
    root = LocalRoot(tmp_path)
    finalize(root)
    validator("statistics").validate(json.loads((root.local(STATISTICS)).read_bytes()))
    for name in (TOKENS, MANIFEST, STATISTICS, SUCCESS):
        assert f"`{name}`" in section("2")
        assert f"`{name}`" in section("11")
    tokens = [(name, kind) for name, kind, *_ in table_rows(section("10"))]
    assert tokens == columns_of(pq.read_schema(root.local(TOKENS)))
    named = set(re.findall(r"`(\w+)`", section("11")))
    files = {f"{part}{name}" for part in ("", "hidden_", "quarantine_") for name in ("name", "sha256", "size")}
    assert set(pq.read_schema(root.local(MANIFEST)).names) - files <= named


def test_unknown_format_version_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path, 2)
    path = tmp_path / RUN
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2', 1))
    with pytest.raises(MismatchError, match="format version 2"):
        require_run(LocalRoot(tmp_path))
