"""The templates of jobs/clusters and the dashboard: that they parse, have what their runner and a preemption need, and
name only commands, options and metrics that exist.
"""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from distill_pipe.cli import app
from distill_pipe.errors import EngineError, StoreError
from distill_pipe.produce.job import load_job
from distill_pipe.produce.journal import COUNTERS, GAUGES

JOBS = Path(__file__).parents[1] / "jobs"
CLUSTERS = JOBS / "clusters"
# The models of Grafana 11.6, as a package.
GRAFANA = "grafana-foundation-sdk==1769699379!11.6.0"
SCRIPTS = sorted([*CLUSTERS.glob("*.sh"), *CLUSTERS.glob("*.sbatch")])


def rayjob() -> dict:
    [job] = [d for d in yaml.safe_load_all((CLUSTERS / "kuberay-rayjob.yaml").read_text()) if d["kind"] == "RayJob"]
    return job


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_valid_bash_stops_at_errors_and_can_be_run(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert path.stat().st_mode & 0o111


COMMANDS = re.compile(r"distill-pipe ((?:generate|submit|logs)\b[^\n|;)&']*)")


@pytest.mark.parametrize("path", sorted(CLUSTERS.iterdir()), ids=lambda p: p.name)
def test_every_command_of_a_template_has_options_that_exist(path: Path) -> None:
    found = COMMANDS.findall(path.read_text().replace("${DISTILL_PIPE:-distill-pipe}", "distill-pipe"))
    assert found
    for line in found:
        name, *words = shlex.split(line.split(" 2>")[0])
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        for option in (w for w in words if w.startswith("--")):
            assert option in shown, (name, option)


def test_the_job_of_the_rayjob_is_one_and_its_cluster_survives_losing_nodes() -> None:
    documents = list(yaml.safe_load_all((CLUSTERS / "kuberay-rayjob.yaml").read_text()))
    [config] = [d for d in documents if d["kind"] == "ConfigMap"]
    assert set(yaml.safe_load(config["data"]["job.yaml"])) == {"target", "corpus", "out", "gpus"}
    job = rayjob()
    assert (job["apiVersion"], job["metadata"]["name"]) == ("ray.io/v1", "distill-pipe")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert (spec["submissionMode"], spec["shutdownAfterJobFinishes"]) == ("HTTPMode", True)
    assert spec["backoffLimit"] >= 10
    assert "--set address=auto" in spec["entrypoint"]
    assert cluster["authOptions"] == {"mode": "token"}
    # Nothing of the dashboard's address: the operator would not reach one that listens to its own pod alone.
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    [workers] = cluster["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    [container] = pod["containers"]
    stop = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    seconds = int(re.search(r"sleep (\d+)", stop)[1])
    assert seconds < pod["terminationGracePeriodSeconds"]
    assert f"--deadline-remaining-seconds {seconds}" in stop
    assert {m["name"]: m["mountPath"] for m in container["volumeMounts"]}["job"] == "/job"
    assert [v["emptyDir"]["medium"] for v in pod["volumes"] if v["name"] == "shm"] == ["Memory"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_no_template_holds_a_secret_or_opens_the_dashboard() -> None:
    for path in CLUSTERS.iterdir():
        text = path.read_text()
        assert not re.search(r"hf_\w{10}|AKIA\w+|0\.0\.0\.0", text), path
    for group in (rayjob()["spec"]["rayClusterSpec"]["headGroupSpec"],):
        for variable in group["template"]["spec"]["containers"][0]["env"]:
            assert "valueFrom" in variable or variable["name"] == "RAY_JOB_STOP_WAIT_TIME_S"


def test_ray_has_the_commands_that_the_templates_call() -> None:
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        pytest.skip("ray is not installed beside this Python")
    for command in ("symmetric-run", "drain-node"):
        text = subprocess.run([ray, command, "--help"], capture_output=True, text=True, check=True).stdout
        for path in CLUSTERS.iterdir():
            used = re.search(rf"ray {command} (--.*?)(?:;| -- )", path.read_text(), re.S)
            for option in re.findall(r"--[a-z][a-z-]+", used[1] if used else ""):
                assert option in text or option == "--disable-usage-stats", (path, option)


def test_slurm_asks_for_a_signal_before_the_end_and_queues_itself_again() -> None:
    text = (CLUSTERS / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))
    assert options["signal"] == "B:USR1@120"
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"
    assert f"$code == {StoreError.exit_code} || $code == {EngineError.exit_code}" in text


def slurm(tmp_path: Path, step: str, restarts: int = 0) -> subprocess.Popen[bytes]:
    """slurm.sbatch with stand-ins for Slurm's commands: `step` is what runs, and requeues are told in a file."""
    for name, body in (("srun", f'[[ " $* " == *" --cpus-per-task=32 "* ]]\n{step}'),
                       ("scontrol", f'if [[ $1 == show ]]; then echo node1; else echo "$*" >> {tmp_path}/calls; fi')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -e\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return subprocess.Popen([CLUSTERS / "slurm.sbatch", "job.yaml"], stderr=subprocess.DEVNULL, env={
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "32", "SLURM_RESTART_COUNT": str(restarts)})


@pytest.mark.parametrize(("code", "restarts", "requeues"), [(0, 0, 0), (2, 0, 0), (8, 0, 0), (75, 0, 1), (7, 19, 1),
                                                            (7, 20, 0)])
def test_slurm_queues_again_what_may_pass_and_not_for_ever(tmp_path: Path, code, restarts, requeues) -> None:
    process = slurm(tmp_path, f"exit {code}", restarts)
    assert (process.wait(60), calls(tmp_path)) == (code, requeues)


@pytest.mark.parametrize(("warning", "ends", "requeues"), [(signal.SIGUSR1, 143, 1), (signal.SIGTERM, -15, 0)])
def test_slurm_queues_a_warned_job_again_when_its_run_has_ended_and_a_cancelled_one_never(
        tmp_path: Path, warning, ends, requeues) -> None:
    end = f"kill $!; sleep 0.3; [[ -e {tmp_path}/calls ]] || touch {tmp_path}/first; exit 143"
    process = slurm(tmp_path, f'sleep 100 &\ntrap "{end}" TERM\necho $$ > {tmp_path}/pid\ntouch {tmp_path}/ready\nwait')
    try:
        wait_for(tmp_path / "ready")
        process.send_signal(warning)
        assert (process.wait(60), calls(tmp_path)) == (ends, requeues)
        assert (tmp_path / "first").exists() == bool(requeues), "the run ends before the job is queued"
    finally:
        process.kill()
        process.wait()
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_skypilot_recovers_from_what_passes_and_from_nothing_else() -> None:
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "secrets", "setup", "run"}
    recovery = task["resources"]["job_recovery"]
    assert set(recovery["recover_on_exit_codes"]) == {StoreError.exit_code, EngineError.exit_code, 143}
    assert task["resources"]["use_spot"] is True
    assert task["secrets"] == {"HF_TOKEN": None}
    assert load_job(JOBS.parent / task["envs"]["JOB"], [f"out={task['envs']['OUT']}"], {}).out == task["envs"]["OUT"]
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(task, schemas.get_task_schema())


def plain(tmp_path: Path, script: str) -> subprocess.Popen[bytes]:
    """plain.sh with a stand-in for the command, which counts its calls in a file."""
    fake = tmp_path / "distill-pipe"
    fake.write_text(f"#!/usr/bin/env bash\necho call >> {tmp_path}/calls\n{script}\n")
    fake.chmod(0o755)
    return subprocess.Popen([CLUSTERS / "plain.sh", "job.yaml"], stderr=subprocess.DEVNULL,
                            env={"PATH": "/usr/bin:/bin", "DISTILL_PIPE": str(fake), "PAUSE": "0", "TRIES": "3"})


def calls(tmp_path: Path) -> int:
    path = tmp_path / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("code", "tries", "ends"),
                         [(0, 1, 0), (2, 1, 2), (5, 1, 5), (8, 1, 8), (7, 3, 75), (75, 3, 75)])
def test_the_plain_script_tries_again_only_what_may_pass(tmp_path: Path, code, tries, ends) -> None:
    process = plain(tmp_path, f"exit {code}")
    assert (process.wait(60), calls(tmp_path)) == (ends, tries)


def test_the_plain_script_hands_sigterm_on_and_waits_for_the_run(tmp_path: Path) -> None:
    process = plain(tmp_path, f"trap 'sleep 0.3; echo done > {tmp_path}/done; exit 143' TERM\n"
                             f"touch {tmp_path}/ready\nsleep 100 & wait")
    try:
        wait_for(tmp_path / "ready")
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, calls(tmp_path)) == (143, 1)
    assert (tmp_path / "done").exists()


def test_the_dashboard_draws_every_metric_of_a_run_and_no_other() -> None:
    dashboard = json.loads((JOBS / "grafana" / "dashboard.json").read_text())
    drawn = {name for panel in dashboard["panels"] for target in panel["targets"]
             for name in re.findall(r"distill_pipe_\w+", target["expr"])}
    assert drawn == {f"distill_pipe_{name}_total" for name in COUNTERS} | {f"distill_pipe_{name}" for name in GAUGES}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert all(t["expr"].count("(") == t["expr"].count(")") for t in panel["targets"])


@pytest.mark.loaders
def test_grafana_s_own_models_take_all_of_the_dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path, GRAFANA],
                   check=True)
    [wheel] = tmp_path.glob("*.whl")
    monkeypatch.syspath_prepend(str(wheel))
    encoder, plugins, models = (importlib.import_module(f"grafana_foundation_sdk.{name}")
                                for name in ("cog.encoder", "cog.plugins", "models.dashboard"))
    plugins.register_default_plugins()

    def through(dashboard: dict[str, object]) -> dict[str, object]:
        return json.loads(encoder.JSONEncoder().encode(models.Dashboard.from_json(dashboard)))

    ours = json.loads((JOBS / "grafana" / "dashboard.json").read_text())
    theirs = through(ours)
    assert missing(ours, theirs) == []
    ours["panels"][0]["fieldConfg"] = ours["panels"][0].pop("fieldConfig")
    assert missing(ours, through(ours)) == [".panels[0].fieldConfg"], "a field that they do not know is noticed"


def missing(ours: object, theirs: object, path: str = "") -> list[str]:
    """Where `theirs` lacks, or has otherwise, what is in `ours`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [lack for name, value in ours.items() for lack in (
            missing(value, theirs[name], f"{path}.{name}") if name in theirs else [f"{path}.{name}"])]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [lack for i, pair in pairs for lack in missing(*pair, f"{path}[{i}]")]
    return [] if ours == theirs else [path]
