"""The configuration, out of YAML files and command lines."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config import (
    AppConfig,
    DurabilityConfig,
    EngineConfig,
    FrameConfig,
    ModelConfig,
    PriorityConfig,
    SessionConfig,
    load_config,
    load_models,
)
from serve_app.errors import ConfigError, InvalidInput


def yaml_of(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text) or {})


FULL = """
model:
  name: rnn
  cell: gru
  hidden: 512
  weights: null
engine:
  device: cpu
  slots: 300
session:
  idle_timeout_s: 60
  nan: pass
frame:
  answer_within_s: 0.5
replicas: 2
num_gpus: 0.5
"""
FULL_FLAT = {
    "model": "rnn",
    "model.cell": "gru",
    "model.hidden": "512",
    "model.weights": "none",
    "engine.device": "cpu",
    "engine.slots": "300",
    "session.idle_timeout_s": "60",
    "session.nan": "pass",
    "frame.answer_within_s": "0.5",
    "replicas": "2",
    "num_gpus": "0.5",
}


def test_nothing_gives_the_defaults() -> None:
    config = load_config({})
    assert config.model.name == ModelConfig().name
    assert dataclasses.replace(config, model=ModelConfig()) == AppConfig()
    assert (config.engine, config.session, config.frame) == (EngineConfig(), SessionConfig(), FrameConfig())


def test_yaml_and_command_line_give_the_same_tree() -> None:
    config = load_config(yaml_of(FULL))
    assert config == load_config(FULL_FLAT)
    assert config.model.name == "rnn"
    assert config.model.options.items() >= {"cell": "gru", "hidden": 512, "weights": None}.items()
    assert config.engine == EngineConfig(device="cpu", slots=300)
    assert config.session == SessionConfig(idle_timeout_s=60.0, nan="pass")
    assert config.frame == FrameConfig(answer_within_s=0.5)
    assert (config.replicas, config.num_gpus) == (2, 0.5)


@pytest.mark.parametrize(
    "args",
    [
        {"model": "rnn", "model.hidden": "512"},
        {"model.hidden": "512", "model": "rnn"},
        {"model.name": "rnn", "model.hidden": 512},
        {"model": {"name": "rnn"}, "model.hidden": "5_12"},
        {"model": {"name": "rnn", "hidden": 512}},
        {"model": {"name": "rnn", "hidden": "512"}, "engine": None, "session": {}},
    ],
)
def test_every_way_to_give_a_model(args: dict[str, Any]) -> None:
    assert load_config(args) == load_config(yaml_of("model: {name: rnn, hidden: 512}"))


def test_a_model_without_options() -> None:
    assert load_config({"model": "silero_vad"}) == load_config({"model": {"name": "silero_vad"}}) == load_config({})
    assert load_config({"model": None}) == load_config({})


def test_options_without_a_name_are_those_of_the_default_model() -> None:
    assert load_config({"model.sample_rate": "8000"}).model.options["sample_rate"] == 8000


def test_nested_and_flat_keys_mix() -> None:
    config = load_config({"engine": {"slots": 300}, "engine.threads": "2", "session.nan": "pass"})
    assert config == load_config({"engine": {"slots": 300, "threads": 2}, "session": {"nan": "pass"}})


def test_a_class_of_ones_own_keeps_its_options_as_they_are() -> None:
    config = load_config({"model": "my.models:Decoder", "model.size": "3", "model.more.depth": "x"})
    assert config.model == ModelConfig("my.models:Decoder", {"size": "3", "more": {"depth": "x"}})


def test_the_arguments_are_left_alone() -> None:
    args = yaml_of(FULL)
    load_config(args)
    assert args == yaml_of(FULL)


# What is wrong, and what of the message has to be there: the key, the value, the way out.
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"replica": 2}, ["replica is not a setting", "did you mean replicas?", "model, engine, session, frame"]),
    ({"slots": 2}, ["slots is not a setting", "did you mean engine.slots?"]),
    ({"engine.slot": "2"}, ["engine.slot is not a setting", "did you mean engine.slots?", "max_batch_size"]),
    ({"sesion": {"nan": "pass"}}, ["sesion is not a setting", "did you mean session?"]),
    ({"frame": {"max_byte": 3}}, ["frame.max_byte is not a setting", "did you mean frame.max_bytes?"]),
    ({"model": "rnn", "model.hiden": "3"}, ["model.hiden is not a setting", "did you mean model.hidden?", "layers"]),
    ({"model.hidden": "3"}, ["model.hidden is not a setting", "sample_rate"]),
    ({"model": {"name": "rnn", "options": {"hidden": 3}}}, ["model.options is not a setting", "hidden"]),
    ({"model": "rrn"}, ["rrn", "did you mean rnn?"]),
    ({"model": ""}, ["not known", "rnn, silero_vad"]),
    ({"model": 3}, ["model.name is 3", "text"]),
    ({"model": ["rnn"]}, ["model.name is ['rnn']", "text"]),
    ({"model": {"name": None}}, ["model.name is None", "text"]),
    ({"model": "rnn", "model.name": "rnn"}, ["model.name is given twice", "'rnn'", "keep one"]),
    ({"model": "rnn", "model.hidden": "big"}, ["model.hidden is 'big'", "a whole number"]),
    ({"model": "rnn", "model.cell": "elman"}, ["model.cell is 'elman'", "relu, tanh, lstm, gru"]),
    ({"model": "rnn", "model.hidden": "0"}, ["model.hidden is 0", "the least is 1"]),
    ({"model.sample_rate": "44100"}, ["model.sample_rate is '44100'", "16000, 8000"]),
    ({"engine": 3, "engine.slots": 4}, ["engine", "(3)", "keep one"]),
    ({"engine": {"slots": 3}, "engine.slots": "4"}, ["engine.slots is given twice", "3", "'4'", "keep one"]),
    ({"engine": 3}, ["engine is 3", "a section with device, slots"]),
    ({"engine": {"slots": 3.5}}, ["engine.slots is 3.5", "a whole number"]),
    ({"engine": {"slots": True}}, ["engine.slots is True", "a whole number"]),
    ({"engine.slots": "many"}, ["engine.slots is 'many'", "a whole number"]),
    ({"engine.slots": "0"}, ["engine.slots is 0", "the least is 1"]),
    ({"session": {"nan": False}}, ["session.nan is False", "refuse, pass", "quotes"]),
    ({"session.nan": "drop"}, ["session.nan is 'drop'", "refuse, pass"]),
    ({"session.idle_timeout_s": "0"}, ["session.idle_timeout_s is 0.0", "more than 0"]),
    ({"durability.keep_s": "0"}, ["durability.keep_s is 0.0", "more than 0"]),
    ({"durability.max_bytes": "-1"}, ["durability.max_bytes is -1", "the least is 0"]),
    ({"durability.url": "x"}, ["durability.url is not a setting", "store, max_bytes, keep_s"]),
    ({"session.idle_timeout_s": "nan"}, ["session.idle_timeout_s is 'nan'", "a number"]),
    (
        {"session.max_segment_timesteps": "5000"},
        ["session.max_segment_timesteps=5000", "session.max_window_timesteps=4096"],
    ),
    ({"frame.max_bytes": "100"}, ["frame.max_bytes is 100", "the least is 65536"]),
    ({"replicas": 0}, ["replicas is 0", "the least is 1"]),
    ({"accelerator_type": "L4"}, ["accelerator_type is 'L4'", "num_gpus is 0", "give num_gpus: 1"]),
    ({"replicas": "auto"}, ["replicas is 'auto'", "a whole number"]),
    ({"engine..slots": "1"}, ["'engine..slots'", "section.name"]),
]


@pytest.mark.parametrize(("args", "words"), WRONG, ids=[str(args) for args, _ in WRONG])
def test_an_error_names_key_value_and_way_out(args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(args)
    assert [word for word in words if word not in caught.value.message] == [], caught.value.message


def test_the_whole_has_to_be_a_section() -> None:
    with pytest.raises(ConfigError, match=r"the configuration is \['a'\], expected a section"):
        load_config(["a"])  # type: ignore[arg-type]


def test_a_config_error_is_invalid_input() -> None:
    """So that the edges answer 400."""
    assert issubclass(ConfigError, InvalidInput)
    assert ConfigError.http == 400


@pytest.mark.parametrize("section", ["model", "engine", "session", "frame"])
def test_the_tree_never_changes(section: str) -> None:
    config = load_config({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, section, None)
    name = dataclasses.fields(getattr(config, section))[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(getattr(config, section), name, None)


# Several models.

SEVERAL = """
engine: {threads: 2, slots: 64}
durability: {store: /shared}
replicas: 3
models:
  vad:
    model: silero_vad
    engine: {slots: 32}
  rnn:
    model: {cell: gru}
    replicas: 1
  silero_vad:
"""
SEVERAL_FLAT = {
    "engine.threads": "2",
    "engine": {"slots": 64},
    "durability.store": "/shared",
    "replicas": "3",
    "models.vad.model": "silero_vad",
    "models.vad.engine.slots": "32",
    "models.rnn.model.cell": "gru",
    "models.rnn.replicas": "1",
    "models.silero_vad": None,
}


def test_several_models_each_with_a_tree_of_its_own() -> None:
    models = load_models(yaml_of(SEVERAL))
    assert models == load_models(SEVERAL_FLAT)
    assert list(models) == ["vad", "rnn", "silero_vad"]
    assert [config.model.name for config in models.values()] == ["silero_vad", "rnn", "silero_vad"]
    assert [config.model.served_name for config in models.values()] == list(models)
    assert [config.engine.slots for config in models.values()] == [32, 64, 64]
    assert [config.replicas for config in models.values()] == [3, 1, 3]
    assert {config.engine.threads for config in models.values()} == {2}
    assert {config.durability for config in models.values()} == {DurabilityConfig(store="/shared")}
    assert models["rnn"].model.options["cell"] == "gru"


def test_one_model_is_called_by_its_name() -> None:
    assert load_models({"model": "rnn"}) == {"rnn": load_config({"model": "rnn"})}
    assert list(load_models({"models.a.model": "my.models:Decoder"})) == ["a"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"models": {}}, ["models is {}", "models.vad.model=silero_vad"]),
        ({"models": ["rnn"]}, ["models is ['rnn']", "a section for each"]),
        ({"models.rnn.engine.slots": "4", "model": "rnn"}, ["model is given beside models", "models.NAME.model"]),
        ({"models.rnn.engine.slot": "4"}, ["models.rnn: engine.slot is not", "did you mean engine.slots?"]),
        ({"models.rnn.engine.slots": "0"}, ["models.rnn: engine.slots is 0", "the least is 1"]),
        ({"models.vda": None}, ["models.vda: model=vda is not known", "rnn, silero_vad"]),
        ({"models": {"rnn": 3}}, ["models.rnn: it is 3", "expected a section"]),
        ({"models": {"a/b": {"model": "rnn"}}}, ["a model called 'a/b'", "letters, digits, - and _"]),
        ({"models.rnn.durability.store": "/a"}, ["models.rnn: durability is the same", "move it to the top"]),
        ({"models.rnn.model": "rnn", "models.rnn.model.name": "rnn"}, ["models.rnn.model.name is given twice"]),
    ],
    ids=str,
)
def test_an_error_names_the_model(args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_models(args)
    assert [word for word in words if word not in caught.value.message] == [], caught.value.message


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_files_that_come_along_are_right(path: Path) -> None:
    (application,) = yaml.safe_load(path.read_text())["applications"]
    assert load_models(application["args"])


def test_a_model_with_batching_is_stateless() -> None:
    text = """
    models:
      own:
        model: my.models:Classifier
        batching: {max_batch_size: 8, preferred_batch_sizes: [2, 4], priorities: [{timeout_s: 1}, {on_timeout: delay}]}
      other: {model: my.models:Classifier, batching: {}}
      rnn:
    """
    models = load_models(yaml_of(text))
    own = models["own"].batching
    assert own is not None
    assert (own.preferred_batch_sizes, own.priorities[0]) == ((2, 4), PriorityConfig(timeout_s=1.0))
    assert own.priorities[1].on_timeout == "delay"
    assert models["other"].batching == load_config({"batching.dtype": "fp32", "model": "a:B"}).batching
    assert models["rnn"].batching is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"model": "rnn", "batching.max_batch_size": "4"}, ["batching is given", "model=rnn has a state"]),
        ({"batching.preferred_batch_sizes": "4,65"}, ["has 65", "batching.max_batch_size=64"]),
        ({"batching.max_padding": "1"}, ["batching.max_padding is 1.0", "less than 1"]),
        ({"batching.graph_lengths": "64,32"}, ["batching.graph_lengths is [64, 32]", "must rise"]),
        ({"batching.default_priority": "2"}, ["batching.default_priority is 2", "batching.priorities has 1"]),
        ({"batching": {"priorities": [{"timeout": 1}]}}, ["batching.priorities[0].timeout is not", "timeout_s"]),
        ({"batching.max_queue_delay": "1"}, ["batching.max_queue_delay is not", "max_queue_delay_s"]),
        ({"models.a.model": "rnn", "batching.instances": "1"}, ["batching is given beside models"]),
    ],
    ids=str,
)
def test_an_error_in_batching_is_named(args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_models(args if "model" in args or "models.a.model" in args else {"model": "a:B", **args})
    assert [word for word in words if word not in caught.value.message] == [], caught.value.message


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"engine.max_pending_bytes": "-1"}, ["engine.max_pending_bytes is -1", "the least is 1"]),
        ({"engine.max_retained_bytes": "0"}, ["engine.max_retained_bytes is 0", "the least is 1"]),
        ({"session.checkpoint_timesteps": "12289"}, ["is 12289", "the most is 12288", "max_window_timesteps=4096"]),
        (
            {"session.checkpoint_timesteps": "8193", "session.max_window_timesteps": "100000"},
            ["session.checkpoint_timesteps is 8193", "the most is 8192", "0 is never"],
        ),
    ],
    ids=str,
)
def test_a_bound_that_nothing_could_keep_is_refused(args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(args)
    assert [word for word in words if word not in caught.value.message] == [], caught.value.message
