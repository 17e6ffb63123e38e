# SPDX-License-Identifier: Apache-2.0
"""The reference of a policy: which weights are copied, and what the cache of its log-probabilities
reuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import T, decoder, judged_rows, pair_rows, unpacked_slots

from jaxllm import reference
from jaxllm.config import (
    DataSection,
    LogSection,
    MeshSection,
    PeftSection,
    TrainConfig,
)
from jaxllm.data.batch import Batch
from jaxllm.data.cache import Cache
from jaxllm.data.dataset import Data
from jaxllm.data.rows import Rows
from jaxllm.hf import abstract_model
from jaxllm.mesh import make_mesh
from jaxllm.model.adapter import AdapterParam
from jaxllm.objectives.dpo import answer_logps
from jaxllm.objectives.lm import lm_loss
from jaxllm.objectives.table import Objective
from jaxllm.program import assemble
from jaxllm.reference import precomputed

LORA = PeftSection(method="lora", r=4, target_modules=("all-linear",))
SECTIONS = {
    "all weights": (PeftSection(), True),
    "lora": (LORA, False),
    "lora and the head": (PeftSection(method="lora", r=4, modules_to_save=("lm_head",)), True),
    "lora that was trained before": (PeftSection(method="lora", r=4, path="somewhere"), True),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_reference_is_the_start_and_only_trained_weights_are_copied(name):
    section, copied = SECTIONS[name]
    if section.path:
        model = decoder(PeftSection(method="lora", r=4))
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, AdapterParam):
                variable.set_value(variable.get_value() + 0.1)
    else:
        model = decoder(section)
    tokens = np.arange(12)[None]
    before = np.asarray(model(tokens))
    _, trained, rest = nnx.split(model, model.peft.trains, ...)
    params, weights = nnx.to_pure_dict(trained), nnx.to_pure_dict(rest)
    mesh = make_mesh(MeshSection(), jax.devices()[:1])

    def make(adapter):
        return abstract_model(model.cfg, mesh, {}, peft=adapter)

    program = assemble(TrainConfig(peft=section), mesh, make, model.peft, Objective(lm_loss, True))
    frozen = program.with_reference(params, weights)
    assert frozen["weights"] is weights  # shared, not copied
    assert bool(frozen["reference"]) == copied
    moved = jax.tree.map(lambda x: x + 0.1, params)
    jax.tree.map(lambda x: x.delete(), params)  # as a step does that donates them
    policy, reference = program.models(moved, frozen)
    np.testing.assert_allclose(reference(tokens), before, atol=1e-6)
    assert float(jnp.abs(policy(tokens) - before).max()) > 0.1
    assert (reference.peft.frozen, policy.peft.frozen) == (
        copied and model.peft.frozen,
        model.peft.frozen,
    )


class Part(list):
    """Rows of a source, as the loader has them."""

    length = T

    def __init__(self, rows):
        super().__init__({k: v[i] for k, v in rows.items()} for i in range(len(rows["tokens"])))


@pytest.mark.parametrize("make", [pair_rows, judged_rows], ids=["pairs", "judged answers"])
def test_another_packing_or_more_data_reuses_the_cached_log_probabilities(
    tmp_path, monkeypatch, make
):
    folder = DataSection(cache_dir=str(tmp_path / "cache"))
    quiet = LogSection(progress=False)
    cfg = TrainConfig(objective="dpo", data=folder, log=quiet, micro_batch_size=4)
    model, mesh = decoder(), make_mesh(MeshSection(), jax.devices()[:1])
    computed = []

    def eval_batches(rows, size, *, original=reference.eval_batches):
        computed.extend(rows.parts[0])
        return original(rows, size)

    monkeypatch.setattr(reference, "eval_batches", eval_batches)

    def logps_of(rows):
        data = Data(Rows((Part(rows),), None, T), {}, {})
        data = precomputed(cfg, data, model, "tiny", mesh)
        return data.train.parts[0].logps

    packed = make(16)
    names = [name for name in reference.LOGPS if name in packed]
    first = logps_of(packed)
    assert len(computed) == 16
    want, *_ = answer_logps(model, Batch(**packed), [packed[name] for name in names])
    for name, logps in zip(names, want, strict=True):
        np.testing.assert_allclose(first[reference.LOGPS[name]], logps, atol=1e-5)

    single = logps_of(unpacked_slots(packed))
    assert len(computed) == 16  # another packing of the same answers
    for name in names:
        logps = first[reference.LOGPS[name]]
        used = np.any([packed[n] > 0 for n in names], 0)
        np.testing.assert_array_equal(single[reference.LOGPS[name]][:, 0], logps[used])

    more = make(20)
    assert all(len(v) == 20 for v in logps_of(more).values())
    new = len(computed) - 16
    assert 0 < new <= 20
    relearned = packed | {"weights": np.where(packed["weights"] > 0, 0, packed["weights"])}
    logps_of(relearned)  # the same tokens with another mask are other answers
    assert len(computed) == 16 + new + 16
    assert len(list((tmp_path / "cache").glob("reference-*.npz"))) == 1


def test_damaged_log_probabilities_are_computed_again(tmp_path, capsys):
    file, values = tmp_path / "reference-1.npz", {0: 0.0, 7: -1.5, 9: -2.5}
    reference._save(Cache(str(tmp_path)), file.name, values)
    assert reference._load(file) == values
    whole, at = file.read_bytes(), file.read_bytes().index(np.float32(-1.5).tobytes()) + 3
    for damaged in (b"", whole[:-30], whole[:at] + b"\0" + whole[at + 1 :], b"PK"):
        file.write_bytes(damaged)
        assert reference._load(file) == {0: 0.0}
        assert f"{file} is damaged, so it is made again" in capsys.readouterr().err
