"""Settings: what is refused, and that they survive JSON."""

import json

import pytest

from molae.config import ConvertConfig, field_help
from molae.errors import ArgumentError


@pytest.mark.parametrize(
    "config",
    [
        ConvertConfig(),
        ConvertConfig(size=0.3, group_size=8),
        ConvertConfig(method="molae", rank=4, group_size={"gate": 8, "up_proj": 2}),
    ],
)
def test_settings_survive_json(config):
    assert ConvertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"size": 0}, "0"),
        ({"size": 1.5}, "1.5"),
        ({"size": -0.1}, "-0.1"),
        ({"size": float("nan")}, "nan"),
        ({"size": "0.5"}, "'0.5'"),
        ({"size": True}, "True"),
        ({"rank": 0}, "0"),
        ({"rank": 2.0}, "2.0"),
        ({"rank": True}, "True"),
        ({"group_size": 0}, "0"),
        ({"max_memory": "much"}, "'much'"),
        ({"max_memory": 0}, "0"),
        ({"max_memory": "-1GB"}, "'-1GB'"),
        ({"max_memory": 1.5}, "1.5"),
        ({"group_size": "many"}, "'many'"),
        ({"group_size": {"router": 2}}, "'router'"),
        ({"group_size": {"gate": 0}}, "0"),
        ({"method": 3}, "3"),
    ],
)
def test_a_wrong_value_is_refused_and_shown(settings, shown):
    (name,) = settings
    with pytest.raises(ArgumentError) as caught:
        ConvertConfig(**settings)
    assert str(caught.value).startswith(name)
    assert shown in str(caught.value)


def test_unknown_settings_and_other_versions_are_refused():
    with pytest.raises(ArgumentError, match=r"unknown settings \['colour'\]"):
        ConvertConfig.from_dict({"colour": "red"})
    with pytest.raises(ArgumentError, match=r"settings_version.*99"):
        ConvertConfig.from_dict({"settings_version": 99})


def test_short_names_of_types_are_taken():
    config = ConvertConfig(group_size={"down": 4, "gate": 8})
    assert config.group_size == {"gate_proj": 8, "down_proj": 4}
    assert config.group_size_of("gate_proj") == 8
    assert config.group_size_of("up_proj") is None
    assert ConvertConfig(group_size={}).group_size == "auto"


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({}, 0.75),
        ({"size": 0.5}, 0.5),
        ({"rank": 4}, 0.75),
        ({"group_size": 4}, 0.75),
        ({"rank": 4, "group_size": 4}, None),
        ({"rank": 4, "group_size": {"gate": 2}}, 0.75),
        ({"rank": 4, "group_size": {"gate": 2, "up": 4}}, None),
        ({"rank": 4, "group_size": 4, "size": 0.9}, 0.9),
    ],
)
def test_the_size_to_reach(settings, target):
    assert ConvertConfig(method="molae", **settings).target_size == target


def test_the_docstring_is_made_of_the_help_texts():
    for name in ("method", "size", "group_size", "rank"):
        assert field_help(ConvertConfig, name) in ConvertConfig.__doc__
    with pytest.raises(AttributeError):
        field_help(ConvertConfig, "colour")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("800mb", 8 * 10**8),
        ("4096", 4096),
        ("2k", 2000),
        (7, 7),
    ],
)
def test_memory_in_words(text, nbytes):
    config = ConvertConfig(max_memory=text)
    assert config.max_memory == nbytes
    assert ConvertConfig.from_dict(config.to_dict()) == config
