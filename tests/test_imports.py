"""Catches an import that points the wrong way, a heavy import where none may be, and dangerous calls anywhere."""

import ast
import importlib
import pickle
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distill_pipe
from distill_pipe import errors

PACKAGE = Path(distill_pipe.__file__).parent
FILES = {str(p.relative_to(PACKAGE)): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}
HEAVY = ("vllm", "ray", "transformers")
STORE = [f"distill_pipe.store.{m.name}" for m in pkgutil.iter_modules([str(PACKAGE / "store")])
         if m.name not in ("hidden_codec", "rotation")]
CONSUME = ["distill_pipe.consume", *(f"distill_pipe.consume.{m.name}"
                                     for m in pkgutil.iter_modules([str(PACKAGE / "consume")])),
           *(f"distill_pipe.consume.exporters.{m.name}"
             for m in pkgutil.iter_modules([str(PACKAGE / "consume" / "exporters")]))]


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports anywhere, in functions and for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield ast.unparse(node.args[0])


def importers(module: str) -> set[str]:
    """The files that import `module` or a part of it."""
    return {name for name, tree in FILES.items() for found in imported(tree)
            if found == module or found.startswith(f"{module}.")}


def test_the_files_are_found() -> None:
    assert {"cli.py", "store/shard.py", "produce/capture.py", "consume/reader.py"} <= set(FILES)
    assert importers("numpy")


@pytest.mark.parametrize(("inside", "outside"), [
    ("store", "produce"), ("store", "consume"), ("store", "cli"), ("produce", "consume"), ("produce", "cli"),
    ("consume", "produce"), ("consume", "cli"), *((side, "report") for side in ("store", "produce", "consume")),
    *((side, outside) for side in ("report", "hub") for outside in ("produce", "consume", "cli")),
    *((side, "hub") for side in ("store", "produce", "consume", "report")),
    *((side, "speculative") for side in ("store", "produce", "consume", "report", "hub")), ("speculative", "cli")])
def test_imports_point_to_the_store_and_nowhere_else(inside: str, outside: str) -> None:
    assert not {name for name in importers(f"distill_pipe.{outside}") if name.startswith(f"{inside}/")}


def test_errors_imports_nothing() -> None:
    assert list(imported(FILES["errors.py"])) == []


@pytest.mark.parametrize(("module", "files"), [
    ("vllm", {"produce/capture.py", "produce/core_watch.py", "produce/seams.py", "produce/vllm_engine.py",
              "speculative/vllm_decoding.py"}),
    ("ray", {"produce/cluster.py", "produce/job_server.py"})])
def test_only_the_files_meant_to_import_an_engine_or_ray_do(module: str, files: set[str]) -> None:
    assert importers(module) == files


def test_of_the_store_only_what_runs_a_codec_imports_torch() -> None:
    codecs = {"store/hidden_codec.py", "store/rotation.py"}
    assert {name for name in importers("torch") if name.startswith("store/")} == codecs
    users = importers("distill_pipe.store.hidden_codec") | importers("distill_pipe.store.rotation")
    assert {name for name in users if name.startswith("store/")} <= codecs


def import_blocked(modules: list[str], blocked: tuple[str, ...]) -> None:
    imports = "\n".join(f"import {module}" for module in modules)
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n{imports}"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_store_and_the_command_line_work_without_engine_trainer_and_hub() -> None:
    import_blocked([*STORE, "distill_pipe.cli"], (*HEAVY, "torch", "huggingface_hub", "safetensors"))


def test_the_consumer_works_without_engine_and_without_producer() -> None:
    import_blocked(["distill_pipe.consume", *STORE], (*HEAVY, "distill_pipe.produce"))
    import_blocked(CONSUME, ("vllm", "ray", "distill_pipe.produce"))


def test_what_plans_and_drives_a_run_works_without_an_engine_and_without_torch() -> None:
    import_blocked([f"distill_pipe.produce.{name}" for name in ("engine", "worker", "cluster", "generate", "forecast")],
                   (*HEAVY, "torch"))


def test_the_sink_works_without_an_engine() -> None:
    import_blocked(["distill_pipe.produce.sink"], HEAVY)


FORBIDDEN_MODULES = ("pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib")
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
                   "np.save", "numpy.save", "torch.save"}
# Some trainers read nothing but pickles; what is written for them loads with weights_only=True.
ALLOWED_CALLS = {"consume/exporters/files.py": {"torch.save"}}


@pytest.mark.parametrize("module", FORBIDDEN_MODULES)
def test_nothing_is_pickled(module: str) -> None:
    assert importers(module) == set()


@pytest.mark.parametrize("name", FILES)
def test_no_file_makes_a_dangerous_call(name: str) -> None:
    for node in ast.walk(FILES[name]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called not in FORBIDDEN_CALLS - ALLOWED_CALLS.get(name, set()), f"{name}:{node.lineno} calls {called}"
        assert options.get("shell", "False") == "False", f"{name}:{node.lineno}"
        assert options.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}"
        assert options.get("trust_remote_code", "False") == "False", f"{name}:{node.lineno}"
        if called == "torch.load":
            assert options.get("weights_only") == "True", f"{name}:{node.lineno}"


def error_classes() -> dict[str, type[errors.DistillPipeError]]:
    return {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        if found := re.match(r"( +(?:│   )*(?:[├└]── )?)(\w+Error) +(\d+)\b", line):
            depth, name = len(found[1]), found[2]
            above = [(d, n) for d, n in above if d < depth]
            drawn[name] = (above[-1][1] if above else None, int(found[3]))
            above.append((depth, name))
    classes = error_classes()
    assert set(drawn) == set(classes)
    for name, (parent, code) in drawn.items():
        assert classes[name].exit_code == code, name
        bases = [b.__name__ for b in classes[name].__bases__ if b in classes.values()]
        assert bases == ([] if parent is None else [parent]), name


@pytest.mark.parametrize("name", error_classes())
def test_every_error_survives_the_way_between_processes(name: str) -> None:
    error = error_classes()[name]("shard 3: what happened")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - Ray does this; the bytes are made one line above
    assert type(again) is type(error)
    assert (str(again), again.exit_code) == ("shard 3: what happened", error.exit_code)
    assert isinstance(again, errors.DistillPipeError)


def test_every_error_class_of_the_package_with_an_exit_code_is_in_the_one_tree() -> None:
    for name in FILES:
        module = f"distill_pipe.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
        for kind in vars(importlib.import_module(module)).values():
            if isinstance(kind, type) and issubclass(kind, errors.DistillPipeError):
                assert kind.__module__ == "distill_pipe.errors"
