# SPDX-License-Identifier: Apache-2.0
"""The command line: import cost, exit statuses, one-line errors and help."""

import errno
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from jaxllm import cli
from jaxllm.config import VERBS, Source, checks, describe, from_dict, leaves, load_config
from jaxllm.config.verbs import unread
from jaxllm.errors import MissingFile, UserError

HEAVY = ("jax", "flax", "optax", "grain", "orbax", "numpy", "torch")
HEAVY += ("transformers", "tokenizers", "datasets", "safetensors", "pydantic", "yaml")
MODEL = ["--model", "m"]
RUN = ["--model.path", "m", "--data.train", "d.txt"]


@pytest.fixture(autouse=True)
def files(monkeypatch, tmp_path):
    """A folder with the models, runs and data that the tests name."""
    for name in ("m", "x", "y/b", "run"):
        (tmp_path / "cwd" / name).mkdir(parents=True)
    for name in ("a", "b", "d.txt"):
        (tmp_path / "cwd" / name).touch()
    monkeypatch.chdir(tmp_path / "cwd")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def jaxllm(*args):
    command = [sys.executable, "-m", "jaxllm", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def stand_in(monkeypatch):
    """Replace a module by one with a fake function that records its arguments."""

    def put(module, name, does=None, **others):
        calls = []
        fake = ModuleType(f"jaxllm.{module}")

        def record(*args, **keys):
            calls.append((args, keys))
            return does(*args, **keys) if does else None

        vars(fake).update({name: record} | others)
        monkeypatch.setitem(sys.modules, f"jaxllm.{module}", fake)
        return calls

    return put


def result(stopped=False):
    evals = {"eval": {"loss": 1.0, "perplexity": 2.72}}
    best = SimpleNamespace(step=2, value=0.5, loss=1.25)
    ended = {"stopped": stopped, "early": False, "final": "run/final"}
    return SimpleNamespace(step=3, best=best, evals=evals, evaluated=3, **ended)


# ---- imports


@pytest.mark.parametrize("module", ["jaxllm", "jaxllm.config", "jaxllm.cli"])
def test_importing_brings_in_nothing_heavy(module):
    loaded = python(
        f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    ).stdout.split()
    assert "jaxllm" in loaded
    assert not set(HEAVY) & set(loaded)


def test_public_names_are_there_and_others_are_not():
    import jaxllm

    assert jaxllm.TrainConfig().batch_size == 32
    assert jaxllm.Source is Source
    assert set(dir(jaxllm)) == {*jaxllm.__all__, "__version__"}
    with pytest.raises(AttributeError, match="'jaxllm' has no attribute 'trane'"):
        jaxllm.trane  # noqa: B018


def test_train_is_a_function_whatever_was_imported_before():
    done = python(
        "import jaxllm.training as module\n"
        "import jaxllm\n"
        "from jaxllm import train\n"
        "assert train is jaxllm.train is module.train\n"
        "try: train(jaxllm.TrainConfig())\n"
        "except jaxllm.UserError as error: print(error)\n"
    )
    assert done.stderr == ""
    assert done.stdout.startswith("2 mistakes: (1) no model: give model.path")


# ---- exit status


def test_a_users_mistake_is_one_line_and_status_2():
    done = jaxllm("pretrain", "--learning_rat", "1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "jaxllm: error: unknown flag --learning_rat; did you mean --learning_rate?\n"
    )


def test_contradictions_are_found_before_anything_heavy_is_imported(monkeypatch, capsys):
    # importing it would raise ImportError
    monkeypatch.setitem(sys.modules, "jaxllm.training", None)
    assert cli.main(["pretrain", *RUN, "--model.config", "c"]) == 2
    assert capsys.readouterr().err.endswith("are both given; keep one\n")


MISTAKES = [
    ("sft --learning_rat 1", "unknown flag --learning_rat"),
    ("sft nope.yaml", "nope.yaml: no such config file"),
    ("sft --model.path m", "no data: give data.train"),
    ("sft --model.path m --data.train d.txt --optim.name adamv", "optim.name is 'adamv'"),
    ("sft --model.path m --data.train d.txt --optim.options.b 1", "optim.options.b is no option"),
    ("sft --model.path no --data.train d.txt --optim.power 2", "goes with polynomial"),
    ("sft --model.path no --data.train d.txt", "no: no such directory, and not a hub"),
    ("sft --model.path /no --data.train d.txt", "error: /no: no such directory"),
    (
        "sft --model.path m --data.train d.txt --output_dir d.txt/run",
        "run: d.txt is not a writable folder",
    ),
    ("sft --model.path m --data.train no.jsonl 'n*'", "2 mistakes: (1) no.jsonl: no such file"),
    ("sft --model.path m --model.tokenizer t --data.train d.txt", "t: no such directory, and not"),
    ("sft --model.path m --data.train d.txt --data.template t", "neither a file nor one of"),
    ("grpo --model.path m --data.train d.txt --rl.rewards no", "no: no such directory, and"),
    ("sft --model.path m --data.train d.txt --peft.method lora --peft.path n", "n: no such"),
    ("grpo --model.path m --data.train d.txt --rl.rewards n.py:f", "there is no file n.py"),
    ("pretrain --deepspeed no.json", "no.json: no such DeepSpeed file"),
    ("tokenize --objective sft --model.path m --data.train no.txt", "no.txt: no such file"),
    ("compare --model.path no --data.train d.txt --data.eval_fraction 0.5", "no: no such"),
    ("plan --objective sft --model.path no --topology cpu:1", "no: no such directory, and"),
    ("preview --objective sft --model.path m --data.train no.txt", "no.txt: no such file"),
    ("tokenizer train no.txt --out t", "no.txt: no such file or directory"),
    ("eval --model no --data a", "no: no such directory, and"),
    ("eval --model m --data '{path: no.txt}'", "no.txt: no such file or directory"),
    ("generate --model no --prompt x", "no: no such directory, and"),
    ("generate --model m --chat --template t --prompt x", "neither a file nor one of"),
    ("chat --model m --adapter n=no", "no: no such directory, and"),
    ("export no out", "no: no such directory"),
    ("rows no --step 1", "no: no such directory"),
    ("verify no", "no: no such directory"),
]


def test_mistakes_are_found_before_anything_heavy_is_imported():
    """So they are reported at once. pydantic and yaml are needed to read a config."""
    done = python(
        "import shlex, sys\n"
        "from jaxllm import cli\n"
        f"for line in {[line for line, _ in MISTAKES]!r}:\n"
        "    assert cli.main(shlex.split(line)) == 2, line\n"
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == len(MISTAKES), done.stderr
    for line, (_, message) in zip(lines, MISTAKES, strict=True):
        assert message in line
    assert not (set(HEAVY) - {"pydantic", "yaml"}) & set(done.stdout.split())


def test_an_output_dir_that_cannot_be_written_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert cli.main(["sft", *RUN]) == 2
    assert "output_dir run: run is not a writable folder" in capsys.readouterr().err


def test_a_run_that_is_done_is_status_0_and_one_that_was_stopped_75(stand_in, capsys):
    calls = stand_in("training", "train", lambda cfg, origins: result())
    assert cli.main(["sft", *RUN, "--steps", "3"]) == 0
    ((cfg,), options) = calls[0]
    assert (cfg.objective, cfg.steps, cfg.data.train) == ("sft", 3, (Source("d.txt"),))
    assert options["origins"]["steps"] == "--steps"
    said = capsys.readouterr().out
    assert "model in run/final" in said and "best: step 2, loss 0.5000\n" in said
    stand_in("training", "train", lambda cfg, origins: result(stopped=True))
    assert cli.main(["pretrain", *RUN]) == 75


def test_a_bug_keeps_its_traceback(stand_in):
    def library_error(cfg, origins):
        return int("no number")  # a ValueError that is no UserError

    stand_in("training", "train", library_error)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["pretrain", *RUN])
    stand_in("training", "train", lambda cfg, origins: cfg.no_such_field)
    with pytest.raises(AttributeError):
        cli.main(["pretrain", *RUN])


def test_a_full_disk_and_a_missing_file_are_one_line(stand_in, capsys):
    def full(cfg, origins):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "run/checkpoints/5")
        except OSError as error:
            raise RuntimeError("writing failed") from error

    def missing(cfg, origins):
        Path("not/there.jsonl").read_text()

    stand_in("training", "train", full)
    assert cli.main(["pretrain", *RUN]) == 2
    assert (
        "the disk is full (run/checkpoints/5: No space left on device)" in capsys.readouterr().err
    )
    stand_in("training", "train", missing)
    assert cli.main(["pretrain", *RUN]) == 2
    assert capsys.readouterr().err == "jaxllm: error: not/there.jsonl: No such file or directory\n"


def test_a_file_where_a_folder_should_be_is_one_line(stand_in, capsys, tmp_path):
    (tmp_path / "run").write_text("")
    stand_in("training", "train", lambda cfg, origins: (tmp_path / "run").mkdir())
    assert cli.main(["pretrain", *RUN]) == 2
    assert capsys.readouterr().err == f"jaxllm: error: {tmp_path}/run: File exists\n"


def test_ctrl_c_is_status_130_without_a_traceback(stand_in, capsys):
    def interrupted(cfg, origins):
        raise KeyboardInterrupt

    stand_in("training", "train", interrupted)
    assert cli.main(["pretrain", *RUN]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_user_error_of_a_worker_process_is_a_message_and_a_value_error_is_not():
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(UserError) as found:
            pool.submit(from_dict, {"seed": "a"}).result()
    assert cli.mistake(found.value).startswith("seed is 'a'")
    assert cli.mistake(ValueError("out of a library")) is None


def test_a_missing_file_is_also_a_file_not_found_error():
    error = MissingFile("a.txt: no such file")
    assert isinstance(error, UserError) and isinstance(error, FileNotFoundError)
    assert cli.mistake(pickle.loads(pickle.dumps(error))) == "a.txt: no such file"


# ---- help, explain, schema


def test_help_answers_at_once():
    began = time.perf_counter()
    done = jaxllm("--help")
    seconds = time.perf_counter() - began
    print(f"jaxllm --help: {seconds:.2f} s")
    assert done.returncode == 0 and "pretrain" in done.stdout
    assert seconds < 10  # about 1 s; a busy machine may be slower


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_key_that_the_command_reads(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for leaf in leaves().values():
        read = leaf.key not in (*unread(verb), "objective")
        assert text.count(f" --{leaf.key} {describe.kind_of(leaf)} [") == read
        assert not read or " ".join(leaf.doc.split()) in text
    assert ("rl." in text) == (verb in ("ppo", "grpo"))
    assert ("align." in text) == (verb not in ("pretrain", "sft"))


@pytest.mark.parametrize("verb", VERBS)
def test_help_begins_with_an_example_and_ten_keys(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    example = next(line for line in lines if line.startswith(f"  jaxllm {verb} "))
    cfg, _ = load_config(verb, None, example.split()[2:])
    checks.check(cfg)
    keys = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert tuple(keys[:10]) == VERBS[verb].first and len(VERBS[verb].first) == 10


def test_help_names_the_default_and_the_other_names(capsys):
    assert cli.main(["pretrain", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--optim.eps FLOAT [1e-08] ε added to the square root of the" in text
    assert "second moment (also --adam_epsilon)" in text
    assert "--model.remat none|full|dots|names|offload [full]" in text
    assert "--bf16: model.compute_dtype bfloat16" in text
    assert "--data.max_length INT (tokens) [null]" in text
    assert "--save.every INT|epoch (steps) [500]" in text
    assert "--model.path PATH [null]" in text


@pytest.mark.parametrize(
    "verb", ["tokenizer train", "eval", "generate", "chat", "export", "rows", "verify"]
)
def test_help_of_the_other_verbs(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: jaxllm {verb}" in capsys.readouterr().out


def test_explain_shows_value_and_origin_of_every_key_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jaxllm.training", None)
    assert cli.main(["pretrain", "--learning_rate", "3e-4", "--explain"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == list(leaves())
    assert ["optim.learning_rate", "0.0003", "--learning_rate"] in rows
    assert ["seed", "0", "default"] in rows


def test_schema_is_json(capsys):
    assert cli.main(["pretrain", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["output_dir"]["default"] == "run"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pretain"], "unknown command pretain; did you mean pretrain?"),
        (["rlhf"], "unknown command rlhf; known: pretrain, sft"),
        (["tokenizer"], "seen nothing"),
        (["tokenizer", "trian"], "seen 'trian'"),
        (["eval", "--model", "m"], "needs --data FILE"),
        (["eval", "--modle", "m"], "required: --model"),
        (["eval", *MODEL, "--data", "a", "--data", "b"], "--data is given twice; give all its"),
        (["eval", *MODEL, "--data", "{pth: a}"], "--data: data.eval[0].pth is not known"),
        (["eval", *MODEL, "--data", "a", "--template", "chatml"], "--template requires --chat"),
        (
            ["eval", *MODEL, "--data", "a", "--batch_size", "0"],
            "--batch_size: seen 0; must be an integer",
        ),
        (["eval", *MODEL, "--data", "a", "--batch_size=-1"], "integer from 1 to 2147483647"),
        (
            ["eval", *MODEL, "--data", "a", "--max_length", "-5"],
            "--max_length: seen -5; must be an integer",
        ),
        (["generate", *MODEL, "--top_k", "x"], "--top_k: seen x; must be an integer from 0 to"),
        (["generate", *MODEL, "--prompt", "x", "--system", "s"], "--system requires --chat"),
        (
            ["generate", *MODEL, "--prompt", "x", "--template", "chatml"],
            "--template requires --chat",
        ),
        (["generate", *MODEL, "--seed", "9" * 20], f"integer from 0 to {2**63 - 1}"),
        (["chat", *MODEL, "--seed", "-1"], "--seed: seen -1; must be an integer"),
        (
            ["tokenizer", "train", "a", "--out", "t", "--vocab_size", "1.5"],
            "--vocab_size: seen 1.5",
        ),
        (["rows", "run"], "required: --step"),
        (["rows", "run", "--step", "0"], "--step: seen 0; must be an integer from 1"),
        (["verify"], "required: RUN"),
        (["pretrain", "nope.yaml"], "nope.yaml: no such config file"),
    ],
)
def test_mistakes_of_every_verb_are_one_line(args, message, capsys):
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxllm: error: ") and error.count("\n") == 1
    assert message in error


# ---- verbs call their function


def test_eval_prints_one_json_object_or_a_table(stand_in, capsys):
    found = {"loss": 1.5, "perplexity": 4.48, "tokens": 1200, "examples": 7}
    calls = stand_in("evaluate", "evaluate_files", lambda *a, **k: found)
    args = ["eval", "--model", "m", "--data", "a", "{path: b, split: test}", "--chat"]
    assert cli.main([*args, "--max_length", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    (positional, keys) = calls[0]
    assert positional == ("m", (Source("a"), Source("b", split="test")))
    assert keys == {
        "objective": "sft",
        "max_length": 64,
        "batch_size": 8,
        "dtype": "float32",
        "template": None,
        "adapter": {},
        "use": ...,
    }
    assert cli.main([*args, "--adapter", "a=x", "y/b", "--use", "a:0.5,b:2"]) == 0
    assert calls[1][1]["adapter"] == {"a": "x", "b": "y/b"}
    assert calls[1][1]["use"] == {"a": 0.5, "b": 2.0}
    capsys.readouterr()
    assert cli.main(args) == 0
    assert "1,200" in capsys.readouterr().out


def test_torch_is_hidden_from_commands_that_do_not_use_it(monkeypatch, capsys):
    def found(*given: list[str]) -> bool:
        """Whether torch can be imported after a mistaken command."""
        monkeypatch.setattr(sys, "meta_path", [*finders])
        assert cli.main(*given) == 2
        assert any(finder.find_spec("numpy", None) for finder in sys.meta_path)
        return any(finder.find_spec("torch", None) for finder in sys.meta_path)

    finders = sys.meta_path
    monkeypatch.setattr(sys, "argv", ["jaxllm", "sft", "--stepz", "1"])
    assert not found()
    assert found(["sft", "--stepz", "1"])  # in the process of a caller
    monkeypatch.setattr(sys, "argv", ["jaxllm", "eval", "--stepz", "1"])
    assert found()


def test_generate_passes_prompts_and_sampling(stand_in, capsys):
    calls = stand_in("chat", "generate_text", lambda m, p, **k: ["A", "B"])
    args = ["generate", "--model", "m", "--prompt", "x", "--prompt", "y", "--chat", "--top_k", "5"]
    assert cli.main([*args, "--stop", "END"]) == 0
    assert capsys.readouterr().out == "A\nB\n"
    (positional, keys) = calls[0]
    assert positional == ("m", ["x", "y"])
    assert keys["chat"] is True and keys["stop"] == ["END"] and keys["sampling"].top_k == 5
    assert cli.main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[1]) == {"prompt": "y", "text": "B"}


def test_a_run_folder_stands_for_its_final_model(stand_in, capsys, tmp_path):
    calls = stand_in("chat", "generate_text", lambda m, p, **k: ["A"])
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    for path, model in ((final.parent, final), (tmp_path, tmp_path), ("OWNER/NAME",) * 2):
        assert cli.main(["generate", "--model", str(path), "--prompt", "x"]) == 0
        assert calls.pop()[0][0] == str(model)
    (final.parent / "model.safetensors").touch()  # a model with a folder of this name
    (final.parent / "config.json").write_text('{"model_type": "llama"}')
    assert cli.main(["generate", "--model", str(final.parent), "--prompt", "x"]) == 0
    assert calls.pop()[0][0] == str(final.parent)


def test_chat_tokenizer_and_export_call_their_functions(stand_in, capsys):
    chats = stand_in("chat", "chat_loop")
    assert cli.main(["chat", "--model", "m", "--system", "Be brief."]) == 0
    assert chats[0][0] == ("m",) and chats[0][1]["system"] == "Be brief."
    trained = stand_in("data.tokenizer_training", "train_tokenizer", lambda *_, **__: range(290))
    assert cli.main(["tokenizer", "train", "a", "b", "--out", "t", "--vocab_size", "300"]) == 0
    assert trained == [((["a", "b"], "t"), {"vocab_size": 300})]
    written = stand_in("exports", "export", lambda **keys: keys["out"])
    assert cli.main(["export", "run", "out", "--dtype", "bfloat16", "--merge"]) == 0
    given = {"run": "run", "out": "out", "dtype": "bfloat16", "step": None, "merge": True}
    assert written == [((), given | {"check": False})]
    out, err = capsys.readouterr()
    assert out == "t\nout\n" and "290 tokens, not 300: the text has no more pairs" in err
