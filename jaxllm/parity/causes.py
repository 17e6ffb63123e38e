# SPDX-License-Identifier: Apache-2.0
"""Why two runs differ: what could be the cause is tried, one after another, until they agree.

A trial gives our run what the user's run has (a key of the config, or its rows), or runs theirs
again without what jaxllm does not have (dropout, another choice of decayed weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import PeftSection, TrainConfig, aliases
from jaxllm.config.fields import Given
from jaxllm.config.schema import from_dict, leaf_of, to_dict, value_of
from jaxllm.parity.ours import Example, Step, our_examples, trained

TOLERANCE = 1e-4  # of a loss, relative where it is above 1
# Stage -> the keys of our config that it compares, in causal order.
SETTINGS: dict[str, tuple[str, ...]] = {
    "length": ("data.max_length",),
    "loss": ("align.loss", "align.beta", "align.loss_weights", "align.label_smoothing")
    + ("align.centering",),
    "learning rate": ("optim.learning_rate", "optim.schedule", "optim.warmup", "optim.final")
    + ("optim.power", "optim.decay"),
    "optimizer": ("optim.name", "optim.b1", "optim.b2", "optim.eps"),
    "weight decay": ("optim.weight_decay",),
    "clipping": ("optim.clip",),
}
ADAPTER = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules")


@dataclass(frozen=True)
class Cause:
    """Something that differs between the runs."""

    name: str
    about: str
    flags: dict[str, Any] = field(default_factory=dict)
    """our keys with the values that make the runs equal, if keys can"""
    then: str = "no effect within the tolerance"
    """what trying it showed"""


@dataclass(frozen=True)
class State:
    """A pair of runs to compare."""

    cfg: TrainConfig
    theirs: dict[str, Any]
    """what `theirs.run` recorded"""
    updates: list[list[Example]] | None = None
    """the examples of our steps; None: of the records of the user's steps"""
    adapter: str | None = None
    """folder of the adapter that our run starts from"""


Trial = tuple[Cause, State]
Again = Callable[[Sequence[str]], dict[str, Any]]  # the user's run with switches


# ---- agreement


def agree(theirs: float, ours: float) -> bool:
    """False also for numbers that are not finite."""
    return abs(theirs - ours) <= TOLERANCE * max(1.0, abs(theirs))


def first_difference(theirs: dict[str, Any], ours: Sequence[Step]) -> int | None:
    """The first step, from 0, whose losses do not agree; None if all do."""
    pairs = enumerate(zip(theirs["steps"], ours, strict=True))
    return next((i for i, (a, b) in pairs if not agree(a["loss"], b.loss)), None)


def largest(theirs: dict[str, Any], ours: Sequence[Step]) -> float:
    """The largest difference of the losses of a step."""
    return max(abs(a["loss"] - b.loss) for a, b in zip(theirs["steps"], ours, strict=True))


# ---- rows


def their_rows(theirs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rows of each step."""
    return [[row for micro in step["micro"] for row in micro] for step in theirs["steps"]]


def as_example(row: dict[str, Any], scale: float = 1.0) -> Example:
    texts = tuple(
        (np.array(tokens, np.int32), scale * np.array(learned, np.float32))
        for tokens, learned in row["texts"]
    )
    return Example(texts, row.get("margin", 0.0))


def micro_size(theirs: dict[str, Any]) -> int:
    return max(len(micro) for step in theirs["steps"] for micro in step["micro"])


def updates_of(state: State) -> list[list[Example]]:
    """The examples of our steps: those of the records of the user's steps, or as many as a step of
    ours has, in the same order."""
    if state.updates is not None:
        return state.updates
    found, per_row = our_examples(state.cfg)
    rows = their_rows(state.theirs)
    if batch_difference(state.cfg, state.theirs) is None:
        return [[e for row in step for e in found.get(row["record"], [])] for step in rows]
    order = [example for record in sorted(found) for example in found[record]]
    size = max(round(state.cfg.batch_size * per_row), 1)
    starts = range(0, size * len(rows), size)
    return [[order[i % len(order)] for i in range(start, start + size)] for start in starts]


def batch_difference(cfg: TrainConfig, theirs: dict[str, Any]) -> dict[str, Any] | None:
    """Our keys that give a step as many examples as the user's has; None if it has."""
    args = theirs["arguments"]
    size = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"]
    keys = {"batch_size": size, "data.packing": bool(args.get("packing"))}
    return _differing(cfg, keys) or None


def _differing(cfg: TrainConfig, keys: dict[str, Any]) -> dict[str, Any]:
    def same(key: str, value: Any) -> bool:
        ours = value_of(cfg, key)
        if isinstance(ours, list | tuple):
            return list(ours) == list(value)
        return ours == value or isinstance(ours, float) and bool(np.isclose(ours, value))

    return {key: value for key, value in keys.items() if not same(key, value)}


def with_keys(cfg: TrainConfig, keys: dict[str, Any]) -> TrainConfig:
    """The config with other values of dotted keys."""
    values = to_dict(cfg)
    for key, value in keys.items():
        *section, name = key.split(".")
        (values[section[0]] if section else values)[name] = value
    if "batch_size" in keys:
        values |= {"micro_batch_size": 0, "accumulation": 0}
    return from_dict(values)


def _text_difference(tokenizer: Any, theirs: Any, ours: Any) -> tuple[str, str] | None:
    """(cause, sentence) of the difference of a text of the user's [tokens, learned] and of ours
    [tokens, weights]; None if there is none."""
    (tokens, learned), (own, weights) = theirs, ours
    own = own.tolist()
    if tokens != own:
        both = zip(tokens, own, strict=False)
        at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(tokens), len(own)))

        def part(ids: list[int]) -> str:
            return repr(tokenizer.decode(ids[at : at + 8])) if ids[at:] else "its end"

        same_text = tokenizer.decode(tokens) == tokenizer.decode(own)
        kind = "tokenization" if same_text else "template"
        return kind, f"at token {at} your run has {part(tokens)} and ours {part(own)}"
    marks, ours_learned = np.array(learned[1:], bool), np.asarray(weights)[1:] > 0
    if (marks == ours_learned).all():
        return None
    at = int(np.flatnonzero(marks != ours_learned)[0]) + 1
    who = "your run" if marks[at - 1] else "ours"
    return "mask", (
        f"your run learns {marks.sum()} of its {len(tokens)} tokens and ours "
        f"{ours_learned.sum()}; the first that only {who} learns is "
        f"{tokenizer.decode(tokens[at : at + 1])!r} (token {at})"
    )


def row_differences(state: State, tokenizer: Any) -> dict[str, tuple[int, str]]:
    """{cause: (number of rows, a sentence on the first)} of the user's rows and ours."""
    found, _ = our_examples(state.cfg)
    differences: dict[str, tuple[int, str]] = {}
    for row in (row for step in their_rows(state.theirs) for row in step):
        ours = found.get(row["record"], [])
        difference: tuple[str, str] | None
        if len(ours) != 1:
            difference = (
                ("dropped" if not ours else "turns"),
                (f"a row of your run, {len(ours)} examples of ours"),
            )
        else:
            pairs = zip(row["texts"], ours[0].texts, strict=True)
            each = (_text_difference(tokenizer, a, b) for a, b in pairs)
            difference = next((one for one in each if one), None)
        if difference:
            kind, text = difference
            count, first = differences.get(kind, (0, f"record {row['record'] + 1}: {text}"))
            differences[kind] = count + 1, first
    return differences


# ---- the stages, in causal order: each looks at a state and may change it


def settings(stage: str, state: State) -> Trial | None:
    """A stage of SETTINGS. The arguments of the user's run, with TRL's defaults, in our terms."""
    args = {name: value for name, value in state.theirs["arguments"].items() if value is not None}
    given = [Given(name, value, "your run") for name, value in args.items()]
    ours = aliases.translate(given, state.cfg.objective).given
    keys = {
        key: leaf.read(one.value)
        for key, one in ours.items()
        if key in SETTINGS[stage] and (leaf := leaf_of(key))
    }
    differing = _differing(state.cfg, keys)
    if not differing:
        return None
    about = "; ".join(
        f"{key} is {_shown(value)} in your run and {_shown(value_of(state.cfg, key))} in ours"
        for key, value in differing.items()
    )
    return Cause(stage, about, differing), replace(state, cfg=with_keys(state.cfg, differing))


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def batch(state: State) -> Trial | None:
    keys = batch_difference(state.cfg, state.theirs)
    if keys is None:
        return None
    theirs = float(np.mean([len(step) for step in their_rows(state.theirs)]))
    ours = float(np.mean([len(update) for update in updates_of(state)]))
    about = f"a step has {theirs:g} examples in your run and {ours:g} in ours"
    if "data.packing" in keys and state.cfg.data.packing:
        about += ", which packs several into a row (data.packing)"
    return Cause("batch", about, keys), replace(state, cfg=with_keys(state.cfg, keys))


def rows(state: State, tokenizer: Any) -> Iterator[Trial]:
    """The rows of the records: first a key that makes ours equal, else the user's rows."""
    differences = row_differences(state, tokenizer)
    if not differences:
        return
    total = sum(map(len, their_rows(state.theirs)))
    name = " and ".join(differences)
    about = "; ".join(
        f"{count:,} of {total:,} rows differ, {first}"
        if kind != name
        else f"{count:,} of {total:,} rows; {first}"
        for kind, (count, first) in differences.items()
    )
    for keys in _row_keys(state, tokenizer, differences):
        other = replace(state, cfg=with_keys(state.cfg, keys))
        if not row_differences(other, tokenizer):
            if keys.pop("data.template", None):
                about += "; your run renders with another chat template: set data.template to a "
                about += "file that has its trainer.processing_class.chat_template"
            yield Cause(name, about, keys), other
            return
    about += "; no key changes that: ours got the rows of your run"
    updates = [[as_example(row) for row in step] for step in their_rows(state.theirs)]
    yield Cause(name, about), replace(state, updates=updates)


def _row_keys(state: State, tokenizer: Any, kinds: Any) -> Iterator[dict[str, Any]]:
    template = state.theirs["template"]
    folder = Path(str(state.cfg.model.path))
    if "template" in kinds and template and template != tokenizer.chat_template:
        file = folder.with_name("template.jinja")
        file.write_text(template, encoding="utf-8")
        yield {"data.template": str(file)}
    if "data.train_on_prompt" in state.cfg.verb.reads:
        yield {"data.train_on_prompt": not state.cfg.data.train_on_prompt}
        yield {"data.learn": "last"}


def adapter(state: State) -> Trial | None:
    """LoRA's shape; the user's adapter has the same start in both runs."""
    made = state.theirs["adapter"]
    if made is None or state.adapter is not None:
        return None
    folder = str(Path(str(state.cfg.model.path)).with_name("adapter"))
    same = {name: made.get(name) for name in ADAPTER if made.get(name) is not None}
    keys = {f"peft.{name}": value for name, value in same.items()}
    cfg, linear = state.cfg, state.theirs["linear"]
    targets = linear if cfg.peft.target_modules == ("all-linear",) else cfg.peft.target_modules
    cfg = with_keys(cfg, {"peft.target_modules": sorted(targets)})
    differing = _differing(cfg, keys)
    other = replace(state, adapter=folder)
    if not differing:
        return Cause("", ""), other
    about = "; ".join(
        f"{key} is {_shown(value)} in your run and {_shown(value_of(state.cfg, key))} in ours"
        for key, value in differing.items()
    )
    return Cause("LoRA", about, differing), other


def padding(state: State, tokenizer: Any, again: Again) -> Trial | None:
    """torch gives the input embedding of the pad token no gradient, also where it is no padding."""
    pad = state.theirs["padding"]
    rows = (row for step in their_rows(state.theirs) for row in step)
    if pad is None or not any(pad in tokens for row in rows for tokens, _ in row["texts"]):
        return None
    about = f"your run never trains the input embedding of {tokenizer.decode([pad])!r}, which is "
    about += "in its texts: it is the model's pad_token_id, and torch leaves that out. Your run "
    about += "was tried with it"
    return Cause("pad token", about), replace(state, theirs=again(["pad token"]))


def decay_groups(state: State, again: Again) -> Trial | None:
    """Which weights are decayed: here matrices, no norms and no biases."""
    decayed, dims = state.theirs["decayed"], state.theirs["dims"]
    other = [n for n, on in decayed.items() if on != (dims[n] > 1 and "bias" not in n)]
    if not other or not state.theirs["arguments"]["weight_decay"]:
        return None
    what = "decays" if decayed[other[0]] else "does not decay"
    about = f"your run {what} {other[0]}"
    about += f" and {len(other) - 1} others" if other[1:] else ""
    about += "; jaxllm decays matrices alone. Your run was tried with that"
    return Cause("decay groups", about), replace(state, theirs=again(["decay matrices"]))


def dropout(state: State, again: Again) -> Trial | None:
    theirs, ours = state.theirs["dropout"], our_dropout(state.cfg)
    if theirs == ours:
        return None
    shown = [", ".join(f"{k} {v:g}" for k, v in one.items()) or "none" for one in (theirs, ours)]
    keys: dict[str, Any] = {}
    if "lora_dropout" in {**theirs, **ours}:
        keys["peft.lora_dropout"] = theirs.get("lora_dropout", 0.0)
    about = f"your run has dropout ({shown[0]}) and ours ({shown[1]}); both were tried without"
    cfg = with_keys(state.cfg, {"peft.lora_dropout": 0.0})
    return Cause("dropout", about, keys), replace(state, cfg=cfg, theirs=again(["no dropout"]))


def our_dropout(cfg: TrainConfig) -> dict[str, float]:
    rate = cfg.peft.lora_dropout
    return {"lora_dropout": rate} if rate else {}


def reduction(state: State) -> Trial:
    """Each micro-batch's mean, and the mean of these."""

    def scaled(micro: list[dict[str, Any]]) -> list[Example]:
        learned = sum(sum(marks[1:]) for row in micro for _, marks in row["texts"])
        return [as_example(row, 1 / max(learned, 1)) for row in micro]

    steps = state.theirs["steps"]
    updates = [[e for micro in step["micro"] for e in scaled(micro)] for step in steps]
    about = "your run averages the means of its micro-batches; jaxllm divides the sum over all "
    about += "learned tokens of a step by their number"
    return Cause("gradient accumulation", about), replace(state, updates=updates)


# ---- the trials


def run_ours(state: State) -> list[Step]:
    cfg = state.cfg
    if cfg.peft.method != "none":
        rate = cfg.peft.lora_dropout
        rate = 0.0 if our_dropout(cfg) == state.theirs["dropout"] else rate
        cfg = replace(cfg, peft=replace(cfg.peft, lora_dropout=rate))
        if state.adapter:
            section = PeftSection("lora", state.adapter, lora_dropout=rate)
            cfg = replace(cfg, peft=section)
    return trained(cfg, updates_of(state), micro_size(state.theirs))


def start(state: State) -> State:
    """The state with the user's adapter, if ours has the same shape."""
    trial = adapter(state)
    return trial[1] if trial and not trial[0].name else state


def trials(state: State, tokenizer: Any, again: Again) -> Iterator[Trial]:
    """Each difference of the state, and of what the ones before it left."""
    stages: list[Callable[[State], Iterator[Trial] | Trial | None]] = [
        lambda s: settings("length", s),
        batch,
        lambda s: rows(s, tokenizer),
        lambda s: padding(s, tokenizer, again),
        adapter,
        *(lambda s, n=name: settings(n, s) for name in SETTINGS if name != "length"),
        lambda s: decay_groups(s, again),
        lambda s: dropout(s, again),
    ]
    for stage in stages:
        found = stage(state)
        for cause, state in [found] if isinstance(found, tuple) else found or ():
            yield cause, state


def explain(
    state: State, ours: list[Step], tokenizer: Any, again: Again
) -> tuple[list[Cause], list[Step], State]:
    """(the causes, the steps of our run after the last of them that was tried, its state).

    After the runs agree, the differences that are left are listed without a trial.
    """
    causes: list[Cause] = []
    done = first_difference(state.theirs, ours) is None

    def rerun(switches: Sequence[str]) -> dict[str, Any]:
        return state.theirs if done else again(switches)

    for cause, after in trials(state, tokenizer, rerun):
        if not done:
            state, ours = after, run_ours(after)
            cause = replace(cause, then=_then(state, ours))
            done = first_difference(state.theirs, ours) is None
        causes.append(cause)
    several = state.theirs["arguments"]["gradient_accumulation_steps"] > 1
    if (
        not done
        and several
        and state.cfg.verb.data == "chat"
        and first_difference(state.theirs, ours) == 0
    ):
        cause, after = reduction(state)
        steps = run_ours(after)
        if first_difference(after.theirs, steps) != 0:
            causes.append(replace(cause, then=_then(after, steps)))
            state, ours = after, steps
    return causes, ours, state


def _then(state: State, ours: list[Step]) -> str:
    at = first_difference(state.theirs, ours)
    if at is None:
        return f"then all losses agree (largest difference {largest(state.theirs, ours):.1e})"
    theirs = state.theirs["steps"][at]["loss"]
    return f"then the first difference is at step {at + 1}: {theirs:.5f} and {ours[at].loss:.5f}"
