# SPDX-License-Identifier: Apache-2.0
"""The command line: one function per command, exit statuses, and one-line errors."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from jaxllm import __version__, config
from jaxllm.arguments import Parser, adapters, integer, model_options, run_config, uses
from jaxllm.compilation import use_cache
from jaxllm.config import TrainConfig, checks, describe, load_config
from jaxllm.config.fields import home
from jaxllm.data.inputs import check_inputs, check_options
from jaxllm.errors import DONE, INTERRUPTED, MISTAKE, STOPPED, UserError, mistake, nearest
from jaxllm.libraries import hide_torch, log_once

# Metrics of an evaluation to print; with a perplexity, only the loss and the perplexity.
SHOWN = dict.fromkeys(("loss", "accuracy", "margin", "reward_mean"), ".4f") | {"perplexity": ".2f"}


# ---- training commands


def training(verb: str, args: list[str]) -> int:
    """A training run from a YAML file and flags."""
    if {"-h", "--help"} & set(args):
        print(describe.training_help(verb))
        return DONE
    if "--schema" in args:
        print(json.dumps(describe.json_schema(), indent=2))
        return DONE
    explain = "--explain" in args
    args = [arg for arg in args if arg != "--explain"]
    path = args.pop(0) if args and not args[0].startswith("-") else None
    cfg, origins = load_config(verb, path, args)
    if explain:
        print(describe.explanation(cfg, origins))
        return DONE
    checks.check_run(cfg)  # before the import below, which takes seconds
    check_inputs(cfg)
    from jaxllm.training import train

    return _say_end(cfg, train(cfg, origins=origins))


def _say_end(cfg: TrainConfig, result: Any) -> int:
    """Print how a run ended; returns the exit status."""
    from jaxllm import dist

    if not dist.is_main():
        return STOPPED if result.stopped else DONE
    for name, values in result.evals.items():
        shown = dict.fromkeys(values, ".4f") if "loss" not in values else SHOWN  # a task, a set
        shown = ("loss", "perplexity") if {"loss", "perplexity"} <= {*values} else shown
        texts = [f"{key} {values[key]:{SHOWN.get(key, '.4f')}}" for key in shown if key in values]
        when = "" if result.evaluated == result.step else f" at step {result.evaluated}"
        print(f"{name}{when}: {'  '.join(texts)}")
    best, metric = result.best, cfg.eval.metric
    if best.step not in (None, result.step):
        exported = " (exported to final/)" if cfg.save.load_best and result.final else ""
        loss = "" if metric.endswith("loss") or best.loss is None else f", loss {best.loss:.4f}"
        print(f"best: step {best.step}, {metric} {best.value:.4f}{loss}{exported}")
    if result.early:
        more = f" by more than {cfg.eval.min_delta:g}" if cfg.eval.min_delta else ""
        waited = f"{best.waited} evaluations (eval.patience)"
        print(f"stopped early: {metric} has not improved{more} in {waited}")
    if result.stopped:
        print(f"stopped at step {result.step}; run the same command to resume", file=sys.stderr)
        return STOPPED
    print(f"done: {result.step} steps" + (f", model in {result.final}" if result.final else ""))
    return DONE


# ---- other commands


class _Parser(Parser):
    """The parser of a command's arguments, with the about of VERBS."""

    def __init__(self, verb: str):
        super().__init__(verb, VERBS[verb.split()[0]][1])


def _need_chat(options: argparse.Namespace, *names: str) -> None:
    """Raise UserError for a flag that is used only with --chat."""
    for name in names:
        if getattr(options, name) is not None and not options.chat:
            raise UserError(f"--{name} requires --chat")


def _sampling_options(parser: _Parser) -> None:
    flag = parser.flag
    flag("--system", "system message of the chat")
    flag("--max_new_tokens", "maximum length of an answer in tokens", type=integer(1), default=256)
    flag("--temperature", "sampling temperature; 0 = greedy", type=float, default=0.0)
    flag("--top_k", "sample from the k most likely tokens; 0 = all", type=integer(0), default=0)
    about = "sample from the most likely tokens whose probabilities sum to top_p"
    flag("--top_p", about, type=float, default=1.0)
    about = "exclude tokens less likely than min_p times the most likely one"
    flag("--min_p", about, type=float, default=0.0)
    flag("--stop", "stop string; repeatable", action="append", default=[], metavar="TEXT")
    flag("--seed", "seed of the sampling", type=integer(0, 2**63 - 1), default=0)


def _decoding(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that generate_text and chat_loop have in common."""
    from jaxllm.sampling import Sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    sampling.check()
    shared = {name: getattr(options, name) for name in ("system", "template", "stop", "dtype")}
    return shared | {"sampling": sampling, "adapter": adapters(options)}


def tokenizer(verb: str, args: list[str]) -> None:
    if args[:1] not in (["train"], ["-h"], ["--help"]):
        seen = repr(args[0]) if args else "nothing"
        raise UserError(f"jaxllm tokenizer: seen {seen}; the only command is `tokenizer train`")
    args = args[args[0] == "train" :]
    parser = _Parser("tokenizer train")
    about = "text files, or JSON, JSONL, Parquet or Arrow files with texts or conversations"
    parser.flag("files", about, nargs="+", metavar="FILE")
    parser.flag("--out", "output directory", required=True, type=home, metavar="DIR")
    parser.flag("--vocab_size", "size of the vocabulary", type=integer(1), default=32_000)
    options = parser.read(args)
    from jaxllm.data.tokenizer_training import train_tokenizer

    made = train_tokenizer(options.files, options.out, vocab_size=options.vocab_size)
    if len(made) < options.vocab_size:
        fewer = f"{len(made):,} tokens, not {options.vocab_size:,}"
        print(f"{fewer}: the text has no more pairs to merge", file=sys.stderr)
    print(options.out)


def evaluate(verb: str, args: list[str]) -> None:
    from jaxllm import tasks

    parser = _Parser(verb)
    model_options(parser)
    flag = parser.flag
    about = "files or datasets, or {path, split, columns} as in data.eval"
    flag("--data", about, nargs="+", default=[], metavar="FILE")
    flag("--chat", "evaluate chats, on the assistant's tokens only", action="store_true")
    about = "context length in tokens; default: 1024, with --tasks that of the model"
    flag("--max_length", about, type=integer(2))
    flag("--batch_size", "rows per batch; smaller values save memory", type=integer(1), default=8)
    flag("--json", "print one JSON object", action="store_true")
    tasks.flags(parser, integer)
    options = parser.read(args)
    tasks.check(options)
    asked = [options.use] if options.use else []
    if options.tasks:
        tasks.command(options, adapters(options), uses(asked))
        return
    _need_chat(options, "template")
    data = config.read_sources(options.data, "--data")
    check_options({"files": [source.path for source in data]})
    from jaxllm import dist
    from jaxllm.evaluate import evaluate_files
    from jaxllm.files import strict_json

    dist.start(config.ClusterSection())
    use_cache()
    found = evaluate_files(
        options.model,
        data,
        objective="sft" if options.chat else "pretrain",
        max_length=options.max_length or 1024,
        batch_size=options.batch_size,
        dtype=options.dtype,
        template=options.template,
        adapter=adapters(options),
        use=uses(asked)[0] if asked else ...,
    )
    lines = [f"{k:<12} {v:>14{',' if isinstance(v, int) else '.4f'}}" for k, v in found.items()]
    if dist.is_main():
        print(strict_json(found) if options.json else "\n".join(lines))


def generate(verb: str, args: list[str]) -> None:
    parser = _Parser(verb)
    model_options(parser, action="append", default=[])
    flag = parser.flag
    about = "text to complete; repeatable; default: the lines of standard input"
    flag("--prompt", about, action="append", metavar="TEXT")
    flag("--chat", "treat each prompt as a user message", action="store_true")
    _sampling_options(parser)
    about = "sample N answers per prompt and keep the best"
    flag("--best_of", about, type=integer(1), default=1, metavar="N")
    flag("--reward", "reward model that scores the answers of --best_of", type=home, metavar="DIR")
    flag("--json", 'print one {"prompt", "text", "score"} per line', action="store_true")
    options = parser.read(args)
    _need_chat(options, "system", "template")
    if (options.best_of > 1) != (options.reward is not None):
        raise UserError("--best_of N requires --reward DIR, and the other way round")
    if options.reward and not (options.chat and options.temperature > 0):
        raise UserError("--best_of requires --chat and --temperature > 0, so that answers differ")
    prompts = options.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT, or lines on standard input")
    from jaxllm.chat import generate_text

    use_cache()
    use = uses(options.use)
    answers = generate_text(
        options.model,
        [prompt for prompt in prompts for _ in range(options.best_of)],
        chat=options.chat,
        use=use if len(use) == 1 else [one for one in use for _ in range(options.best_of)],
        **_decoding(options),
    )
    best = [{"prompt": q, "text": a} for q, a in zip(prompts, answers, strict=False)]
    if options.reward:
        from jaxllm.rl.rewards import best_of

        best = best_of(options.reward, prompts, answers, system=options.system, dtype=options.dtype)
    for one in best:
        print(json.dumps(one, ensure_ascii=False) if options.json else one["text"])


def chat(verb: str, args: list[str]) -> None:
    parser = _Parser(verb)
    model_options(parser)
    _sampling_options(parser)
    options = parser.read(args)
    from jaxllm.chat import chat_loop

    use_cache()
    use = uses([options.use] if options.use else [])
    chat_loop(options.model, use=use, **_decoding(options))


def serve(verb: str, args: list[str]) -> None:
    from jaxllm.serve import command, flags

    parser = _Parser(verb)
    model_options(parser)
    flags(parser, integer)
    if args and not args[0].startswith("-"):
        args = ["--model", *args]
    options = parser.read(args)
    command(options, adapters(options), uses([options.use] if options.use else []))


def export(verb: str, args: list[str]) -> None:
    parser = _Parser(verb)
    flag = parser.flag
    flag("run", "run folder, checkpoint, model or adapter", type=home, metavar="RUN")
    flag("out", "output directory", type=home, metavar="OUT")
    about = "checkpoint to export: a step, or best (evaluation); default: best with "
    about += "save.load_best, else the latest valid one"
    flag("--step", about, type=lambda text: text if text == "best" else integer(0)(text))
    about = "dtype of the weights; default: as trained"
    flag("--dtype", about, choices=("float32", "bfloat16"))
    about = "merge a LoRA adapter into its base model"
    flag("--merge", about, action="store_true")
    about = "load the result in transformers or peft, and in vLLM if installed, and compare it "
    about += "with jaxllm; needs the extra `parity`"
    flag("--check", about, action="store_true")
    options = parser.read(args)
    if options.check:  # vLLM may need the accelerator's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from jaxllm.exports import export as write

    use_cache()
    print(write(**vars(options)))


def rows(verb: str, args: list[str]) -> None:
    parser = _Parser(verb)
    parser.flag("run", "run folder", type=home, metavar="RUN")
    parser.flag("--step", "the step, from 1", type=integer(1), required=True, metavar="N")
    parser.flag("--json", "print one JSON object", action="store_true")
    options = parser.read(args)
    from jaxllm.rows import describe, rows_of_step

    found = rows_of_step(options.run, options.step)
    print(json.dumps(found) if options.json else describe(found, colour=sys.stdout.isatty()))


def verify(verb: str, args: list[str]) -> None:
    parser = _Parser(verb)
    parser.flag("run", "run folder", type=home, metavar="RUN")
    options = parser.read(args)
    from jaxllm.rows import verify as check_rows

    print(check_rows(options.run))


def report(verb: str, args: list[str]) -> None:
    parser = _Parser(verb)
    parser.flag("runs", "run folders; several share one set of charts", nargs="+", metavar="RUN")
    about = "path of the report; default: report.html in the run folder, or here for several runs"
    parser.flag("--out", about, type=home, metavar="FILE")
    about = "also write a picture of the headline and the curves; needs Chromium or Chrome"
    parser.flag("--png", about, type=home, metavar="FILE")
    parser.flag("--open", "open the report in the browser", action="store_true")
    options = parser.read(args)
    from jaxllm.report.page import publish

    for path in publish(options.runs, options.out, options.png, show=options.open):
        print(path)


def comparison(verb: str, args: list[str]) -> int:
    from jaxllm.compare import compare

    return compare(args)


def launch(verb: str, args: list[str]) -> None:
    from jaxllm.launch import PLACES, USAGE, Launch
    from jaxllm.launch import launch as start

    parser = _Parser(verb)
    parser.usage = USAGE
    flag = parser.flag
    flag("--on", "where to run", required=True, choices=PLACES)
    flag("--nodes", "processes of the run, one per node; default: 1", type=integer(1), metavar="N")
    flag("--name", "name of the job or the TPU VM; default: that of the config file")
    about = "options of sbatch, kubectl or gcloud: --options='--partition=gpu --time=8:00:00'"
    flag("--options", about, default="", metavar="TEXT")
    flag("--dry-run", "print what would be submitted", action="store_true")
    flag("--image", "gke: container image with jaxllm")
    about = "gke: accelerators of a node, nvidia.com/gpu=8 or google.com/tpu=4"
    flag("--resource", about, metavar="NAME=COUNT")
    about = "gke: label of the nodes to use; repeatable"
    flag("--select", about, action="append", default=[], metavar="KEY=VALUE")
    flag("--volume", "gke: persistent volume claim to mount", metavar="CLAIM:/PATH")
    flag("--slices", "gke: TPU slices of the run", type=integer(1), default=1, metavar="N")
    options, words = parser.parse_known_args(args)
    options.select = tuple(options.select)
    start(words, Launch(**vars(options)))


def tokenize(verb: str, args: list[str]) -> None:
    if {"-h", "--help"} & set(args):
        print(describe.TOKENIZE_HELP)
        return
    cfg = run_config(args)
    checks.check(cfg)  # before the imports below, which take seconds
    check_inputs(cfg)
    from jaxllm import dist
    from jaxllm.data.dataset import summarize
    from jaxllm.pretokenize import tokenize

    manifest = tokenize(cfg)
    if dist.is_main():
        print(*summarize(manifest), sep="\n")


def planning(verb: str, args: list[str]) -> None:
    parser = _Parser(verb)
    parser.usage = (
        "jaxllm plan [CONFIG.yaml] [--objective VERB] --topology CHIP:SIZE [--key value ...]\n\n"
        "Compiles the training step for devices that need not be attached. No data or weights are\n"
        "read. All arguments except the following belong to the run (`jaxllm sft --help`). Plans\n"
        "for TPUs need the extra `plan`: pip install 'jaxllm[plan]'"
    )
    flag = parser.flag
    about = "chips to plan for: v5p:4x4x4, v6e:16x16, h100:8x4 (GPUs of a node x nodes), cpu:8, or "
    about += "local: the devices of this machine"
    flag("--topology", about, required=True, metavar="CHIP:SIZE")
    flag("--slices", "TPU slices of that size", type=integer(1), default=1, metavar="N")
    flag("--length", "tokens of a row; default: from data.max_length", type=integer(2))
    flag("--search", "try other settings, one key after another", action="store_true")
    flag("--output", "--search: the config with the best settings", default="plan.yaml", type=home)
    flag("--json", "print one JSON object", action="store_true")
    options, words = parser.parse_known_args(args)
    cfg = run_config(words)
    check_inputs(cfg, data=False)
    from jaxllm.plan_search import run

    print(run(cfg, options))


def proof_of_resume(verb: str, args: list[str]) -> int:
    parser = _Parser(verb)
    parser.usage = (
        "jaxllm verify-resume [COMMAND] [CONFIG.yaml] [--after STEP] [--key value ...]\n\n"
        "Trains a config twice in a temporary folder, once killed and resumed, and compares the\n"
        "results bit for bit (status 1 if they differ). All arguments except the following belong\n"
        "to the run. COMMAND (sft, dpo, ...) is needed if the config has no `objective`."
    )
    about = "kill the second run after the checkpoint of this step; both runs have twice as many"
    parser.flag("--after", about, type=integer(1, 10**6), default=3, metavar="STEP")
    stated = ["--objective", args.pop(0)] if args and args[0] in config.VERBS else []
    options, words = parser.parse_known_args([*args, *stated])
    cfg = run_config(words)
    checks.check(cfg)  # before the import below, which takes seconds
    check_inputs(cfg)
    from jaxllm.verify_resume import verify_resume

    return verify_resume(cfg, options.after)


def within(module: str) -> Callable[[str, list[str]], int | None]:
    """A command that is `run(parser, args)` of a module, which is imported by its use."""

    def run(verb: str, args: list[str]) -> int | None:
        return import_module(module).run(_Parser(verb), args)

    return run


# command -> (its function, which returns an exit status or None for DONE; help)
VERBS: dict[str, tuple[Callable[[str, list[str]], int | None], str]] = {
    **{name: (training, verb.about) for name, verb in config.VERBS.items()},
    "compare": (comparison, "train one config with several PEFT methods, and compare them"),
    "tokenize": (tokenize, "tokenize the data of a training run in advance"),
    "tokenizer": (tokenizer, "train a byte-level BPE tokenizer on text files (tokenizer train)"),
    "eval": (evaluate, "compute loss and perplexity, run lm-eval tasks, or compute rewards"),
    "generate": (generate, "complete texts or answer messages"),
    "chat": (chat, "chat with a model in the terminal"),
    "serve": (serve, "serve a model on an OpenAI-compatible HTTP API, with a chat page"),
    "export": (export, "export a checkpoint or an adapter as a HuggingFace directory"),
    "launch": (launch, "start a run of several processes: here, on Slurm, GKE or a TPU VM"),
    "parity": (within("jaxllm.parity.command"), "compare a run with TRL and with jaxllm"),
    "plan": (planning, "predict the memory, communication and step time of a run"),
    "preview": (within("jaxllm.preview.command"), "show rows of a run and problems in its data"),
    "report": (report, "write an HTML report of runs: curves, samples, data, config, machine"),
    "rows": (rows, "print the rows that a step was trained on, and their sources"),
    "verify": (verify, "check that a run was trained on the rows of its config and data"),
    "verify-resume": (proof_of_resume, "check that a killed run resumes bit for bit"),
    "doctor": (within("jaxllm.doctor.command"), "find problems of this machine and of a run"),
}


# ---- entry point

# The commands that use torch, or a library that may. Reward functions have a process of their own.
WITH_TORCH = ("eval", "export", "parity")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 done, 2 a user's mistake (one line), 75 stopped with a checkpoint saved, 130 interrupted by
    Ctrl-C. Any other exception is a bug and propagates.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help"):
            print(_usage())
            return DONE
        if args[0] in ("-V", "--version"):
            print(f"jaxllm {__version__}")
            return DONE
        verb = args.pop(0)
        if argv is None:  # the process is the command's own
            if verb not in WITH_TORCH:
                hide_torch()
            log_once()
        if verb not in VERBS:
            near = nearest(verb, VERBS)
            hint = f"did you mean {near}?" if near else f"known: {', '.join(VERBS)}"
            raise UserError(f"unknown command {verb}; {hint}")
        return VERBS[verb][0](verb, args) or DONE
    except BrokenPipeError:  # `jaxllm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:  # before the training loop, which handles Ctrl-C itself
        return INTERRUPTED
    except BaseException as error:  # a panic in Rust is no Exception
        line = mistake(error)
        if line is None:
            raise
        print(f"jaxllm: error: {line}", file=sys.stderr)
        return MISTAKE


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {about}" for verb, (_, about) in VERBS.items())
    return f"""\
usage: jaxllm COMMAND [...]

Train language models with JAX. Reads and writes HuggingFace model directories.

{verbs}

`jaxllm COMMAND --help` shows all options of a command."""
