# SPDX-License-Identifier: Apache-2.0
"""What doctor finds wrong with a machine, and the page that it links to."""

import ast
import re
import socket
from importlib import metadata
from pathlib import Path

import pytest

import jaxllm.ops.chosen
from jaxllm.doctor import devices, machine
from jaxllm.doctor.findings import Fact, Problem
from jaxllm.doctor.run import FAILED, REMEDIES
from jaxllm.doctor.sections import Section

ROOT = Path(__file__).parents[2]


def problems(findings):
    return {one.entry: one for one in findings if isinstance(one, Problem)}


def facts(findings):
    return {one.name: one.value for one in findings if isinstance(one, Fact)}


def test_each_problem_has_an_entry_of_the_page_and_each_entry_a_problem():
    package = ROOT / "jaxllm"
    linked = {entry for entry, _ in (*REMEDIES.values(), FAILED)}
    for file in (*(package / "doctor").glob("*.py"), package / "verify_resume.py"):
        text = file.read_text()
        linked |= set(re.findall(r"troubleshooting\.md#([\w-]+)", text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Problem":
                linked |= {one.value for one in node.args[:1] if isinstance(one, ast.Constant)}
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    entries = re.findall(r"^### (.+)$", page, re.MULTILINE)
    assert linked == {entry.lower().replace(" ", "-") for entry in entries}


# ---- the machine


@pytest.mark.parametrize(
    ("own", "group"),
    [
        ("0::/\n", "."),
        ("0::/slurm/job_7/step_0\n", "slurm/job_7"),
        ("0::/not/visible/in/the/container\n", "."),
        ("0::/../other\n", "."),
        ("5:cpu,cpuacct:/cpu\n4:memory:/docker/1f\n0::/\n", "memory/docker/1f"),
    ],
)
def test_memory_is_that_of_the_container_or_job(own, group, tmp_path, monkeypatch):
    whole, _ = machine.memory()
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    folder = tmp_path / group
    folder.mkdir(parents=True, exist_ok=True)
    v1 = group.startswith("memory")
    limit = folder / ("memory.limit_in_bytes" if v1 else "memory.max")
    limit.write_text(f"{3 << 30}\n")
    (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{5 << 29}\n")
    (folder / ("memory.oom_control" if v1 else "memory.events")).write_text("oom 7\noom_kill 2\n")
    assert machine.memory() == (3 << 30, 1 << 29) and whole > 3 << 30
    assert machine.memory_kills() == 2
    assert "out-of-memory" in problems(machine.machine())
    cached = f"inactive_file {1 << 20 if v1 else 1 << 30}\nactive_file {1 << 30}\n"
    (folder / "memory.stat").write_text(cached + f"total_inactive_file {1 << 30}\n" * v1)
    assert machine.memory() == (3 << 30, 3 << 29)  # the cache of files is given back
    limit.write_text(f"{1 << 62}\n" if v1 else "max\n")
    assert machine.memory()[0] == whole


def test_memory_is_what_all_steps_of_a_job_leave(tmp_path, monkeypatch):
    (tmp_path / "own").write_text("0::/job/step\n")
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    for folder, used, kills in (("job", 5 << 29, 2), ("job/step", 1 << 29, 0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{3 << 30}\n")
        (tmp_path / folder / "memory.current").write_text(f"{used}\n")
        (tmp_path / folder / "memory.events").write_text(f"oom_kill {kills}\n")
    assert machine.memory() == (3 << 30, 1 << 29)
    assert machine.memory_kills() == 2


def test_packages_that_are_too_old_are_named(monkeypatch):
    assert not problems(machine.versions())
    needs = [
        "numpy>=99",
        "etils[epath]>=1.0",
        'jax[cuda13]; extra == "cuda"',
        'none-of; extra == "x"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: needs)
    found = [*machine.versions()]
    assert "jaxllm needs numpy>=99" in problems(found)["versions-do-not-fit"].seen
    assert (facts(found)["extras"], facts(found)["not installed"]) == ("cuda", "x")


def test_a_disk_that_is_full_or_cannot_be_written_is_named(tmp_path, monkeypatch):
    assert not problems(machine.disk("here", tmp_path / "new", set()))
    (tmp_path / "file").write_text("")
    found = problems(machine.disk("there", tmp_path / "file" / "inside", set()))
    assert "there): Not a directory" in found["a-directory-cannot-be-written"].seen
    monkeypatch.setattr(machine, "LOW", 1 << 60)
    full = set()
    assert str(tmp_path) in problems(machine.disk("here", tmp_path, full))["the-disk-is-full"].seen
    assert not problems(machine.disk("again", tmp_path, full))


def test_a_cache_of_programs_that_others_can_write_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:secret@hub.example")
    (tmp_path / "compiled").mkdir(mode=0o700)
    found = [*machine.disks()]
    assert not problems(found) and "with a token" in facts(found)["hub"]
    assert "secret" not in repr(found) and "at https://hub.example" in facts(found)["hub"]
    (tmp_path / "compiled").chmod(0o777)
    assert "others-can-write-compiled-programs" in problems(machine.disks())


def test_the_place_among_processes_is_that_of_the_launcher(monkeypatch):
    for names in machine.PLACES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert "one process" in facts(machine.processes())["place"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = [*machine.processes()]
    assert facts(found)["torchrun"] == "WORLD_SIZE=4" and "started-by-torchrun" in problems(found)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    meet = "the-processes-of-a-run-do-not-meet"
    assert "cluster.process (JAX_PROCESS_ID) too" in problems(machine.processes())[meet].seen
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host-a:8476")

    def unknown(host, _):
        raise socket.gaierror(-2, f"no {host}")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = [*machine.processes()]
    assert facts(found)["place"] == "process 1 of 4; process 0 is at host-a:8476"
    assert problems(found)[meet].seen.endswith("host-a is unknown here: no host-a")


# ---- the devices


def test_devices_and_kernels_are_named(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # and restore it
    found = [*devices.devices()]
    assert not problems(found)
    assert facts(found)["cpu"].startswith("8 x cpu, ready after ")
    assert facts(found)["attention, bfloat16"] == "xla"
    assert facts(found)["experts"] == "a loop over the experts"


def test_a_gpu_that_is_busy_or_not_used_is_named(tmp_path, monkeypatch):
    from jax._src import hardware_utils

    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(hardware_utils, "has_visible_nvidia_gpu", lambda: True)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0, 100, 81920, 580.1\necho 1, 70000, 81920, 580.1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    why = "tokamax is not installed (pip install tokamax==1)"
    chosen = {"attention, bfloat16": ("xla", why)}
    monkeypatch.setattr(jaxllm.ops.chosen, "chosen", lambda _: chosen)
    found = problems(devices.devices())
    assert "this machine has an NVIDIA GPU" in found["the-accelerator-is-not-used"].seen
    assert found["another-process-uses-the-gpu"].seen == "GPU 1: 68.4 GiB of 80.0 GiB are in use"
    assert why in found["attention-runs-a-slower-kernel"].seen
    program.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert "no driver" in problems(devices.devices())["jax-finds-no-device"].seen


def test_a_library_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "jax.py").write_text("raise ImportError('half installed')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    section = Section("devices", None, 60)
    found = problems(section.findings())["a-part-of-doctor-fails"]
    section.close()
    assert found.seen == "importing jax ended with status 1: ImportError: half installed"
