# SPDX-License-Identifier: Apache-2.0
"""Loads tasks of lm-eval and evaluates a model on them.

A task of lm-eval's own may run the Python of its package. Nothing else runs: a YAML file of the
user's is data, and so are datasets, templates and the metrics that `evaluate` would download.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any, NoReturn

import evaluate as hub_metrics
import lm_eval
import lm_eval.evaluator
import lm_eval.utils
import numpy as np
import yaml
from flax import nnx
from jax.sharding import Mesh
from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from jaxllm.chat import TextModel
from jaxllm.config import MeshSection
from jaxllm.errors import UserError, nearest
from jaxllm.mesh import make_mesh
from jaxllm.paths import first_line
from jaxllm.peft.combine import choose
from jaxllm.step import alone
from jaxllm.tasks.harness import Model
from jaxllm.untrusted import read_text

SEEDS = 0, 1234  # of Python's and of NumPy's random numbers, and of the examples: lm-eval's
DRAWS = 1000  # of a bootstrap for a metric whose standard error has no formula


# ---- what a task may run


def _refused(*args: Any, **_: Any) -> NoReturn:
    name = args[0] if args else "metric"
    raise UserError(f"the metric {name} of the package evaluate is code to download; it is not run")


@contextmanager
def restricted() -> Iterator[None]:
    """lm-eval with sandboxed templates, without downloaded metrics, processes of its own and
    warnings; the random numbers of the process continue afterwards as if nothing had happened."""
    logger, disabled = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, env, load = logger.level, lm_eval.utils.env, hub_metrics.load
    states, variable = (random.getstate(), np.random.get_state()), os.environ.get(disabled)
    sandbox = SandboxedEnvironment(undefined=env.undefined, keep_trailing_newline=True)
    sandbox.filters |= env.filters
    try:
        lm_eval.utils.env, hub_metrics.load = sandbox, _refused
        logger.setLevel(logging.CRITICAL)
        os.environ[disabled] = "1"  # its pool forks a process that has threads
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])
        yield
    except TemplateError as error:
        raise UserError(f"a template of the task fails: {first_line(error)}") from error
    finally:
        lm_eval.utils.env, hub_metrics.load = env, load
        logger.setLevel(level)
        os.environ.pop(disabled)
        os.environ |= {} if variable is None else {disabled: variable}
        random.setstate(states[0])
        np.random.set_state(states[1])


def check_files(folder: Path) -> None:
    """Raises UserError if a YAML file in a directory of tasks names Python code, says whether code
    that models write is run, or includes a file that is neither in the directory nor lm-eval's."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory of task files")
    package, inside = Path(lm_eval.__file__).resolve().parent, folder.resolve()
    waiting, seen = sorted(folder.glob("**/*.yaml")), set[Path]()
    while waiting:
        file = waiting.pop(0)
        seen.add(file.resolve())
        found = _read(file)
        named = found.get("include", []) if isinstance(found, dict) else []
        for name in [named] if isinstance(named, str) else named:
            target = (file.resolve().parent / str(name)).resolve()
            if target.is_relative_to(package) or target in seen:
                continue
            if not target.is_relative_to(inside):
                raise UserError(f"{file}: include: {name} is outside {folder} and lm-eval")
            waiting.append(target)


def _read(file: Path) -> Any:
    """A YAML file of a task. Raises UserError for a tag that is not YAML's own."""

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as lm-eval

    class Loader(base):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            made = super().construct_mapping(node, deep)
            if "unsafe_code" in made:  # false would permit what a task of lm-eval's own says
                raise UserError(
                    f"{file}: unsafe_code is for tasks that run code that models write, which "
                    "jaxllm does not; remove it"
                )
            return made

    def refuse(*_: Any) -> NoReturn:
        raise UserError(
            f"{file}: !function runs Python code, which jaxllm does only for lm-eval's own tasks; "
            "remove it, or run the task with lm_eval"
        )

    Loader.add_constructor("!function", refuse)
    try:
        return yaml.load(read_text(file, "task file"), Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: not a YAML file of a task: {first_line(error)}") from error


# ---- tasks


class Tasks:
    """Tasks with their data. Raises UserError for those that are unknown, cannot be loaded, or run
    code that is not lm-eval's own.

    names: of tasks, groups and tags, or patterns of them. num_fewshot: examples before a question;
    None: as many as the task says. limit: documents of each task; None: all. chat: render the
    prompts with the chat template.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        chat: bool = False,
    ):
        self.limit, self.chat = limit, chat
        if include_path is not None:
            check_files(Path(include_path))
        with restricted():
            self.loaded: Any = self._load(names, include_path)
        for name, task in self.loaded["tasks"].items():
            self._check(name, task)
            shots = task.get_config("num_fewshot")
            if shots is None or (num_fewshot is not None and shots != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)

    def _load(self, names: Sequence[str], include_path: str | None) -> Any:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if not set(names) <= {*manager.all_subtasks}:
            manager = TaskManager(include_path=include_path)  # takes seconds
        found = {name: manager.match_tasks([name]) for name in names}
        for name in (name for name, matches in found.items() if not matches):
            near = nearest(name, manager.all_tasks)
            hint = f"did you mean {near}?" if near else "`lm-eval ls tasks` lists lm-eval's"
            raise UserError(f"there is no task {name}; {hint}")
        every = [one for matches in found.values() for one in matches]
        try:
            return manager.load([*dict.fromkeys(every)])
        except UserError:
            raise
        except Exception as error:  # of lm-eval, of the task's Python, of datasets or of the hub
            raise UserError(f"{' '.join(names)}: cannot be loaded: {first_line(error)}") from error

    def _check(self, name: str, task: Any) -> None:
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"the task {name} runs code that models write; jaxllm does not")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"the task {name} has images or sounds; models here read text")
        functions = getattr(task, "_metric_fn_list", {}).items()
        if task.get_config("process_results") is None:
            for metric in (metric for metric, function in functions if function is None):
                raise UserError(
                    f"the task {name} has the metric {metric}, which lm-eval does not have"
                )
        for metric in (metric for metric, function in task.aggregation().items() if not function):
            raise UserError(f"the task {name}: lm-eval has no such aggregation of {metric}")

    def names(self) -> dict[str, dict[str, float]]:
        """What `metrics` returns, as far as it is known before an evaluation. Its values: 1 if the
        task says that higher is better, 0 if lower is, NaN if it does not say; of a group their
        mean."""
        rows: dict[str, Any] = {}
        for name, task in self.loaded["tasks"].items():
            says = {True: 1.0, False: 0.0}
            signs = {m: says.get(task.higher_is_better().get(m), nan) for m in task.aggregation()}
            if filters := task._filters:
                rows[name] = {f"{m},{one.name}": v for m, v in signs.items() for one in filters}
        sized = {name: row | {"sample_len": 1} for name, row in rows.items()}
        with restricted():
            groups = {name: group.aggregate(sized) for name, group in self._groups().items()}
        return self._shown(rows | groups)

    def _groups(self) -> dict[str, Any]:
        """The groups that have metrics themselves."""
        found = self.loaded.get("groups", {}).items()
        return {name: group for name, group in found if group.has_aggregation}

    def _shown(self, rows: dict[str, Any]) -> dict[str, dict[str, float]]:
        """The metrics of lm-eval's results, without those of the members of such groups."""
        hidden = {
            one.task_name for group in self._groups().values() for one in group.get_all_tasks()
        }
        hidden |= {one.name for group in self._groups().values() for one in group.get_all_groups()}
        shown = {name: _numbers(row) for name, row in rows.items() if name not in hidden}
        return {name: numbers for name, numbers in shown.items() if numbers}

    def results(self, model: Model, trainable: Any, frozen: Any, *, draws: int = 0) -> Any:
        """lm-eval's results, with each document's answers. draws: of a bootstrap; 0: no standard
        errors at all."""
        model.weights = trainable, frozen
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEEDS[1])
        try:
            with restricted():
                return lm_eval.evaluator.evaluate(
                    lm=model,
                    task_dict=self.loaded,
                    limit=self.limit,
                    bootstrap_iters=draws,
                    apply_chat_template=self.chat,
                    fewshot_as_multiturn=self.chat,
                )
        finally:
            model.weights = None, None

    def metrics(self, model: Model, trainable: Any, frozen: Any) -> dict[str, dict[str, float]]:
        """{task or group: {metric: value}}; a metric after a filter is METRIC,FILTER. The members
        of a group that has metrics itself are left out."""
        return self._shown(self.results(model, trainable, frozen)["results"])


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task in lm-eval's results."""
    metrics = {k.removesuffix(",none"): v for k, v in row.items() if "," in k}
    kept = {k: v for k, v in metrics.items() if "_stderr" not in k and not isinstance(v, str)}
    return {name: float(value) for name, value in kept.items()}


# ---- jaxllm eval --tasks


def evaluate_tasks(
    path: str,
    names: Sequence[str],
    *,
    mesh: Mesh | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    template: str | None = None,
    adapter: dict[str, str] | None = None,
    use: Any = ...,
    **options: Any,
) -> dict[str, Any]:
    """lm-eval's results of the model at `path`: {results, groups, versions, samples, …}.

    mesh: default: all devices, as fsdp. max_length: context length; default: all positions of the
    model. options: of `Tasks`; the others: of `evaluate_files`.
    """
    tasks = Tasks(names, **options)  # mistakes show before the model is loaded
    mesh = make_mesh(MeshSection()) if mesh is None else mesh
    given: dict[str, Any] = {"mesh": mesh, "compute_dtype": dtype, "adapter": adapter}
    text = TextModel.load(path, template, **given)
    if use is not ...:
        choose(text.model, use)
    graph, weights = nnx.split(text.model)
    model = harness(alone(graph), text, mesh, batch_size, max_length=max_length)
    found = tasks.results(model, nnx.to_pure_dict(weights), {}, draws=DRAWS)
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better")
    kept += ("n-samples", "samples")
    return {key: found[key] for key in kept if key in found}


def harness(
    models: Any,
    text: TextModel,
    mesh: Mesh,
    batch_size: int,
    *,
    max_length: int | None = None,
    window: int | None = None,
) -> Model:
    """The model of `models(trainable, frozen)`, which has the shape and the tokenizer of `text`.

    max_length, window: as of `Model`; default: as many tokens as the model has positions.
    """
    room = text.model.cfg.max_positions - text.model.peft.length
    longest = min(max_length or room, room)
    sizes = {"max_length": longest, "window": min(window or longest, longest)}
    return Model(models, text.tokenizer, text.stop_ids, mesh=mesh, batch_size=batch_size, **sizes)


def table(found: dict[str, Any]) -> str:
    """lm-eval's tables of the tasks and of the groups."""
    tables = [make_table(found)]
    tables += [make_table(found, "groups")] if found.get("groups") else []
    return "\n".join(tables).rstrip()
