# SPDX-License-Identifier: Apache-2.0
"""`jaxllm plan`: every verb's program in numbers, against real runs, and a user's mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import yaml
from runs import MODEL, arguments, refused

from jaxllm import plan, plan_search, program, topologies, training
from jaxllm.cli import main
from jaxllm.compilation import use_cache
from jaxllm.config import VERBS, MeshSection, TrainConfig, load_config
from jaxllm.errors import UserError
from jaxllm.mesh import make_mesh
from jaxllm.plan import quiet
from jaxllm.topologies import topology

KEYS = ("peak_gib", "hbm_gib", "fits", "wire_gib", "collectives", "classes", "flops")
CLASSES = {"parameters", "gradients", "optimizer", "frozen", "batch", "activations", "temporaries"}
GIB = 2**30


@pytest.fixture(autouse=True)
def cache():
    """A plan turns the compilation cache off; the tests after it use it again. The eight devices of
    the tests are there before a plan asks for others."""
    jax.devices()
    yield
    use_cache()


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL | {"num_hidden_layers": 1}))
    return str(tmp_path / "model.json")


def planned(capsys, *args: str) -> dict:
    """The object that `jaxllm plan --json` prints alone on standard output."""
    capsys.readouterr()
    assert main(["plan", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def flags(model: str, verb: str, *more: str) -> list[str]:
    base = ["--objective", verb, "--model.config", model, "--topology", "cpu:8"]
    return [*base, "--batch_size", "16", "--data.max_length", "32", *more]


def cases():
    swept = {"reward", "dpo", "kto", "orpo", "simpo", "ppo", "sft"}
    for verb in VERBS:
        marks = [pytest.mark.sweep] if verb in swept else []
        yield pytest.param(verb, (), id=verb, marks=marks)
    yield pytest.param("sft", ("--peft.method", "lora"), id="LoRA")
    quantized = ("--peft.method", "lora", "--peft.quantize_base", "nf4")
    yield pytest.param("sft", quantized, id="QLoRA", marks=pytest.mark.sweep)


@pytest.mark.parametrize(("verb", "more"), list(cases()))
def test_every_verb_has_a_plan(model, capsys, monkeypatch, verb, more):
    more = (*more, "--rl.max_new_tokens", "16") if VERBS[verb].online else more
    found = planned(capsys, *flags(model, verb, *more))
    assert set(KEYS) <= found.keys() and found["classes"].keys() == CLASSES
    assert math.isclose(sum(found["classes"].values()), found["peak_gib"], rel_tol=1e-9)
    assert 0 < found["peak_gib"] < found["hbm_gib"] and found["fits"] is True
    assert found["devices"] == 8 and found["mesh"] == {"fsdp": 8}
    pair = 2 if VERBS[verb].data in ("pairs", "judged") else 1
    assert found["length"] == (48 if VERBS[verb].online else 32 * pair)
    for row in found["collectives"]:
        assert row["axis"] == "fsdp" and row["gib"] > 0 and row["count"] >= 1
    sent = sum(row["gib"] for row in found["collectives"])
    assert math.isclose(sent, found["wire_gib"]) and "all-gather" in str(found["collectives"])
    assert found["flops"] >= found["model_flops"] > 0
    assert found["seconds_bound"] == max(found["seconds"].values()) > 0
    if verb == "pretrain":
        D, V, Q, KV, F = 32, 500, 32, 16, 64
        split = V * D + D * (2 * Q + 2 * KV + 3 * F)  # along fsdp; norms are whole on each device
        parameters = 4 * (split / 8 + 3 * D + 2 * 8)
        assert math.isclose(found["classes"]["parameters"] * GIB, parameters)
        assert 0 <= found["classes"]["optimizer"] * GIB - 2 * parameters <= 64
    frozen = "--peft.method" in more
    assert (found["classes"]["frozen"] > found["classes"]["parameters"]) == frozen
    phases = {"prefill", "decode"} if VERBS[verb].online else set()
    if verb == "ppo":  # here grpo has no reference, and one update per rollout
        phases.add("log-probabilities")
    assert found["rollout_peak_gib"].keys() == phases
    monkeypatch.setattr(plan_search, "plan", lambda *_: found)
    assert main(["plan", *flags(model, verb, *more)]) == 0
    text = capsys.readouterr().out
    rows = f"16 rows of {found['length']} tokens"
    for part in (f"{verb} on cpu:8: 8 devices, mesh fsdp 8", rows, ": fits", "at the peak", "MFU"):
        assert part in text


@pytest.mark.parametrize("verb", ["pretrain", pytest.param("sft", marks=pytest.mark.sweep)])
def test_a_plan_compiles_the_program_of_the_run(project, capsys, monkeypatch, verb):
    """The same memory as of the step that a run on the same mesh compiles, and the same arrays."""
    steps, compile_step = [], training.compiled

    def recorded(*args):
        steps.append((compile_step(*args), args[3:]))
        return steps[-1][0]

    monkeypatch.setattr(training, "compiled", recorded)
    lora = () if verb == "pretrain" else ("--peft.method", "lora")
    # A program from the cache does not know its memory.
    more = [*lora, "--steps", "1", "--save.final", "false", "--log.compile_cache", "off"]
    assert main(arguments(project, verb, f"{verb}-planned", *more)) == 0
    found = planned(
        capsys,
        "--objective",
        verb,
        "--topology",
        "cpu:8",
        *arguments(project, verb, "x", *more)[1:],
    )
    (step, inputs), *_ = steps
    memory = step.memory_analysis()
    held = [
        shard.data.nbytes for x in jax.tree.leaves(inputs[1:]) for shard in x.addressable_shards
    ]
    real = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    real += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert abs(found["peak_gib"] * GIB / real - 1) < 0.02
    given = sum(found["classes"][name] for name in ("frozen", "batch")) * GIB * 8
    assert abs(sum(held) - given) <= 0.02 * given


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model.mlp_blocks", "3"), ("3 is not a divisor", "64 / fsdp 8 = 8 features")),
        (("--model.mlp_blocks", "2", "--mesh.tensor", "2"), ("mesh.tensor",)),
        (
            ("--model.mlp_blocks", "2", "--peft.method", "lora", "--peft.lora_dropout", "0.1")
            + ("--peft.target_modules", "all-linear"),
            ("dropout",),
        ),
        (
            ("--model.mlp_blocks", "2", "--peft.method", "lora", "--peft.quantize_base", "nf4"),
            ("quantized",),
        ),
        (("--model.mlp_blocks", "2"), ("biases",)),
    ],
)
def test_an_mlp_that_cannot_be_computed_in_blocks_is_refused(model, capsys, more, words):
    if "biases" in words:
        biased = {"model_type": "llama", "mlp_bias": True, "num_hidden_layers": 1}
        Path(model).write_text(json.dumps(MODEL | biased))
    refused(
        capsys, ["plan", *flags(model, "sft", *more)], "model.mlp_blocks: ", *words, "change it"
    )


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_a_run_has_the_memory_and_the_mfu_of_its_plan(model, monkeypatch, platform):
    """On devices of a kind that is known. (A CPU's peak is not.)"""
    given = ["--model.config", model, "--data.max_length", "32", "--batch_size", "16"]
    cfg = load_config("pretrain", None, given)[0]
    mesh = make_mesh(MeshSection(), jax.devices()[:8])
    made = program.build(plan.resolve(plan.prepared(cfg), 8), mesh)
    with jax.set_mesh(mesh):
        step = made.step(10).lower(made.state, made.frozen, made.batch(32)).compile()
    chip = topologies.TPUS["v5p"][0]
    where = topologies.Topology("local", chip, jax.devices()[:8], (8,), ())
    monkeypatch.setattr(plan, "topology", lambda _: where)
    monkeypatch.setattr(plan.jax, "local_devices", lambda: [SimpleNamespace(platform=platform)])
    if platform == "cpu":
        assert plan.planned_for(made, step) is None
        return
    memory, mfu = plan.planned_for(made, step)
    assert memory * GIB == step.memory_analysis().peak_memory_in_bytes
    model_flops, flops = plan.step_flops(made)
    assert 0 < mfu <= model_flops / flops
    assert (mfu < 0.5 * model_flops / flops) == (platform == "tpu")  # the links take longer


def test_gpus_are_estimated_and_cross_their_nodes(model, capsys):
    more = ["--mesh.data", "2", "--mesh.fsdp", "4", "--mesh.zero", "1"]
    args = flags(model, "pretrain", *more)
    found = planned(capsys, *args[:4], "--topology", "h100:4x2", *args[6:])
    assert "h100" in found["estimate"] and found["hbm_gib"] == 79.6
    assert any("data" in row["axis"] for row in found["collectives"])


def test_a_plan_for_gpus_has_their_defaults(model, capsys, monkeypatch):
    """Not those of the CPU devices that stand in for them."""
    args = ["--objective", "pretrain", "--model.config", model, "--data.max_length", "32"]
    args += ["--topology", "h100:8x1", "--batch_size", "16"]
    cfgs = []

    def recorded(cfg, mesh):
        cfgs.append(cfg)
        return program.build(cfg, mesh)

    monkeypatch.setattr(plan, "build", recorded)
    found = planned(capsys, *args, "--model.compute_dtype", "bfloat16")
    (cfg,) = cfgs
    made = program.build(cfg, make_mesh(cfg.mesh))
    assert made.shardings.reduction.dtype == "bfloat16"
    assert (cfg.model.loss_blocks, cfg.model.loss_chunk) == (8, 4096)
    dtypes = {row["op"]: row["dtype"] for row in found["collectives"][::-1] if row["gib"] > 1e-6}
    assert dtypes["reduce-scatter"] == dtypes["all-gather"] == "bf16"
    planned(capsys, *args, "--mesh.zero", "1", "--mesh.reduce_dtype", "float32")
    assert (cfgs[1].model.loss_blocks, cfgs[1].mesh.reduce_dtype) == (1, "float32")
    refused(capsys, ["plan", *args, "--model.remat", "offload"], "cannot show", "offload", "full")
    refused(
        capsys, ["plan", *args, "--optim.offload", "true"], "cannot show optim.offload", "false"
    )


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        ("Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.", 63.8),
        ("total memory required for HLO temporaries (60.00G) exceeds the memory", 63.0),
    ],
)
def test_the_peak_of_a_refused_program_has_its_arguments_once(message, peak):
    error = RuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. {message}")
    assert plan.refused_peak(error, 3 * GIB) == pytest.approx(peak * GIB)
    with pytest.raises(RuntimeError):
        plan.refused_peak(RuntimeError(f"INTERNAL: {message}"), 0)


def test_what_a_refused_program_sends_is_unknown(model, capsys, monkeypatch):
    gone = plan.Compiled(peak=2.0**60, hlo=None, largest={}, host=0, outputs=None)
    monkeypatch.setattr(plan, "compiled", lambda *args: gone)
    found = planned(capsys, *flags(model, "pretrain"))
    assert found["wire_gib"] is found["collectives"] is found["classes"]["activations"] is None
    seconds = found["seconds"]
    assert seconds["memory"] is seconds["links"] is None and found["bound"] == "compute"
    assert not found["fits"] and found["seconds_bound"] == seconds["compute"] > 0
    assert main(["plan", *flags(model, "pretrain")]) == 0
    text = capsys.readouterr().out
    for part in ("DOES NOT FIT", "GiB sent     unknown\n", "memory unknown, links unknown"):
        assert part in text


@pytest.mark.parametrize(
    ("verb", "remat", "again"),
    [("pretrain", "full", "layer"), ("pretrain", "names", "weights"), ("pretrain", "dots", "")]
    + [("simpo", "full", "layer head"), ("simpo", "none", "head")],
)
def test_the_flops_of_a_dense_model(model, capsys, monkeypatch, verb, remat, again):
    """A layer's last product is not computed again; the logits are, for log-probabilities."""
    gone = plan.Compiled(peak=1.0, hlo=None, largest={}, host=0, outputs=None)
    monkeypatch.setattr(plan, "compiled", lambda *args: gone)
    found = planned(capsys, *flags(model, verb, "--model.remat", remat))
    D, V, Q, KV, F, T = 32, 500, 32, 16, 64, found["length"]
    products, head = 2 * D * (2 * Q + 2 * KV + 3 * F), 2 * D * V
    attention = 4 * Q * (T + 1) / 2
    parts = {"layer": products - 2 * D * F + attention, "weights": products - 2 * D * F}
    tokens = 16 * T / 8
    assert found["model_flops"] == pytest.approx(3 * (products + attention + head) * tokens)
    extra = sum((parts | {"head": head})[name] for name in again.split())
    assert found["flops"] - found["model_flops"] == pytest.approx(extra * tokens)


# ---- topologies


def test_the_speed_of_a_group_is_that_of_the_links_it_spans():
    chip = topologies.V5P
    devices = [
        SimpleNamespace(id=i, coords=(i % 4, i // 4 % 4, i // 16), slice_index=0) for i in range(64)
    ]
    torus = topologies.Topology("t", chip, devices, (4, 4, 4), (True,) * 3)
    link = chip.link
    assert torus.speed(devices) == 6 * link
    assert torus.speed(devices[:16]) == 4 * link
    assert torus.speed(devices[:4]) == 2 * link
    assert torus.speed(devices[:2]) == link  # a part of a ring is a line
    other = [SimpleNamespace(id=64, coords=(0, 0, 0), slice_index=1)]
    assert torus.speed([devices[0], *other]) == chip.network
    gpus = [SimpleNamespace(id=i) for i in range(16)]
    nodes = topologies.Topology("h", topologies.H100, gpus, (8,))
    assert nodes.speed(gpus[:8]) == topologies.H100.link
    assert nodes.speed(gpus) == 8 * topologies.H100.network
    assert nodes.speed([gpus[0], gpus[8]]) == topologies.H100.network


def test_float32_is_slower_on_a_gpu_alone():
    gpu = topologies.Topology("h", topologies.H100, [], (8,))
    tpu = topologies.Topology("t", topologies.V5P, [], (4, 4, 4), (True,) * 3)
    assert gpu.flops("float32") == gpu.flops("bfloat16") / 2
    assert tpu.flops("float32") == tpu.flops("bfloat16")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("v9p:4x4x4", ("unknown chip 'v9p'", "did you mean v5p?")),
        ("laptop", ("unknown chip 'laptop'", "tpu7x")),
        ("v5p:16x16", ("v5p takes three numbers", "v5p:4x4x4")),
        ("v6e:4x4x4", ("v6e takes two numbers",)),
        ("cpu:0", ("cpu takes one number",)),
        ("h100", ("h100 takes",)),
        ("cpu:4096", ("has started with 8 host devices", "XLA_FLAGS")),
    ],
)
def test_a_topology_that_does_not_exist_is_named(where, words):
    with pytest.raises(UserError) as error:
        topology(where)
    for word in words:
        assert word in str(error.value)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxllm\[plan\]'"):
        topology("v5e:4x4")


def test_local_devices_have_the_memory_that_they_report(monkeypatch):
    gpu = SimpleNamespace(id=0, device_kind="NVIDIA L4", platform="gpu")
    gpu.memory_stats = lambda: {"bytes_limit": 21 * GIB}
    monkeypatch.setattr("jax.devices", lambda: [gpu])
    found = topology("local")
    assert (found.hbm_gib, found.chip.flops, found.estimate) == (21, 121e12, "")
    monkeypatch.undo()
    assert "cpu" in topology("local").estimate and len(topology("local").devices) == 8


def test_slices_are_for_tpus():
    with pytest.raises(UserError, match="--slices 2 is for TPUs"):
        topology("cpu:8", 2)


# ---- mistakes


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--batch_size", "12"), ("12 does not divide over 8 devices", "8 or 16")),
        (("--mesh.fsdp", "3"), ("mesh: fsdp 3 does not make 8 devices",)),
        (("--data.max_length", "4096"), ("over the model's limit of 64",)),
        (("--optim.learning_rat", "1"), ("--optim.learning_rate",)),
        (("--length", "many"), ("--length",)),
    ],
)
def test_a_mistake_is_one_line(model, capsys, more, words):
    refused(capsys, ["plan", *flags(model, "pretrain", *more)], *words)


def test_a_plan_needs_an_objective_a_topology_and_a_model(model, capsys):
    refused(capsys, ["plan", "--topology", "cpu:8"], "no objective")
    refused(capsys, ["plan", "--objective", "sft"], "--topology")
    refused(capsys, ["plan", "--objective", "sft", "--topology", "cpu:8"], "no model")


def test_noise_is_hidden_but_not_that_of_a_bug(capfd):
    import os

    with quiet():
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError), quiet():
        os.write(2, b"the reason\n")
        raise ZeroDivisionError
    assert capfd.readouterr().err == "the reason\n"


# ---- the search


def test_the_search_ranks_what_fits_and_writes_the_best(model, tmp_path, capsys, monkeypatch):
    def made_up(cfg, where):
        """Slower with remat; no room without it, nor for more than two rows."""
        rows = cfg.micro_batch_size or 4
        room = rows <= 2 and cfg.model.remat != "none"
        costs = {"offload": 4.0, "full": 3.0, "names": 2.0, "dots": 1.5, "none": 1.0}
        found = {"fits": room, "peak_gib": rows, "seconds_bound": costs[cfg.model.remat] / rows}
        found |= {"micro_batches": 4 // rows, "micro_batch_size": rows, "bound": "compute"}
        found |= {"batch_size": cfg.batch_size or 32}
        found |= {"seconds": {"compute": found["seconds_bound"]}}
        return found | {"devices": 8, "mesh": {}, "mfu": 0.5, "topology": "cpu:8"}

    monkeypatch.setattr(plan_search, "plan", made_up)
    out = str(tmp_path / "best.yaml")
    args = flags(model, "pretrain", "--search", "--output", out, "--optim.clip", "0.5")
    found = planned(capsys, *args, "--batch_size", "32")
    assert found["settings"]["model.remat"] == "dots" and found["settings"]["micro_batch_size"] == 2
    assert found["fits"] and found["config"] == out
    written = yaml.safe_load(open(out).read())
    assert written["optim"] == {"clip": 0.5} and written["model"]["remat"] == "dots"
    assert "data" in written and "train" not in written["data"]  # no stand-ins
    cfg, _ = load_config("pretrain", out)
    assert cfg.micro_batch_size == 2 and cfg.batch_size == 32


def test_the_search_keeps_the_batch_and_the_length(model, tmp_path, capsys, monkeypatch):
    batches = []

    def made_up(cfg, where):
        """More rows a second with larger batches, more seconds a step."""
        size = batches.append(cfg.batch_size) or cfg.batch_size or 8 * len(where.devices)
        found = {"fits": True, "peak_gib": 1.0, "seconds_bound": size / 8, "bound": "compute"}
        found |= {"seconds": {"compute": size / 8}, "batch_size": size, "mfu": 0.5}
        found |= {"micro_batches": size // 8, "micro_batch_size": 1, "topology": "cpu:8"}
        return found | {"devices": 8, "mesh": {"fsdp": 8}}

    monkeypatch.setattr(plan_search, "plan", made_up)
    out = str(tmp_path / "best.yaml")
    args = flags(model, "pretrain", "--search", "--output", out, "--length", "24")
    planned(capsys, *args, "--batch_size", "0", "--micro_batch_size", "2", "--accumulation", "4")
    written = yaml.safe_load(open(out).read())
    assert batches[0] == 0 and set(batches[1:]) == {64}
    assert (written["batch_size"], written["data"]["max_length"]) == (64, 24)
    assert "accumulation" not in written


def test_a_batch_is_split_by_the_axes_of_rows_alone():
    cfg = TrainConfig(batch_size=2, mesh=MeshSection(context=4))
    sizes = plan_search._axes(cfg, {"devices": 8, "mesh": {"context": 4, "fsdp": 2}})
    assert [size["mesh.tensor"] for size in sizes] == [1, 2]


def test_the_order_of_plans_puts_what_fits_first():
    def made(fits, bound, links, peak):
        seconds = {"compute": bound, "links": links}
        return {"fits": fits, "seconds_bound": bound, "seconds": seconds, "peak_gib": peak}

    order = [
        made(True, 2.0, 1.0, 9.0),
        made(True, 2.0, 1.5, 8.0),
        made(True, 3.0, 0.1, 1.0),
        made(False, 5.0, 0.1, 12.0),
        made(False, 1.0, 0.1, 13.0),
    ]
    assert sorted(order[::-1], key=plan_search.rank) == order


# ---- the real TPU compiler (make tpu)

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "head_dim": 128}
LLAMA |= {"vocab_size": 128256, "max_position_embeddings": 8192, "num_hidden_layers": 2}
WIDE = {"hidden_size": 4096, "intermediate_size": 14336}
WIDE |= {"num_attention_heads": 32, "num_key_value_heads": 8}
WIDER = {"hidden_size": 8192, "intermediate_size": 28672}
WIDER |= {"num_attention_heads": 64, "num_key_value_heads": 8}


@pytest.mark.tpu
def test_an_axis_may_be_a_part_of_a_dim_of_the_torus():
    with quiet():
        chips = list(topologies.topology("v6e:4x4").devices)
    mesh = make_mesh(MeshSection(tensor=2), chips)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 2}


PLANS = {}


def pod_plan(capfd, folder, shape, layers, where, devices, rows, length, *more):
    """The plan of a shortened Llama-3.1 with `rows` rows of `length` tokens a device."""
    key = (shape["hidden_size"], layers, where, rows, length, *more)
    if key not in PLANS:
        config = LLAMA | shape | {"num_hidden_layers": layers}
        (folder / "config.json").write_text(json.dumps(config))
        args = ["plan", "--objective", "sft", "--model.config", str(folder), "--topology", where]
        args += ["--batch_size", str(rows * devices), "--length", str(length)]
        assert main([*args, "--model.compute_dtype", "bfloat16", *more, "--json"]) == 0
        out, err = capfd.readouterr()
        assert err == ""  # libtpu's warnings
        PLANS[key] = json.loads(out)
    return PLANS[key]


def sizes_of(shape):
    """Numbers of weights in (a layer, the head)."""
    D, F, KV = shape["hidden_size"], shape["intermediate_size"], 1024
    return D * (2 * D + 2 * KV + 3 * F), D * LLAMA["vocab_size"]


BLOCKS = ("--model.mlp_blocks", "7")
PODS = {
    "8B v5p": (WIDE, "v5p:4x4x4", 64, 2, 2.96, ()),
    "8B v6e": (WIDE, "v6e:16x16", 256, 1, 1.82, ()),
    "70B v5p": (WIDER, "v5p:8x8x8", 512, 1, 2.47, (*BLOCKS, "--optim.offload", "true")),
    "70B v6e": (WIDER, "v6e:16x16", 256, 2, 4.22, BLOCKS),
}


@pytest.mark.tpu
@pytest.mark.parametrize("pod", PODS)
def test_weights_are_gathered_twice_and_gradients_scattered_once(tmp_path, capfd, pod):
    shape, where, devices, rows, peak, more = PODS[pod]
    found = pod_plan(capfd, tmp_path, shape, 2, where, devices, rows, 8192, *more)
    layer, head = sizes_of(shape)
    sent = {op: 0.0 for op in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")}
    for row in found["collectives"]:
        sent[row["op"]] = sent.get(row["op"], 0.0) + row["gib"] * GIB
        if row["op"] in ("all-gather", "reduce-scatter") and row["gib"] > 0.01:
            assert row["dtype"] in ("bf16", "s32") and row["axis"] == "fsdp"  # s32: the tokens
    part = 2 * (2 * layer + head) * (1 - 1 / devices)  # bytes, each tensor once
    assert sent["all-gather"] == pytest.approx(2 * part, rel=0.03)  # the vocabulary is padded
    assert sent["reduce-scatter"] == pytest.approx(part, rel=0.10)
    assert sent["all-reduce"] < 2**20  # of norms and metrics: no gradient of a matrix
    tokens = rows * 8192 * shape["hidden_size"] * 2
    assert sent["all-to-all"] == pytest.approx(2 * tokens, rel=0.05)  # of the embedding
    assert found["peak_gib"] < peak
    moments = 8 * (2 * layer + 2 * head) / devices
    offload = "--optim.offload" in more
    assert found["host_gib"] * GIB == pytest.approx(moments if offload else 0.0, rel=0.01)
    assert (found["classes"]["optimizer"] == 0) == offload


@pytest.mark.tpu
def test_memory_and_bytes_grow_with_layers_as_they_should(tmp_path, capfd):
    """What a layer adds, so that the 32 layers of 8B are known from 2 and 4."""
    shape, where, devices, rows, _, _ = PODS["8B v5p"]
    two, four = (pod_plan(capfd, tmp_path, shape, n, where, devices, rows, 8192) for n in (2, 4))
    layer, _ = sizes_of(shape)
    wire = (four["wire_gib"] - two["wire_gib"]) / 2
    assert wire * GIB == pytest.approx(3 * 2 * layer * 63 / 64, rel=0.01)
    peak = (four["peak_gib"] - two["peak_gib"]) / 2
    saved = rows * 8192 * shape["hidden_size"] * 2 / GIB
    assert peak < saved + 12 * layer / 64 / GIB + 0.05  # its input, weights and moments
    assert two["peak_gib"] + 30 * peak < 8.5 and two["wire_gib"] + 30 * wire < 43


@pytest.mark.tpu
def test_adapters_are_planned(tmp_path, capfd):
    lora = ("--peft.method", "lora", "--peft.target_modules", "all-linear")
    found = pod_plan(capfd, tmp_path, WIDER, 2, "v5e:16x16", 256, 1, 2048, *lora)
    assert found["devices"] == 256 and found["fits"] and found["estimate"] == ""
    assert found["hbm_gib"] == topologies.TPUS["v5e"][0].hbm
    layer, head = sizes_of(WIDER)
    weights = 4 * (2 * layer + 2 * head)
    assert found["classes"]["frozen"] * GIB * 256 == pytest.approx(weights, rel=0.01)
    sent = {"all-gather": 0.0, "reduce-scatter": 0.0}
    for row in found["collectives"]:
        if row["op"] in sent and row["axis"] == "fsdp":
            sent[row["op"]] += row["gib"]
    assert sent["all-gather"] * GIB >= 2 * 2 * 2 * layer * 0.7
    assert sent["reduce-scatter"] < 0.1  # only the adapters' gradients
    assert found["bound"] in ("compute", "memory", "links") and 0 < found["mfu"] < 1
