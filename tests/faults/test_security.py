# SPDX-License-Identifier: Apache-2.0
"""The promises of docs/security.md that no other test holds, and that the page names real tests."""

import ast
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import CHAT, Place, edited
from jinja2.exceptions import TemplateError
from runs import ENV, arguments, project  # noqa: F401, a fixture
from tiny import one_device

from jaxllm import hf
from jaxllm.config import TrainConfig
from jaxllm.data.chat import render
from jaxllm.data.template import with_settings
from jaxllm.doctor.findings import Problem
from jaxllm.doctor.sections import Section
from jaxllm.errors import UserError
from jaxllm.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_is_there():
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page))
    assert len(named) > 20
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), test
    assert len(re.findall(r"test_\w+`", page)) == len(re.findall(r"::test_\w+`", page))


# ---- no code from data


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("security") / "files")


CODE = "from pathlib import Path\nPath({marker!r}).touch()\nclass Custom: pass\n"


def test_code_beside_a_model_or_a_tokenizer_is_not_run(at, tmp_path):
    marker = tmp_path / "ran"
    places = {"AutoConfig": "custom.Custom", "AutoTokenizer": ["custom.Custom", "custom.Custom"]}
    for name in ("model", "tokenizer"):
        folder = at.copy(name, into=f"code-{name}")
        (folder / "custom.py").write_text(CODE.format(marker=str(marker)))
        for file in ("config.json", "tokenizer_config.json"):
            if (folder / file).exists():
                edited(folder, file, auto_map=places)
        load_tokenizer(folder)
        if name == "model":
            hf.load_hf(str(folder), mesh=one_device())
    edited(at.root / "code-tokenizer", "tokenizer_config.json", tokenizer_class="Custom")
    try:
        load_tokenizer(at.root / "code-tokenizer")
    except UserError:
        pass
    assert not marker.exists()


def test_nothing_unpickles_evaluates_or_trusts_remote_code():
    """Calls of these names in the package, and arguments that allow them."""
    forbidden = {"eval", "exec", "compile", "__import__", "literal_eval"}
    modules = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}
    for path in (ROOT / "jaxllm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                assert name not in forbidden, f"{path}:{node.lineno}: {name}"
                for keyword in node.keywords:
                    if keyword.arg in ("trust_remote_code", "allow_pickle"):
                        is_off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                        assert is_off, f"{path}:{node.lineno}: {keyword.arg}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found = {name.split(".")[0] for name in names} & modules
                if path.parent.name == "parity":  # runs transformers, whose weights are safetensors
                    found -= {"torch"}
                assert not found, f"{path}:{node.lineno}"


def test_python_files_in_the_current_directory_are_not_imported(tmp_path, monkeypatch):
    """Each process that a command starts; `python -m` and `-c` alone would import them."""
    for path in (ROOT / "jaxllm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List) and ast.unparse(node).startswith("[sys.executable,"):
                assert ast.unparse(node.elts[1]) == "'-P'", f"{path}:{node.lineno}"
    for name in ("json", "platform", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from here')\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    section = Section("machine", None, 60)
    said = [*section.findings()]
    section.close()
    assert said and not [one for one in said if isinstance(one, Problem) and "here" in one.seen]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__ }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
        "{% set x = messages.append(1) %}",
    ],
)
def test_a_template_reaches_nothing_but_the_conversation(template, at):
    tokenizer = copy.copy(at.tokenizer)
    tokenizer.chat_template = template
    try:
        with_settings(tokenizer, TrainConfig().data)
        text = render(tokenizer, CHAT)
    except (UserError, TemplateError):
        return
    pytest.fail(f"it rendered {text!r}")


# ---- what a run writes, says and connects to

SECRETS = {
    name: f"secret-{i}-of-{name.lower()}"
    for i, name in enumerate(
        ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
        + ("SWANLAB_API_KEY", "OPENAI_API_KEY", "GOOGLE_API_KEY")
    )
}
# Written where Python looks for it at its start. Processes of this run inherit it.
AUDIT = """
import os, sys

with open(os.environ["AUDIT"], "a") as file:
    print("started", *sys.argv, file=file)

def audit(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"):
        with open(os.environ["AUDIT"], "a") as file:
            print(event, repr(args), file=file)

sys.addaudithook(audit)
"""


@pytest.fixture(scope="module")
def confined(project, tmp_path_factory):  # noqa: F811
    """(what they printed, their folders) of a run and its report. They have a home, a place for
    temporary files and a current directory of their own, and secrets in the environment."""
    root = tmp_path_factory.mktemp("confined")
    folders = {name: root / name for name in ("home", "tmp", "cwd", "run", "cache", "site")}
    for name in ("home", "tmp", "cwd", "site"):
        folders[name].mkdir()
    (folders["site"] / "sitecustomize.py").write_text(AUDIT)
    paths = os.pathsep.join([str(folders["site"]), *filter(None, sys.path)])
    places = {"HOME": "home", "TMPDIR": "tmp"}
    env = ENV | SECRETS | {key: str(folders[name]) for key, name in places.items()}
    env |= {"PYTHONPATH": paths, "AUDIT": str(root / "audit")}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        env.pop(name, None)
    more = ["--steps", "4", "--log.report_to", "tensorboard", "--log.samples", "def "]
    more += ["--log.sample_tokens", "8"]
    args = arguments(project, "pretrain", str(folders["run"]), *more)
    args[args.index("--data.cache_dir") + 1] = str(folders["cache"])
    said = ""
    for words in (args, ["report", str(folders["run"])]):
        done = subprocess.run(
            [sys.executable, "-m", "jaxllm", *words],
            cwd=folders["cwd"],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert (folders["run"] / "report.html").is_file()
    return said, folders


@pytest.mark.sweep
def test_a_run_writes_to_its_folder_and_the_cache_alone(confined):
    _, folders = confined
    assert (folders["run"] / "final").is_dir()
    root = folders["run"].parent
    found = {p.relative_to(root).parts for p in root.rglob("*") if p.is_file()}
    caches = {parts[:4] for parts in found if parts[0] == "home"}
    assert caches <= {("home", ".cache", "jaxllm", "compiled")}
    expected = {"home", "run", "cache", "site", "audit"}
    assert {parts[0] for parts in found} <= expected  # none in tmp, none in cwd


@pytest.mark.sweep
def test_no_secret_of_the_environment_is_written_or_printed(confined):
    said, folders = confined
    files = [p for p in folders["run"].parent.rglob("*") if p.is_file()]
    assert len(files) > 20
    for name, secret in SECRETS.items():
        assert secret not in said, name
        for file in files:
            assert secret.encode() not in file.read_bytes(), f"{name} is in {file}"


@pytest.mark.sweep
def test_a_run_of_one_process_uses_no_network(confined):
    _, folders = confined
    lines = (folders["run"].parent / "audit").read_text().splitlines()
    assert lines.pop(0).startswith("started")
    asks = "('::1', 0))"  # urllib3 asks whether there is IPv6
    assert not [line for line in lines if not line.startswith("started") and asks not in line]
