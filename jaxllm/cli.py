# SPDX-License-Identifier: Apache-2.0
"""The command line: a verb calls one function; a user's mistake is one line and exit status 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from jaxllm import __version__, config
from jaxllm.compilation import use_cache
from jaxllm.config import Leaf, TrainConfig, aliases, checks, leaves, load_config, value_of
from jaxllm.errors import UserError

DONE, MISTAKE, STOPPED, INTERRUPTED = 0, 2, 75, 130
FULL = (errno.ENOSPC, errno.EDQUOT)


# ---- pretrain, sft


def training(verb: str, args: list[str]) -> int:
    """A run described by a YAML file and flags (config.load_config)."""
    if {"-h", "--help"} & set(args):
        print(training_help(verb))
        return DONE
    if "--schema" in args:
        print(json.dumps(config.json_schema(), indent=2))
        return DONE
    explain = "--explain" in args
    args = [arg for arg in args if arg != "--explain"]
    path = args.pop(0) if args and not args[0].startswith("-") else None
    cfg, provenance = load_config(verb, path, args)
    if explain:
        print(explanation(cfg, provenance))
        return DONE
    checks.check(cfg)  # before the seconds that the imports of train take
    from jaxllm.training import train

    result = train(cfg)
    for name, values in result.evals.items():
        print(f"{name}: {_shown(values)}")
    best, named = result.best, cfg.eval.metric
    if best.step not in (None, result.step):
        here = "; final/ is that one" if cfg.save.load_best and result.final else ""
        loss = "" if named.endswith("loss") or best.loss is None else f", loss {best.loss:.4f}"
        print(f"best: step {best.step}, {named} {best.value:.4f}{loss}{here}")
    if result.early:
        by = f" of more than {cfg.eval.min_delta:g}" if cfg.eval.min_delta else ""
        print(
            f"stopped early: no improvement of {named}{by} in {best.waited} evaluations "
            "(eval.patience)"
        )
    if result.stopped:
        print(
            f"stopped at step {result.step}; the same command goes on from there", file=sys.stderr
        )
        return STOPPED
    print(f"done: {result.step} steps" + (f", model in {result.final}" if result.final else ""))
    return DONE


# Of an evaluation, what is printed beside its loss where it has it.
SHOWN = {"perplexity": ".2f", "accuracy": ".4f", "margin": ".4f", "reward_mean": ".4f"}


def _shown(values: dict[str, float]) -> str:
    named = {k: f for k, f in SHOWN.items() if k in values}
    if "perplexity" in named:
        named = {"perplexity": named["perplexity"]}
    parts = [f"{k} {values[k]:{f}}" for k, f in ({"loss": ".4f"} | named).items()]
    return "  ".join(parts)


def training_help(verb: str) -> str:
    """Every key of a run: its type, default, docstring and transformers' name."""
    others = {m: [f"--{name}" for name in names] for m, names in aliases.spellings().items()}
    lines = [
        f"usage: jaxllm {verb} [CONFIG.yaml] [--section.key value ...]",
        "",
        f"{VERBS[verb][1]}.",
        "",
        "Keys are the same in the YAML file and as flags; a flag beats the file. A list takes",
        "several values, a dict YAML ({a: 1}) or --section.key.a 1; --key and --no-key are true",
        "and false.",
        "",
        "  --explain   print the resolved config and where each value came from, and end",
        "  --schema    print the JSON schema of the YAML file, for editors, and end",
    ]
    section = None
    for leaf in leaves().values():
        if leaf.key == "objective":
            continue
        prefix = leaf.key.rpartition(".")[0]
        if prefix != section:
            about = config.SECTIONS.get(prefix, TrainConfig).__doc__
            lines += ["", about or ""]
            section = prefix
        also = f" (also {', '.join(others.pop(leaf.key))})" if leaf.key in others else ""
        lines.append(f"  --{leaf.key} {kind_of(leaf)} [{plain(leaf.default)}]")
        lines += textwrap.wrap(
            f"{leaf.doc}{also}", 92, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    lines += ["", "Other names of transformers, and what they set:"]
    lines += [f"  {', '.join(flags)}: {meaning}" for meaning, flags in others.items()]
    return "\n".join(lines)


def kind_of(leaf: Leaf) -> str:
    """The type of a key as help shows it."""
    if isinstance(leaf.default, dict):
        return "{KEY: VALUE}"
    names = {bool: "true|false", int: "INT", float: "FLOAT"}

    def words(kind: Any) -> list[str]:
        inner = [one for one in get_args(kind) if one not in (type(None), ...)]
        if get_origin(kind) is Literal:
            return [str(value) for value in inner]
        if get_origin(kind) is Annotated:
            return words(inner[0])
        return [w for one in inner for w in words(one)] or [names.get(kind, "TEXT")]

    found = words(leaf.type)
    many = isinstance(leaf.default, tuple) and len(found) == 1
    return "|".join(found) + (" ..." if many else "")


def plain(value: Any) -> str:
    """A value as YAML would have it."""
    if isinstance(value, float):
        return f"{value:g}"
    return (
        json.dumps(value, default=vars, ensure_ascii=False) if not isinstance(value, str) else value
    )


def explanation(cfg: TrainConfig, provenance: dict[str, str]) -> str:
    """Key, value and origin of every field, in columns."""
    rows = [(key, plain(value_of(cfg, key)), provenance[key]) for key in leaves()]
    left = max(len(key) for key, _, _ in rows)
    middle = min(max(len(value) for _, value, _ in rows), 40)
    return "\n".join(f"{key:<{left}}  {value:<{middle}}  {at}" for key, value, at in rows)


# ---- the other verbs


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line."""

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
        """The arguments. A list's flag given twice raises ValueError: it would lose the first."""
        flags = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
        for flag in (name for action in self._actions for name in action.option_strings):
            if flags.count(flag) > 1 and self._option_string_actions[flag].nargs == "+":
                raise UserError(f"{flag} is given twice; give all its values after one {flag}")
        return self.parse_args(args)


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag: a whole number from low to high."""

    def number(text: str) -> int:
        value = aliases.parse(text)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"seen {text}; it is a whole number from {low} to {high}"
            )
        return value

    return number


def _model_options(parser: _Parser, dtype: str = "float32") -> None:
    parser.add_argument(
        "--model",
        required=True,
        type=aliases.home,
        metavar="DIR",
        help="HF directory or hub id, or an adapter's",
    )
    parser.add_argument(
        "--adapter",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="adapters in peft's format beside the model; the first is used",
    )
    parser.add_argument(
        "--dtype", default=dtype, choices=("float32", "bfloat16"), help="of the arithmetic"
    )
    parser.add_argument(
        "--template",
        type=aliases.home,
        help="chat template: a file or a built-in name; default: the model's",
    )


def _use_option(parser: _Parser, **keys: Any) -> None:
    parser.add_argument(
        "--use", metavar="NAME", help="adapter to use: a name, none, or NAME:0.7,NAME:0.3", **keys
    )


def _adapters(options: argparse.Namespace) -> dict[str, str]:
    """{name: directory}; one without a name is called after its directory, `default` if alone."""
    named: dict[str, str] = {}
    for text in options.adapter:
        name, equals, path = text.rpartition("=")
        alone = len(options.adapter) == 1 and not equals
        name = name if equals else "default" if alone else Path(path).name
        if name in named:
            raise UserError(f"--adapter: two are called {name}; say NAME=DIR")
        named[name] = aliases.home(path)
    return named


def _uses(texts: Sequence[str]) -> list[Any]:
    from jaxllm.peft.combine import parse_choice

    return [parse_choice(text) for text in texts]


def _need_chat(options: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for a flag that nothing reads without --chat."""
    for name in names:
        if getattr(options, name) is not None and not options.chat:
            raise UserError(f"--{name} goes with --chat")


def _sampling_options(parser: _Parser) -> None:
    add = parser.add_argument
    add("--system", help="system message of the chat")
    add("--max_new_tokens", type=_whole(1), default=256, help="tokens of an answer at most")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--top_k", type=_whole(0), default=0, help="draw from this many likeliest tokens; 0 = all")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of this mass")
    add(
        "--min_p",
        type=float,
        default=0.0,
        help="leave out tokens below this share of the likeliest",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
    add("--seed", type=_whole(0, 2**63 - 1), default=0, help="of the draws")


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
        raise UserError(f"jaxllm tokenizer: seen {seen}; there is `tokenizer train`")
    parser = _Parser("tokenizer train")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="text files")
    add("--out", required=True, type=aliases.home, metavar="DIR", help="directory to write")
    add("--vocab_size", type=_whole(1), default=32_000, help="tokens in all")
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
        help="files or data sets, or {path, split, columns} as in data.eval",
    )
    parser.add_argument(
        "--chat", action="store_true", help="chats: count the assistant's tokens only"
    )
    parser.add_argument("--max_length", type=_whole(2), default=1024, help="tokens in a row")
    parser.add_argument(
        "--batch_size", type=_whole(1), default=8, help="rows at a time (a memory knob)"
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
        help="repeatable; default: lines of standard input",
    )
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's message")
    _sampling_options(parser)
    _use_option(parser, action="append", default=[])
    parser.add_argument(
        "--best_of", type=_whole(1), default=1, metavar="N", help="answers drawn; the best is kept"
    )
    parser.add_argument(
        "--reward", type=aliases.home, metavar="DIR", help="reward model that --best_of asks"
    )
    parser.add_argument(
        "--json", action="store_true", help='print {"prompt", "text"} a line, and "score"'
    )
    options = parser.read(args)
    _need_chat(options, "system", "template")
    if (options.best_of > 1) != (options.reward is not None):
        raise UserError("--best_of N and --reward DIR go together")
    if options.reward and not (options.chat and options.temperature > 0):
        raise UserError("--best_of goes with --chat and a --temperature over 0, so answers differ")
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
    parser.add_argument("run", type=aliases.home, metavar="RUN", help="run folder")
    parser.add_argument("out", type=aliases.home, metavar="OUT", help="directory to write")
    parser.add_argument(
        "--step",
        type=lambda text: text if text == "best" else _whole(0)(text),
        help="checkpoint, or best: that of the best evaluation; default: best for a run with "
        "save.load_best, else the newest good one",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as trained")
    parser.add_argument(
        "--merge", action="store_true", help="fold a LoRA adapter into the model and write that"
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
    "compare": (comparison, "the same run with full, LoRA, adapter and prefix tuning, as a table"),
    "tokenizer": (tokenizer, "tokenizer train: make a byte-level BPE from text files"),
    "eval": (evaluate, "loss and perplexity of a model on files, or a reward model's scores"),
    "generate": (generate, "continue texts, or answer messages"),
    "chat": (chat, "talk to a model in the terminal"),
    "export": (export, "a run's checkpoint, or an adapter, as a HuggingFace directory"),
}


# ---- what every verb goes through


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a user's mistake (one line), 75 stopped with a checkpoint saved,
    130 ended by Ctrl-C.

    Anything else is a bug and leaves as an exception.
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
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
            raise UserError(f"unknown verb {verb}; {hint}")
        return VERBS[verb][0](verb, args)
    except BrokenPipeError:  # `jaxllm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:  # a training run takes Ctrl-C itself, once it has begun
        return INTERRUPTED
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        print(f"jaxllm: error: {line}", file=sys.stderr)
        return MISTAKE


def _usage() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: jaxllm VERB [...]",
            "",
            "Train language models with JAX, from HuggingFace directory to HuggingFace directory.",
            "",
            *(f"  {verb:<{width}}  {about}" for verb, (_, about) in VERBS.items()),
            "",
            "`jaxllm VERB --help` shows everything that can be set.",
        ]
    )


def mistake(error: BaseException) -> str | None:
    """The line to show when `error` is the user's to mend, None when it is a bug.

    That is a UserError, and a file that is missing, unreadable or does not fit on the disk.
    """
    cause: BaseException | None = error
    while cause is not None:
        full = isinstance(cause, OSError) and cause.errno in FULL
        if full or "No space left" in str(cause):
            return f"the disk is full ({_one_line(cause)}); what was saved before is kept"
        cause = cause.__cause__ or cause.__context__
    files = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, (*files, PermissionError)):
        return _one_line(error)
    return _one_line(error) if isinstance(error, UserError) else None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
