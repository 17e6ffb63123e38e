# SPDX-License-Identifier: Apache-2.0
"""The data of a run over several processes is that of a run of one."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs import DEVICES, ENV, batch_at

from jaxllm.config import DataSection, LogSection, Source, TrainConfig
from jaxllm.data import sources
from jaxllm.data.cache import Cache
from jaxllm.data.dataset import load_data

ROOT = Path(__file__).parents[2]
STEP, ROWS = 3, 8
# Run by each of two processes with two devices: FOLDER -> FOLDER/PROCESS.json and .npz
SCRIPT = f"""
import json, os, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from jaxllm import dist
from jaxllm.config import ClusterSection, MeshSection, Source
from jaxllm.data import examples, sources
from jaxllm.data.dataset import load_data
from jaxllm.data.loader import eval_batches, make_loader
from jaxllm.errors import UserError
from jaxllm.mesh import local_rows, make_mesh, put
from jaxllm.tokenizer import load_tokenizer
from test_processes import config

folder = Path(sys.argv[1])
dist.start(ClusterSection())
tokenizer, fill, seen = load_tokenizer(str(folder / "tokenizer")), examples._fill, []
hashed, file_hash = [], examples.file_hash
sources.PART_BYTES = 400

def record(cached, group, parts, *rest):
    seen.extend([cached.source.path, group, part] for part in parts)
    fill(cached, group, parts, *rest)

def record_hash(file):
    hashed.append(str(file))
    return file_hash(file)

examples._fill, examples.file_hash = record, record_hash
data = load_data(config(folder, "shared"), tokenizer)
out = {{"parts": list(seen), "hashed": list(hashed), "manifest": data.manifest, "rows": {{}}}}
arrays = {{}}
for name, axes in {{"fsdp": {{"fsdp": 4}}, "tensor": {{"tensor": 4}}, "context": {{"context": 2}},
                   "both": {{"fsdp": 2, "tensor": 2}}}}.items():
    mesh = make_mesh(MeshSection(**{{"data": -1, "fsdp": 1}} | axes))
    local = local_rows(mesh, {ROWS} // 2)
    out["rows"][name] = list(local)
    loader = make_loader(data.train, batch_size={ROWS}, micro_batches=2, local=local,
                         seed=5, start_step={STEP})
    batch = dist.gather(put(mesh, next(loader), {ROWS} // 2))
    arrays |= {{f"{{name}}/{{k}}": v.reshape({ROWS}, -1) for k, v in batch.items()}}
    evals = [dist.gather(put(mesh, rows, 4)) for rows in eval_batches(data.evals["held"], 4, local)]
    arrays |= {{f"{{name}}-evals/{{k}}": np.concatenate([e[k] for e in evals]) for k in evals[0]}}
seen.clear()
load_data(config(folder, "shared"), tokenizer)
out["again"] = list(seen)
cfg = config(folder, f"own-{{dist.index()}}")
load_data(cfg, tokenizer)
out["own"] = list(seen)
os.chdir(folder / f"host-{{dist.index()}}")
try:
    load_data(replace(cfg, data=replace(cfg.data, train=(Source("data.jsonl"),))), tokenizer)
except UserError as error:
    out["error"] = str(error)
(folder / f"{{dist.index()}}.json").write_text(json.dumps(out))
np.savez(folder / f"{{dist.index()}}.npz", **arrays)
dist.barrier("end")
"""


def config(folder: Path, cache: str) -> TrainConfig:
    train = (Source(str(folder / "long.jsonl")), Source(str(folder / "files")))
    held = (Source(str(folder / "held.jsonl")),)
    section = DataSection(train=train, eval=held, max_length=32, workers=1)
    section = replace(section, cache_dir=str(folder / cache))
    return TrainConfig(data=section, log=LogSection(progress=False))


def write(file: Path, count: int, start: int = 0) -> None:
    file.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"{i} " * (i % 9)}) for i in range(start, start + count)]
    file.write_text("".join(line + "\n" for line in lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A file of several parts, a folder of small files, one of them empty, and held-out data."""
    folder = tmp_path_factory.mktemp("processes")
    write(folder / "long.jsonl", 61)
    for host in range(2):
        write(folder / f"host-{host}" / "data.jsonl", 3, host)
    for number in range(9):
        write(folder / "files" / f"{number}.jsonl", 5 * (number != 4), number)
    write(folder / "held.jsonl", 20)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def one(folder, tokenizer):
    """The data in one process."""
    return load_data(config(folder, "one"), tokenizer)


@pytest.fixture(scope="module")
def two(folder):
    """What the two processes report, and their arrays."""
    (folder / "run.py").write_text(SCRIPT)
    path = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'data'}"
    env = ENV | {"XLA_FLAGS": DEVICES + "2", "PYTHONPATH": path}
    command = [ROOT / "launch" / "local.sh", "2", sys.executable, folder / "run.py", folder]
    command = ["timeout", "-s", "KILL", "150", *command]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]
    return reports, [dict(np.load(folder / f"{i}.npz")) for i in range(2)]


def test_two_processes_share_out_files_and_parts_and_tokenize_each_once(two, folder):
    reports, _ = two
    first, second = ({tuple(part) for part in report["parts"]} for report in reports)
    assert not first & second and abs(len(first) - len(second)) <= 1
    long = {part for path, group, part in first | second if path.endswith("long.jsonl")}
    assert long == set(range(len(long))) and len(long) > 3
    groups = {group for path, group, _ in first | second if path.endswith("files")}
    assert groups == set(range(len(groups))) and 1 < len(groups) < 9
    hashed = [set(report["hashed"]) for report in reports]
    assert not hashed[0] & hashed[1] and len(hashed[0] | hashed[1]) == 11
    assert all(report["again"] == [] for report in reports)


def test_the_manifest_is_that_of_one_process(two, one):
    reports, _ = two
    assert [report["manifest"] for report in reports] == [json.loads(json.dumps(one.manifest))] * 2


def test_processes_that_do_not_share_a_cache_tokenize_everything(two):
    reports, _ = two
    parts = {tuple(part) for report in reports for part in report["parts"]}
    assert all({tuple(part) for part in report["own"]} == parts for report in reports)


def test_processes_that_see_other_files_are_told(two):
    reports, _ = two
    for report in reports:
        assert re.search(r"process 1 .* has data data\.jsonl \S*1 file", report["error"])


def test_each_process_builds_the_rows_of_its_devices(two):
    reports, _ = two
    assert [report["rows"] for report in reports] == [
        {"fsdp": [0, 1], "tensor": [0, 1, 2, 3], "context": [0, 1], "both": [0, 1]},
        {"fsdp": [2, 3], "tensor": [0, 1, 2, 3], "context": [2, 3], "both": [2, 3]},
    ]


def test_the_batch_of_two_processes_is_that_of_one(two, one):
    _, arrays = two
    want = batch_at(one.train, 5, STEP, ROWS)
    held = one.evals["held"].parts[0]
    for found in arrays:
        for name in ("fsdp", "tensor", "context", "both"):
            for field, value in want.items():
                np.testing.assert_array_equal(found[f"{name}/{field}"], value)
                evals = found[f"{name}-evals/{field}"]
                for row in range(len(held)):
                    np.testing.assert_array_equal(evals[row], held[row][field])
                assert not evals[len(held) :].any()


def test_parts_are_in_the_order_of_the_records(folder, one, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 150)
    parts = load_data(config(folder, "parts"), tokenizer)
    assert parts.manifest == one.manifest
    for rows, whole in zip(parts.train.parts, one.train.parts, strict=True):
        assert len(rows.examples) == len(whole.examples)
        for i in range(len(rows.examples)):
            np.testing.assert_array_equal(rows.examples.tokens(i), whole.examples.tokens(i))


def test_a_killed_run_goes_on_with_the_parts_that_are_missing(
    folder, one, tokenizer, monkeypatch, tmp_path
):
    monkeypatch.setattr(sources, "PART_BYTES", 400)
    done, put = [], Cache.put

    def killed(cache, made, part):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(part)
        put(cache, made, part)

    cfg = config(folder, "one")
    cfg = replace(cfg, data=replace(cfg.data, cache_dir=str(tmp_path)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Cache, "put", killed)
        load_data(cfg, tokenizer)
    more = []
    monkeypatch.setattr(Cache, "put", lambda *args: (more.append(args[2]), put(*args)))
    assert load_data(cfg, tokenizer).manifest == one.manifest
    assert len(more) > 3 and not set(done) & set(more)
