"""The templates of jobs/clusters and the dashboard: that they parse, have what their runner and a preemption need, and
name only commands, options and metrics that exist.
"""

import json
import re
import shlex
import subprocess
import sys
import time
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
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
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
    assert options["signal"] == "B:TERM@120"
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"
    assert "trap again TERM" in text
    assert f"$code == {StoreError.exit_code} || $code == {EngineError.exit_code}" in text


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


@pytest.mark.parametrize(("code", "tries", "ends"),
                         [(0, 1, 0), (2, 1, 2), (5, 1, 5), (8, 1, 8), (7, 3, 75), (75, 3, 75)])
def test_the_plain_script_tries_again_only_what_may_pass(tmp_path: Path, code, tries, ends) -> None:
    process = plain(tmp_path, f"exit {code}")
    assert (process.wait(60), calls(tmp_path)) == (ends, tries)


def test_the_plain_script_hands_sigterm_on_and_waits_for_the_run(tmp_path: Path) -> None:
    process = plain(tmp_path, f"trap 'sleep 0.3; echo done > {tmp_path}/done; exit 143' TERM\n"
                             f"touch {tmp_path}/ready\nsleep 100 & wait")
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
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
