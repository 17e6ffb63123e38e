# SPDX-License-Identifier: Apache-2.0
"""Loading, merging and validating a config, and the messages of its errors."""

import json
import re
from datetime import date
from types import SimpleNamespace

import pytest

from jaxllm.config import (
    DataSection,
    EvalSection,
    LogSection,
    MeshSection,
    ModelSection,
    OptimSection,
    SaveSection,
    Source,
    TrainConfig,
    aliases,
    checks,
    from_dict,
    leaves,
    load_config,
    read_sources,
    to_dict,
    value_of,
)
from jaxllm.config.checks import check, recorded_config, resolve
from jaxllm.config.describe import json_schema


def load(*args, verb="pretrain", path=None):
    return load_config(verb, path, args)[0]


def refused(*args, verb="pretrain", path=None):
    with pytest.raises(ValueError) as error:
        load(*args, verb=verb, path=path)
    message = str(error.value)
    assert "\n" not in message
    return message


STREAMED = DataSection(train=(Source("a", streaming=True),), eval=(Source("b"),))
HELD_OUT = DataSection(train=(Source("a"),), eval_fraction=0.1)


def good(**changes):
    base = {"model": ModelSection(path="m"), "data": DataSection(train=(Source("d.txt"),))}
    return TrainConfig(**base | changes)


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


# ---- the file and the flags


def test_the_documentation_of_a_key_is_one_line():
    assert not [key for key, leaf in leaves().items() if "\n" in leaf.doc or "  " in leaf.doc]


def test_defaults_are_those_of_the_dataclasses():
    cfg, provenance = load_config("pretrain")
    assert cfg == TrainConfig()
    assert set(provenance) == set(leaves())
    assert provenance.pop("objective") == "the command"
    assert set(provenance.values()) == {"default"}


def test_flag_beats_file_beats_default_and_provenance_says_so(yaml):
    path = yaml("steps: 7\noptim:\n  learning_rate: 1e-3\n  clip: 0.5\n")
    cfg, provenance = load_config("sft", path, ["--optim.learning_rate", "2e-3"])
    assert (cfg.objective, cfg.steps, cfg.optim.learning_rate, cfg.optim.clip) == (
        "sft",
        7,
        2e-3,
        0.5,
    )
    assert provenance["steps"] == f"{path}:1"
    assert provenance["optim.clip"] == f"{path}:4"
    assert provenance["optim.learning_rate"] == "--optim.learning_rate"
    assert provenance["seed"] == "default"


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--optim.learning_rate=1e-4"], "optim.learning_rate", 1e-4),
        (["--optim.learning-rate", "1e-4"], "optim.learning_rate", 1e-4),
        (["--mesh.fsdp", "-1"], "mesh.fsdp", -1),
        (["--data.packing", "false"], "data.packing", False),
        (["--no-data.packing"], "data.packing", False),
        (["--overwrite"], "overwrite", True),
        (["--output_dir", "2024"], "output_dir", "2024"),
        (["--model.tokenizer", "null"], "model.tokenizer", None),
        (["--data.train", "a.txt", "b*.txt"], "data.train", (Source("a.txt"), Source("b*.txt"))),
        (["--data.train", "[{path: a, weight: 2}]"], "data.train", (Source("a", 2.0),)),
        (["--data.eval", "{path: a, split: test}"], "data.eval", (Source("a", split="test"),)),
        (["--model.overrides", "{hidden_size: 64}"], "model.overrides", {"hidden_size": 64}),
        (["--model.overrides.rope_theta", "1e4"], "model.overrides", {"rope_theta": 1e4}),
        (["--eval_every", "epoch"], "eval_every", "epoch"),
        (["--save.every", "7"], "save.every", 7),
        (["--eval.greater", "true"], "eval.greater", True),
        (["--no-eval.greater"], "eval.greater", False),
        (["--data.date", "2026-11-27"], "data.date", "2026-11-27"),
        (["--log.samples", "Once: upon", "def "], "log.samples", ("Once: upon", "def ")),
    ],
)
def test_flags_are_parsed_by_the_type_of_their_field(args, key, value):
    assert value_of(load(*args), key) == value


def test_yaml_reads_sources_in_every_form_and_hf_names_and_json(yaml):
    path = yaml("data:\n  train: [a.txt, {path: b.jsonl, weight: 2}]\n  eval: c.txt\nbf16: true\n")
    cfg = load(path=path)
    assert cfg.data.train == (Source("a.txt"), Source("b.jsonl", 2.0))
    assert cfg.data.eval == (Source("c.txt"),)
    assert cfg.model.compute_dtype == "bfloat16"
    path = yaml(json.dumps(to_dict(cfg)))
    assert load(path=path) == cfg


def test_the_home_folder_is_expanded_in_every_path(yaml, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = yaml("output_dir: ~/run\nmodel:\n  path: ~/m\ndata:\n  cache_dir: ~/c\n")
    cfg = load("--data.template=~/t.jinja", "--resume_from_checkpoint=~/run/9", path=path)
    assert cfg.output_dir == f"{tmp_path}/run" and cfg.resume is True
    assert cfg.model.path == f"{tmp_path}/m" and cfg.data.cache_dir == f"{tmp_path}/c"
    assert cfg.data.template == f"{tmp_path}/t.jinja"
    with pytest.raises(
        ValueError, match=r"output_dir is ~/x; ~ is not expanded here, write the full path"
    ):
        check(good(output_dir="~/x"))


def test_yaml_types_that_json_lacks_are_strings_or_refused(yaml):
    dates = load(path=yaml("model:\n  overrides: {day: 2020-01-01}\n")).model.overrides
    assert dates == {"day": "2020-01-01"}
    assert load("--model.overrides", "{day: 2020-01-01}").model.overrides == dates
    for tag in ("!!binary aGk=", "!!timestamp 2020-01-01", "!!set {a}"):
        assert "run.yaml:2: not YAML" in refused(path=yaml(f"model:\n  overrides: {{a: {tag}}}\n"))


def test_sources_of_a_flag_are_parsed_like_training_sources():
    found = read_sources(["a.txt", "{path: b, split: test}"], "--data")
    assert found == (Source("a.txt"), Source("b", split="test"))
    with pytest.raises(
        ValueError, match=r"--data: data\.eval\[0\]\.pth is not known; a source has"
    ):
        read_sources(["{pth: b}"], "--data")


def test_dotted_flags_extend_a_dict_of_the_file(yaml):
    path = yaml("model:\n  overrides: {a: 1, b: 2}\n")
    assert load("--model.overrides.b", "3", path=path).model.overrides == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optim:\n  learning_rat: 1\n",
            r"run\.yaml:2: unknown key optim\.learning_rat; did you mean optim\.learning_rate\?",
        ),
        ("optm:\n  clip: 1\n", r"run\.yaml:1: unknown key optm; did you mean optim\?"),
        ("learning_rates: 1\n", r"run\.yaml:1: .* did you mean learning_rate\?"),
        ("clip: 1\n", r"unknown key clip; did you mean optim\.clip\?"),
        ("optim: 3\n", r"run\.yaml:1: optim: 3 is not known; known: adamw_torch"),
        ("mesh: 8\n", r"run\.yaml:1: mesh must be a mapping, seen 8"),
        ("- a\n", r"run\.yaml:1: a config must be a mapping"),
        ("steps: 1\nsteps: 2\n", r"run\.yaml:2: steps is given twice"),
        ("steps: [1\nseed: 2\n", r"run\.yaml:2: not YAML"),
        ("steps: many\n", r"run\.yaml:1: steps is 'many'; it should be a valid integer"),
        ("steps: true\n", r"run\.yaml:1: steps needs a value, seen true"),
        (
            "optim:\n  schedule: cosin\n",
            r"run\.yaml:2: optim\.schedule is 'cosin'; it should be 'cosine', ",
        ),
        (
            "data:\n  train: [{pth: a}]\n",
            r"run\.yaml:2: data\.train\[0\]\.pth is not known; a source has path",
        ),
        ("data:\n  train: [{split: a}]\n", r"run\.yaml:2: data\.train\[0\]\.path is missing"),
        (
            "data:\n  train: [{path: a, weight: 0}]\n",
            r"data\.train\[0\]\.weight is 0; it should be greater than 0",
        ),
        ("seed: 2020-99-99\n", r"run\.yaml:1: seed is '2020-99-99'; it should be a valid integer"),
        ("seed: 0x_\n", r"run\.yaml:1: '0x_' is not a YAML value"),
        (
            "optim:\n  clip: .nan\n",
            r"run\.yaml:2: optim\.clip is nan; it should be a finite number",
        ),
        (
            "data:\n  train: [{path: a, weight: .inf}]\n",
            r"data\.train\[0\]\.weight is inf; it should be a finite number",
        ),
        (
            "log:\n  report_to: [5]\n",
            r"run\.yaml:2: log\.report_to\[0\] is 5; it should be 'wandb'",
        ),
        (
            "optim.clip: 1\noptim:\n  clip: 2\n",
            r"run\.yaml:3: optim\.clip is given twice; keep one",
        ),
        ("objective: sft\n", r"run\.yaml:1: objective is 'sft'; run `jaxllm sft`"),
    ],
)
def test_mistakes_in_the_file_name_the_line(yaml, text, message):
    assert re.search(message, refused(path=yaml(text)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--optim.learning_rat", "1"],
            "unknown flag --optim.learning_rat; did you mean --optim.learning_rate?",
        ),
        (["--learning-rat", "1"], "unknown flag --learning-rat; did you mean --learning_rate?"),
        (["--data.train.path", "1"], "--data.train.path; it belongs to a source of data.train"),
        (["--data.max_samples", "1"], "data.train: {path: PATH, max_samples: …}"),
        (["--steps"], "steps needs a value"),
        (["--data.train"], "data.train needs a value"),
        (["--steps", "1", "2"], "--steps takes one value, seen 1 2"),
        (["8", "--steps"], "unexpected argument '8'; write [CONFIG.yaml] first"),
        (
            ["--data.train", "a", "--data.train", "b"],
            "--data.train is given twice; give all its values after one --data.train",
        ),
        (
            ["--train_file", "a", "--train_file", "b"],
            "--train_file is given twice; give all its values after one --train_file",
        ),
        (["--model", "m"], "--model: model is a section with keys; did you mean --model.path?"),
        (["--data", "d"], "--data: data is a section with keys; did you mean --data.train?"),
        (["--mesh", "8"], "--mesh: mesh is a section with keys; --help lists them"),
        (["--partition", "gpu"], "unknown flag --partition; --help lists all keys"),
        (["--modle", "m"], "unknown flag --modle; did you mean --model.path?"),
        (
            ["--model.overrides", "3", "--model.overrides.a", "1"],
            "--model.overrides.a: overrides is 3, which has no entries",
        ),
        (["--optim.learning_rate", "inf"], "optim.learning_rate is 'inf'; it should be a finite"),
        (["--optim.learning_rate", "nan"], "optim.learning_rate is 'nan'; it should be a finite"),
        (["--learning_rate", ".nan"], "optim.learning_rate is nan; it should be a finite number"),
        (["--seed", "9" * 20], f"it should be less than or equal to {2**63 - 1}"),
        (["--seed", "-1"], "seed is -1; it should be greater than or equal to 0"),
        (["--steps", "9" * 20], f"it should be less than or equal to {2**31 - 1}"),
        (["--optim.b1", "1"], "optim.b1 is 1; it should be less than 1"),
        (
            ["--max_grad_norm", "-1"],
            "--max_grad_norm: optim.clip is -1; it should be greater than or equal to 0",
        ),
    ],
)
def test_mistakes_in_flags_name_the_flag(args, message):
    assert message in refused(*args)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope\.yaml: no such config file"):
        load_config("pretrain", "nope.yaml")
    with pytest.raises(FileNotFoundError, match=r"nope\.json: no such DeepSpeed file"):
        load("--deepspeed", "nope.json")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00binary")
    assert "not UTF-8 text" in refused(path=str(tmp_path / "run.yaml"))


# ---- the batch


@pytest.mark.parametrize(
    ("given", "devices", "wanted"),
    [
        ({"batch_size": 32}, 1, (32, 32)),
        ({"batch_size": 32}, 8, (32, 4)),
        ({"batch_size": 32, "micro_batch_size": 2}, 8, (32, 2)),
        ({"batch_size": 32, "micro_batch_size": 16}, 8, (32, 4)),
        ({"batch_size": 32, "accumulation": 2}, 8, (32, 2)),
        ({"batch_size": 0, "micro_batch_size": 16, "accumulation": 4}, 8, (512, 16)),
        ({"batch_size": 0, "micro_batch_size": 16}, 2, (32, 16)),
        ({"batch_size": 64, "micro_batch_size": 4, "accumulation": 2}, 8, (64, 4)),
    ],
)
def test_batch_is_resolved_for_the_devices(given, devices, wanted, tmp_path):
    cfg = resolve(TrainConfig(output_dir=str(tmp_path), **given), devices)
    assert (cfg.batch_size, cfg.micro_batch_size) == wanted
    assert resolve(cfg, devices) == cfg


@pytest.mark.parametrize(
    ("given", "devices", "message"),
    [
        (
            {"batch_size": 30},
            8,
            "batch_size 30 does not divide over 8 devices (data x fsdp x expert); use 24 or 32",
        ),
        ({"batch_size": 4}, 8, "use 8"),
        ({"batch_size": 32, "micro_batch_size": 3}, 8, "use one of 1, 2, 4"),
        (
            {"batch_size": 32, "accumulation": 3},
            8,
            "4 rows per device do not divide into accumulation 3",
        ),
        (
            {"batch_size": 32, "micro_batch_size": 16, "accumulation": 4},
            8,
            "batch_size 32 is not micro_batch_size 16 x accumulation 4 x 8 devices = 512",
        ),
    ],
)
def test_batches_that_do_not_divide_are_refused(given, devices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(TrainConfig(**given), devices)


def test_resuming_on_other_devices_keeps_the_batch_and_changes_accumulation(tmp_path):
    flags = {"output_dir": str(tmp_path), "batch_size": 0, "micro_batch_size": 4, "accumulation": 2}
    first = resolve(TrainConfig(**flags), 8)
    assert first.batch_size == 64
    (tmp_path / "config.json").write_text(json.dumps(to_dict(first)))
    assert not recorded_config(TrainConfig(**flags))  # nothing saved yet: a new run
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    again = resolve(TrainConfig(**flags), 4, recorded_config(TrainConfig(**flags)))
    assert (again.batch_size, again.micro_batch_size) == (64, 4)
    assert not recorded_config(TrainConfig(**flags, overwrite=True))


def test_a_resumed_run_keeps_the_date_of_its_first_day(tmp_path, monkeypatch):
    """So the tokens of a template that shows the date do not change on resume."""

    def on(day, **keys):
        today = SimpleNamespace(date=SimpleNamespace(today=lambda: date.fromisoformat(day)))
        monkeypatch.setattr(checks, "datetime", today)
        cfg = good(objective="sft", output_dir=str(tmp_path), **keys)
        return resolve(cfg, recorded=recorded_config(cfg)).data.date

    assert on("2026-11-27") == "2026-11-27"
    (tmp_path / "config.json").write_text(json.dumps({"data": {"date": "2026-11-27"}}))
    assert on("2026-11-28") == "2026-11-28"  # the run has no results yet
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert on("2026-11-29") == "2026-11-27"
    assert on("2026-11-29", overwrite=True) == "2026-11-29"
    given = DataSection(train=(Source("d.txt"),), date="2020-02-29")
    assert on("2026-11-29", data=given) == "2020-02-29"
    for torn in ("{", "[]"):
        (tmp_path / "config.json").write_text(torn)
        assert on("2026-11-29") == "2026-11-29"


# ---- checking, dumping


def test_check_accepts_a_valid_config():
    check(good())
    check(good(optim=OptimSection(warmup=0.1), steps=5))
    check(
        good(
            objective="sft",
            data=DataSection(train=(Source("d"),), packing=False, eval_fraction=0.1),
        )
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelSection()}, "no model: give model.path"),
        ({"model": ModelSection(path="a", config="b")}, "are both given; keep one"),
        ({"model": ModelSection(path="a", overrides={"x": 1})}, "model.overrides"),
        (
            {"model": ModelSection(config="c/config.json")},
            "a file without a tokenizer; set model.tokenizer",
        ),
        ({"data": DataSection()}, "no data: give data.train"),
        (
            {"data": DataSection(train=(Source("a"),), eval=(Source("b"),), eval_fraction=0.1)},
            "keep one",
        ),
        ({"data": DataSection(train=(Source("a"),), eval_fraction=1.0)}, "should be less than 1"),
        (
            {"data": DataSection(train=(Source("a"),), template="chatml")},
            "data.template is not used by pretrain; remove it",
        ),
        (
            {"objective": "sft", "data": DataSection(train=(Source("a"),), segment=False)},
            "data.segment",
        ),
        ({"eval_every": 5}, "eval_every requires data.eval"),
        (
            {"eval": EvalSection(metric="accuracy")},
            "eval.metric requires data.eval, data.eval_fraction or eval.tasks",
        ),
        ({"save": SaveSection(load_best=True)}, "save.load_best requires data.eval"),
        ({"data": HELD_OUT, "eval": EvalSection(patience=2)}, "eval.patience requires eval_every"),
        (
            {"data": HELD_OUT, "eval": EvalSection(min_delta=0.1)},
            "eval.min_delta requires eval.patience",
        ),
        (
            {"data": HELD_OUT, "save": SaveSection(load_best=True, keep_best=False)},
            "save.load_best requires save.keep_best",
        ),
        ({"objective": "grpo", "save": SaveSection(load_best=True)}, "not used by grpo"),
        ({"objective": "ppo", "eval": EvalSection(patience=2)}, "not used by ppo"),
        (
            {"data": STREAMED, "steps": 9, "eval_every": "epoch"},
            "eval_every is epoch, but a streamed",
        ),
        (
            {"data": STREAMED, "steps": 9, "save": SaveSection(every="epoch")},
            "save.every is epoch, but a streamed source has no known length; use steps",
        ),
        (
            {"data": STREAMED, "steps": 9, "log": LogSection(every="epoch")},
            "log.every is epoch, but a streamed",
        ),
        ({"data": DataSection(train=(Source("a"),), date="27.11.2026")}, "write it as YYYY-MM-DD"),
        ({"data": DataSection(train=(Source("a"),), date="20261127")}, "write it as YYYY-MM-DD"),
        ({"batch_size": 0}, "batch_size is 0, which requires micro_batch_size"),
        ({"batch_size": -1}, "batch_size is -1; it should be greater than or equal to 0"),
        ({"mesh": MeshSection(data=0)}, "mesh.data is 0; it must be 1 or more"),
        ({"mesh": MeshSection(data=-1)}, "mesh: only one axis can be -1"),
        ({"steps": 5, "optim": OptimSection(schedule="wsd", decay=6)}, "optim.decay is 6 steps"),
        ({"optim": OptimSection(schedule="cosin")}, "optim.schedule is 'cosin'"),
        (
            {"optim": OptimSection(learning_rate="1e-4")},
            "optim.learning_rate is '1e-4'; write 0.0001",
        ),
        (
            {"log": LogSection(report_to="wandb")},
            "log.report_to is 'wandb'; it should be a valid tuple",
        ),
    ],
)
def test_check_refuses(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(good(**changes))


def test_dump_and_load_are_inverse_through_json():
    cfg = good(mesh=MeshSection(tensor=2), model=ModelSection(config="c", overrides={"a": [1]}))
    assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_from_dict_refuses_unknown_keys_and_sections_that_are_not_mappings():
    with pytest.raises(ValueError, match=r"unknown key optim\.lr"):
        from_dict({"optim": {"lr": 1}})
    with pytest.raises(ValueError, match="optim must be a mapping, seen 3"):
        from_dict({"optim": 3})


def test_schema_describes_every_key_and_allows_what_yaml_allows():
    schema = json_schema()
    for leaf in leaves().values():
        section, _, name = leaf.key.rpartition(".")
        part = schema["$defs"][f"{section.title()}Section"] if section else schema
        assert part["properties"][name]["description"] == leaf.doc
        assert part["additionalProperties"] is False
    for leaf in leaves().values():
        section, _, name = leaf.key.rpartition(".")
        if isinstance(leaf.default, tuple):
            part = schema["$defs"][f"{section.title()}Section"] if section else schema
            part = part["properties"][name]
            item, array = part["anyOf"][0], part["anyOf"][-1]
            assert item["type"] in ("string", "number", "integer") and "type" not in part
            assert array["type"] == "array" and item in array["items"]["anyOf"]
    assert {"type": "string"} in schema["properties"]["optim"]["anyOf"]
    assert schema["properties"].keys() >= {name for name in aliases.NAMES if "." not in name}
    assert schema["properties"]["label_smoothing_factor"]["enum"][:2] == (None, False)
    assert schema["$defs"]["OptimSection"]["properties"]["b1"]["exclusiveMaximum"] == 1
    assert "learning_rate" in schema["properties"]
