# SPDX-License-Identifier: Apache-2.0
"""Ten steps of reward models, DPO and KTO, against the trainers of TRL on the same files.

The batch is the whole data, so that its order does not matter. KTO's mismatched answers are made
the same: TRL rotates the answers of a batch by one, so the draw of each epoch is replaced by that.
The template writes nothing behind the end of a turn: TRL learns what does (chatml's newline), here
a turn ends with its end token.
"""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import lines_of

from jaxllm.config import (
    AlignSection,
    DataSection,
    LogSection,
    ModelSection,
    OptimSection,
    SaveSection,
    Source,
    TrainConfig,
)
from jaxllm.data.preference import Judged
from jaxllm.mesh import make_mesh

pytest.importorskip("trl")

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
)

TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)
STEPS, RATE, COUNT = 10, 1e-3, 8
REAL = Path(__file__).parents[2] / "shared" / "data" / "dpo_en_demo.json"


def user(text):
    return [{"role": "user", "content": text}]


def says(text):
    return [{"role": "assistant", "content": text}]


def made_up(project):
    """Pairs from lines of the project's text; one answer is its prompt's line, one another's."""
    lines = [x.strip() for x in (project / "text.txt").read_text().splitlines() if len(x) > 30]
    rng = np.random.default_rng(0)
    some = [
        lines[i][: rng.integers(12, 60)].strip() for i in rng.integers(0, len(lines), 3 * COUNT)
    ]
    return list(zip(some[::3], some[1::3], some[2::3], strict=True))


def real_ones():
    """The shortest of real pairs, cut."""
    records = json.loads(REAL.read_text())
    found = [
        (r["conversations"][0]["value"], r["chosen"]["value"], r["rejected"]["value"])
        for r in records
        if len(r["conversations"]) == 1
    ]
    cut = [(q[:60].strip(), c[:70].strip(), r[:70].strip()) for q, c, r in found]
    return [each for each in cut if each[1] != each[2] and all(each)][:COUNT]


@pytest.fixture(scope="module")
def place(project):
    """Tokenizer, files of pairs and of judged answers, and two random torch models; our runs are on
    one device, which compiles sooner."""
    folder = project / "trl"
    folder.mkdir()
    (folder / "chat.jinja").write_text(TEMPLATE)
    sets = {"made": made_up(project)} | ({"real": real_ones()} if REAL.is_file() else {})
    for name, pairs in sets.items():
        assert len(pairs) == COUNT
        records = [
            {"prompt": user(q), "chosen": says(c), "rejected": says(r), "margin": i / 8}
            for i, (q, c, r) in enumerate(pairs)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        records = [
            {"prompt": user(q), "completion": says((c, r)[i % 3 == 0]), "label": i % 3 != 0}
            for i, (q, c, r) in enumerate(pairs)
        ]
        (folder / f"{name}-kto.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    tokenizer = AutoTokenizer.from_pretrained(project / "tokenizer")
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=500, max_position_embeddings=256)
    shape |= dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    shape |= dict(bos_token_id=tokenizer.bos_token_id, initializer_range=0.2)
    for name, kind in (("lm", AutoModelForCausalLM), ("rm", AutoModelForSequenceClassification)):
        torch.manual_seed(0)
        config = LlamaConfig(**shape, **({"num_labels": 1} if name == "rm" else {}))
        kind.from_config(config).save_pretrained(folder / name)
    return folder


def ours(place, objective, file, **align):
    """The loss of each step."""
    cfg = TrainConfig(
        objective=objective,
        output_dir=str(place / "ours"),
        overwrite=True,
        steps=STEPS,
        batch_size=COUNT,
        model=ModelSection(
            path=str(place / ("rm" if objective == "reward" else "lm")),
            tokenizer=str(place.parent / "tokenizer"),
        ),
        data=DataSection(
            train=(Source(str(file)),),
            max_length=200,
            packing=False,
            template=str(place / "chat.jinja"),
            cache_dir=str(place / "cache"),
            workers=1,
        ),
        optim=OptimSection(learning_rate=RATE, schedule="constant", clip=1.0),
        log=LogSection(every=1, progress=False),
        save=SaveSection(every=0, final=False),
        align=AlignSection(**align),
    )
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("jaxllm.training")
        patch.setattr(module, "make_mesh", lambda section: make_mesh(section, jax.devices()[:1]))
        before = np.roll(np.arange(COUNT), 1)  # TRL lends the answer of the record before
        patch.setattr(Judged, "donors", lambda self, epoch: before)
        module.train(cfg)
    found = lines_of(place / "ours")
    return np.array([[found[i + 1][k] for k in ("loss", "grad_norm")] for i in range(STEPS)])


TRAINERS = {
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
}


def theirs(place, objective, file, **options):
    """(loss, gradient norm) of each step; the loss as it was before the log rounds it."""
    trainer_class, config_class = TRAINERS[objective]
    tokenizer = AutoTokenizer.from_pretrained(place.parent / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    losses = []

    class Recording(trainer_class):
        def compute_loss(self, *args, **keys):
            loss = super().compute_loss(*args, **keys)
            losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
            return loss

    kind = AutoModelForSequenceClassification if objective == "reward" else AutoModelForCausalLM
    model, reference = (
        kind.from_pretrained(place / ("rm" if objective == "reward" else "lm")).float()
        for _ in range(2)
    )
    args = config_class(
        str(place / "theirs"),
        max_steps=STEPS,
        per_device_train_batch_size=COUNT,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_length=200,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    records = [json.loads(line) for line in file.read_text().splitlines()]
    if objective != "reward":
        records = [{k: v for k, v in r.items() if k != "margin"} for r in records]
    more = {} if objective == "reward" else {"ref_model": reference}
    trainer = Recording(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
        **more,
    )
    trainer.train()
    norms = [x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x]
    return np.array([losses, norms]).T


# name: (objective, data, our options, TRL's)
SOFT = dict(label_smoothing=0.2)
WEIGHTS = dict(desirable_weight=1.3, undesirable_weight=0.8)
CASES = {
    "reward": ("reward", "made", dict(centering=0.05), dict(center_rewards_coefficient=0.05)),
    "sigmoid": ("dpo", "made", dict(beta=0.3), dict(beta=0.3)),
    "ipo": ("dpo", "made", dict(loss=("ipo",)), dict(loss_type=["ipo"])),
    "hinge": ("dpo", "made", dict(loss=("hinge",)), dict(loss_type=["hinge"])),
    "robust": ("dpo", "made", dict(loss=("robust",)) | SOFT, dict(loss_type=["robust"]) | SOFT),
    "apo_zero": ("dpo", "made", dict(loss=("apo_zero",)), dict(loss_type=["apo_zero"])),
    "kto": ("kto", "made", WEIGHTS, WEIGHTS),
    "sigmoid, real pairs": ("dpo", "real", {}, {}),
    "kto, real pairs": ("kto", "real", {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_equal_trl(place, name):
    objective, data, align, options = CASES[name]
    file = place / f"{data}{'-kto' * (objective == 'kto')}.jsonl"
    if not file.is_file():
        pytest.skip(f"{REAL} is not here")
    got, want = ours(place, objective, file, **align), theirs(place, objective, file, **options)
    print(name, np.abs(got - want).max(0), want[0], want[-1])
    assert want[-1][0] < want[0][0] - 0.1  # it learns, and far enough for an error to show
    np.testing.assert_allclose(got[:, 0], want[:, 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-3, atol=1e-4)
