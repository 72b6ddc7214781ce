"""Claim: a recipe is read strictly, and what is wrong with it is one sentence that names the key."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import changed, content

from mull.app.recipe import EXAMPLES, SECTIONS, SHARED, Recipe, load_recipe, parse_recipe, recipe_schema
from mull.app.yaml_text import MAX_CHARACTERS, read_yaml

RHO1 = {"reference": "somewhere"}
CRITIC = {"pretrain": {"steps": 3}}
GRPO = {"reward": "arithmetic"}


@pytest.mark.parametrize("key", EXAMPLES)
def test_the_examples_of_what_belongs_under_a_key_do_belong_there(key: str) -> None:
    template, value = EXAMPLES[key]
    places = {"tags": "run", "arithmetic": "data", "programs": "data", "iterations": "loss"} | dict.fromkeys(
        ("architecture", "etd", "mtp"), "model"
    )
    section = {key: yaml.safe_load(template.format(value))}
    recipe = {"run": {"name": "a"}, "train": {"steps": 1}} | ({places[key]: section} if key in places else section)
    said = refusal(recipe)
    assert "belongs here" not in said
    assert "unknown key" not in said


def refusal(recipe: dict[str, Any]) -> str:
    try:
        parse_recipe(recipe)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train__peek_lr": 1e-4}, "unknown key train.peek_lr. Did you mean train.peak_lr?"),
        ({"data__lenght": 3}, "unknown key data.lenght. Did you mean data.length?"),
        (
            {"loss__iterations__maximun": 3},
            "unknown key loss.iterations.maximun. Did you mean loss.iterations.maximum?",
        ),
        ({"trian": {}}, "unknown key trian. Did you mean train?"),
        ({"run__zzz": 1}, "unknown key run.zzz. Known are name, out, tags."),
        ({"train__keep_last": 1}, "unknown key train.keep_last. Did you mean checkpoint.keep_last?"),
        ({"train__eval_every": 1}, "unknown key train.eval_every."),
        ({"model__mtp__heads": 2}, "unknown key model.mtp.heads."),
        ({"train__steps": "many"}, "train.steps='many': Input should be a valid integer"),
        (
            {"loss__iterations": 2},
            "loss.iterations=2: a section belongs here, such as iterations: {kind: fixed, maximum: 2}",
        ),
        ({"data": "file.txt"}, "data='file.txt': a section belongs here, such as data: {paths: [file.txt]}"),
        ({"data__paths": "file.txt"}, "data.paths='file.txt': a list belongs here, such as paths: [file.txt]"),
        ({"model": "DIR"}, "model='DIR': a section belongs here, such as model: {checkpoint: DIR}"),
        ({"model__mtp": 3}, "model.mtp=3: a section belongs here, such as mtp: {num_predict_tokens: 3}"),
        ({"model__etd": "7,4,5"}, "such as etd: {n_encoder_layers: 12, n_think_layers: 7, n_decoder_layers: 9}"),
        ({"train": "next-token"}, "train='next-token': a section belongs here, such as train: {steps: 100}"),
        ({"run__tags": ["a"]}, "run.tags=['a']: a section belongs here, such as tags: {team: mine}"),
        ({"tracking": True}, "tracking=True: a section of mlflow, uri, experiment belongs here"),
        ({"train__trainable": 3}, "train.trainable"),
        ({"train__max_seconds": 3}, "train: steps=6 and max_seconds=3.0: give exactly one"),
        ({"train__algo": "rho-wmtp"}, "train.algo: 'rho-wmtp' is not known. Did you mean rho1-wmtp?"),
        ({"model__checkpoint": "x"}, "model: give either checkpoint or architecture"),
        (
            {"model__architecture": {"model_type": "gpt2"}},
            "architecture.model_type='gpt2' is not supported; supported are llama",
        ),
        ({"data__vocab_size": 10}, "data.vocab_size=10: Input should be greater than or equal to 257"),
        ({"data__paths": []}, "data.paths=[]: Tuple should have at least 1 item"),
        ({"model__etd__n_think_layers": 0}, "model.etd.n_think_layers=0"),
        ({"tracking__uri": "http://x"}, "tracking: uri is MLflow's, and mlflow is false"),
        ({"data__format": "mbpp", "data__paths": None}, "data: format=mbpp needs paths"),
        ({"data__format": "mbpp", "data__max_bytes": 3}, "data: max_bytes are for texts, and format=mbpp reads tasks"),
        ({"data__format": "arithmetic"}, "data: format=arithmetic with arithmetic=None"),
        ({"data": {"arithmetic": {}}}, "data: format=text with arithmetic="),
        (
            {"data": {"format": "arithmetic", "arithmetic": {"operations": "/"}}},
            "operations='/' must be one or more of",
        ),
        (
            {"data": {"format": "arithmetic", "arithmetic": {}, "paths": ["x"]}},
            "data: format=arithmetic is generated and reads no paths",
        ),
        (
            {"data__held_out_paths": None, "data__held_out_split": "x", "data__paths": None},
            "data: held_out_split needs",
        ),
        (
            {"data__held_out_paths": None, "data__held_out_split": "x", "data__split": "x"},
            "held_out_split='x' is what is trained on",
        ),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared below
        parse_recipe(changed(content(tmp_path), **values))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train__algo": "rho1-wmtp"}, "train.algo=rho1-wmtp needs the section rho1"),
        ({"train__algo": "critic-wmtp"}, "train.algo=critic-wmtp needs the section critic"),
        ({"train__algo": "gradient-wmtp"}, "train.algo=gradient-wmtp needs the section gradient"),
        ({"train__algo": "grpo-wmtp"}, "train.algo=grpo-wmtp needs the section grpo"),
        ({"rho1": RHO1}, "the section rho1 belongs to train.algo=rho1-wmtp, but train.algo=next-token"),
        ({"train__algo": "rho1-wmtp", "rho1": RHO1, "critic": CRITIC}, "the section critic belongs to"),
        ({"train__algo": "rho1-wmtp", "rho1": {}}, "the key rho1.reference is missing"),
        ({"train__algo": "distill"}, "train.algo=distill needs the section distill"),
        ({"train__algo": "distill", "distill": {}}, "the key distill.teacher is missing"),
        (
            {"train__algo": "distill", "distill": {"teacher": "x", "cache": "y"}},
            "distill: cache='y' with top_k=None: give both, or neither",
        ),
        (
            {"train__algo": "distill", "distill": {"teacher": "x", "device": "gpu"}},
            "distill.device: 'gpu' must be cpu, cuda, or one GPU such as cuda:1",
        ),
        (
            {"train__algo": "distill", "distill": {"teacher": "x"}, "loss": {"control": "random"}},
            "loss.control is not read by train.algo=distill",
        ),
        (
            {"train__algo": "align", "align": {"teacher": "x"}, "train__trainable": "new"},
            "train.trainable is not read by train.algo=align, which trains the mixers of the aligned layers: leave it out",
        ),
        (
            {"train__algo": "align", "align": {"teacher": "x", "layers": [1, 1]}},
            "align: layers=[1, 1] names a layer twice",
        ),
        (
            {"train__algo": "critic-wmtp", "critic": {}, "data__format": "examples"},
            "the key critic.pretrain is missing",
        ),
        ({"train__algo": "critic-wmtp", "critic": CRITIC}, "needs tasks with right and wrong answers"),
        ({"train__algo": "gradient-wmtp", "gradient": {"mode": "alignment"}}, "mode alignment needs paths"),
        ({"train__algo": "gradient-wmtp", "gradient": {"paths": ["x"]}}, "mode=norm with paths="),
        ({"train__algo": "grpo-wmtp", "grpo": GRPO}, "grades answers to data.format=arithmetic, not text"),
        ({"train__algo": "grpo-wmtp", "grpo": {"reward": "arithmetics"}}, "Did you mean arithmetic?"),
        ({"train__algo": "grpo-wmtp", "grpo": {**GRPO, "kl_coef": 0.1}}, "the penalty needs one"),
        ({"model__mtp": {}}, "model.mtp is not read by train.algo=next-token"),
        ({"loss__heads": {"detach": True}}, "loss.heads is not read by train.algo=next-token"),
        ({"loss__control": "shuffled"}, "loss.control is not read by train.algo=next-token"),
    ],
)
def test_an_algorithm_has_its_sections_and_no_others(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared below
        parse_recipe(changed(content(tmp_path), **values))
    assert message in str(error.value)


def staged(tmp_path: Path, *stages: Any, **values: Any) -> dict[str, Any]:
    return {**changed(content(tmp_path), **values), "stages": list(stages)}


def test_a_stage_adds_keys_to_the_sections_at_the_top_or_replaces_them(tmp_path: Path) -> None:
    stages = (
        {"name": "warm", "train": {"trainable": "heads", "steps": 2}, "loss": {"heads": {"detach": True}}},
        {"train": {"algo": "rho1-wmtp"}, "data": {"length": 16}, "rho1": {"mode": "weighted"}},
    )
    recipe = parse_recipe(staged(tmp_path, *stages, train__algo="baseline-mtp", rho1=RHO1))
    first, second = recipe.schedule()
    assert (first.name, second.name) == ("warm", "stage-2")
    assert (first.train.steps, first.train.trainable, first.train.precision) == (2, "heads", "fp32")
    assert (second.train.steps, second.train.trainable, second.train.algo) == (6, "all", "rho1-wmtp")
    assert (first.data.length, second.data.length, second.data.batch_size) == (32, 16, 4)
    assert first.loss.iterations == second.loss.iterations
    assert (first.loss.heads.detach, second.loss.heads.detach) == (True, False)
    assert first.settings is None
    assert (second.settings.mode, second.settings.reference) == ("weighted", "somewhere")


def test_one_stage_is_the_recipe_itself(tmp_path: Path) -> None:
    recipe = parse_recipe(content(tmp_path))
    assert [stage.name for stage in recipe.schedule()] == ["stage-1"]
    assert "stages" not in recipe.parameters()
    assert recipe.parameters()["train"]["steps"] == 6


def test_the_critic_is_a_stage_of_its_own(tmp_path: Path) -> None:
    critic = {"pretrain": {"steps": 3, "corrupt": True}, "gamma": 0.9, "beta": 2.0}
    settings = {"algo": "critic-wmtp", "max_seconds": 5.0, "steps": None, "trainable": "heads", "seed": 7}
    recipe = changed(content(tmp_path), critic=critic, data__format="examples")
    recipe["train"] |= settings
    first, second = parse_recipe(recipe).schedule()
    assert (first.name, first.train.algo, first.train.steps, first.train.max_seconds) == (
        "critic",
        "value-head",
        3,
        None,
    )
    assert (first.train.peak_lr, first.train.seed, first.train.trainable) == (1e-3, 7, "all")
    assert (first.settings.gamma, first.settings.gae_lambda, first.settings.corrupt) == (0.9, 0.95, True)
    assert (second.train.max_seconds, second.train.trainable) == (5.0, "heads")


@pytest.mark.parametrize(
    ("stages", "values", "message"),
    [
        ([], {}, "stages is empty"),
        ([{"train": {"steps": 2}, "trian": {}}], {}, "unknown key stages.0.trian. Did you mean stages.0.train?"),
        ([{}, {"train": {"stesp": 2}}], {}, "unknown key stages.1.train.stesp. Did you mean stages.1.train.steps?"),
        ([{}, {}], {"train__stesp": 2}, "unknown key train.stesp. Did you mean train.steps?"),
        ([{}, {"train": {"steps": "x"}}], {}, "stages.1.train.steps='x': Input should be a valid integer"),
        ([{"train": {"max_seconds": 3}}], {}, "stages.0.train: steps=6 and max_seconds=3.0: give exactly one"),
        ([{"rho1": RHO1}], {}, "stages.0: the section rho1 belongs to train.algo=rho1-wmtp"),
        ([{"train": {"algo": "rho1-wmtp"}}], {}, "stages.0: train.algo=rho1-wmtp needs the section rho1"),
        ([{}, {}], {"rho1": RHO1}, "the section rho1 belongs to train.algo=rho1-wmtp, and no stage has that"),
        ([{"name": "a"}, {"name": "a"}, {}], {}, "the name a of a stage is taken"),
        ([{"name": "model"}, {}], {}, "the name model of a stage is taken"),
        ([{"name": "../x"}], {}, "stages.0.name='../x': String should match"),
        ([{}], {"model__mtp": {}}, "model.mtp is not read by train.algo=next-token"),
        ([{"train": {"trainable": "heads"}}], {}, "train.trainable=heads is not read by train.algo=next-token"),
        ([{"train": {"trainable": "trunk"}}], {}, "'trunk' must be one of all, heads, new, or a list of patterns"),
        ("all", {}, "stages='all': a list belongs here, such as stages: [{train: {steps: 100}}]"),
        ([3], {}, "stages.0=3: a section belongs here, such as stages: [{train: {steps: 3}}]"),
        (
            [{}, {"data": {"format": "arithmetic", "arithmetic": {}, "paths": None}}],
            {"data": {"length": 16}},
            "format=arithmetic is generated and reads no paths",
        ),
        (
            [{}, {"data": {"format": "arithmetic", "arithmetic": {}}}],
            {"data": {"length": 16}},
            "stages share a tokenizer",
        ),
    ],
)
def test_a_mistake_in_a_stage_is_named_where_it_is(
    tmp_path: Path, stages: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared below
        parse_recipe({**changed(content(tmp_path), **values), "stages": stages})
    assert message in str(error.value)
    assert "; " not in str(error.value), "one sentence"


def test_overrides_reach_into_stages(tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(staged(tmp_path, {"name": "a"}, {"train": {"steps": 3}})))
    recipe = load_recipe(file, ["stages.0.train.steps=2", "stages.1.train.peak_lr=1e-2", "train.seed=5"])
    assert [(s.train.steps, s.train.seed) for s in recipe.stages] == [(2, 5), (3, 5)]
    assert recipe.stages[1].train.peak_lr == 1e-2
    for override in ("stages.2.train.steps=2", "stages=3"):
        with pytest.raises(ValueError, match="stages"):
            load_recipe(file, [override])
    with pytest.raises(ValueError, match="ends in a list"):
        load_recipe(file, ["stages.x=3"])


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    recipe = content(tmp_path)
    del recipe["train"]
    with pytest.raises(ValueError, match="the key train is missing"):
        parse_recipe(recipe)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(content(tmp_path)))
    recipe = load_recipe(file, ["train.peak_lr=1e-4", "data.length=16", "loss.iterations={kind: fixed, maximum: 2}"])
    (stage,) = recipe.stages
    assert stage.train.peak_lr == 1e-4
    assert stage.data.length == 16
    assert stage.loss.iterations.kind == "fixed"
    for override, message in {
        "train.steps": "lacks a value",
        "train.steps.more=3": "goes through steps, which is a value",
        "train.steps=[": "--set train.steps=\\[ is not YAML",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_recipe(file, [override])


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no recipe at"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(ValueError, match="must hold sections such as run, model and train, but holds list"):
        load_recipe(written(tmp_path, "- 1\n"))
    with pytest.raises(ValueError, match="must hold sections such as run, model and train, but holds NoneType"):
        load_recipe(written(tmp_path, "\n"))
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(written(tmp_path, "a: [1"))
    with pytest.raises(ValueError, match="the key train.steps is given twice, in lines 2 and 4"):
        load_recipe(written(tmp_path, "train:\n  steps: 1\n  seed: 3\n  steps: 2\n"))


RECIPE = "run: {name: x}\nmodel:\n  checkpoint: y\ntrain:\n  steps: 3\n"


def test_numbers_are_read_as_everyone_writes_them(tmp_path: Path) -> None:
    text = RECIPE.replace("checkpoint: y", "architecture: {model_type: qwen3, rms_norm_eps: 1e-5, rope_theta: 1e+5}")
    architecture = load_recipe(written(tmp_path, text)).model.architecture
    assert architecture == {"model_type": "qwen3", "rms_norm_eps": 1e-5, "rope_theta": 1e5}
    assert read_yaml("b: -2.5E3", "here", ()) == {"b": -2500.0}
    assert load_recipe(written(tmp_path, RECIPE.replace("x}", "'1e5'}"))).run.name == "1e5"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3:20", "3:20"),
        ("0200", 200),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("off", "off"),
        ("True", True),
        ("~", None),
        ("-.INF", float("-inf")),
        ("2026-11-28", "2026-11-28"),
        ("0b11", "0b11"),
        ("!!float 3", 3.0),
        ("! 5", "5"),
        ("&a ! 5", "5"),
        ("!!str ${FIVE}", "5"),
        ("&a !!str ${FIVE}", "5"),
        ("${FIVE}", 5),
        ("&a ${FIVE}", 5),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVE", "5")
    found = read_yaml(f"key: {text}", "here", ())["key"]
    assert (found, type(found)) == (value, type(value))


def test_keys_are_texts() -> None:
    assert read_yaml("{1: a, 01: b, true: c, True: d, ~: e, null: f}", "here", ()) == {
        "1": "a",
        "01": "b",
        "true": "c",
        "True": "d",
        "~": "e",
        "null": "f",
    }
    assert read_yaml("a: &x 5\n*x : b\n", "here", ()) == {"a": 5, "5": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: &a {x: *a}", "has an alias in line 1 or below that stands inside what it stands for"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{k}: &{k} [{', '.join([f'*{before}'] * 9)}]\n" for before, k in zip("abcdefg", "bcdefgh", strict=True)
            ),
            "values once its aliases are written out",
        ),
        ("a: " + "x" * MAX_CHARACTERS, "characters, and a recipe at most"),
        ("[" * 5000, "nested too deeply"),
        ("seed: " + "9" * 5000, "is no whole number of at most 4,300 digits"),
        ("a: !!int x", "The tag tag:yaml.org,2002:int in line 1 does not fit its value"),
        ("!!bool x: 1", "in line 1 does not fit its value"),
        ("a: !!python/name:os.system {}", "in line 1 does not fit its value"),
        ("? [a]\n: b", "A key in line 1 is a list or a section"),
    ],
)
def test_files_that_would_hang_or_mean_something_else_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared below
        load_recipe(written(tmp_path, text))
    assert message in str(error.value)


def test_a_recipe_may_begin_with_a_byte_order_mark_and_must_be_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + RECIPE.encode())
    assert load_recipe(file).run.name == "x"
    file.write_bytes(RECIPE.encode() + b"# caf\xe9\n")
    with pytest.raises(ValueError, match=r"recipe.yaml is not UTF-8 in line 6"):
        load_recipe(file)
    file.write_bytes(b"a: x\n" * MAX_CHARACTERS)
    with pytest.raises(ValueError, match="characters, and a recipe at most"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.peak_lr", "true"),
        ("train.peak_lr", ".inf"),
        ("train.peak_lr", ".nan"),
        ("train.peak_lr", "1e6"),
        ("train.betas", "[true, 0.9]"),
        ("train.betas", "[0.9, 1.5]"),
        ("train.steps", "true"),
        ("train.steps", "1" + "0" * 30),
        ("train.max_seconds", ".inf"),
        ("train.seed", "4294967296"),
        ("train.seed", "-1"),
        ("train.accumulate", "100000000"),
        ("loss.iterations.maximum", "100000000"),
        ("model.etd.max_think_iterations", "100000000"),
        ("model.etd.n_think_layers", "100000000"),
        ("data.batch_size", "1000000000"),
        ("train.clip_norm", ".inf"),
        ("train.weight_decay", ".inf"),
        ("loss.heads.warmup_steps", "1" + "0" * 20),
    ],
)
def test_numbers_are_finite_and_bounded(tmp_path: Path, key: str, value: str) -> None:
    file = written(tmp_path, yaml.safe_dump(changed(content(tmp_path), train__algo="baseline-mtp")))
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        load_recipe(file, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layer", 4, "unknown key architecture.num_hidden_layer. Did you mean num_hidden_layers?"),
        ("dtype", "bf16", "unknown key architecture.dtype."),
        ("hidden_size", "32", "Field 'hidden_size' expected int, got str"),
        ("hidden_size", True, "Field 'hidden_size' expected int, got bool"),
        ("hidden_size", -3, "architecture.hidden_size=-3 must be a number from 1"),
        ("num_hidden_layers", 10**6, "architecture.num_hidden_layers=1000000 must be a number from 1 to 1,000"),
        ("rms_norm_eps", float("inf"), "architecture.rms_norm_eps=inf must be a number"),
        ("rope_parameters", {"rope_theta": 0.0}, "architecture.rope_parameters.rope_theta=0.0 must be a number"),
        ("attention_dropout", 1.0, "architecture.attention_dropout=1.0 must be below 1"),
        ("layer_types", ["x"], "layer_types"),
        ("pad_token_id", 10**6, "architecture.pad_token_id=1000000 is outside the vocabulary of 300 tokens"),
    ],
)
def test_an_architecture_has_the_fields_of_its_configuration_and_possible_values(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    recipe = changed(
        content(tmp_path), **{f"model__architecture__{field}": value, "model__architecture__vocab_size": 300}
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared below
        parse_recipe(recipe)
    assert message in str(error.value)
    assert str(error.value).startswith("model: ")


def test_environment_variables_stand_in_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULL_TEST_NAME", "night")
    monkeypatch.setenv("MULL_TEST_EMPTY", "")
    text = """
run:
  name: ${MULL_TEST_NAME}-${MULL_TEST_UNSET:-run}
  tags: {plain: &plain "$${HOME} costs 3 $", same: *plain, number: "${MULL_TEST_UNSET:-7}"}
model:
  checkpoint: "${MULL_TEST_EMPTY:-base}"  # not ${MULL_TEST_UNSET}
train:
  steps: &steps ${MULL_TEST_UNSET:-3}
  seed: *steps
  peak_lr: ${MULL_TEST_UNSET:-1e-4}
  betas: [0.9, "${MULL_TEST_UNSET:-0.99}"]
checkpoint:
  url: ${MULL_TEST_UNSET:-}
"""
    recipe = load_recipe(written(tmp_path, text), ["data.length=${MULL_TEST_UNSET:-64}"])
    assert recipe.run.name == "night-run"
    plain = "${HOME} costs 3 $"
    assert recipe.run.tags == {"plain": plain, "same": plain, "number": "7"}, "a quoted value stays text"
    assert recipe.model.checkpoint == "base"
    (stage,) = recipe.stages
    assert (stage.train.steps, stage.train.seed, stage.train.peak_lr) == (3, 3, 1e-4)
    assert stage.train.betas == (0.9, 0.99)
    assert recipe.checkpoint.url is None
    assert stage.data.length == 64


def test_a_variable_cannot_smuggle_in_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULL_TEST_NAME", "a\nseed: 3, {b: ${HOME}} # c")
    recipe = load_recipe(written(tmp_path, RECIPE.replace("{name: x}", "\n  name: ${MULL_TEST_NAME}")))
    assert recipe.run.name == "a\nseed: 3, {b: ${HOME}} # c"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "${MULL_TEST_UNSET}",
            "train.peak_lr reads the environment variable MULL_TEST_UNSET, which is not set: set it, or write "
            "${MULL_TEST_UNSET:-default}.",
        ),
        ("${1X}", "train.peak_lr: ${ must begin ${NAME} or ${NAME:-default}"),
        ("${X", "train.peak_lr: ${ must begin"),
    ],
)
def test_a_variable_without_a_value_is_named_with_its_key(tmp_path: Path, value: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared below
        load_recipe(written(tmp_path, RECIPE + f"  peak_lr: {value}\n"))
    assert message in str(error.value)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_recipe(written(tmp_path, RECIPE), [f"train.peak_lr={value}"])
    assert message in str(error.value)


def properties(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{section}.{name}": value
        for section, definition in schema["$defs"].items()
        for name, value in definition["properties"].items()
    }


def test_the_schema_explains_every_key() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == {*Recipe.model_fields, *SHARED}
    assert {"train", "loss", "rho1", "critic", "gradient", "grpo"} <= set(SHARED)
    assert set(SECTIONS) <= set(SHARED)
    assert [name for name, value in properties(schema).items() if not value.get("description")] == []
    assert properties(schema)["TrainSection.peak_lr"]["description"] == "Learning rate of AdamW after warm-up."
    assert "TrainSection.eval_every" not in properties(schema)
    json.dumps(schema)


def test_the_schema_allows_a_variable_wherever_one_is_read() -> None:
    for name, value in properties(recipe_schema()).items():
        choices = value.get("anyOf", [value])
        assert any(choice.get("type") == "string" and "enum" not in choice for choice in choices), name


def test_the_recipes_of_the_repository_are_valid() -> None:
    files = sorted((Path(__file__).parents[3] / "runs").glob("*.yaml"))
    assert files
    for file in files:
        load_recipe(file)


def test_the_place_of_a_run_is_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for out, place in {
        "~/a?b": tmp_path / "a?b",
        f"file://{tmp_path}/#%": tmp_path / "#%",
        "[x] y": Path("[x] y"),
    }.items():
        assert parse_recipe(changed(content(tmp_path), run__out=out)).run.out == place
    for key, value in {"run__out": "s3://bucket/x", "run__name": "../x", "checkpoint__url": "~no-such-user/x"}.items():
        with pytest.raises(ValueError, match=key.replace("__", r"\.")):
            parse_recipe(changed(content(tmp_path), **{key: value}))
