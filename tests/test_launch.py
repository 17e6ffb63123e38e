# SPDX-License-Identifier: Apache-2.0
"""Launchers: the environment each sets, when a run starts again, and what `jaxllm launch` submits.

Schedulers' clients are stand-ins here; test_slurm.py runs a real Slurm.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jsonschema
import pytest
import yaml
from runs import ENV, FAST, MODEL, refused

from jaxllm import dist
from jaxllm.cli import main
from jaxllm.launch import FILES, PLACES

SCRIPTS = [FILES / name for name in ("local.sh", "slurm.sbatch", "tpu-vm.sh")]
SHOW = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"'
CONFIG = "objective: sft\noutput_dir: /data/run\nmodel: {path: m}\ndata: {train: t.jsonl}\n"


def bash(*command, path=None, timeout=60, **environment):
    """Runs a script; `path` is a folder of programs that come before those of the machine."""
    env = {k: v for k, v in ENV.items() if not k.startswith(("SLURM", "JAX_"))}
    env["PATH"] = f"{path}:{ENV['PATH']}" if path else ENV["PATH"]
    command = ["bash", *map(str, command)]
    return subprocess.run(
        command, env=env | environment, capture_output=True, text=True, timeout=timeout
    )


def program(folder: Path, name: str, code: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{code}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My run.yaml").write_text(CONFIG)
    return "My run.yaml"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound_and_say_how_they_are_used(script):
    assert bash("-n", script).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    done = bash(script)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
    assert all(name in script.read_text() for name in dist.VARIABLES)


# ---- local.sh


def test_local_processes_get_an_index_each_and_the_same_address():
    lines = sorted(bash(FILES / "local.sh", 3, "bash", "-c", SHOW).stdout.splitlines())
    assert [line.partition(" at ")[0] for line in lines] == ["0 of 3", "1 of 3", "2 of 3"]
    assert len({line.partition(" at ")[2] for line in lines}) == 1 and "127.0.0.1:" in lines[0]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("exit 0", "exit 0", 0),
        ("exit 0", "exit 2", 2),
        ("exit 75", "exit 75", 75),
        ("kill -9 $$", "exit 75", 75),
        ("exit 0", "kill -9 $$", 75),
        ("exit 1", "exit 75", 1),
        ("exit 75", "exit 2", 2),
    ],
)
def test_local_exit_status_says_whether_to_start_again(first, second, expected):
    code = f"if ((JAX_PROCESS_ID)); then {second}; else {first}; fi"
    assert bash(FILES / "local.sh", 2, "bash", "-c", code).returncode == expected


def test_local_command_that_does_not_exist_is_not_started_again():
    assert bash(FILES / "local.sh", 2, "no-such-command").returncode == 127


WAITS = """
import os, signal, sys, time
def save(*_):
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)
    time.sleep(0.5)
    os.write(1, b"saved\\n")
    sys.exit(75)
for name in (signal.SIGTERM, signal.SIGINT):
    signal.signal(name, save)
os.write(1, b"ready\\n")
time.sleep(60)
"""


def stopped(
    command: list, env: dict, count: int, send: Callable[[int], None] | None = None
) -> tuple[int, str]:
    """Sends a signal to a launcher once `count` processes are ready; (status, further output).
    send: by its pid; default: SIGTERM."""
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline() == "ready\n"
    send(process.pid) if send else process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    return process.returncode, out


def test_a_signal_reaches_all_local_processes():
    command = ["bash", str(FILES / "local.sh"), "2", sys.executable, "-c", WAITS]
    assert stopped(command, ENV, 2) == (75, "saved\nsaved\n")


def test_ctrl_c_in_a_terminal_reaches_each_local_process_once():
    """A terminal sends SIGINT to every process of the foreground group. If the launcher sent it
    again, the run would end without a checkpoint."""
    command = ["bash", str(FILES / "local.sh"), "2", sys.executable, "-c", WAITS]
    send = lambda pid: os.killpg(pid, signal.SIGINT)  # noqa: E731
    assert stopped(command, ENV, 2, send) == (75, "saved\nsaved\n")


# ---- slurm.sbatch

# A stand-in for srun: starts the tasks; a task's status is the highest, as that of srun.
SRUN = """
while [[ $1 == --* ]]; do shift; done
worst=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task "$@"
  status=$?
  ((status > worst)) && worst=$status
done
exit $worst
"""
SCONTROL = 'if [[ $1 == show ]]; then printf "n1\\nn2\\n"; else echo "$@" >>"$CALLS"; fi'


def slurm(folder: Path, code: str, **environment):
    """(the finished slurm.sbatch, calls of scontrol)"""
    program(folder / "bin", "srun", SRUN)
    program(folder / "bin", "scontrol", SCONTROL)
    job = {"SLURM_JOB_ID": "30007", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
    calls = folder / "calls"
    job |= {"CALLS": str(calls)} | environment
    script = FILES / "slurm.sbatch"
    done = bash(script, "bash", "-c", code, path=folder / "bin", **job)
    return done, calls.read_text() if calls.exists() else ""


def test_slurm_tasks_get_their_rank_and_the_first_node(tmp_path):
    done, calls = slurm(tmp_path, SHOW)
    assert done.stdout.splitlines() == ["0 of 2 at n1:20007", "1 of 2 at n1:20007"]
    assert (done.returncode, calls) == (0, "")


@pytest.mark.parametrize(
    ("code", "status", "requeued"),
    [
        ("exit 75", 75, True),
        ("((JAX_PROCESS_ID)) && exit 137; exit 75", 137, True),  # a task was killed
        ("exit 2", 2, False),
        ("exit 1", 1, False),
        ("exit 127", 127, False),
    ],
)
def test_slurm_requeues_a_run_that_can_resume(tmp_path, code, status, requeued):
    done, calls = slurm(tmp_path, code)
    assert done.returncode == status
    assert calls == ("requeue 30007\n" if requeued else "")


def test_slurm_does_not_requeue_for_ever(tmp_path):
    assert slurm(tmp_path, "exit 75", SLURM_RESTART_COUNT="99")[1]
    (tmp_path / "calls").unlink()
    assert not slurm(tmp_path, "exit 75", SLURM_RESTART_COUNT="100")[1]


def test_slurm_signals_all_tasks_before_the_time_limit():
    lines = (FILES / "slurm.sbatch").read_text().splitlines()
    assert "#SBATCH --signal=TERM@300" in lines  # without B: to the tasks, not to the script
    assert {"#SBATCH --requeue", "#SBATCH --ntasks-per-node=1"} <= set(lines)


# ---- tpu-vm.sh


class Metadata(BaseHTTPRequestHandler):
    values = {"worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2", "agent-worker-number": "1"}

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        is_known = name in self.values and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if is_known else 404)
        self.end_headers()
        self.wfile.write(self.values.get(name, "").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    """Address of a metadata server like that of a TPU VM."""
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def tpu_vm(folder: Path, address: str, code: str):
    """(status, how often the command was started, its output)"""
    program(folder / "bin", "sleep", "")
    code = f"echo . >>{folder}/starts; starts=$(wc -l <{folder}/starts); {code}"
    script = FILES / "tpu-vm.sh"
    done = bash(script, "bash", "-c", code, path=folder / "bin", GCE_METADATA_IP=address)
    starts = folder / "starts"
    return done.returncode, len(starts.read_text().split()) if starts.exists() else 0, done


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
class TestTpuVm:
    def test_workers_come_from_the_metadata_server(self, tmp_path, metadata):
        status, _, done = tpu_vm(tmp_path, metadata, SHOW)
        assert (status, done.stdout) == (0, "1 of 2 at 10.0.0.1:8476\n")

    def test_another_machine_is_a_mistake(self, tmp_path):
        status, starts, done = tpu_vm(tmp_path, "127.0.0.1:9", SHOW)
        assert (status, starts) == (2, 0) and "not a worker of a TPU VM" in done.stderr

    @pytest.mark.parametrize(
        ("code", "status", "starts"),
        [
            ("exit 0", 0, 1),
            ("exit 2", 2, 1),
            ("exit 1", 1, 1),
            ("exit 127", 127, 1),
            ("((starts < 3)) && exit 75; exit 0", 0, 3),
            ("((starts < 2)) && kill -9 $$; exit 0", 0, 2),
            # killed, and back before the others have missed it
            ("((starts == 1)) && kill -9 $$; ((starts < 4)) && exit 2; exit 0", 0, 4),
            ("((starts == 1)) && exit 75; exit 2", 2, 4),
            ("exit 75", 75, 101),
        ],
    )
    def test_a_run_that_can_resume_starts_again(self, tmp_path, metadata, code, status, starts):
        assert tpu_vm(tmp_path, metadata, code)[:2] == (status, starts)

    def test_a_signal_ends_the_loop_after_the_checkpoint(self, metadata):
        command = ["bash", str(FILES / "tpu-vm.sh"), sys.executable, "-c", WAITS]
        assert stopped(command, ENV | {"GCE_METADATA_IP": metadata}, 1) == (75, "saved\n")


# ---- gke-jobset.yaml

TEXT, NUMBER, TEXTS = str, int, [str]
# The fields of batch/v1 and v1 that a run uses, with their types. `make cluster` compares them with
# the published models.
POD = {
    "restartPolicy": TEXT,
    "terminationGracePeriodSeconds": NUMBER,
    "nodeSelector": dict,
    "containers": [
        {
            "name": TEXT,
            "image": TEXT,
            "command": TEXTS,
            "args": TEXTS,
            "env": [
                {"name": TEXT, "value": TEXT, "valueFrom": {"fieldRef": {"fieldPath": TEXT}}},
            ],
            "resources": {"limits": dict},
            "volumeMounts": [{"name": TEXT, "mountPath": TEXT}],
        }
    ],
    "volumes": [
        {
            "name": TEXT,
            "configMap": {"name": TEXT},
            "persistentVolumeClaim": {"claimName": TEXT},
        }
    ],
}
JOB = {
    "completionMode": TEXT,
    "parallelism": NUMBER,
    "completions": NUMBER,
    "backoffLimit": NUMBER,
    "podFailurePolicy": {
        "rules": [
            {
                "action": TEXT,
                "onPodConditions": [{"type": TEXT, "status": TEXT}],
                "onExitCodes": {"operator": TEXT, "values": [NUMBER]},
            }
        ]
    },
    "template": {"spec": POD},
}


def check_jobset(document: dict) -> None:
    """Validates a JobSet by the schema of its API, which here allows no unknown field, and its job
    by the fields above."""
    schema = json.loads((Path(__file__).parent / "schemas" / "jobset.json").read_text())
    for kind in schema["definitions"].values():
        kind["additionalProperties"] = False
    schema["$ref"] = "#/definitions/jobset.v1alpha2.JobSet"
    jsonschema.Draft4Validator.check_schema(schema)
    jsonschema.Draft4Validator(schema).validate(document)
    check_fields(document["metadata"], {"name": TEXT, "annotations": dict})
    for group in document["spec"]["replicatedJobs"]:
        check_fields(group["template"], {"spec": JOB})


def check_fields(value, expected, where=""):
    """Every field is known and of its type."""
    if isinstance(expected, type):
        assert type(value) is expected, where
        if expected is dict:
            assert all(type(x) is str for pair in value.items() for x in pair), where
    elif isinstance(expected, list):
        assert type(value) is list and value, where
        for i, one in enumerate(value):
            check_fields(one, expected[0], f"{where}[{i}]")
    else:
        assert type(value) is dict and value.keys() <= expected.keys(), (where, value)
        for key, one in value.items():
            check_fields(one, expected[key], f"{where}.{key}")


def gke(capsys, config, *flags):
    """(config map, jobset, its pod) of a dry run."""
    args = ["launch", config, "--on", "gke", "--image", "registry/jaxllm:1", "--dry-run"]
    assert main([*args, "--volume", "claim:/data", *flags]) == 0
    settings, jobset = yaml.safe_load_all(capsys.readouterr().out)
    (group,) = jobset["spec"]["replicatedJobs"]
    return settings, jobset, group["template"]["spec"]["template"]["spec"]


def test_the_jobset_has_only_fields_of_its_api(capsys, config):
    for document in list(yaml.safe_load_all((FILES / "gke-jobset.yaml").read_text()))[1:]:
        check_jobset(document)
    more = ("--nodes", "4", "--resource", "google.com/tpu=4", "--select", "a/b=c")
    _, jobset, pod = gke(capsys, config, *more)
    check_jobset(jobset)
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        check_jobset(jobset | {"spec": jobset["spec"] | {"failurePolicy": {"maxRestart": 1}}})
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "my-run" and "annotations" in jobset["metadata"]
    assert pod["nodeSelector"] == {"a/b": "c"}
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
    mounts = {one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/data", "/etc/jaxllm"}


def test_gpus_do_not_claim_a_node_pool(capsys, config):
    jobset = gke(capsys, config, "--resource", "nvidia.com/gpu=8")[1]
    assert "annotations" not in jobset["metadata"]


def test_containers_run_the_config_with_the_arguments_after_it(capsys, config):
    settings, _, pod = gke(capsys, config, "--steps", "10", "--name", "second")
    assert settings["data"]["config.yaml"] == CONFIG
    assert settings["metadata"]["name"] == pod["volumes"][0]["configMap"]["name"] == "second"
    run = ["jaxllm", "sft", "/etc/jaxllm/config.yaml", "--steps", "10"]
    assert pod["containers"][0]["args"] == run


def test_containers_of_two_slices_have_an_index_each(capsys, config):
    _, jobset, pod = gke(capsys, config, "--nodes", "4", "--slices", "2")
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (group["replicas"], job["parallelism"], job["completions"]) == (2, 2, 2)
    (container,) = pod["containers"]
    env = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    seen = []
    for job_index in range(2):
        for pod_index in range(2):
            place = {"SLICE": str(job_index), "JOB_COMPLETION_INDEX": str(pod_index)}
            command = [*container["command"][1:], "bash", "-c", SHOW]
            seen.append(bash(*command, **env, **place).stdout)
    assert seen == [f"{i} of 4 at my-run-slice-0-0.my-run:8476\n" for i in range(4)]


@pytest.mark.parametrize(
    ("status", "restarts"),
    [(75, True), (137, True), (134, True), (1, False), (2, False), (127, False)],
)
def test_jobset_restarts_a_run_that_can_resume(capsys, config, status, restarts):
    """Applies the policies as Kubernetes and JobSet document them to a container's exit status."""
    _, jobset, _ = gke(capsys, config)
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["backoffLimit"] == 0
    disruption, codes = job["podFailurePolicy"]["rules"]
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {disruption["action"], codes["action"]} == {"FailJob"}
    assert codes["onExitCodes"]["operator"] == "NotIn"
    matches = status not in codes["onExitCodes"]["values"]
    reason = "PodFailurePolicy" if matches else "BackoffLimitExceeded"
    action = next(
        rule["action"]
        for rule in jobset["spec"]["failurePolicy"]["rules"]
        if reason in rule.get("onJobFailureReasons", [reason])
    )
    assert action == ("RestartJobSet" if restarts else "FailJobSet")


@pytest.mark.cluster
def test_kubernetes_client_knows_every_field(capsys, config):
    """Compares with the published models of Kubernetes (package `kubernetes`, Apache-2.0)."""
    models = pytest.importorskip("kubernetes.client.models")

    def check(value, kind, where):
        if kind.startswith("list["):
            for one in value:
                check(one, kind[5:-1], where)
        elif kind.startswith("V1"):
            model = getattr(models, kind)
            names = {json_name: name for name, json_name in model.attribute_map.items()}
            assert value.keys() <= names.keys(), (where, value.keys() - names.keys())
            for key, one in value.items():
                check(one, model.openapi_types[names[key]], f"{where}.{key}")
            model(**{names[key]: one for key, one in value.items()})  # raises if one is missing
        elif kind in ("str", "int"):
            assert type(value).__name__ == kind, where

    settings, jobset, _ = gke(capsys, config, "--nodes", "2", "--resource", "google.com/tpu=4")
    check(settings, "V1ConfigMap", "")
    (group,) = jobset["spec"]["replicatedJobs"]
    check(group["template"], "V1JobTemplateSpec", "template")


# ---- jaxllm launch


def printed(capsys, config, where, *flags) -> str:
    assert main(["launch", config, "--on", where, *flags, "--dry-run", "--steps", "7"]) == 0
    return capsys.readouterr().out


def test_dry_runs_print_what_would_be_submitted(capsys, config):
    run = f"{sys.executable} -P -m jaxllm sft 'My run.yaml' --steps 7\n"
    assert printed(capsys, config, "local", "--nodes", "2") == f"bash {FILES}/local.sh 2 {run}"
    flags = ("--nodes", "3", "--options=--partition=gpu --time 8:00:00")
    shown = (
        f"sbatch --nodes=3 --job-name=my-run --partition=gpu --time 8:00:00 {FILES}/slurm.sbatch "
    )
    assert printed(capsys, config, "slurm", *flags) == shown + run
    copy, start = printed(
        capsys, config, "tpu-vm", "--name", "t", "--options=--zone z"
    ).splitlines()
    gcloud = "gcloud compute tpus tpu-vm"
    assert copy == f"{gcloud} scp {FILES}/tpu-vm.sh 'My run.yaml' t: --worker=all --zone z"
    assert start.startswith(f"{gcloud} ssh t --worker=all --zone z --command 'nohup bash tpu-vm.sh")
    more = ("--image", "i", "--volume", "c:/data")
    assert "kind: JobSet" in printed(capsys, config, "gke", *more)


def test_paths_that_no_worker_has_are_named(capsys, config):
    def warned(*flags: str) -> list[str]:
        assert main(["launch", config, *flags, "--dry-run"]) == 0
        return [x for x in capsys.readouterr().err.splitlines() if "warning" in x]

    tpu, data = ("--on", "tpu-vm", "--name", "t"), ("--data.train", "gs://b/t.jsonl")
    (line,) = warned(*tpu, "--output_dir", "run/x")
    assert "model.path m, data.train t.jsonl, output_dir run/x: relative paths" in line
    assert (
        "model.path m: relative"
        in warned("--on", "gke", "--image", "i", "--volume", "c:/data", *data)[0]
    )
    assert warned(*tpu, *data, "--model.path", "OWNER/NAME") == []
    assert warned("--on", "slurm") == warned("--on", "local") == []


def test_the_verb_stands_before_a_config_that_does_not_state_it(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG.replace("objective: sft\n", ""))
    path = str(tmp_path / "c.yaml")
    refused(capsys, ["launch", path, "--on", "local"], f"`jaxllm launch sft {path} …`")
    assert main(["launch", "sft", path, "--on", "local", "--dry-run"]) == 0
    assert f" sft {path}\n" in capsys.readouterr().out


def test_an_evaluation_is_launched_without_a_config(capsys, tmp_path, monkeypatch):
    words = ["eval", "--model", "gs://b/m", "--tasks", "arc_easy", "mmlu", "--output", "o.json"]
    scripts = {
        "local": "local.sh 2 PYTHON -P -m jaxllm",
        "slurm": "slurm.sbatch PYTHON -P -m jaxllm",
        "tpu-vm": "bash tpu-vm.sh python3 -m jaxllm",
    }
    for where, script in scripts.items():
        more = ["--name", "vm"] if where == "tpu-vm" else ["--nodes", "2"]
        assert main(["launch", *words, "--on", where, *more, "--dry-run"]) == 0
        shown = capsys.readouterr().out.replace(sys.executable, "PYTHON")
        assert f"{script} {shlex.join(words)}" in shown, where
    assert main(["launch", *words, "--on", "gke", "--image", "i", "--dry-run"]) == 0
    settings, jobset = yaml.safe_load_all(capsys.readouterr().out)
    assert settings["metadata"]["name"] == "eval"
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == ["jaxllm", *words]


CLIENTS = {"slurm": "sbatch", "gke": "kubectl", "tpu-vm": "gcloud"}


@pytest.mark.parametrize("where", CLIENTS)
def test_a_missing_client_is_named(capsys, config, tmp_path, monkeypatch, where):
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["--name", "n", "--image", "i", "--volume", "c:/data"]
    line = refused(capsys, ["launch", config, "--on", where, *flags], CLIENTS[where], "--dry-run")
    assert "not on PATH" in line


@pytest.mark.parametrize("where", CLIENTS)
def test_the_client_gets_what_a_dry_run_prints(capsys, config, tmp_path, monkeypatch, where):
    seen = tmp_path / "seen"
    program(tmp_path / "bin", CLIENTS[where], f'printf "%s\\n" "$@" >>{seen}; cat >>{seen}')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("sys.stdin", None)
    flags = ["--name", "n", "--image", "i", "--volume", "c:/data"]
    assert main(["launch", config, "--on", where, *flags, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert main(["launch", config, "--on", where, *flags]) == 0
    if where == "gke":
        assert seen.read_text() == f"apply\n-f\n-\n{shown[:-1]}"  # print adds a newline
    else:
        commands = [shlex.split(line) for line in shown.splitlines()]
        assert seen.read_text().splitlines() == [x for words in commands for x in words[1:]]
    program(tmp_path / "bin", CLIENTS[where], "exit 3")
    refused(capsys, ["launch", config, "--on", where, *flags], CLIENTS[where], "status 3")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--on", "nowhere"], PLACES),
        (["--on", "gke"], ["--image"]),
        (["--on", "gke", "--image", "i"], ["/data/run", "--volume"]),
        (["--on", "gke", "--image", "i", "--volume", "c:data"], ["CLAIM:/PATH"]),
        (["--on", "gke", "--image", "i", "--nodes", "3", "--slices", "2"], ["--slices 2"]),
        (["--on", "gke", "--image", "i", "--volume", "c:/data", "--select", "x"], ["--select"]),
        (["--on", "gke", "--image", "i", "--name", "A_b"], ["--name", "A_b"]),
        (["--on", "tpu-vm"], ["--name"]),
        (["--on", "tpu-vm", "--name", "t", "--nodes", "2"], ["--nodes"]),
        (["--on", "slurm", "--overwrite"], ["--overwrite", "restart"]),
        (["--on", "slurm", "--stps", "3"], ["stps", "steps"]),
        (
            ["--on", "slurm", "--partition", "gpu"],
            ["--partition; --help lists all keys; options of sbatch go into --options='--p"],
        ),
        (["--on", "tpu-vm", "--name", "t", "--zone", "z"], ["gcloud go into --options='--zone"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] == "--on" else "",
)
def test_mistakes_are_one_line_before_anything_is_submitted(capsys, config, flags, words):
    refused(capsys, ["launch", config, *flags], *words)


@pytest.mark.sweep
def test_launch_trains_on_two_processes_of_this_machine(tmp_path):
    from jaxllm.data.tokenizer_training import train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 200)
    train_tokenizer([text], tmp_path / "tokenizer", vocab_size=300)
    (tmp_path / "model.json").write_text(
        json.dumps(MODEL | {"vocab_size": 300, "num_hidden_layers": 1})
    )
    config = {
        "objective": "pretrain",
        "output_dir": str(tmp_path / "run"),
        "batch_size": 4,
        "model": {"config": str(tmp_path / "model.json"), "tokenizer": str(tmp_path / "tokenizer")},
        "data": {"train": str(text), "max_length": 32, "workers": 0},
        "log": {"every": 1},
        "cluster": {"timeout": 60},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "jaxllm", "launch", str(tmp_path / "config.yaml")]
    command += ["--on", "local", "--nodes", "2", "--steps", "2"]
    env = ENV | {"XLA_FLAGS": f"{FAST} --xla_force_host_platform_device_count=1"}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said[-3000:]
    assert said.count("done: 2 steps") == 1, said[-3000:]
    metrics = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in metrics if x["kind"] == "train"] == [1, 2]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
