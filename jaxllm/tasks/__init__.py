# SPDX-License-Identifier: Apache-2.0
"""The tasks of EleutherAI's lm-eval: `jaxllm eval --tasks`, and eval.tasks of a run.

harness.py   our model as lm-eval asks it: log-likelihoods and generation over a mesh
loading.py   loads tasks without running code that they name, and evaluates them
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxllm.config import ClusterSection
from jaxllm.config.fields import home, names
from jaxllm.errors import UserError

# Flags that need --tasks.
OURS = ("num_fewshot", "limit", "apply_chat_template", "include_path", "output")


def check_installed(asked: str) -> None:
    """Raises UserError without the extra `eval`. asked: the flag or key that needs it."""
    if find_spec("lm_eval") is None:
        raise UserError(f"{asked} needs lm_eval: pip install 'jaxllm[eval]'")


def flags(parser: Any, integer: Callable[[int], Any]) -> None:
    """Adds the flags of tasks to those of `jaxllm eval`."""
    flag = parser.flag
    about = "tasks, groups or tags of lm-eval, such as hellaswag mmlu 'arc_*'"
    flag("--tasks", about, nargs="+", default=[], metavar="TASK")
    about = "--tasks: number of few-shot examples; default: the task's"
    flag("--num_fewshot", about, type=integer(0), metavar="N")
    about = "--tasks: evaluate only the first N documents of each task"
    flag("--limit", about, type=integer(1), metavar="N")
    about = "--tasks: render prompts with the chat template, few-shot examples as earlier turns"
    flag("--apply_chat_template", about, action="store_true")
    about = "--tasks: directory with YAML files of your own tasks"
    flag("--include_path", about, type=home, metavar="DIR")
    about = "--tasks: write the results and each document's answers to a JSON file"
    flag("--output", about, type=home, metavar="FILE")


def check(options: Any) -> None:
    """Raises UserError unless the flags ask for either tasks or data."""
    if bool(options.tasks) == bool(options.data):
        raise UserError("jaxllm eval needs --data FILE ..., or --tasks TASK ... of lm-eval")
    if options.tasks and options.chat:
        raise UserError("--chat is for --data; with --tasks use --apply_chat_template")
    for name in () if options.tasks else OURS:
        if getattr(options, name):
            raise UserError(f"--{name} requires --tasks")


def command(options: Any, adapter: dict[str, str], use: Sequence[Any]) -> None:
    """Evaluates the model of the options on their tasks, and prints and writes the results."""
    check_installed("jaxllm eval --tasks")
    from jaxllm import dist
    from jaxllm.compilation import use_cache
    from jaxllm.files import strict, strict_json
    from jaxllm.tasks.loading import evaluate_tasks, table

    if options.output:  # before an evaluation that may take hours
        output = Path(options.output).absolute()
        if output.is_dir():
            raise UserError(f"--output: {output} is a directory; name a file")
        if not output.parent.is_dir():
            raise UserError(f"--output: no such directory: {Path(options.output).parent}")
    dist.start(ClusterSection())
    use_cache()
    found = evaluate_tasks(
        options.model,
        names(options.tasks),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        chat=options.apply_chat_template,
        include_path=options.include_path,
        max_length=options.max_length,
        batch_size=options.batch_size,
        use=use[0] if use else ...,
        dtype=options.dtype,
        template=options.template,
        adapter=adapter,
    )
    if not dist.is_main():
        return
    samples = found.pop("samples")
    print(strict_json(found) if options.json else table(found))
    if options.output:
        text = json.dumps(strict(found | {"samples": samples}), indent=2, ensure_ascii=False)
        Path(options.output).write_text(text + "\n", encoding="utf-8")
