# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval: those of its `hf` model, on every mesh, and no code."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import lm_eval
import numpy as np
import pytest
import torch
import yaml
from flax import nnx
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from runs import arguments, finished, launched, refused
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from jaxllm.chat import TextModel
from jaxllm.checkpoint import Checkpoints
from jaxllm.cli import main
from jaxllm.config import MeshSection
from jaxllm.mesh import make_mesh
from jaxllm.report.reading import read_run
from jaxllm.step import alone
from jaxllm.tasks.harness import Model, width
from jaxllm.tasks.loading import Tasks, evaluate_tasks, harness, restricted, table

WORDS = ["import json", "def read(self):", "the value", "return None", "for line in file", "a list"]
LENGTH = 96
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def some_text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def task(folder, name: str, records: list[dict], **keys) -> None:
    """A YAML file of a task, with its data beside it."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    base = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | keys))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of tasks: one for each kind of request."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    choices = [
        # Contexts that end with spaces, and some that exceed the positions.
        {"q": some_text(rng, rng.choice((1, 4, 60))) + rng.choice(("", " ", "  ")),
         "a": [" " + some_text(rng, n) for n in (1, 2, 3)], "gold": i % 3}
        for i in range(11)
    ]  # fmt: skip
    choices[4]["q"] = ""  # the prefix token is its context
    texts = [{"text": some_text(rng, n)} for n in (1, 9, 25, 70, 140)]
    ask = [{"q": some_text(rng, n), "a": "return"} for n in (1, 2, 3, 5, 8, 13, 100)]
    choice = {"doc_to_text": "{{q}}", "doc_to_choice": "{{a}}", "doc_to_target": "{{gold}}"}
    choice |= {"output_type": "multiple_choice", "target_delimiter": ""}
    means = [
        {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
    ]
    task(folder, "tiny_choice", choices, **choice, metric_list=means)
    shots = {"fewshot_split": "test", "num_fewshot": 2}
    task(folder, "tiny_shots", choices[:4], **choice, **shots, metric_list=means)
    task(
        folder, "tiny_ppl", texts, output_type="loglikelihood_rolling",
        doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": m} for m in ("byte_perplexity", "bits_per_byte")],
    )  # fmt: skip
    task(
        folder, "tiny_high", texts, output_type="loglikelihood_rolling",
        doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte", "higher_is_better": True}],
    )  # fmt: skip
    task(
        folder, "tiny_text", ask, output_type="generate_until",
        doc_to_text="{{q}}", doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n", "se"], "max_gen_toks": 24, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("a", "b")]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    task(
        folder, "tiny_filters", ask[:1], output_type="generate_until",
        doc_to_text="{{q}}", doc_to_target="{{a}}", filter_list=filters, metric_list=exact,
        generation_kwargs={"until": ["x"], "max_gen_toks": 2},
    )  # fmt: skip
    members = {"task": ["tiny_choice", {"group": "inner", "task": ["tiny_shots"]}]}
    acc = {"aggregate_metric_list": [{"metric": "acc", "filter_list": "none"}]}
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "tiny_group"} | members | acc))
    return folder


@pytest.fixture(scope="module")
def model(project, tmp_path_factory):
    """The directory of a random Llama whose greedy choices differ from position to position."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(project / "tokenizer")
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ALL = ["tiny_choice", "tiny_shots", "tiny_ppl", "tiny_text"]


def answers(found) -> list:
    """Each document's answers: (log p, is greedy) or a text."""
    samples = [one for name in ALL if name in found["samples"] for one in found["samples"][name]]
    return [answer for one in samples for answers in one["resps"] for answer in answers]


def assert_equal(ours, theirs) -> None:
    found = [json.loads(json.dumps(answers(x))) for x in (ours, theirs)]
    assert len(found[0]) == len(found[1]) > 0
    for a, b in zip(*found, strict=True):
        if isinstance(a, str):
            assert a == b
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for name, values in theirs["results"].items():
        for metric, value in values.items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), metric


@pytest.fixture(scope="module")
def ours(model, tasks):
    return evaluate_tasks(model, ALL, include_path=str(tasks), batch_size=4, mesh=one_device())


def one_device():
    return make_mesh(MeshSection(), devices=jax.devices()[:1])


def loaded(path: str, **sizes: int) -> Model:
    """Our model as lm-eval asks it, with batches of three rows."""
    text = TextModel.load(path, mesh=one_device())
    graph, weights = nnx.split(text.model)
    ours = harness(alone(graph), text, one_device(), 3, **sizes)
    ours.weights = nnx.to_pure_dict(weights), {}
    return ours


@pytest.fixture(scope="module")
def theirs(model):
    """lm-eval's `hf` model."""
    return HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=4)


def test_answers_and_metrics_equal_those_of_the_hf_model(ours, theirs, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(theirs, tasks=ALL, task_manager=manager, bootstrap_iters=0)
    assert_equal(ours, found)
    texts = [answer for answer in answers(ours) if isinstance(answer, str)]
    assert len(set(texts)) > 4 and len({text.count(" ") for text in texts}) > 2
    assert 0 < ours["results"]["tiny_choice"]["acc,none"] < 1


def test_greedy_continuations_are_recognized(model, theirs):
    """Contexts with the tokens that greedy decoding gives, and with another last token."""
    ours = loaded(model)
    asked = []
    for seed in range(1, 4):
        context = ours.tok_encode(some_text(random.Random(seed), seed))
        given = torch.tensor([context])
        made = theirs.model.generate(given, max_new_tokens=4, do_sample=False)[0].tolist()
        more = made[len(context) :]
        asked += [(("", ""), context, more), (("", ""), context, [*more[:-1], more[-1] ^ 1])]
    found = ours._loglikelihood_tokens(asked)
    expected = theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False] * 3
    assert ours._scores._cache_size() == 1  # two batches, one program
    for a, b in zip(found, expected, strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-4) and a[1] == b[1]


def test_texts_are_scored_in_windows_as_long_as_is_asked(model):
    """The windows alone are shorter than the positions of the model; contexts are not cut there."""
    theirs = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=4, max_length=32)
    requests = [SimpleNamespace(args=(some_text(random.Random(n), n),)) for n in (1, 20, 50)]
    ours = loaded(model, window=32)
    found = ours.loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, True), rel=1e-4)
    assert found != pytest.approx(loaded(model).loglikelihood_rolling(requests), rel=1e-4)
    assert ours.max_length == LENGTH


def test_texts_are_encoded_as_by_the_hf_model_where_texts_begin_with_a_token(model, tmp_path):
    path = str(shutil.copytree(model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    begin = {
        "single": "<|im_start|> $A",
        "special_tokens": [("<|im_start|>", tokenizer.bos_token_id)],
    }
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**begin)
    tokenizer.save_pretrained(path)
    ours, hf = loaded(path), HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=1)
    assert ours.tok_encode("a b")[0] == ours.prefix_token_id == tokenizer.bos_token_id
    for text in ("a b", "", " a", "<|im_start|>user\na<|im_end|>", "a<|im_start|>"):
        assert ours.tok_encode(text) == hf.tok_encode(text)
        for add in (False, True):
            assert ours.tok_encode(text, add) == hf.tok_encode(text, add)
    asked = [SimpleNamespace(args=pair) for pair in (("", " a"), ("<|im_start|>user", " a b"))]
    for a, b in zip(ours.loglikelihood(asked), hf.loglikelihood(asked), strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-4)


def test_a_special_token_as_stop_string_ends_a_text(model, theirs, tmp_path):
    """One that the greedy text has becomes special, so that the decoded text no longer has it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = "return None for a list"
    given = torch.tensor([tokenizer(prompt).input_ids])
    made = theirs.model.generate(given, max_new_tokens=24, do_sample=False)[0, given.shape[1] :]
    names = tokenizer.convert_ids_to_tokens(made.tolist())
    stop = next(n for n in names[4:] if n.isascii() and n not in names[:4] and n not in prompt)
    shutil.copytree(model, tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": [stop]})
    tokenizer.save_pretrained(tmp_path / "model")
    kwargs = {"until": [stop, "never"], "max_gen_toks": 24, "do_sample": False}
    asked = [SimpleNamespace(args=(prompt, kwargs))]
    path = str(tmp_path / "model")
    hf = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=1)
    expected = hf.generate_until(asked, disable_tqdm=True)
    whole = tokenizer.decode(made, skip_special_tokens=True)
    assert expected[0] and len(expected[0]) < len(whole)
    assert loaded(path).generate_until(asked) == expected


def test_the_metrics_of_groups_and_filters_are_known_before_an_evaluation(
    model, tasks, monkeypatch
):
    def own(**keys):  # reading lm-eval's own takes seconds
        return TaskManager(**keys | {"include_defaults": False})

    monkeypatch.setattr("jaxllm.tasks.loading.TaskManager", own)
    both = ["tiny_group", "tiny_filters"]
    asked = Tasks(both, include_path=str(tasks), limit=1)
    assert asked.names()["tiny_group"]["acc"] == 1  # higher is better
    low = Tasks(["tiny_ppl"], include_path=str(tasks), limit=1).names()["tiny_ppl"]
    assert {*low.values()} == {0} and len(low) == 2
    known = {name: set(row) for name, row in asked.names().items()}
    filtered = {"exact_match,a", "exact_match,b"}
    assert known == {"tiny_group": {"acc"}, "tiny_filters": filtered}
    ours = loaded(model)
    found = asked.metrics(ours, *ours.weights)
    assert {name: set(row) for name, row in found.items()} == known


MESHES = [{"fsdp": 4, "tensor": 2}]
MESHES += [pytest.param({"fsdp": 2, "context": 4}, marks=pytest.mark.sweep)]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_answers_over_a_mesh_equal_those_of_one_device(model, tasks, axes):
    options = {"include_path": str(tasks), "limit": 3, "batch_size": 8}
    over = make_mesh(MeshSection(**axes))
    few = ["tiny_text"]  # a run scores over eight devices below
    found = evaluate_tasks(model, few, mesh=over, **options)
    assert_equal(found, evaluate_tasks(model, few, mesh=one_device(), **options))


def test_batches_have_few_widths():
    found = [width(n) for n in range(1, 4097)]
    assert sorted(set(found)) == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert all(n <= w <= max(64, 2 * n) for n, w in enumerate(found, 1))
    assert width(65, 48) == 144


# ---- the command


def test_the_command_prints_the_table_and_writes_the_answers(model, tasks, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["eval", "--model", model, "--tasks", "tiny_choice,tiny_ppl", "--limit", "2"]
    words += ["--include_path", str(tasks)]
    assert main([*words, "--output", str(out), "--json"]) == 0
    printed, found = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert len(found.pop("samples")["tiny_choice"]) == 2
    assert printed == found and printed["n-shot"] == {"tiny_choice": 0, "tiny_ppl": 0}
    assert printed["results"]["tiny_choice"]["acc_stderr,none"] != "N/A"
    shown = table(printed)
    assert "|tiny_choice|" in shown and "|acc_norm" in shown and "bits_per_byte" in shown


def test_prompts_are_rendered_with_the_chat_template(model, tasks):
    options = {"include_path": str(tasks), "limit": 2, "mesh": one_device(), "num_fewshot": 1}
    found = evaluate_tasks(model, ["tiny_shots"], chat=True, **options)
    prompt = found["samples"]["tiny_shots"][0]["arguments"][0][0]
    assert prompt.count("<|im_start|>user") == 2 and prompt.endswith("<|im_start|>assistant\n")


def test_a_chat_template_may_refuse_a_system_message_but_not_the_others(model):
    ours = loaded(model)
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    ours.tokenizer.chat_template = no_system + CHAT
    system, user = {"role": "system", "content": "x"}, {"role": "user", "content": "why"}
    assert ours.apply_chat_template([system, user]) == ours.apply_chat_template([user])
    ours.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="chat template refuses .*: roles must alternate"):
        ours.apply_chat_template([user])


def test_mistakes_of_the_command_are_one_line(model, tasks, tmp_path, capsys):
    base = ["eval", "--model", model]
    refused(capsys, base, "--data FILE", "--tasks TASK")
    refused(capsys, [*base, "--data", "x.txt", "--limit", "3"], "--limit requires --tasks")
    asked = [*base, "--tasks", "x", "--output"]
    refused(capsys, [*asked, str(tmp_path)], "--output", "is a directory")
    refused(capsys, [*asked, str(tmp_path / "gone" / "x.json")], "--output", "no such directory")
    ours = [*base, "--include_path", str(tasks), "--tasks"]
    refused(capsys, [*ours, "tiny_text", "--max_length", "20"], "max_gen_toks 24", "20 tokens")
    metric = {"metric": "acc", "aggregation": "meen", "higher_is_better": True}
    record, keys = {"q": "a", "a": "b"}, {"doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    task(tmp_path, "odd", [record], output_type="loglikelihood", metric_list=[metric], **keys)
    odd = [*base, "--include_path", str(tmp_path), "--tasks", "odd"]
    refused(capsys, odd, "the task odd", "no such aggregation of acc")
    task(tmp_path, "gone", [], output_type="multiple_choice", dataset_path="json")
    (tmp_path / "gone.jsonl").unlink()
    mine = [*base, "--include_path", str(tmp_path), "--tasks", "gone"]
    refused(capsys, mine, "gone: cannot be loaded", "gone.jsonl")


def test_without_the_package_the_extra_is_named(model, capsys, monkeypatch):
    monkeypatch.setattr("jaxllm.tasks.find_spec", lambda name: None)
    refused(capsys, ["eval", "--model", model, "--tasks", "x"], "lm_eval", "jaxllm[eval]")


# ---- what is not run

EVIL = "def run(*args):\n    raise SystemExit('run')\nrun()\n"


def test_no_code_of_a_task_file_is_run(tasks, tmp_path):
    (tmp_path / "utils.py").write_text(EVIL)
    file = tmp_path / "mine.yaml"
    base = (tasks / "tiny_choice.yaml").read_text().replace("task: tiny_choice", "task: mine")

    def load(text: str, *words: str) -> None:
        file.write_text(text)
        with pytest.raises(ValueError) as error:
            Tasks(["mine"], include_path=str(tmp_path))
        assert all(word in str(error.value) for word in words), error.value

    load(base + "process_docs: !function utils.run\n", "mine.yaml", "!function")
    load("task: mine\nclass: !function utils.run\n", "mine.yaml", "!function")
    load(base + "x: !!python/object/apply:os.system [exit]\n", "mine.yaml", "not a YAML file")
    load(base.replace("metric: acc_norm", f"metric: {tmp_path}/utils.py"), "the metric", "utils.py")
    load(base.replace("metric: acc\n", "metric: acc\n  hf_evaluate: true\n"), "the metric acc")
    load(base + "unsafe_code: true\n", "mine", "code that models write")
    # lm-eval's own function runs code of the dataset and of the model.
    base_file = Path(lm_eval.__file__).parent / "tasks/cruxeval/cruxeval_common_yaml"
    assert "unsafe_code: true" in base_file.read_text()
    unlocked = f"include: {base_file}\nunsafe_code: false\n"
    load(base + unlocked, "mine.yaml", "unsafe_code", "remove it")
    load("group: mine\ntask: [{task: humaneval, unsafe_code: false}]\n", "mine.yaml", "unsafe_code")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "base.txt").write_text("process_docs: !function utils.run\n")
    load(base + f"include: {tasks / 'tiny_ppl.yaml'}\n", "include", "outside")
    load(base + "include: elsewhere/base.txt\n", "base.txt", "!function")


def test_templates_reach_no_python_and_random_numbers_continue(model, tasks, tmp_path):
    base = (tasks / "tiny_choice.yaml").read_text().replace("task: tiny_choice", "task: mine")
    attack = '{{ "".__class__.__mro__[1].__subclasses__() }}'
    (tmp_path / "mine.yaml").write_text(base.replace("{{q}}", attack))
    with pytest.raises(ValueError, match="__class__.* unsafe"):
        evaluate_tasks(model, ["mine"], include_path=str(tmp_path), mesh=one_device())
    random.seed(7)
    np.random.seed(7)
    expected = random.random(), np.random.rand()
    random.seed(7)
    np.random.seed(7)
    with restricted():
        random.random()
        np.random.rand()
    assert (random.random(), np.random.rand()) == expected


# ---- in a run


def flags(tasks) -> list[str]:
    asked = ["--eval.tasks", "tiny_choice", "tiny_high", "--eval.tasks_path", str(tasks)]
    asked += ["--eval.tasks_limit", "5", "--eval_every", "2", "--steps", "4"]
    return [*asked, "--eval.metric", "tiny_high/bits_per_byte", "--log.progress", "false"]


def test_a_run_evaluates_tasks_and_selects_its_best_by_one(project, tasks, capsys, monkeypatch):
    run = project / "tasks"
    with monkeypatch.context() as patch:
        patch.setattr("jaxllm.tasks.harness.track", None)  # would be a second bar
        shorter = ("--data.max_length", "8")  # than the 64 positions of the model
        assert main(arguments(project, "pretrain", "tasks", *flags(tasks), *shorter)) == 0
    assert "tiny_choice: acc " in capsys.readouterr().out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    assert [(one["step"], one["name"]) for one in evals] == [
        (step, name) for step in (2, 4) for name in ("tiny_choice", "tiny_high")
    ]
    bits = {one["step"]: one["bits_per_byte"] for one in evals if "bits_per_byte" in one}
    found = read_run(run)
    assert found["best"]["value"] == pytest.approx(bits[2]) and bits[2] > bits[4]  # as it says
    assert Checkpoints(run / "checkpoints").meta(4)["best_eval"]["step"] == 2
    assert found["evals"]["tiny_high"]["about"]["bits_per_byte"]
    final = str(run / "final")
    options = {"include_path": str(tasks), "limit": 5, "mesh": one_device()}
    after = evaluate_tasks(final, ["tiny_choice"], **options)["results"]
    assert after["tiny_choice"]["acc_norm,none"] == pytest.approx(evals[2]["acc_norm"])
    short, long = (
        evaluate_tasks(final, ["tiny_ppl"], max_length=n, **options)["results"]["tiny_ppl"]
        for n in (8, 64)
    )
    assert short["bits_per_byte,none"] == pytest.approx(bits[4], 1e-4)
    assert long["bits_per_byte,none"] != pytest.approx(bits[4], 1e-4)


def test_mistakes_in_a_run_are_found_before_it_starts(project, tasks, capsys):
    other = arguments(project, "pretrain", "other", *flags(tasks))
    refused(capsys, [*other, "--eval.metric", "tiny_choice/f1"], "tiny_choice/f1", "acc_norm")
    held_out = shutil.copy(project / "text.txt", project / "tiny_high.txt")
    refused(
        capsys, [*other, "--data.eval", str(held_out)], "both have tiny_high", "rename the file"
    )
    alone = arguments(project, "pretrain", "other", "--eval.tasks_limit", "5")
    refused(capsys, alone, "eval.tasks_limit requires eval.tasks")
    assert not (project / "other" / "metrics.jsonl").exists()


@pytest.mark.sweep
def test_two_processes_give_the_numbers_of_one(model, tasks, ours, tmp_path):
    out = tmp_path / "out.json"
    words = [sys.executable, "-m", "jaxllm", "eval", "--model", model]
    words += ["--tasks", *ALL, "--include_path", str(tasks)]
    run = launched(2, 2, [*words, "--batch_size", "4", "--output", str(out)])
    status, printed = finished(run)
    assert status == 0, printed
    assert printed.count("|tiny_choice|") == 1
    assert_equal(json.loads(out.read_text()), ours)


@pytest.mark.sweep
def test_two_processes_evaluate_files_and_one_prints(model, project, capsys):
    words = ["eval", "--model", model, "--data", str(project / "few.jsonl"), "--chat", "--json"]
    words += ["--max_length", "64"]
    assert main(words) == 0
    expected = json.loads(capsys.readouterr().out)
    status, printed = finished(launched(2, 2, [sys.executable, "-m", "jaxllm", *words]))
    assert status == 0, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("{")]
    assert json.loads(line) == pytest.approx(expected, rel=1e-5)
