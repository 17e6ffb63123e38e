# SPDX-License-Identifier: Apache-2.0
"""Reward models, DPO and KTO: an update's numbers do not depend on how it is computed, and whole
runs resume exactly."""

import gc
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from runs import arguments, killed, lines_of, one_device, refused
from safetensors.numpy import load_file, save_file
from steps import judged_rows, pair_rows, trajectory, unpacked_slots

from jaxllm.checkpoint import Checkpoints
from jaxllm.cli import main
from jaxllm.config import AlignSection, MeshSection, TrainConfig
from jaxllm.objectives.table import make_objective

# ---- the step

ALIGN = {
    "reward": AlignSection(centering=0.1),
    "dpo": AlignSection(beta=0.1, loss=("sigmoid", "bco"), loss_weights=(1.0, 0.5)),
    "kto": AlignSection(beta=0.3, desirable_weight=1.3),
}


def steps_of(name, rows=None, **form):
    objective = make_objective(TrainConfig(objective=name, align=ALIGN[name]))
    rows = rows_of(name) if rows is None else rows
    found = trajectory(rows, objective=objective, scores=name == "reward", **form)
    return np.stack(found[:2])


def rows_of(name):
    """Rows of an objective; those of KTO have a mean KL above 0, where it is not clipped."""
    if name != "kto":
        return pair_rows(16, margin=True)
    known = np.random.default_rng(1).uniform(-25, -5, (16, 2)).astype(np.float32)
    rows = judged_rows(16)
    return rows | {"unpaired_logps": known * (rows["unpaired_segment"] > 0)}


@pytest.fixture(scope="module")
def plain():
    return {name: steps_of(name) for name in ALIGN}


FORMS = {
    "accumulated, recomputed": dict(count=4, remat="full"),
    "on eight devices": dict(devices=8, mesh=MeshSection(fsdp=8)),
}


@pytest.mark.parametrize("name", ALIGN)
@pytest.mark.parametrize("form", ["unpacked", *FORMS])
def test_trajectory_does_not_depend_on_how_an_update_is_computed(plain, name, form):
    rows = unpacked_slots(rows_of(name)) if form == "unpacked" else None
    got = steps_of(name, rows, **FORMS.get(form, {}))
    assert len(rows_of(name)["tokens"]) != 24 == len(unpacked_slots(rows_of(name))["tokens"])
    assert plain[name][0][-1] < plain[name][0][0]
    np.testing.assert_allclose(got, plain[name], rtol=2e-5)


# ---- whole runs

TUNED = ("--peft.method", "lora", "--peft.r", "4", "--peft.target_modules", "all-linear")
KEYS = ("loss", "grad_norm", "tokens", "reward_chosen", "reward_mean", "accuracy", "kl")


@pytest.fixture(scope="module")
def base(project):
    """The project with a model, pairs and judged answers."""
    with one_device():
        assert main(arguments(project, "pretrain", "base", "--save.every", "0")) == 0
    chats = [json.loads(x) for x in (project / "chats.jsonl").read_text().splitlines()]
    said = [[m["content"][:40] for m in c["messages"]] for c in chats]
    pairs = [
        {"prompt": q, "chosen": f"yes {a}", "rejected": f"no {other}"}
        for (q, a), (_, other) in zip(said, said[1:] + said[:1], strict=True)
    ]
    judged = [
        {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": i % 2}
        for i, p in enumerate(pairs)
    ]
    for name, records in (("pairs", pairs), ("judged", judged)):
        (project / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return project


def aligning(project, verb, out, *more):
    data = project / ("judged.jsonl" if verb == "kto" else "pairs.jsonl")
    args = arguments(project, verb, out, "--data.train", str(data), *more)
    at = args.index("--model.config")
    args[at : at + 4] = ["--model.path", str(project / "base" / "final")]
    return args


def equal_runs(want, got, keys=KEYS, **tolerance):
    assert sorted(got) == sorted(want)
    for step in want:
        for key in set(keys) & want[step].keys():
            np.testing.assert_allclose(got[step][key], want[step][key], **tolerance)


@pytest.fixture(scope="module")
def runs(base):
    """Undisturbed runs of 12 steps on one device."""
    rows = ("--micro_batch_size", "8")
    options = {"reward": ("--align.centering", "0.01"), "dpo": TUNED}
    with one_device():
        for verb, more in options.items():
            assert main(aligning(base, verb, verb, *rows, *more)) == 0
    return {"reward": (*rows, *options["reward"]), "dpo": (*rows, *TUNED)}


@pytest.fixture(scope="module")
def kto(base):
    """An undisturbed run of 12 steps on all devices."""
    assert main(aligning(base, "kto", "kto")) == 0


@pytest.mark.parametrize("verb", ["reward", "dpo"])
def test_a_run_resumes_from_its_checkpoint_exactly(base, runs, verb):
    run = base / verb
    want = lines_of(run)
    assert want[12]["loss"] < want[1]["loss"]
    for place in ("checkpoints/8", "checkpoints/12", "final"):  # as after a machine failure
        shutil.rmtree(run / place)
    with one_device():
        assert main(aligning(base, verb, verb, *runs[verb])) == 0
    equal_runs(want, lines_of(run), rtol=0)


@pytest.mark.sweep
def test_kto_after_sigkill_equals_the_undisturbed_run(base, kto):
    args = aligning(base, "kto", "killed")
    killed([sys.executable, "-m", "jaxllm", *args], base / "killed")
    assert max(lines_of(base / "killed"), default=0) < 12
    assert main(args) == 0
    want = lines_of(base / "kto")
    assert want[1]["loss"] == pytest.approx(0.5, abs=1e-4) and want[12]["loss"] < 0.499
    equal_runs(want, lines_of(base / "killed"), rtol=0)


def assert_precomputed_is_live(base, verb, *more):
    """The live run may be on eight devices, and AdamW magnifies rounding: 3 steps."""
    more = (*more, "--align.reference", "precomputed", "--steps", "3")
    with one_device():
        assert main(aligning(base, verb, f"{verb}-precomputed", *more)) == 0
    want = {step: line for step, line in lines_of(base / verb).items() if step <= 3}
    equal_runs(want, lines_of(base / f"{verb}-precomputed"), rtol=1e-3, atol=1e-4)
    return set((base / "cache").glob("reference-*.npz"))


def test_precomputed_log_probabilities_give_the_run_of_the_live_reference(base, runs):
    assert len(assert_precomputed_is_live(base, "dpo", *runs["dpo"])) == 1


@pytest.mark.sweep
def test_kto_with_precomputed_log_probabilities_equals_its_live_run(base, runs, kto):
    before = assert_precomputed_is_live(base, "dpo", *runs["dpo"])
    after = assert_precomputed_is_live(base, "kto", "--micro_batch_size", "8")
    assert after == before  # both start from one model


def test_a_resumed_run_frees_its_first_weights_before_it_restores(base, monkeypatch):
    """With one copy more in memory, a run that fits at first would not fit when it resumes."""
    out = ("dpo", "freed", "--micro_batch_size", "8", "--align.reference", "precomputed")
    live, restore = [], Checkpoints.restore

    def restoring(*args, **options):
        live.append(sum(array.nbytes for array in jax.live_arrays()))
        return restore(*args, **options)

    monkeypatch.setattr(Checkpoints, "restore", restoring)
    with one_device():
        assert main(aligning(base, *out, "--steps", "1")) == 0
        gc.collect()
        before = sum(array.nbytes for array in jax.live_arrays())
        gc.disable()
        try:
            assert main(aligning(base, *out, "--steps", "2")) == 0
        finally:
            gc.enable()
    assert live == [before]


def test_a_metric_is_checked_before_log_probabilities_are_precomputed(base, capsys):
    cache = set((base / "cache").glob("reference-*.npz"))
    more = ("--micro_batch_size", "8", "--align.reference", "precomputed")
    more += ("--data.eval", str(base / "pairs.jsonl"), "--eval.metric")
    with one_device():
        refused(capsys, aligning(base, "dpo", "no-metric", *more, "f1"), "'f1' is not", "accuracy")
        assert set((base / "cache").glob("reference-*.npz")) == cache
        more += ("margin", "--steps", "1", "--no-save.final")
        assert main(aligning(base, "dpo", "margin", *more)) == 0


def test_a_run_from_an_adapter_is_compared_with_that_adapter(base, runs, capsys):
    """Compared with the base model, the loss would not start at ln 2."""
    first, last = lines_of(base / "dpo")[1]["loss"], lines_of(base / "dpo")[12]["loss"]
    assert first == pytest.approx(np.log(2), abs=1e-6) and last < np.log(2) - 0.01
    adapter = shutil.copytree(base / "dpo" / "final", base / "adapter")
    path = ("--peft.method", "lora", "--peft.path", str(adapter))
    more = ("--micro_batch_size", "8", "--optim.learning_rate", "1e-3", *path)
    with one_device():
        assert main(aligning(base, "dpo", "again", "--steps", "6", *more)) == 0
    again = lines_of(base / "again")
    assert again[1]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    later = [again[step]["loss"] for step in range(2, 7)]
    assert np.mean(later) < np.log(2) - 0.02
    config = json.loads((base / "again" / "final" / "adapter_config.json").read_text())
    assert config["r"] == 4
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: 2 * v for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    line = refused(capsys, aligning(base, "dpo", "again", "--steps", "7", *more))
    assert "weights peft.path changed since" in line


def test_a_reward_model_is_saved_for_sequence_classification(base, runs):
    config = json.loads((base / "reward" / "final" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert config["pad_token_id"] is not None


@pytest.mark.parametrize(
    ("verb", "more", "words"),
    [
        (
            "dpo",
            ["--align.loss", "sigmoid", "sft", "--align.loss_weights", "1"],
            ["1 weights for 2"],
        ),
        ("dpo", ["--align.loss", "sigmoyd"], ["sigmoyd", "sigmoid"]),
        ("dpo", ["--align.label_smoothing", "0.5"], ["align.label_smoothing"]),
        ("dpo", ["--align.centering", "1"], ["align.centering", "dpo"]),
        ("dpo", ["--align.gamma", "2"], ["align.gamma", "only by the losses simpo"]),
        (
            "dpo",
            ["--align.loss", "ipo", "--align.label_smoothing", "0.1"],
            ["align.label_smoothing", "only by the losses sigmoid, robust, exo, simpo"],
        ),
        ("kto", ["--align.loss", "ipo"], ["align.loss", "kto"]),
        ("reward", ["--align.beta", "0.2"], ["align.beta", "reward"]),
        ("orpo", ["--align.reference", "precomputed"], ["align.reference", "orpo"]),
        ("simpo", ["--align.length_normalized", "true"], ["align.length_normalized", "simpo"]),
        ("sft", ["--align.beta", "0.2"], ["align.beta", "sft"]),
        ("reward", ["--log.samples", "hi"], ["log.samples", "reward"]),
        ("dpo", ["--rl.group_size", "4"], ["rl.group_size", "dpo"]),
    ],
)
def test_a_config_mistake_is_one_line(base, capsys, verb, more, words):
    refused(capsys, aligning(base, verb, "wrong", *more), *words)
    assert not (base / "wrong" / "checkpoints").exists()


def test_pairs_for_kto_and_judged_answers_for_dpo_are_refused_by_line(base, runs, capsys):
    args = aligning(base, "kto", "wrong")
    args[args.index("--data.train") + 1] = str(base / "pairs.jsonl")
    assert "pairs.jsonl:1: label is None" in refused(capsys, args)
    args = aligning(base, "dpo", "wrong")
    args[args.index("--data.train") + 1] = str(base / "judged.jsonl")
    assert "judged.jsonl:1: chosen is missing" in refused(capsys, args)
    args = aligning(base, "dpo", "wrong")
    args[args.index("--model.path") + 1] = str(base / "reward" / "final")
    assert "is a reward model; dpo trains a language model" in refused(capsys, args)
    scores = ["generate", "--model", str(base / "reward" / "final"), "--prompt", "a"]
    assert "is a reward model; it scores texts and generates none" in refused(capsys, scores)
