from __future__ import annotations

import json

import pytest
import yaml

from holdfast.errors import HoldfastError
from holdfast.finetune import Strategy
from holdfast.recipe import build_defense, load, names

MINIMAL = {
    "title": "t", "model": {"name": "cnn"}, "pretrain": {"steps": 1}, "benign": {"data": "digits[0-4]"},
    "restricted": {"data": "digits[5-9]"}, "defense": {"name": "sophon"},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    def write(**change):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **change}))
        return str(path)

    return write


@pytest.mark.parametrize("name", names())
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
        ({"model": {"name": "nets.py:make"}}, "'nets.py:make' is made by code, and a recipe has none run"),
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
        ({"overrides": ["title=2020-13-45"]}, "--set 'title=2020-13-45': the value is not valid YAML: month"),
        ({"overrides": ["title=" + "[" * 10_000]}, "not valid YAML"),
        ({"scale": "paper"}, "no scale 'paper'; it has: cpu"),
    ],
)
def test_bad_arguments(recipe, arguments, message):
    with pytest.raises(HoldfastError, match=message):
        load(recipe(), **arguments)


def test_names_and_files():
    with pytest.raises(HoldfastError, match=r"did you mean 'quickstart'.*ends in \.yaml"):
        load("quikstart")
    with pytest.raises(HoldfastError, match="does not exist"):
        load("nothing.yaml")


def test_not_yaml(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [")
    with pytest.raises(HoldfastError, match="not valid YAML"):
        load(str(path))
    path.write_bytes(b"title: \xff")
    with pytest.raises(HoldfastError, match="no text in UTF-8"):
        load(str(path))
    path.write_text("just words")
    with pytest.raises(HoldfastError, match="no mapping"):
        load(str(path))
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(HoldfastError, match="not valid YAML"):
        load(str(path))


def test_numbers_in_yamls_odd_spelling():
    assert build_defense({"name": "sophon", "suppression_lr": "1e-3"}).config()["suppression_lr"] == 1e-3


def test_a_defense_reads_strategies_written_out():
    written = {"initialisation": "head", "optimizer": "momentum", "learning_rate": 0.05}
    made = build_defense({"name": "sophon", "strategies": [written]})
    assert made.phi() == [Strategy("head", "all", "momentum", 0.05)]
    assert build_defense({"name": "sophon", **json.loads(json.dumps(made.config()))}) == made
    with pytest.raises(HoldfastError, match=r"strategies\.0\.optimiser is 'adam': unexpected keyword"):
        build_defense({"name": "sophon", "strategies": [{"optimiser": "adam"}]})
