# SPDX-License-Identifier: Apache-2.0
"""The command line: verbs call functions, and a user's mistake is one line and exit status 2."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from typing import Any

from jaxllm.config import TrainConfig, json_schema, keys, load_config, to_dict

TRAINING = {
    "pretrain": "train on text: from random weights (model.config) or from a model (model.path)",
    "sft": "fine-tune on chats; only the assistant's words are learned",
}
ABOUT = "Train language models with JAX: a HuggingFace directory in, a HuggingFace directory out."




def training_help(verb: str) -> str:
    """Every key of a run with its default, from the config's own docstrings."""
    import inspect

    from jaxllm import config

    lines = [
        f"usage: jaxllm {verb} [CONFIG.yaml] [--section.key value …]",
        "",
        TRAINING[verb],
        "",
        "Any key of the YAML file is also a flag; a flag beats the file. The spellings of transformers",
        "(--model_name_or_path, --per_device_train_batch_size, --deepspeed FILE, …) are accepted too.",
        "  --explain   print the resolved config and where each value comes from, and end",
        "  --schema    print the JSON schema of the YAML file, and end",
        "",
    ]
    docs = _field_docs(inspect.getsource(config))
    defaults = _flat(to_dict(TrainConfig()))
    for key in keys():
        if key == "objective":
            continue
        lines.append(f"  --{key:<26} {docs[key]} [{json.dumps(defaults[key])}]")
    return "\n".join(lines)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    from jaxllm.config import SECTIONS

    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if key in SECTIONS else {key: value}
    return flat


def _field_docs(source: str) -> dict[str, str]:
    """{dotted key: the docstring under the field}."""
    import ast

    from jaxllm.config import SECTIONS

    names = {kind.__name__: f"{name}." for name, kind in SECTIONS.items()} | {"TrainConfig": ""}
    docs: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            for field, doc in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                    docs[names[node.name] + ast.unparse(field.target)] = ast.literal_eval(doc.value)
    return docs


def run_training(verb: str, args: list[str]) -> int:
    if "--help" in args or "-h" in args:
        print(training_help(verb))
        return 0
    if "--schema" in args:
        print(json.dumps(json_schema(), indent=2))
        return 0
    explain = "--explain" in args
    args = [a for a in args if a != "--explain"]
    path = args.pop(0) if args and not args[0].startswith("--") else None
    cfg, source = load_config(verb, path, args)
    if explain:
        for key, value in _flat(to_dict(cfg)).items():
            print(f"{key:<28} {json.dumps(value):<40} {source.get(key, 'default')}")
        return 0
    from jaxllm.train import train

    result = train(cfg)
    for name, values in result.evals.items():
        print(f"{name}: loss {values['loss']:.4f}  perplexity {values['perplexity']:.2f}")
    if result.stopped:
        print(f"stopped at step {result.step}; the same command goes on from there", file=sys.stderr)
        return 75
    print(f"done: {result.step} steps{f', model in {result.final}' if result.final else ''}")
    return 0


def tokenizer_train(a: argparse.Namespace) -> int:
    from jaxllm.tokenizer import train_tokenizer

    train_tokenizer(a.files, a.out, vocab_size=a.vocab_size)
    print(a.out)
    return 0


def evaluate(a: argparse.Namespace) -> int:
    from jaxllm.evaluate import evaluate_files

    out = evaluate_files(
        a.model,
        a.data,
        objective="sft" if a.chat else "pretrain",
        max_length=a.max_length,
        batch_size=a.batch_size,
        dtype=a.dtype,
        template=a.template,
    )
    print(json.dumps(out) if a.json else "\n".join(f"{k:<12} {v:g}" for k, v in out.items()))
    return 0


def _sampling(a: argparse.Namespace) -> dict[str, Any]:
    from jaxllm.rollout import Sampling

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    sampling = Sampling(**{name: getattr(a, name) for name in names})
    keys = dict(system=a.system, template=a.template, stop=a.stop, dtype=a.dtype)
    return keys | {"sampling": sampling}


def generate(a: argparse.Namespace) -> int:
    from jaxllm.rollout import generate_text

    prompts = a.prompt or [line.rstrip("\n") for line in sys.stdin]
    for text in generate_text(a.model, prompts, chat=a.chat, **_sampling(a)):
        print(json.dumps(text) if a.json else text)
    return 0


def chat(a: argparse.Namespace) -> int:
    from jaxllm.rollout import chat_loop

    chat_loop(a.model, **_sampling(a))
    return 0


def export(a: argparse.Namespace) -> int:
    from jaxllm.hf import export as run

    print(run(a.run, a.out, dtype=a.dtype, step=a.step))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{self.prog}: {message}")


def _decoding(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help="HF directory or hub id")
    p.add_argument("--system", help="system message")
    p.add_argument("--template", help="chat template: a file or a built-in name [the tokenizer's own]")
    p.add_argument("--stop", action="append", default=[], help="text that ends an answer (repeatable)")
    p.add_argument("--max_new_tokens", type=int, default=256, help="tokens [%(default)s]")
    p.add_argument("--temperature", type=float, default=0.0, help="0 = greedy [%(default)s]")
    p.add_argument("--top_k", type=int, default=0, help="0 = off [%(default)s]")
    p.add_argument("--top_p", type=float, default=1.0, help="1 = off [%(default)s]")
    p.add_argument("--min_p", type=float, default=0.0, help="0 = off [%(default)s]")
    p.add_argument("--seed", type=int, default=0, help="of sampling [%(default)s]")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[%(default)s]")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="jaxllm", description=ABOUT)
    verbs = top.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    for verb, text in TRAINING.items():
        verbs.add_parser(verb, help=text, add_help=False)

    group = verbs.add_parser("tokenizer", help="train a byte-level BPE tokenizer").add_subparsers(
        dest="action", required=True, parser_class=_Parser
    )
    p = group.add_parser("train", help="from text files")
    p.add_argument("files", nargs="+", help="text files")
    p.add_argument("--out", required=True, help="directory to write")
    p.add_argument("--vocab_size", type=int, default=32_000, help="tokens in all [%(default)s]")
    p.set_defaults(run=tokenizer_train)

    p = verbs.add_parser("eval", help="loss and perplexity of a model on files")
    p.add_argument("--model", required=True, help="HF directory or hub id")
    p.add_argument("--data", nargs="+", required=True, help="files or data sets")
    p.add_argument("--chat", action="store_true", help="read chats, count the assistant's tokens only")
    p.add_argument("--template", help="chat template: a file or a built-in name")
    p.add_argument("--max_length", type=int, default=1024, help="tokens in a row [%(default)s]")
    p.add_argument("--batch_size", type=int, default=8, help="rows at a time [%(default)s]")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[%(default)s]")
    p.add_argument("--json", action="store_true", help="one JSON object")
    p.set_defaults(run=evaluate)

    p = verbs.add_parser("generate", help="continue texts, or answer messages")
    _decoding(p)
    p.add_argument("--prompt", action="append", help="a text (repeatable) [lines of standard input]")
    p.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    p.add_argument("--json", action="store_true", help="one JSON string a prompt")
    p.set_defaults(run=generate)

    p = verbs.add_parser("chat", help="talk to a model in the terminal")
    _decoding(p)
    p.set_defaults(run=chat)

    p = verbs.add_parser("export", help="a run's checkpoint as a HF directory")
    p.add_argument("run", help="run folder")
    p.add_argument("out", help="directory to write")
    p.add_argument("--step", type=int, help="checkpoint [the newest good one]")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights [as trained]")
    p.set_defaults(run=export)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns its exit status: 0 done, 2 the user's mistake, 75 stopped and saved."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in TRAINING:
            return run_training(argv[0], argv[1:])
        a = parser().parse_args(argv)
        return a.run(a)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        # A ValueError from inside a library is a bug, and its traceback is wanted.
        if not _ours(error):
            raise
        print(f"jaxllm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"jaxllm: error: the disk is full: {error}; what was saved before is kept", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


def _ours(error: BaseException) -> bool:
    """Whether the error was raised by this package (a message for the user) or below it (a bug)."""
    tb = error.__traceback__
    if isinstance(error, OSError) or tb is None:
        return True
    if any("JAX" in note for note in getattr(error, "__notes__", ())):
        return False  # jax has cut its own frames off the traceback
    while tb.tb_next:
        tb = tb.tb_next
    return tb.tb_frame.f_globals.get("__name__", "").startswith("jaxllm")
