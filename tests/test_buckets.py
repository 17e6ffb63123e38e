# SPDX-License-Identifier: Apache-2.0
"""Runs, models and data in a bucket: a real S3 server (moto) on loopback, and no other network."""

import gzip
import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket import SECRET, B, server, upload  # noqa: F401, a fixture of every test
from jax.sharding import NamedSharding, PartitionSpec
from runs import ENV, arguments, finished, launched, refused
from safetensors import safe_open

import jaxllm
from jaxllm import files, hf
from jaxllm.checkpoint import Checkpoints
from jaxllm.cli import main
from jaxllm.config import Source
from jaxllm.data import sources
from jaxllm.errors import UserError
from jaxllm.monitor import metrics
from jaxllm.paths import as_path, copy, files_in, is_bucket

pytestmark = pytest.mark.usefixtures("on_one_device")


def lines(run: str, kind: str = "train") -> dict[int, dict]:
    text = (as_path(run) / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return {line["step"]: line for line in found if line["kind"] == kind}


def in_bucket(project: Path, out: str, *more: str) -> list[str]:
    """A pretraining run with everything in the bucket, evaluated on its data."""
    (project / "eval.txt").write_text((project / "text.txt").read_text()[:20_000])
    for name in ("text.txt", "eval.txt", "model.json"):
        copy(project / name, as_path(f"{B}/in/{name}"))
    upload(project / "tokenizer", f"{B}/in/tokenizer")
    args = arguments(project, "pretrain", "unused", "--data.eval", f"{B}/in/eval.txt")
    args += ["--steps", "4", "--save.every", "2", "--save.load_best", "true"]
    args += ["--output_dir", out, *more]
    return [arg if is_bucket(arg) else arg.replace(str(project), f"{B}/in") for arg in args]


def test_a_run_in_a_bucket_equals_a_local_one_and_resumes(project, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the local part of the cache
    there = in_bucket(project, f"{B}/run")
    here = [arg.replace(f"{B}/in", str(project)).replace(B, str(project)) for arg in there]
    assert main([*here, "--steps", "4"]) == 0
    assert main([*there, "--steps", "2", "--save.final", "false"]) == 0
    assert sorted(lines(f"{B}/run")) == [1, 2]
    tables = [f for f in files_in(as_path(f"{B}/in/cache")) if f.name == "state.json"]
    assert len(tables) == 2  # text.txt and eval.txt
    capsys.readouterr()
    monkeypatch.setenv("HOME", str(tmp_path / "another machine"))
    monkeypatch.setattr("jaxllm.data.examples.tokenize_table", None)  # the cache has all
    assert main(there) == 0
    assert "resuming from step 2" in capsys.readouterr().err
    theirs, ours = lines(str(project / "run")), lines(f"{B}/run")
    assert [ours[s]["loss"] for s in (1, 2, 3, 4)] == [theirs[s]["loss"] for s in (1, 2, 3, 4)]
    checkpoints = as_path(f"{B}/run/checkpoints")
    steps = {f.relative_to(checkpoints).parts[0] for f in files_in(checkpoints)}
    assert steps == {"2", "4"}
    final = as_path(f"{B}/run/final")
    for file in files_in(project / "run" / "final"):
        assert (final / file.name).read_bytes() == file.read_bytes(), file.name

    # The model in the bucket is loaded, evaluated, generated from and exported.
    tokens = jax.numpy.arange(64).reshape(1, 64)
    model, local = jaxllm.load_hf(str(final)), jaxllm.load_hf(str(project / "run" / "final"))
    assert np.array_equal(model(tokens), local(tokens))
    capsys.readouterr()
    evaluated = []
    for folder, data in ((final, f"{B}/in"), (project / "run" / "final", project)):
        args = ["--model", str(folder), "--data", f"{data}/eval.txt", "--json"]
        assert main(["eval", *args]) == 0
        evaluated.append(json.loads(capsys.readouterr().out))
    assert evaluated[0]["loss"] == evaluated[1]["loss"]
    for model in (f"{B}/run", str(final)):  # a run folder stands for its final model
        args = ["--model", model, "--prompt", "def ", "--max_new_tokens", "4"]
        assert main(["generate", *args]) == 0
    generated = capsys.readouterr().out
    assert generated[: len(generated) // 2] * 2 == generated != ""
    assert main(["export", f"{B}/run", f"{B}/export", "--step", "2"]) == 0
    assert (as_path(f"{B}/export") / "config.json").is_file()
    assert (as_path(f"{B}/export") / "tokenizer.json").is_file()


@pytest.mark.sweep
def test_hosts_that_share_only_a_bucket_train_one_run(project, monkeypatch, tmp_path):
    """Two processes with home directories of their own, then one: the numbers are those of a run
    on the disk."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args = in_bucket(project, f"{B}/hosts", "--save.load_best", "false")
    args[args.index(f"{B}/in/cache")] = f"{B}/hosts-cache"
    assert (
        main([arg.replace(f"{B}/in", str(project)).replace(B, str(project)) for arg in args]) == 0
    )
    host = ["bash", "-c", 'HOME=$0/$JAX_PROCESS_ID exec "$@"', str(tmp_path)]
    command = [
        *host,
        sys.executable,
        "-m",
        "jaxllm",
        *args,
        "--steps",
        "2",
        "--save.final",
        "false",
    ]
    status, output = finished(launched(2, 2, command))
    assert status == 0, output[-3000:]
    folders = (as_path(f"{B}/hosts-cache"), tmp_path / "0", tmp_path / "1")
    tables = [[f for f in files_in(folder) if f.name == "state.json"] for folder in folders]
    assert [len(found) for found in tables] == [2, 2, 2]  # of text.txt and eval.txt
    assert main(args) == 0
    theirs, ours = lines(str(project / "hosts")), lines(f"{B}/hosts")
    assert list(ours) == list(theirs) == [1, 2, 3, 4]
    for step in ours:
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-6)
    recorded = (as_path(f"{B}/hosts") / "rows.bin").read_bytes()
    assert recorded == (project / "hosts" / "rows.bin").read_bytes()
    assert main(["verify", f"{B}/hosts"]) == 0


@pytest.mark.sweep
def test_overwrite_deletes_the_run_in_the_bucket_and_no_other(project, capsys):
    other = as_path(f"{B}/over-other/config.json")
    other.write_text("{}")
    args = in_bucket(project, f"{B}/over", "--steps", "1", "--save.final", "false")
    assert main(args) == 0
    refused(capsys, [*args, "--seed", "7"], f"{B}/over belongs to another run", "seed")
    refused(capsys, [*args, "--resume", "false"], f"{B}/over has checkpoints")
    copy(project / "text.txt", as_path(f"{B}/over/data/text.txt"))
    inside = [arg.replace(f"{B}/in/text.txt", f"{B}/over/da*/*.txt") for arg in args]
    inside += ["--overwrite", "true"]
    refused(capsys, inside, "overwrite would delete", "which this run reads")
    assert main([*args, "--seed", "7", "--overwrite", "true"]) == 0
    assert json.loads(as_path(f"{B}/over/config.json").read_text())["seed"] == 7
    assert sorted(lines(f"{B}/over")) == [1] and other.is_file()


@pytest.mark.sweep
def test_an_adapter_in_the_bucket_starts_a_run(project, capsys):
    """On the model of the first test's run, all of it in the bucket."""
    if not (as_path(f"{B}/run/final") / "config.json").is_file():
        assert main(in_bucket(project, f"{B}/run")) == 0
    copy(project / "few.jsonl", as_path(f"{B}/in/chats.jsonl"))
    args = ["sft", "--model.path", f"{B}/run/final", "--data.train", f"{B}/in/chats.jsonl"]
    args += ["--data.template", "chatml", "--data.max_length", "64"]
    args += ["--data.cache_dir", f"{B}/in/cache", "--steps", "1", "--batch_size", "8"]
    args += ["--peft.method", "lora", "--log.every", "1"]
    assert main([*args, "--output_dir", f"{B}/lora", "--peft.r", "4"]) == 0
    adapter = f"{B}/lora/final"
    assert {f.name for f in files_in(as_path(adapter))} >= {files.ADAPTER, files.ADAPTER_CONFIG}
    assert main([*args, "--output_dir", f"{B}/lora2", "--peft.path", adapter]) == 0
    assert main(["export", f"{B}/lora2", f"{B}/merged", "--merge"]) == 0
    assert jaxllm.load_hf(f"{B}/merged").peft.frozen is False


# ---- weights


@pytest.fixture
def weights(tmp_path):
    """A tiny model with several files and an index, {local, bucket}."""
    model = hf.random_model(**_shape())
    jaxllm.save_hf(model, str(tmp_path / "model"), max_shard_bytes=30_000)
    jaxllm.save_hf(model, f"{B}/model", max_shard_bytes=30_000)
    return tmp_path / "model", f"{B}/model"


def _shape():
    from runs import MODEL

    from jaxllm.config import MeshSection
    from jaxllm.mesh import make_mesh
    from jaxllm.model.families import from_hf

    return {"cfg": from_hf(MODEL), "mesh": make_mesh(MeshSection()), "hf_config": dict(MODEL)}


def test_a_model_is_written_as_streams_with_its_config_last(weights, monkeypatch):
    local, bucket = weights
    assert {f.name for f in files_in(local)} == {f.name for f in files_in(as_path(bucket))}
    for file in files_in(local):
        assert (as_path(bucket) / file.name).read_bytes() == file.read_bytes(), file.name
    assert hf.weights_hash(files.tensor_files(local).values()) == hf.weights_hash(
        files.tensor_files(as_path(bucket)).values()
    )
    model = jaxllm.load_hf(bucket)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "save_configs", killed)
    with pytest.raises(KeyboardInterrupt):
        jaxllm.save_hf(model, bucket)
    with pytest.raises(UserError, match="has no config.json"):
        jaxllm.load_hf(bucket)
    monkeypatch.undo()
    jaxllm.save_hf(model, bucket)  # replaces what is not complete
    assert not (as_path(bucket) / files.INDEX).exists()
    jaxllm.load_hf(bucket)


def test_a_truncated_file_is_an_error(weights):
    file = next(f for f in files_in(as_path(weights[1])) if f.suffix == ".safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="is not a complete safetensors file: it has"):
        jaxllm.load_hf(weights[1])


def test_a_folder_with_other_objects_is_not_replaced(weights):
    _, bucket = weights
    (as_path(bucket) / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="notes.md"):
        jaxllm.save_hf(jaxllm.load_hf(bucket), bucket)
    (as_path(bucket) / "notes.md").unlink()


def test_slices_equal_safe_open_and_read_no_more_than_their_rows(weights, monkeypatch):
    local, bucket = weights
    read = []
    ranges = files.read_array
    monkeypatch.setattr(files, "read_array", lambda f, a, b: read.append(b - a) or ranges(f, a, b))
    for name, file in files.tensor_files(local).items():
        remote = files.open_tensors(as_path(bucket) / file.name)
        with safe_open(file, "np") as ours, remote as theirs:
            a, b = ours.get_slice(name), theirs.get_slice(name)
            assert a.get_shape() == b.get_shape() and a.get_dtype() == b.get_dtype()
            assert np.array_equal(ours.get_tensor(name), theirs.get_tensor(name))
            rows = a.get_shape()[0]
            half = (slice(rows // 2, rows), *[slice(None)] * (len(a.get_shape()) - 1))
            read.clear()
            assert np.array_equal(a[half], b[half])
            assert sum(read) == a[half].nbytes
            if len(half) == 2:
                read.clear()
                for columns in (slice(0, 3), slice(3, None)):
                    assert np.array_equal(a[:, columns], b[:, columns])
                assert sum(read) == theirs.get_tensor(name).nbytes


def test_each_byte_of_a_sharded_model_is_read_once(weights, monkeypatch):
    _, bucket = weights
    read = []
    ranges = files.read_array
    monkeypatch.setattr(
        files, "read_array", lambda f, a, b: read.append((str(f), a, b)) or ranges(f, a, b)
    )
    model = jaxllm.load_hf(bucket)  # 8 devices along fsdp
    sharded = [x for x in jax.tree.leaves(model.layers) if not x.sharding.is_fully_replicated]
    assert sharded and len(read) == len(set(read))


# ---- checkpoints


def test_checkpoints_are_listed_checked_kept_and_tidied_as_on_disk(capsys):
    mesh = jax.make_mesh((8,), ("d",))
    place = NamedSharding(mesh, PartitionSpec("d"))
    state = {"w": jax.device_put(np.arange(64.0, dtype=np.float32).reshape(8, 8), place)}
    folder = f"{B}/ckpt/checkpoints"
    saved = Checkpoints(folder, 2)
    assert saved.latest() is None
    for step in (1, 2, 3):
        saved.save(step, state, {"x": step}, 1)
    saved.close()
    again = Checkpoints(folder, 2)
    assert again.latest() == 3 and again.best() == 1 and again.meta(3) == {"x": 3}
    again.amend(3, {"y": 4}, 3)
    assert again.meta(3) == {"x": 3, "y": 4} and again.best() == 3
    like = {"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=place)}
    assert np.array_equal(again.restore(3, like)["w"], state["w"])
    again.close()

    data = next(f for f in files_in(as_path(folder) / "3" / "state") if f.parent.name == "d")
    data.write_bytes(b"short")
    (as_path(folder) / "4" / "state" / "part").write_bytes(b"of a killed save")
    broken = Checkpoints(folder, 2)
    assert broken.latest() == 2
    assert "checkpoint 3 is damaged" in capsys.readouterr().err
    broken.save(4, state, {})
    broken.close()
    names = {f.relative_to(folder).parts[0] for f in files_in(as_path(folder))}
    assert names == {"2", "3.damaged", "4"}
    assert not (as_path(folder) / "4" / "state" / "part").exists()


# ---- metrics


def test_metrics_are_uploaded_while_the_run_goes_on_and_continued(monkeypatch):
    monkeypatch.setattr(metrics.Spool, "EVERY", 0.05)
    first = metrics.Metrics(f"{B}/m")
    first.write("train", 1, loss=2.0)
    for _ in range(200):
        if (as_path(f"{B}/m") / "metrics.jsonl").exists() and lines(f"{B}/m"):
            break
        first.spool._closed.wait(0.05)
    assert sorted(lines(f"{B}/m")) == [1]
    first.write("train", 2, loss=1.0)
    first.samples(2, [{"text": "ä"}])
    first.close()
    assert sorted(lines(f"{B}/m")) == [1, 2]
    second = metrics.Metrics(f"{B}/m", resume_step=1)
    second.write("train", 2, loss=0.5)
    second.close()
    assert [line["loss"] for line in lines(f"{B}/m").values()] == [2.0, 0.5]


# ---- data


def records(path: str, tmp_path: Path, **options) -> list[dict]:
    table = sources.read(sources.locate(Source(path, **options)), tmp_path)
    indices = range(len(table))
    return [record for _, record in sources.records(table[:], indices, path)]


def test_every_format_is_read_from_the_bucket(tmp_path):
    import pandas

    rows = [{"text": f"row {i}"} for i in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    data = as_path(f"{B}/data")
    (data / "a.jsonl").write_text(text)
    (data / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (data / "c.csv").write_text("text\n" + "".join(f"row {i}\n" for i in range(5)))
    pandas.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
    copy(tmp_path / "d.parquet", data / "d.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet"):
        (tmp_path / f"of {name}").mkdir()
        assert records(f"{B}/data/{name}", tmp_path / f"of {name}") == rows, name


def test_globs_folders_and_splits_are_found_in_the_bucket(tmp_path):
    for name in ("g/train-0.jsonl", "g/deep/train-1.jsonl", "g/test.jsonl", "g/notes.md"):
        as_path(f"{B}/{name}").write_text(json.dumps({"text": name}) + "\n")
    found = [r["text"] for r in records(f"{B}/g/**/train-*.jsonl", tmp_path)]
    assert found == ["g/deep/train-1.jsonl", "g/train-0.jsonl"]
    assert [r["text"] for r in records(f"{B}/g", tmp_path, split="test")] == ["g/test.jsonl"]
    with pytest.raises(FileNotFoundError, match="no such object"):
        sources.locate(Source(f"{B}/none.jsonl"))
    with pytest.raises(FileNotFoundError, match="no file matches"):
        sources.locate(Source(f"{B}/g/*.csv"))


def test_files_in_the_bucket_are_streamed(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = in_bucket(project, f"{B}/streamed", "--steps", "1", "--save.final", "false")
    train = args.index("--data.train")
    args[train + 1 : train + 2] = ["{path: s3://bucket/in/text.txt, streaming: true}"]
    assert main(args) == 0
    assert any(f.name.startswith("rows-") for f in files_in(as_path(f"{B}/in/cache")))
    capsys.readouterr()
    assert main(["rows", f"{B}/streamed", "--step", "1"]) == 0
    assert f"{B}/in/text.txt (record 0)" in capsys.readouterr().out
    assert main(["verify", f"{B}/streamed"]) == 0


# ---- gs://


def emulate_generations(emulator, patch) -> None:
    """Adds the generation of an object to what the emulator answers to a download, as Google does.
    tensorstore needs it to write an object that it has read."""
    from gcp_storage_emulator.handlers import objects

    answer = objects.download

    def download(request, response, storage, *args):
        answer(request, response, storage, *args)
        if response.status in (200, 206):
            place = (request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = storage.get_file_obj(*place)["generation"]

    patch.setattr(objects, "download", download)
    for _, methods in emulator.HANDLERS:
        if methods.get("GET") is answer:
            patch.setitem(methods, "GET", download)


@pytest.mark.sweep
def test_a_run_in_a_bucket_of_google_resumes(project, tmp_path, monkeypatch):
    """Its losses equal those of a run on the disk. The clients read the emulator's address when
    they are imported: in processes of their own."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    emulate_generations(emulator, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    service = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    service.start()
    url = f"http://127.0.0.1:{port}"
    env = ENV | {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    env |= {"FSSPEC_GCS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    args = arguments(project, "pretrain", "unused", "--output_dir", "gs://bucket/run")
    python = "from jaxllm.cli import main; from jaxllm import load_hf; import sys\n"
    python += "assert main([*sys.argv[1:], '--steps', '2', '--save.final', 'false']) == 0\n"
    python += "assert main([*sys.argv[1:], '--steps', '4']) == 0\n"
    python += "load_hf('gs://bucket/run/final')\n"
    python += "from jaxllm.paths import as_path\n"
    python += "print(as_path('gs://bucket/run/metrics.jsonl').read_text())"
    command = [sys.executable, "-c", python, *args, "--data.cache_dir", "gs://bucket/cache"]
    try:
        done = subprocess.run(
            command, env=env | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=280
        )
    finally:
        service.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from step 2" in done.stderr
    assert main([*args, "--output_dir", str(tmp_path / "run"), "--steps", "4"]) == 0
    there = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    losses = {line["step"]: line["loss"] for line in there if line["kind"] == "train"}
    assert losses == {step: line["loss"] for step, line in lines(str(tmp_path / "run")).items()}
    assert list(losses) == [1, 2, 3, 4]


# ---- mistakes


def test_a_bucket_that_does_not_exist_is_one_line_without_credentials(project, capsys):
    args = arguments(project, "pretrain", "x", "--output_dir", "s3://no-such-bucket/run")
    line = refused(capsys, args, "s3://no-such-bucket/run cannot be written")
    assert SECRET not in line
    with pytest.raises(UserError, match="s3://bucket/nothing does not exist"):
        jaxllm.load_hf(f"{B}/nothing")


def test_what_needs_the_local_disk_says_so(project, capsys):
    text = str(project / "text.txt")
    refused(capsys, ["tokenizer", "train", text, "--out", f"{B}/tok"], "use the local disk")
    args = arguments(project, "pretrain", "x", "--log.compile_cache", f"{B}/compiled")
    refused(capsys, args, f"{B}/compiled", "use the local disk")


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setattr("jaxllm.paths.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install 'jaxllm[gcs]'")):
        as_path("gs://bucket/x")


@pytest.mark.sweep
def test_a_run_neither_writes_nor_prints_the_credentials(project, capfd):
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    args = in_bucket(project, f"{B}/secret", "--steps", "1")
    assert main(args) == 0
    printed = capfd.readouterr()
    line = refused(capfd, [*args, "--seed", "7"], "belongs to another run")
    written = files_in(as_path(B))
    assert {"config.json", "metrics.jsonl", "files.json"} <= {file.name for file in written}
    for file in written:
        assert SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in printed.out + printed.err + line
