# SPDX-License-Identifier: Apache-2.0
"""The cause of a difference is found: of runs of our own that differ on purpose, and of TRL's."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from runs import MODEL
from transformers import AutoConfig, AutoModelForCausalLM

from jaxllm.cli import main
from jaxllm.config import DataSection, ModelSection, OptimSection, Source, TrainConfig
from jaxllm.config.checks import resolve
from jaxllm.parity import causes
from jaxllm.parity.causes import State, explain, first_difference, run_ours
from jaxllm.parity.ours import our_examples
from jaxllm.tokenizer import load_tokenizer

TEMPLATE = (  # nothing follows the end of a turn, which TRL would learn
    "{% for m in messages %}{% if not loop.first %}\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)
STEPS, EACH = 3, 4


@pytest.fixture(scope="module")
def place(project):
    """The project with a model, its tokenizer with a template, and prompts with completions."""
    values = MODEL | {"num_hidden_layers": 3, "initializer_range": 0.1}
    torch.manual_seed(0)  # with some weights a cause has no effect on the first step
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).save_pretrained(
        project / "model"
    )
    tokenizer = load_tokenizer(project / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(project / "model")
    chats = [json.loads(line)["messages"] for line in (project / "few.jsonl").open()]

    def short(message, length):
        return [message | {"content": message["content"][:length].strip()}]

    records = [
        {"prompt": short(question, 8), "completion": short(answer, 5 + i % 9)}
        for i, (question, answer) in enumerate(chats)
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (project / "data.jsonl").write_text("".join(lines))
    return project


# ---- runs of our own


@pytest.fixture(scope="module", autouse=True)
def once():
    """Equal runs of ours train once."""
    made, train = {}, causes.trained

    def cached(cfg, updates, micro):
        texts = [
            a.tobytes() for update in updates for e in update for pair in e.texts for a in pair
        ]
        key = repr(cfg), micro, b"|".join(texts)
        if key not in made:
            made[key] = train(cfg, updates, micro)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causes, "trained", cached)
        yield


@pytest.fixture(scope="module")
def cfg(place):
    return resolve(
        TrainConfig(
            objective="sft",
            batch_size=EACH,
            model=ModelSection(path=str(place / "model")),
            data=DataSection(
                train=(Source(str(place / "data.jsonl")),),
                max_length=64,
                packing=False,
                cache_dir=str(place / "cache"),
                workers=1,
            ),
            optim=OptimSection(learning_rate=1e-2, schedule="linear"),
        ),
        1,
    )


def recorded(cfg, **arguments):
    """What `theirs.run` would have recorded of a run that trains as `cfg` does."""
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "packing": False}
    args |= {"max_length": 64, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    args |= {"warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0} | arguments
    found, _ = our_examples(cfg)
    rows = [
        {
            "record": record,
            "texts": [(t.tolist(), (w > 0).tolist()) for e in found[record] for t, w in e.texts],
        }
        for record in range(STEPS * EACH)
    ]
    micro = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    steps = [{"micro": micro[i : i + 2]} for i in range(0, len(micro), 2)]
    theirs = {"steps": steps, "arguments": args, "adapter": None, "dropout": {}, "template": None}
    theirs |= {"padding": None}
    theirs |= {"decayed": {"a": True}, "dims": {"a": 2}, "linear": []}
    for step, line in zip(steps, run_ours(State(cfg, theirs)), strict=True):
        step |= asdict(line)
    return theirs


def explained(theirs, cfg):
    """(the first step that differs, the causes, whether the runs agree in the end)."""
    state = State(cfg, theirs)
    ours = run_ours(state)
    tokenizer = load_tokenizer(cfg.model.path)
    first = first_difference(theirs, ours)
    found, ours, state = explain(state, ours, tokenizer, lambda switches: theirs)
    return first, found, first_difference(state.theirs, ours) is None


def test_equal_runs_agree_and_a_setting_without_effect_is_listed(cfg):
    theirs = recorded(cfg, weight_decay=1e-7)
    first, found, agree = explained(theirs, cfg)
    assert first is None and agree
    assert [one.name for one in found] == ["weight decay"]
    assert found[0].flags == {"optim.weight_decay": 1e-7}


def test_a_schedule_and_a_mask_are_found_in_the_order_of_their_effect(cfg):
    masked = replace(cfg, data=replace(cfg.data, train_on_prompt=True))
    theirs = recorded(masked)
    other = replace(cfg, optim=replace(cfg.optim, schedule="constant"))
    first, found, agree = explained(theirs, other)
    assert first == 0 and agree
    mask, schedule = found
    assert mask.name == "mask" and mask.flags == {"data.train_on_prompt": True}
    assert re.search(r"learns \d+ of its \d+ tokens and ours \d+; the first that only", mask.about)
    # The first step has no learning rate yet, and the schedule shows in the third.
    assert mask.then.startswith("then the first difference is at step 3")
    assert schedule.name == "learning rate" and schedule.flags == {"optim.schedule": "linear"}
    assert schedule.about == "optim.schedule is linear in your run and constant in ours"
    assert schedule.then.startswith("then all losses agree")


def test_rows_that_no_key_gives_are_taken_over(cfg):
    theirs = recorded(cfg)
    for step in theirs["steps"]:
        for row in (row for micro in step["micro"] for row in micro):
            tokens, learned = row["texts"][0]
            row["texts"] = [(tokens, [False, *learned[1:-1], False])]  # no end of turn
    state = State(cfg, theirs)
    updates = [[causes.as_example(row) for row in step] for step in causes.their_rows(theirs)]
    for step, line in zip(theirs["steps"], run_ours(replace(state, updates=updates)), strict=True):
        step |= asdict(line)
    first, found, agree = explained(theirs, cfg)
    assert first == 0 and agree
    assert [one.name for one in found] == ["mask"] and not found[0].flags
    assert "only ours learns is '<|im_end|>'" in found[0].about
    assert "no key changes that" in found[0].about


def test_means_of_micro_batches_are_found(cfg):
    theirs = recorded(cfg)
    _, scaled = causes.reduction(State(cfg, theirs))
    for step, line in zip(theirs["steps"], run_ours(scaled), strict=True):
        step |= asdict(line)
    first, found, agree = explained(theirs, cfg)
    assert first == 0 and agree
    assert [one.name for one in found] == ["gradient accumulation"]


def test_a_difference_without_a_known_cause_is_not_explained(cfg):
    theirs = recorded(cfg)
    theirs["steps"][1]["loss"] += 0.01
    first, found, agree = explained(theirs, cfg)
    assert first == 1 and found == [] and not agree


# ---- runs of TRL

RUN = """\
model_name_or_path: {model}
learning_rate: 0.01
lr_scheduler_type: constant
max_length: 64
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
"""


def compared(place, capsys, *flags, text=RUN, data="data.jsonl", objective="sft"):
    """(exit status, the JSON object) of a parity of four steps."""
    pytest.importorskip("trl")
    (place / "run.yaml").write_text(text.format(model=place / "model"))
    line = ["parity", str(place / "run.yaml"), "--data", str(place / data), "--json"]
    capsys.readouterr()
    status = main([*line, "--objective", objective, "--steps", "4", *flags])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.sweep
def test_sft_of_trl_agrees(place, capsys):
    status, found = compared(place, capsys, "--data.packing", "false")
    assert status == 0 and found["agree"] and not found["causes"]
    losses = [step["ours"]["loss"] for step in found["steps"]]
    assert losses[-1] < losses[0] - 0.1  # it learns, and far enough for an error to show


@pytest.mark.sweep
def test_a_schedule_packing_and_decay_that_differ_from_trl_are_explained(place, capsys):
    text = RUN.replace("constant", "linear") + "weight_decay: 0.1\n"
    status, found = compared(place, capsys, "--optim.schedule", "constant", text=text)
    assert status == 1 and found["explained"] and found["first_difference"] == 1
    names = [cause["name"] for cause in found["causes"]]
    assert names == ["batch", "learning rate"]
    assert found["causes"][1]["flags"] == {"optim.schedule": "linear"}


@pytest.mark.sweep
def test_lora_of_trl_agrees_but_for_its_defaults(place, capsys):
    text = RUN + "use_peft: true\nlora_r: 4\nlora_target_modules: [q_proj, v_proj]\n"
    status, found = compared(place, capsys, "--data.packing", "false", text=text)
    assert status == 1 and found["explained"]
    assert [cause["name"] for cause in found["causes"]] == ["LoRA", "dropout"]
    assert found["causes"][0]["flags"] == {"peft.lora_alpha": 32}
    assert found["causes"][1]["flags"] == {"peft.lora_dropout": 0.05}
    flags = ("--data.packing", "false", "--peft.lora_alpha", "32", "--peft.lora_dropout", "0.05")
    status, found = compared(place, capsys, *flags, text=text)
    assert status == 0 and not found["causes"]


@pytest.mark.sweep
@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_pairs_of_trl_agree(place, capsys, objective):
    records = [json.loads(line) for line in (place / "data.jsonl").open()]
    turned = zip(records, records[1:] + records[:1], strict=True)
    pairs = [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in turned
    ]
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (place / "pairs.jsonl").write_text("".join(lines))
    flags = ("--data.packing", "false")
    status, found = compared(place, capsys, *flags, data="pairs.jsonl", objective=objective)
    assert status == 0 and found["agree"], found


@pytest.mark.sweep
def test_what_trl_refuses_is_one_line(place, capsys):
    (place / "run.yaml").write_text(
        RUN.format(model=place / "model") + "assistant_only_loss: true\n"
    )
    line = ["parity", str(place / "run.yaml"), "--data", str(place / "data.jsonl")]
    assert main([*line, "--objective", "sft", "--steps", "2"]) == 2
    assert "jaxllm: error: your run, not ours, fails on this cut: " in capsys.readouterr().err
