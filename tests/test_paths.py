# SPDX-License-Identifier: Apache-2.0
"""What jaxllm.paths and its callers do in a bucket: a real S3 server (moto) on loopback."""

import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from bucket import SECRET, B, server, upload  # noqa: F401, a fixture of every test
from runs import ENV, arguments, refused

from jaxllm import files
from jaxllm.checkpoint import Checkpoints
from jaxllm.cli import mistake
from jaxllm.config import Source
from jaxllm.config.checks import has_results
from jaxllm.data import sources
from jaxllm.data.cache import Cache
from jaxllm.data.template import template_source
from jaxllm.errors import UserError
from jaxllm.monitor import metrics
from jaxllm.paths import (
    as_path,
    delete,
    entries,
    files_in,
    filesystem,
    matching,
    modified,
    read_bytes,
    touch,
)
from jaxllm.tokenizer import load_tokenizer, save_tokenizer


def put(name: str, data: bytes = b"") -> None:
    """Writes an object; one whose name ends in "/" is what the console of S3 makes for a folder."""
    fs = filesystem(B)
    bucket, _, key = name.removeprefix("s3://").partition("/")
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data)


def test_the_objects_in_a_bucket_are_deleted_but_not_the_bucket():
    filesystem(B).mkdir("other")
    for name in ("a/x", "a/deep/y", "b"):
        put(f"s3://other/{name}")
    delete(as_path("s3://other"))
    assert files_in(as_path("s3://other")) == []
    assert filesystem(B).exists("s3://other")


def test_a_name_with_magic_characters_deletes_nothing_else():
    for name in ("x[1]/a*", "x[1]/ab", "x1/a"):
        put(f"{B}/magic/{name}")
    delete(as_path(f"{B}/magic/x[1]/a*"))
    left = [f.name for f in files_in(as_path(f"{B}/magic"))]
    assert left == ["a", "ab"]


def test_a_bucket_itself_is_no_target(project, capsys):
    for name in (B, f"{B}/"):
        with (
            pytest.raises(UserError, match="is a bucket; give a folder in it"),
            files.new_folder(name),
        ):
            pass
        refused(capsys, arguments(project, "pretrain", "x", "--output_dir", name), "is a bucket")


def test_the_object_of_an_empty_folder_is_not_an_entry_of_it():
    for name in ("console/", "console/sub/", "console/a.jsonl"):
        put(f"{B}/{name}")
    folder = as_path(f"{B}/console")
    assert entries(folder) == [folder / "a.jsonl", folder / "sub"]
    assert files_in(folder) == matching(f"{B}/console/**") == [folder / "a.jsonl"]
    assert entries(folder / "sub") == []
    with files.new_folder(str(folder / "sub")) as out:
        (out / "config.json").write_text("{}")
    put(f"{B}/console/checkpoints/")
    saves = Checkpoints(folder / "checkpoints")
    assert saves.latest() is None
    saves.save(1, {"w": jax.numpy.zeros(2)}, {})
    saves.close()
    assert Checkpoints(folder / "checkpoints").latest() == 1


def test_a_missing_object_is_an_error_when_a_range_of_it_is_read():
    with pytest.raises(FileNotFoundError):
        read_bytes(as_path(f"{B}/none"), [(0, 1)])
    put(f"{B}/empty-run/metrics.jsonl")
    assert not has_results(as_path(f"{B}/empty-run"))
    put(f"{B}/empty-run/metrics.jsonl", b"{}")
    assert has_results(as_path(f"{B}/empty-run"))


def test_the_time_of_an_object_is_known_and_a_touch_keeps_its_bytes():
    put(f"{B}/time", b"x")
    before = modified(as_path(f"{B}/time"))
    assert abs(before - time.time()) < 60
    touch(as_path(f"{B}/time"))
    assert as_path(f"{B}/time").read_bytes() == b"x" and modified(as_path(f"{B}/time")) >= before


def test_a_replaced_safetensors_file_is_read_with_its_own_header(tmp_path):
    from safetensors.numpy import save

    for name, size in (("a", 3), ("b", 5)):
        put(f"{B}/replaced.safetensors", save({name: np.full(size, size, np.float32)}))
        with files.open_tensors(as_path(f"{B}/replaced.safetensors")) as file:
            assert file.keys() == [name] and file.get_tensor(name).tolist() == [size] * size


# ---- checkpoints


def test_checkpoints_copied_from_a_disk_are_resumed(tmp_path, capsys):
    state = {"w": jax.numpy.arange(4.0)}
    saves = Checkpoints(tmp_path)
    for step in (1, 2):
        saves.save(step, state, {"x": step})
    saves.close()
    upload(tmp_path, f"{B}/copied")
    copied = Checkpoints(f"{B}/copied")
    assert copied.latest() == 2 and copied.meta(2) == {"x": 2}
    like = {"w": jax.ShapeDtypeStruct((4,), np.float32, sharding=state["w"].sharding)}
    assert np.array_equal(copied.restore(2, like)["w"], state["w"])
    copied.save(3, state, {"x": 3})
    copied.close()
    assert [path.name for path in entries(copied.directory)] == ["1", "2", "3"]
    assert "damaged" not in capsys.readouterr().err


# ---- the cache


def test_entries_that_change_are_read_from_the_bucket_again(tmp_path, monkeypatch):
    for home in ("1", "2"):
        monkeypatch.setenv("HOME", str(tmp_path / home))
        cache = Cache(f"{B}/growing")
        before = cache.get("rows.json")
        assert before is None or before.read_text() == "1"
        (cache.root / "part").write_text(home)
        cache.put(cache.root / "part", "rows.json")
    monkeypatch.setenv("HOME", str(tmp_path / "1"))
    again = Cache(f"{B}/growing").get("rows.json")
    assert again is not None and again.read_text() == "2"


def test_temporary_files_of_the_cache_are_deleted(tmp_path):
    cache = Cache(str(tmp_path))
    for text in ("first", "second"):  # the second process has made the same entry
        made = cache.root / f"making-{text}"
        made.mkdir()
        (made / "state.json").write_text(text)
        entry = cache.put(made, "entry")
    assert (entry / "state.json").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry", "hashes"]
    assert cache.get("entry") == entry
    (tmp_path / "making-old").mkdir()
    (tmp_path / "making-old" / "part").touch()
    (tmp_path / "making-old.json").touch()
    (tmp_path / "making-new").touch()
    new = [f"{name}.jaxllm-0123456789abcdef.new" for name in ("a.json", "hashes/a")]
    for name in (*new, "users.new"):
        (tmp_path / name).touch()
    for name in ("making-old", "making-old.json", *new, "users.new"):
        os.utime(tmp_path / name, (0, 0))
    Cache(str(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["entry", "hashes", "making-new", "users.new"]
    assert not list((tmp_path / "hashes").glob("*.new"))


# ---- tokenizers


@pytest.mark.parametrize("place", ["bucket", "disk"])
def test_named_chat_templates_are_saved_loaded_and_replaced(place, project, tmp_path):
    folder = f"{B}/templates" if place == "bucket" else str(tmp_path / "templates")
    tokenizer = load_tokenizer(project / "tokenizer")
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    for _ in range(2):
        with files.new_folder(folder) as out:
            save_tokenizer(tokenizer, out)
            (out / "config.json").write_text("{}")
    assert load_tokenizer(folder).chat_template == tokenizer.chat_template
    (as_path(folder) / files.TEMPLATES / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=files.TEMPLATES), files.new_folder(folder):
        pass


# ---- metrics


def test_metrics_that_could_not_be_uploaded_stay_on_the_disk(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = metrics.Spool(as_path(f"{B}/spool"))
    (spool.folder / "metrics.jsonl").write_text("{}\n")

    def fails(*_):
        raise OSError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "copy", fails)
        spool.close()
    assert (spool.folder / "metrics.jsonl").is_file()
    assert f"copy {spool.folder} to {B}/spool" in capsys.readouterr().err
    second = metrics.Spool(as_path(f"{B}/spool"))
    (second.folder / "metrics.jsonl").write_text("{}\n")
    second.close()
    assert not second.folder.parent.exists()


def test_a_file_that_vanishes_while_it_is_uploaded_is_no_error(monkeypatch, capsys):
    spool = metrics.Spool(as_path(f"{B}/vanishing"))
    (spool.folder / "gone").symlink_to("nowhere")  # it is listed, and has no stat
    (spool.folder / "metrics.jsonl").write_text("{}\n")
    spool.close()
    assert (as_path(f"{B}/vanishing") / "metrics.jsonl").is_file()
    assert not spool.folder.exists() and not capsys.readouterr().err


# ---- data


def test_a_folder_of_files_takes_few_requests(monkeypatch):
    from s3fs import S3FileSystem

    for i in range(50):
        put(f"{B}/many/{i:02}.jsonl", b'{"text": "%d"}\n' % i)
    requests, call = [], S3FileSystem._call_s3

    def counted(self, method, *args, **options):
        requests.append(method)
        return call(self, method, *args, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    located = sources.locate(Source(f"{B}/many"))
    assert len(located.files) == 50 and len(sources.divide(located)) == 1
    ids = sources.file_ids(list(map(str, located.files)))
    assert len(requests) <= 10, requests
    put(f"{B}/many/07.jsonl", b'{"text": "x"}\n')
    after = sources.file_ids(list(map(str, located.files)))
    assert [i for i in range(50) if ids[i] != after[i]] == [7]


# ---- mistakes


VERBS = {
    "eval": ["eval", "--model", f"{B}/model", "--data", f"{B}/data.jsonl"],
    "export": ["export", f"{B}/run", "out"],
    "pretrain": ["pretrain", "--model.path", f"{B}/m", "--data.train", "x", "--output_dir", "out"],
    "verify": ["verify", f"{B}/run"],
}
PROBLEMS = [
    pytest.param(verb, problem, marks=() if verb == "eval" else pytest.mark.sweep)
    for verb in VERBS
    for problem in ("missing", "denied", "no network")
]


@pytest.mark.parametrize(("verb", "problem"), PROBLEMS)
def test_a_bucket_that_cannot_be_read_is_one_line(verb, problem, tmp_path):
    env = ENV | {k: v for k, v in os.environ.items() if k.startswith(("AWS", "PYTHONPATH"))}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    if problem == "missing":
        del env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]
    if problem == "no network":
        env |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    code = "import sys; from jaxllm.cli import main; sys.exit(main(sys.argv[1:]))"
    if problem == "denied":
        code = (
            "from s3fs import S3FileSystem; from s3fs.errors import translate_boto_error as t\n"
            "from botocore.exceptions import ClientError as E\n"
            "async def deny(*_, **__):\n"
            "    raise t(E({'Error': {'Code': 'AccessDenied', 'Message': 'Access Denied'}}, 'x'))\n"
            f"S3FileSystem._call_s3 = deny\n{code}"
        )
    command = [sys.executable, "-c", code, *VERBS[verb]]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    lines = [x for x in done.stderr.splitlines() if x.startswith("jaxllm: error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert SECRET not in done.stderr + done.stdout


@pytest.mark.parametrize(
    "module",
    ["botocore.exceptions", "gcsfs.retry", "google.auth.exceptions", "aiohttp.client_exceptions"],
)
def test_errors_of_the_clients_can_be_fixed_by_the_user(module):
    error = type("Denied", (Exception,), {"__module__": module})("no access:\nask")
    wrapped = OSError("Access Denied")
    wrapped.__cause__ = error
    assert mistake(error) == "the bucket cannot be accessed: no access: ask"
    assert mistake(wrapped) == "the bucket cannot be accessed: Access Denied"
    assert mistake(ValueError("a bug")) is None


def test_config_files_and_templates_in_a_bucket_are_refused_by_name(capsys):
    refused(capsys, ["sft", f"{B}/sft.yaml"], f"{B}/sft.yaml is in a bucket", "use the local disk")
    with pytest.raises(UserError, match=f"{B}/chat.jinja is in a bucket"):
        template_source(None, f"{B}/chat.jinja")
