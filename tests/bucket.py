# SPDX-License-Identifier: Apache-2.0
"""An S3 server (moto) on loopback, for the tests that use a bucket."""

import logging
from pathlib import Path

import pytest
from etils import epath

from jaxllm.paths import as_path, copy, files_in, filesystem

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
SECRET = "secret-of-the-test"
B = "s3://bucket"


@pytest.fixture(scope="module", autouse=True)
def server():
    """The address of a server with an empty bucket; its credentials are in the environment."""
    service = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    service.start()
    host, port = service.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        filesystem(B).mkdir("bucket")
        yield f"http://{host}:{port}"
    filesystem(B).clear_instance_cache()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()  # it has the address
    service.stop()


def upload(folder: Path, target: str) -> str:
    for file in files_in(folder):
        copy(file, as_path(target) / file.relative_to(folder).as_posix())
    return target
