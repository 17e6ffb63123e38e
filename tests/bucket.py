# SPDX-License-Identifier: Apache-2.0
"""An S3 server (moto) on loopback, for the tests that use a bucket."""

import logging
from functools import cache
from pathlib import Path

import pytest

from jaxllm.paths import as_path, copy, files_in, filesystem

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
SECRET = "secret-of-the-test"
B = "s3://bucket"


@cache
def started() -> str:
    """Starts the server and returns its address. One per process: orbax keeps the first address."""
    service = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    service.start()
    host, port = service.get_host_and_port()
    return f"http://{host}:{port}"


@pytest.fixture(scope="module", autouse=True)
def server():
    """The address of a server with a bucket; its credentials are in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", started())
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        filesystem(B).mkdirs("bucket", exist_ok=True)
        yield started()


def upload(folder: Path, target: str) -> str:
    for file in files_in(folder):
        copy(file, as_path(target) / file.relative_to(folder).as_posix())
    return target
