from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

import holdfast
from holdfast.defenses.registry import build_defense
from holdfast.errors import HoldfastError
from holdfast.experiments.recipe import load
from holdfast.runtime.documents import read_json, read_yaml, recipe_names
from holdfast.training import Strategy

RECIPES = Path(holdfast.__file__).parent / "recipes"
BOMB = "- &a [1, 1]\n" + "".join(f"- &{q} [{', '.join(['*' + p] * 9)}]\n" for p, q in itertools.pairwise("abcdefg"))
MINIMAL = {
    "title": "t", "model": {"name": "cnn"}, "pretrain": {"steps": 1}, "benign": {"data": "digits[0-4]"},
    "restricted": {"data": "digits[5-9]"}, "defense": {"name": "sophon"},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    def write(**change):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **change}, sort_keys=False))
        return str(path)

    return write


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_valid_at_every_scale(name):
    recipe = load(name)
    for scale in recipe.scales:
        load(name, scale=scale).resolved()
    assert recipe.about


def test_overrides_win_over_the_scale_over_the_file(recipe):
    path = recipe(audit={"seeds": 5, "shots": 4}, scales={"smoke": {"audit.seeds": 2, "audit.shots": 3}})
    assert load(path).audit.seeds == 5
    loaded = load(path, scale="smoke", overrides=["audit.seeds=1", "defense.learning_rates=[1e-3]"], seed=9)
    assert (loaded.audit.seeds, loaded.audit.shots, loaded.seed) == (1, 3, 9)
    assert loaded.resolved()["defense"]["learning_rates"] == (0.001,)


def test_resolved_holds_every_default(recipe):
    resolved = load(recipe()).resolved()
    assert resolved["defense"]["iterations"] == 800
    assert resolved["audit"]["thresholds"]["tolerance"] == 0.02
    assert "scales" not in resolved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defence": {}}, "Unknown key 'defence': did you mean 'defense'"),
        ({"audit": {"bugdets": [0, 1]}}, "did you mean 'audit.budgets'"),
        ({"model": {"nam": "cnn"}}, "model.name is missing"),
        ({"model": {"name": "nets.py:make"}}, "'nets.py:make' is made by code, and recipes never run code"),
        ({"audit": {"seeds": 0}}, "audit.seeds is 0"),
        ({"audit": {"seeds": "many"}}, "audit.seeds is 'many'"),
        ({"audit": {"budgets": [5, 10]}}, "ascending, the first 0"),
        ({"defense": {"name": "sofon"}}, "did you mean 'sophon'"),
        ({"defense": {"name": "sophon", "stepz": 3}}, "did you mean 'steps'"),
        ({"defense": {"name": "sophon", "steps": "few"}}, "steps is 'few'"),
        ({"defense": {"name": "sophon", "learning_rates": []}}, "^defense 'sophon': sophon: learning_rates is empty"),
        ({"defense": {}}, "Unknown defense 'None'"),
        ({"defense": {"name": ["x"]}}, r"Unknown defense .*x"),
        ({"scales": [1]}, "scales is .*expected a mapping of scales"),
        ({"scales": {"smoke": 3}}, "expected a mapping of scales"),
        ({"scales": {"smoke": {1: 2}}}, "expected a mapping of scales"),
        ({"scales": {3: {}}}, "expected a mapping of scales"),
        ({"threads": 10**9}, "threads is 1000000000"),
        ({"pretrain": {"optimizer": "sdg"}}, "Unknown optimizer 'sdg'"),
        ({"audit": {"seeds": True}}, "audit.seeds is true; expected a number"),
        ({"audit": {"budgets": [False, 5]}}, "audit.budgets.0 is false; expected a number"),
        ({"defense": {"name": "sophon", "steps": True}}, "steps is true; expected a number"),
        ({"audit": {"thresholds": {"tolerence": 0.1}}}, "did you mean 'audit.thresholds.tolerance'"),
    ],
)
def test_bad_recipes(recipe, change, message):
    with pytest.raises(HoldfastError, match=message):
        load(recipe(**change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": ["audit.seeds"]}, "has no '='"),
        ({"overrides": ["audit.sedes=1"]}, "did you mean 'audit.seeds'"),
        ({"overrides": ["title.x=1"]}, "goes through 'title'"),
        ({"overrides": ["audit.seeds=[1"]}, "not valid YAML"),
        ({"overrides": ["audit.seeds=2020-13-45"]}, "audit.seeds is '2020-13-45'"),
        ({"overrides": ["audit.seeds=1", "audit.seeds=2"]}, "--set audit.seeds is given twice"),
        ({"overrides": ["audit.seeds=1", "audit={}"]}, "'audit' comes after 'audit.seeds' and would replace it"),
        ({"overrides": ["seed=1"], "seed": 2}, "--seed 2 and --set seed=1 are both given"),
        ({"overrides": ["scales.smoke={}"]}, "--set of scales has no effect"),
        ({"overrides": ["audit.thresholds.tolerance=.nan"]}, "it is nan; expected a finite number"),
        ({"overrides": ["title=" + "[" * 10_000]}, "not valid YAML"),
        ({"scale": "paper"}, "no scale 'paper'; it has: cpu"),
    ],
)
def test_bad_arguments(recipe, arguments, message):
    with pytest.raises(HoldfastError, match=message):
        load(recipe(), **arguments)


def test_names_and_files():
    with pytest.raises(HoldfastError, match=r"did you mean 'quickstart'.*end in \.yaml"):
        load("quikstart")
    with pytest.raises(HoldfastError, match="does not exist"):
        load("nothing.yaml")


def test_not_yaml(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [")
    with pytest.raises(HoldfastError, match="not valid YAML"):
        load(str(path))
    path.write_bytes(b"title: \xff")
    with pytest.raises(HoldfastError, match="is not UTF-8 text"):
        load(str(path))
    path.write_text("just words")
    with pytest.raises(HoldfastError, match="not a mapping"):
        load(str(path))
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(HoldfastError, match="not valid YAML"):
        load(str(path))


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_packaged_recipes_mean_the_same_by_either_version_of_yaml(file):
    """Nothing in them depends on which numbers and words a reader of YAML takes for what."""
    text = file.read_text()
    assert read_yaml(text, str(file)) == yaml.safe_load(text)


def test_a_parent_after_its_child_in_a_scale(recipe):
    path = recipe(scales={"smoke": {"audit.seeds": 2, "audit": {"shots": 1}}})
    load(path)
    with pytest.raises(HoldfastError, match=r"scale 'smoke': 'audit' comes after 'audit\.seeds' and would replace it"):
        load(path, scale="smoke")


def test_an_unknown_key_of_a_named_setting_is_compared_with_those_beside_it(tmp_path):
    path = tmp_path / "p.yaml"
    settings = {"s": {"modle": {"name": "cnn"}, "benign": {"data": "digits[0-4]"}}}
    path.write_text(yaml.safe_dump({"kind": "protocol", "title": "t", "settings": settings}))
    with pytest.raises(HoldfastError, match=r"'settings\.s\.modle': did you mean 'settings\.s\.model'"):
        load(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seeds: 20\nseeds: 3", "'seeds' is given twice, in line 1 and in line 2"),
        ("attacks:\n  a: {x: 1}\n  b: {}\n  a: {x: 2}", "'a' is given twice, in line 2 and in line 4"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x", "'<<' is given twice"),
        ("1: a\n1.0: b", "'1.0' is given twice"),
        ("a: 1\n---\na: 2", "expected a single document"),
        ("a:\n\tb: 1", "cannot start any token"),
        ("a: .inf", "a is inf; expected a finite number"),
        ("a: {b: [1, .nan]}", "a.b.1 is nan; expected a finite number"),
        ("a: 1e999", "a is inf"),
        ("a: &x [*x]", "the anchor in line 1 contains an alias of itself"),
        ("a: " + "9" * 5000, "digits"),
        ("[a]: 1", "unhashable key"),
        (BOMB, "more than 100000 values"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(text, words):
    with pytest.raises(HoldfastError, match=re.escape(words)):
        read_yaml(text, "It")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-010", -10), ("0o10", 8), ("0x1F", 31), ("+1", 1), ("1e-3", 0.001), ("1e3", 1000.0),
        (".5", 0.5), ("5.", 5.0), ("Off", "Off"),
        ("1:30", "1:30"), ("1_000", "1_000"), ("0b1", "0b1"), ("yes", "yes"), ("no", "no"), ("on", "on"),
        ("true", True), ("FALSE", False), ("~", None), ("null", None), ("", None), ("2020-13-45", "2020-13-45"),
        ("'010'", "010"), ("{a: 1}\r\n", {"a": 1}), ("\ufeff[1]", [1]), ("1e", "1e"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read_yaml(text, "It")
    assert found == value
    assert type(found) is type(value)


def test_merged_keys_may_be_replaced():
    assert read_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}", "It")["d"] == {"b": 3, "c": 2}


def test_a_seed_with_a_zero_in_front_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(MINIMAL).replace("\n", "\r\n").encode() + b"seed: 010\r\n")
    assert load(str(path)).seed == 10


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[NaN]", "[-Infinity]", "{"])
def test_json_that_is_refused(text):
    with pytest.raises(ValueError, match=r"given twice|is not a number|Expecting"):
        read_json(text)


def test_numbers_in_yamls_odd_spelling():
    assert build_defense({"name": "sophon", "suppression_lr": "1e-3"}).config()["suppression_lr"] == 1e-3


def test_a_defense_reads_strategies_written_out():
    written = {"initialisation": "head", "optimizer": "momentum", "learning_rate": 0.05}
    made = build_defense({"name": "sophon", "strategies": [written]})
    assert made.phi() == [Strategy("head", "all", "momentum", 0.05)]
    assert build_defense({"name": "sophon", **json.loads(json.dumps(made.config()))}) == made
    with pytest.raises(HoldfastError, match=r"strategies\.0\.optimiser is 'adam': unexpected keyword"):
        build_defense({"name": "sophon", "strategies": [{"optimiser": "adam"}]})
