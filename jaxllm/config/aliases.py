# SPDX-License-Identifier: Apache-2.0
"""Names of transformers, TRL and LLaMA-Factory, translated to our keys.

Every name is translated, refused, or reported as ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxllm.config.fields import Given
from jaxllm.config.names import IGNORED, REFUSED, RENAMED, harmless
from jaxllm.config.rules import NOTE, NULLS, STEPS, TRANSLATED
from jaxllm.errors import UserError

NAMES = frozenset(RENAMED) | set(TRANSLATED) | IGNORED | set(REFUSED)


@dataclass(frozen=True)
class Translation:
    """The names of one file or command line in our terms."""

    given: dict[str, Given] = field(default_factory=dict)
    """our keys"""
    ignored: list[str] = field(default_factory=list)
    """names without effect here, each with its origin"""
    notes: list[str] = field(default_factory=list)
    """lines for the user on values that have a slightly different meaning here"""
    errors: list[UserError] = field(default_factory=list)
    """refused names, invalid values, and names that set one key differently"""


def meanings() -> dict[str, str]:
    """{name of another library: what it sets}."""
    return RENAMED | {name: meaning for name, (_, meaning) in TRANSLATED.items()}


def spellings() -> dict[str, list[str]]:
    """{key or keys that are set: names of other libraries}, the inverse of `meanings`."""
    names: dict[str, list[str]] = {}
    for name, meaning in meanings().items():
        names.setdefault(meaning, []).append(name)
    return names


def is_given(one: Given) -> bool:
    """False for a name of another library whose value is null, unless null has a meaning there."""
    return one.value is not None or one.name in NULLS or one.name not in NAMES


def translate(
    layer: Sequence[Given], objective: str = "pretrain", names: Mapping[str, Given] | None = None
) -> Translation:
    """Translate the names of one file or command line of the command `objective`.

    names: those of the file and the command line together, which the rules read; default: `layer`.
    """
    found = Translation()
    flags = {one.name: one for one in layer}
    overwrite, resume = flags.get("overwrite_output_dir"), flags.get("resume_from_checkpoint")
    if overwrite and resume and overwrite.value and resume.value:
        deletes = "--overwrite_output_dir deletes what --resume_from_checkpoint resumes from"
        found.errors.append(UserError(f"{deletes}; keep one"))
    context = {**(flags if names is None else names)}
    context |= {"objective": Given("objective", objective, "the command")}
    context |= {"layer": Given("layer", flags.keys(), "")}
    skipped = {STEPS[name] for name in STEPS.keys() & flags if flags[name].value != "steps"}
    for name, one in flags.items():
        at = one.where if one.where.startswith("--") else f"{one.where}: {name}"
        refused = REFUSED.get(name, (None,))[0]
        if refused and one.value in harmless(name):
            continue
        values = {RENAMED.get(name, name): one.value}
        try:
            if refused:
                raise UserError(refused)
            if name in TRANSLATED:
                values = TRANSLATED[name][0](one.value, context)
        except UserError as error:
            found.errors.append(UserError(f"{at}: {error}"))
            continue
        if values is None or name in IGNORED or name in skipped:
            found.ignored.append(at)
            continue
        if note := values.pop(NOTE, None):
            found.notes.append(f"{at}: {note}")
        for key, value in values.items():
            before = found.given.get(key)
            found.given[key] = Given(key, value, one.where)
            if before and before.value != value:
                by = f"{before.value!r} by {before.where}, {value!r} by {one.where}"
                found.errors.append(UserError(f"{key} is given twice: {by}; keep one"))
    return found
