# SPDX-License-Identifier: Apache-2.0
"""The user's run: transformers, TRL and PEFT on a CPU, recorded step by step.

Only this module imports torch. It is run in a process of its own, `python -m jaxllm.parity.theirs
SPEC.json`, whose dict is that of `command.specification`; `main` writes what it recorded.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

CUT, ADAPTER = "model", "adapter"  # folders of the models that both runs start from
RECORD = "jaxllm_record"  # column with the index of a record
# What both runs do alike, or not at all, whatever the user's arguments say.
FIXED: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "tf32": None,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
    "deepspeed": None,
    "fsdp": None,
    "fsdp_config": None,
    "torch_compile": False,
    "use_liger_kernel": False,
    "dataloader_num_workers": 0,
    "resume_from_checkpoint": None,
    "dataset_num_proc": None,
    "activation_offloading": False,
    "shuffle_dataset": False,
    "model_init_kwargs": None,
    "precompute_ref_log_probs": False,
}
# Arguments whose values, with the defaults of TRL, are compared with ours.
COMPARED = (
    *("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "packing"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
    *("beta", "loss_type", "loss_weights", "label_smoothing", "center_rewards_coefficient"),
)


def cut_model(spec: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Write the first layers of the model with random weights, and its tokenizer.

    Returns its number of parameters, and the number of layers of the whole model.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    config = AutoConfig.from_pretrained(spec["model"], trust_remote_code=False)
    values: dict[str, Any] = config.to_dict()
    if "text_config" in values:
        raise ValueError(f"{spec['model']} is a multimodal model, of which parity makes no cut")
    tokenizer = AutoTokenizer.from_pretrained(spec["tokenizer"], trust_remote_code=False)
    whole = config.num_hidden_layers  # which the dict of nemotron_h lacks
    layers = min(spec["layers"], whole)
    values = {
        name: value[:layers] if isinstance(value, list) and len(value) == whole else value
        for name, value in values.items()
    }
    values |= {"num_hidden_layers": layers, "dtype": "float32", "use_cache": False}
    kind = AutoModelForCausalLM
    if spec["verb"] == "reward":
        kind = AutoModelForSequenceClassification
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        values |= {"num_labels": 1, "pad_token_id": pad}
    values.pop("id2label", None)
    values.pop("label2id", None)
    torch.manual_seed(spec["seed"])
    model = kind.from_config(AutoConfig.for_model(**values)).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters(), whole


def lora(spec: dict[str, Any]) -> Any:
    """peft's config of the adapter; None without one."""
    if spec["lora"] is None:
        return None
    from peft import LoraConfig

    kind = "SEQ_CLS" if spec["verb"] == "reward" else "CAUSAL_LM"
    return LoraConfig(**({"task_type": kind} | spec["lora"]))


def segments(inputs: dict[str, Any]) -> Iterator[tuple[list[int], list[bool]]]:
    """(tokens, which of them are learned) of each text of a micro-batch, in order; of pairs the
    chosen answers, then the rejected ones."""
    import torch

    tokens = inputs["input_ids"]
    if "labels" in inputs:
        learned = inputs["labels"] != -100
    else:
        mask = inputs["completion_mask" if "completion_mask" in inputs else "attention_mask"]
        learned = mask != 0
    present = inputs.get("attention_mask")
    present = torch.ones_like(tokens) if present is None else present
    places = inputs.get("position_ids")
    for row in range(len(tokens)):
        kept = present[row] != 0
        ids, marks = tokens[row][kept].tolist(), learned[row][kept].tolist()
        starts = [0]
        if places is not None:  # several texts in a row
            starts = [i for i, at in enumerate(places[row][kept].tolist()) if at == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[start:end], marks[start:end]


def recording(kind: Any, spec: dict[str, Any], numbers: list[int]) -> Any:
    """A Trainer of this `kind` that records its steps in `self.steps`.

    numbers: the record of each token of the dataset, in order; for pairs, of each row.
    """
    pairs = spec["verb"] in ("dpo", "reward")

    class Recording(kind):
        steps: list[dict[str, Any]] = []
        seen = 0

        def training_step(self, model: Any, inputs: Any, *args: Any, **keys: Any) -> Any:
            if len(self.steps) == self.state.global_step:
                rate = self.optimizer.param_groups[0]["lr"]
                self.steps.append({"loss": 0.0, "learning_rate": float(rate), "micro": []})
            step = self.steps[-1]
            step["micro"].append(self._rows(inputs))
            loss = super().training_step(model, inputs, *args, **keys)
            step["loss"] += float(loss)
            return loss

        def _rows(self, inputs: Any) -> list[dict[str, Any]]:
            found = list(segments(inputs))
            rows = []
            half = len(found) // 2
            texts = zip(found[:half], found[half:], strict=True) if pairs else ((s,) for s in found)
            for text in texts:
                rows.append({"record": numbers[self.seen % len(numbers)], "texts": text})
                self.seen += 1 if pairs else len(text[0][0])
            for row, margin in zip(rows, inputs.get("margin", ()), strict=False):
                row["margin"] = float(margin)
            return rows

        def get_decay_parameter_names(self, model: Any) -> list[str]:
            names = super().get_decay_parameter_names(model)
            if "decay matrices" in spec["switches"]:
                return [n for n, p in model.named_parameters() if p.ndim > 1 and "bias" not in n]
            if "optimizer" in (spec["deepspeed"] or {}):  # one group, made by DeepSpeed
                return [name for name, _ in model.named_parameters()]
            return names

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            block = (spec["deepspeed"] or {}).get("scheduler")
            if not block:
                return super().create_scheduler(num_training_steps, optimizer)
            import torch

            shape = deepspeed_schedule(block, num_training_steps)
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
            return self.lr_scheduler

    return Recording


def deepspeed_schedule(block: dict[str, Any], steps: int) -> Callable[[int], float]:
    """Updates done -> fraction of the peak, of WarmupLR, WarmupDecayLR and WarmupCosineLR."""
    given = {k: v for k, v in block.get("params", {}).items() if v != "auto"}
    warmup = int(given.get("warmup_num_steps", 1000))
    is_log = given.get("warmup_type", "log") == "log"
    floor = given.get("cos_min_ratio", 1e-4)

    def shape(done: int) -> float:
        if done < warmup:
            return math.log(done + 1) / math.log(max(warmup, 2)) if is_log else done / warmup
        share = (done - warmup) / max(steps - warmup, 1)
        if block["type"] == "WarmupDecayLR":
            return max(1 - share, 0.0)
        if block["type"] == "WarmupCosineLR":
            return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2
        return 1.0

    return shape


def numbered(spec: dict[str, Any]) -> Any:
    """The records as a Dataset, with a column RECORD."""
    from datasets import Dataset

    with Path(spec["data"]).open(encoding="utf-8") as lines:  # str.splitlines has other line ends
        records = [json.loads(line) | {RECORD: i} for i, line in enumerate(lines)]
    return Dataset.from_list(records)


def trace_packing(numbers: list[int]) -> None:
    """Make TRL's packing keep the record of each token in `numbers`."""
    from trl.trainer import sft_trainer

    module: Any = sft_trainer
    pack = module.pack_dataset

    def traced(dataset: Any, *args: Any, **keys: Any) -> Any:
        def number(row: dict[str, Any], index: int) -> dict[str, Any]:
            return {RECORD: [index] * len(row["input_ids"])}

        packed = pack(dataset.map(number, with_indices=True), *args, **keys)
        numbers.extend(chain.from_iterable(packed[RECORD]))
        return packed.remove_columns(RECORD)

    module.pack_dataset = traced


def trainer_of(spec: dict[str, Any], folder: Path) -> tuple[Any, list[str]]:
    """The user's trainer on the cut model and data, and the model's `linear_modules`."""
    from dataclasses import fields

    import trl
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    name = {"sft": "SFT", "dpo": "DPO", "reward": "Reward"}[spec["verb"]]
    kind, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    known = {field.name for field in fields(config)}
    given = spec["arguments"] | FIXED | {"max_steps": spec["steps"]}
    given = {name: value for name, value in given.items() if name in known}
    args = config(output_dir=str(folder / "out"), **given)
    auto = AutoModelForSequenceClassification if name == "Reward" else AutoModelForCausalLM
    numbers: list[int] = []
    if getattr(args, "packing", False):
        trace_packing(numbers)
    base = auto.from_pretrained(folder / CUT, dtype="float32")
    linear = linear_modules(base)
    trainer = recording(kind, spec, numbers)(
        model=base,
        args=args,
        train_dataset=numbered(spec),
        processing_class=AutoTokenizer.from_pretrained(folder / CUT),
        peft_config=lora(spec),
    )
    if not numbers:
        rows = trainer.train_dataset
        lengths = [1] * len(rows)
        if name == "SFT":
            lengths = [len(row) for row in rows["input_ids"]]
        numbers += [i for i, n in zip(rows[RECORD], lengths, strict=True) for _ in range(n)]
    return trainer, linear


def dropouts(model: Any) -> dict[str, float]:
    """{name: probability} of the dropouts of a model."""
    import torch

    found: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            name = "lora_dropout" if "lora_dropout" in path else path.rpartition(".")[2]
            found[name] = module.p
        if rate := getattr(module, "attention_dropout", 0.0):
            found["attention_dropout"] = rate
    return found


def turn_off_dropout(model: Any) -> None:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0


def linear_modules(model: Any) -> list[str]:
    """The names that peft's all-linear adapts: those of linear layers, but not the head."""
    import torch

    heads = ("lm_head", "score")
    names = (
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in path
    )
    return sorted({name for name in names if name not in (*heads, "base_layer")})


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """What the user's run did: its steps, its arguments with their defaults, and what it trains."""
    from importlib.metadata import version

    folder = Path(spec["folder"])
    parameters, whole = 0, 0
    if not (folder / CUT).is_dir():
        parameters, whole = cut_model(spec, folder / CUT)
    trainer, linear = trainer_of(spec, folder)
    model = trainer.model
    dropout = dropouts(model)
    if dropout == spec["dropout"] or "no dropout" in spec["switches"]:
        turn_off_dropout(model)  # equal in both runs, whose draws differ
    embedding = model.get_input_embeddings()
    padding = getattr(embedding, "padding_idx", None)
    if "pad token" in spec["switches"]:
        embedding.padding_idx = None
    adapter: dict[str, Any] | None = None
    if spec["lora"] is not None:
        found = model.peft_config["default"].to_dict()
        adapter = {k: sorted(v) if isinstance(v, set) else v for k, v in found.items()}
        if not (folder / ADAPTER).is_dir():
            model.save_pretrained(folder / ADAPTER, selected_adapters=["default"])
    decayed = set(trainer.get_decay_parameter_names(model))
    trained = {name: p.ndim for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    for step, norm in zip(trainer.steps, norms, strict=True):
        step["grad_norm"] = float(norm)
    values = {name: getattr(trainer.args, name) for name in COMPARED if hasattr(trainer.args, name)}
    if "scheduler" in (spec["deepspeed"] or {}):  # it decides, not the Trainer's arguments
        for name in ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"):
            values.pop(name)
    names = ("torch", "transformers", "trl", *(("peft",) if adapter else ()))
    return {
        "steps": trainer.steps,
        "arguments": {name: getattr(value, "value", value) for name, value in values.items()},
        "adapter": adapter,
        "dropout": dropout,
        "padding": padding if embedding.weight.requires_grad else None,
        "decayed": {name: name in decayed for name in trained},
        "dims": trained,
        "linear": linear,
        "unknown": sorted(set(spec["arguments"]) - {*vars(trainer.args), *FIXED}),
        "parameters": parameters,
        "layers": [min(spec["layers"], whole), whole],
        "template": trainer.processing_class.chat_template,
        "trainer": type(trainer).__mro__[1].__name__,
        "versions": {name: version(name) for name in names},
    }


def main(path: str) -> None:
    """Run the specification in a file, and write the result, or {"error"}, where it says."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        result = run(spec)
    except (ValueError, TypeError, RuntimeError, OSError, KeyError) as error:
        import traceback

        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
