# SPDX-License-Identifier: Apache-2.0
"""Run by each of two processes of tests/test_cluster.py: process 1 differs in one thing at a time.

Writes FOLDER/PROCESS.json: {what differs: the message that this process got}.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxllm import dist, identity, run
from jaxllm.config import ClusterSection, DataSection, OptimSection, Source, TrainConfig
from jaxllm.errors import UserError

folder, told = Path(sys.argv[1]), {}
dist.start(ClusterSection())
me = str(dist.index())
os.makedirs(folder / me / "model")
os.chdir(folder / me)  # as if each host had a disk of its own
for name in ("other.py", "reward.py"):
    Path(name).write_text(me)
save_file({"w": np.full(4, dist.index())}, "model/model.safetensors")


def tell(name, call, *args, patches=()):
    """Notes what `call` says; in process 1 something is replaced meanwhile."""
    patches = patches if me == "1" else ()
    for one in patches:
        one.start()
    try:
        call(*args)
        told[name] = ""
    except UserError as error:
        told[name] = str(error)
    finally:
        for one in patches:
            one.stop()


check, version, clock = run.check_processes, run.version, time.time
cfg = TrainConfig(data=DataSection(train=(Source("a.txt"),)), optim=OptimSection(1e-3))
tell("nothing", check, cfg)
tell("config", check, replace(cfg, seed=dist.index()))
tell("code", check, cfg, patches=[patch.object(run, "__file__", str(Path("other.py").resolve()))])
for package in ("jax", "transformers", "grain"):

    def other(asked, package=package):
        return "9.9" if asked == package else version(asked)

    tell(package, check, cfg, patches=[patch.object(run, "version", other)])
device = jax.local_devices()[0]
kind = SimpleNamespace(device_kind="other", client=device.client)
tell("devices", check, cfg, patches=[patch("jax.local_devices", lambda: [kind])])
client = SimpleNamespace(platform_version="CUDA 9")
driver = SimpleNamespace(device_kind=device.device_kind, client=client)
tell("platform", check, cfg, patches=[patch("jax.local_devices", lambda: 2 * [driver])])
tell("clock", check, cfg, patches=[patch("time.time", lambda: clock() + 99)])

check = identity.check_processes_read_the_same
tell("data", check, cfg, {"data": {"a.txt": me}})
tell("tokenizer", check, cfg, {"tokenizer": me})
tell("template", check, cfg, {"template": me})
tell("reward", check, cfg, {"rewards": {"reward.py:f": identity._reward("reward.py:f", cfg)}})
tell("weights", check, replace(cfg, model=replace(cfg.model, path="model")), {})
(folder / f"{me}.json").write_text(json.dumps(told))
dist.barrier("end")
