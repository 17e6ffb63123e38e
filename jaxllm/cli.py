# SPDX-License-Identifier: Apache-2.0
"""The command line: one function per verb, exit statuses, and one-line errors."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxllm import __version__, config
from jaxllm.compilation import use_cache
from jaxllm.config import TrainConfig, checks, describe, load_config
from jaxllm.config.annotations import home
from jaxllm.config.loading import parse
from jaxllm.errors import UserError

DONE, MISTAKE, STOPPED, INTERRUPTED = 0, 2, 75, 130  # exit statuses
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


# ---- the training verbs


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
    checks.check(cfg)  # before the import below, which takes seconds
    from jaxllm.training import train

    return _report(cfg, train(cfg))


def _report(cfg: TrainConfig, result: Any) -> int:
    """Print how a run ended; returns the exit status."""
    for name, values in result.evals.items():
        print(f"{name}: {_metrics_text(values)}")
    best, metric = result.best, cfg.eval.metric
    if best.step not in (None, result.step):
        exported = " (exported to final/)" if cfg.save.load_best and result.final else ""
        loss = "" if metric.endswith("loss") or best.loss is None else f", loss {best.loss:.4f}"
        print(f"best: step {best.step}, {metric} {best.value:.4f}{loss}{exported}")
    if result.early:
        more = f" by more than {cfg.eval.min_delta:g}" if cfg.eval.min_delta else ""
        print(
            f"stopped early: {metric} has not improved{more} in {best.waited} evaluations "
            "(eval.patience)"
        )
    if result.stopped:
        print(f"stopped at step {result.step}; run the same command to resume", file=sys.stderr)
        return STOPPED
    print(f"done: {result.step} steps" + (f", model in {result.final}" if result.final else ""))
    return DONE


# Metrics of an evaluation to print after its loss.
SHOWN = {"perplexity": ".2f", "accuracy": ".4f", "margin": ".4f", "reward_mean": ".4f"}


def _metrics_text(values: dict[str, float]) -> str:
    shown = {name: form for name, form in SHOWN.items() if name in values}
    if "perplexity" in shown:
        shown = {"perplexity": shown["perplexity"]}
    return "  ".join(f"{k} {values[k]:{form}}" for k, form in ({"loss": ".4f"} | shown).items())


# ---- the other verbs


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError."""

    def __init__(self, verb: str):
        super().__init__(
            prog=f"jaxllm {verb}",
            description=VERBS[verb.split()[0]][1] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (`{self.prog} --help` shows the flags)")

    def read(self, args: list[str]) -> argparse.Namespace:
        """Parse the arguments. Raises UserError for a list flag given twice."""
        flags = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
        for flag in (name for action in self._actions for name in action.option_strings):
            if flags.count(flag) > 1 and self._option_string_actions[flag].nargs == "+":
                raise UserError(f"{flag} is given twice; give all its values after one {flag}")
        return self.parse_args(args)


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Type of a flag: an integer from low to high."""

    def number(text: str) -> int:
        value = parse(text)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"seen {text}; must be an integer from {low} to {high}"
            )
        return value

    return number


def _model_options(parser: _Parser, dtype: str = "float32") -> None:
    parser.add_argument(
        "--model",
        required=True,
        type=home,
        metavar="DIR",
        help="HF directory or hub id, of a model or an adapter",
    )
    parser.add_argument(
        "--adapter",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="adapters in peft's format to load; the first one is active",
    )
    parser.add_argument(
        "--dtype", default=dtype, choices=("float32", "bfloat16"), help="compute dtype"
    )
    parser.add_argument(
        "--template",
        type=home,
        help="chat template: a file or a built-in name; default: the tokenizer's",
    )


def _use_option(parser: _Parser, **keys: Any) -> None:
    parser.add_argument(
        "--use",
        metavar="NAME",
        help="active adapter: a name, none, or a weighted sum NAME:0.7,NAME:0.3",
        **keys,
    )


def _adapters(options: argparse.Namespace) -> dict[str, str]:
    """{name: directory} of --adapter; the default name is the directory's, or `default` for one."""
    named: dict[str, str] = {}
    for text in options.adapter:
        name, equals, path = text.rpartition("=")
        if not equals:
            name = "default" if len(options.adapter) == 1 else Path(path).name
        if name in named:
            raise UserError(f"--adapter: two adapters are named {name}; write NAME=DIR")
        named[name] = home(path)
    return named


def _uses(texts: Sequence[str]) -> list[Any]:
    from jaxllm.peft.combine import parse_choice

    return [parse_choice(text) for text in texts]


def _need_chat(options: argparse.Namespace, *names: str) -> None:
    """Raise UserError for a flag that is used only with --chat."""
    for name in names:
        if getattr(options, name) is not None and not options.chat:
            raise UserError(f"--{name} requires --chat")


def _sampling_options(parser: _Parser) -> None:
    add = parser.add_argument
    add("--system", help="system message of the chat")
    add(
        "--max_new_tokens",
        type=_integer(1),
        default=256,
        help="maximum length of an answer in tokens",
    )
    add("--temperature", type=float, default=0.0, help="sampling temperature; 0 = greedy")
    add(
        "--top_k", type=_integer(0), default=0, help="sample from the k most likely tokens; 0 = all"
    )
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the most likely tokens whose probabilities sum to top_p",
    )
    add(
        "--min_p",
        type=float,
        default=0.0,
        help="exclude tokens less likely than min_p times the most likely one",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="stop string; repeatable")
    add("--seed", type=_integer(0, 2**63 - 1), default=0, help="seed of the sampling")


def _sampling(options: argparse.Namespace) -> Any:
    from jaxllm.sampling import Sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    sampling.check()
    return sampling


def tokenizer(verb: str, args: list[str]) -> int:
    if not args or args[0] != "train":
        if {"-h", "--help"} & set(args[:1]):
            print("usage: jaxllm tokenizer train FILE ... --out DIR [--vocab_size N]")
            return DONE
        seen = repr(args[0]) if args else "nothing"
        raise UserError(f"jaxllm tokenizer: seen {seen}; the only command is `tokenizer train`")
    parser = _Parser("tokenizer train")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="text files")
    add("--out", required=True, type=home, metavar="DIR", help="output directory")
    add("--vocab_size", type=_integer(1), default=32_000, help="size of the vocabulary")
    options = parser.read(args[1:])
    from jaxllm.data.tokenizer_training import train_tokenizer

    train_tokenizer(options.files, options.out, vocab_size=options.vocab_size)
    print(options.out)
    return DONE


def evaluate(verb: str, args: list[str]) -> int:
    parser = _Parser(verb)
    _model_options(parser)
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="files or datasets, or {path, split, columns} as in data.eval",
    )
    parser.add_argument(
        "--chat", action="store_true", help="evaluate chats, on the assistant's tokens only"
    )
    parser.add_argument(
        "--max_length", type=_integer(2), default=1024, help="context length of a row, in tokens"
    )
    parser.add_argument(
        "--batch_size",
        type=_integer(1),
        default=8,
        help="rows per batch; smaller values save memory",
    )
    _use_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.read(args)
    _need_chat(options, "template")
    data = config.read_sources(options.data, "--data")
    from jaxllm.evaluate import evaluate_files

    use_cache()
    found = evaluate_files(
        options.model,
        data,
        objective="sft" if options.chat else "pretrain",
        max_length=options.max_length,
        batch_size=options.batch_size,
        dtype=options.dtype,
        template=options.template,
        adapter=_adapters(options),
        use=_uses([options.use])[0] if options.use else ...,
    )
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(
                f"{name:<12} {value:>14,}"
                if isinstance(value, int)
                else f"{name:<12} {value:>14.4f}"
            )
    return DONE


def generate(verb: str, args: list[str]) -> int:
    parser = _Parser(verb)
    _model_options(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to complete; repeatable; default: the lines of standard input",
    )
    parser.add_argument("--chat", action="store_true", help="treat each prompt as a user message")
    _sampling_options(parser)
    _use_option(parser, action="append", default=[])
    parser.add_argument(
        "--best_of",
        type=_integer(1),
        default=1,
        metavar="N",
        help="sample N answers per prompt and keep the best",
    )
    parser.add_argument(
        "--reward",
        type=home,
        metavar="DIR",
        help="reward model that scores the answers of --best_of",
    )
    parser.add_argument(
        "--json", action="store_true", help='print one {"prompt", "text", "score"} per line'
    )
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
    use = _uses(options.use)
    texts = generate_text(
        options.model,
        [prompt for prompt in prompts for _ in range(options.best_of)],
        chat=options.chat,
        system=options.system,
        template=options.template,
        stop=options.stop,
        dtype=options.dtype,
        sampling=_sampling(options),
        adapter=_adapters(options),
        use=use if len(use) == 1 else [one for one in use for _ in range(options.best_of)],
    )
    kept = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=False)]
    if options.reward:
        from jaxllm.rl.rewards import best_of

        kept = best_of(options.reward, prompts, texts, system=options.system, dtype=options.dtype)
    for one in kept:
        print(json.dumps(one, ensure_ascii=False) if options.json else one["text"])
    return DONE


def chat(verb: str, args: list[str]) -> int:
    parser = _Parser(verb)
    _model_options(parser)
    _sampling_options(parser)
    _use_option(parser)
    options = parser.read(args)
    from jaxllm.chat import chat_loop

    use_cache()
    chat_loop(
        options.model,
        system=options.system,
        template=options.template,
        stop=options.stop,
        dtype=options.dtype,
        sampling=_sampling(options),
        adapter=_adapters(options),
        use=_uses([options.use] if options.use else []),
    )
    return DONE


def export(verb: str, args: list[str]) -> int:
    parser = _Parser(verb)
    parser.add_argument("run", type=home, metavar="RUN", help="run folder")
    parser.add_argument("out", type=home, metavar="OUT", help="output directory")
    parser.add_argument(
        "--step",
        type=lambda text: text if text == "best" else _integer(0)(text),
        help="checkpoint to export: a step, or best (evaluation); default: best with "
        "save.load_best, else the latest valid one",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the weights; default: as trained"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge a LoRA adapter into the base model and export a standalone model",
    )
    options = parser.read(args)
    from jaxllm.exports import export as write

    use_cache()
    print(write(options.run, options.out, options.dtype, options.step, options.merge))
    return DONE


def comparison(verb: str, args: list[str]) -> int:
    from jaxllm.compare import HELP, compare

    if {"-h", "--help"} & set(args):
        print(HELP)
        return DONE
    return compare(args)


VERBS: dict[str, tuple[Callable[[str, list[str]], int], str]] = {
    **{name: (training, verb.about) for name, verb in config.VERBS.items()},
    "compare": (comparison, "compare full, LoRA, adapter and prefix tuning on the same run"),
    "tokenizer": (tokenizer, "tokenizer train: train a byte-level BPE tokenizer on text files"),
    "eval": (evaluate, "compute a model's loss and perplexity, or a reward model's scores"),
    "generate": (generate, "complete texts or answer messages"),
    "chat": (chat, "chat with a model in the terminal"),
    "export": (export, "export a checkpoint or an adapter as a HuggingFace directory"),
}


# ---- entry point


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
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"
            raise UserError(f"unknown verb {verb}; {hint}")
        return VERBS[verb][0](verb, args)
    except BrokenPipeError:  # `jaxllm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:  # before the training loop, which handles Ctrl-C itself
        return INTERRUPTED
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        print(f"jaxllm: error: {line}", file=sys.stderr)
        return MISTAKE


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {about}" for verb, (_, about) in VERBS.items())
    return f"""\
usage: jaxllm VERB [...]

Train language models with JAX, from HuggingFace directory to HuggingFace directory.

{verbs}

`jaxllm VERB --help` shows all options of a verb."""


# Errors of a path that a user can fix.
PATH_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
PATH_ERRORS += (PermissionError,)


def mistake(error: BaseException) -> str | None:
    """The line to print if the user can fix `error`, else None: it is a bug.

    The user can fix a UserError, a path that is missing or not accessible, and a full disk.
    """
    cause: BaseException | None = error
    while cause is not None:  # libraries wrap the OSError of a full disk
        full = isinstance(cause, OSError) and cause.errno in DISK_FULL
        if full or "No space left" in str(cause):
            return f"the disk is full ({_one_line(cause)}); earlier checkpoints are kept"
        cause = cause.__cause__ or cause.__context__
    return _one_line(error) if isinstance(error, (UserError, *PATH_ERRORS)) else None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
