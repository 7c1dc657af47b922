"""Causal language models: loaded, trained, saved, attacked and immunized as plain transformers and peft do."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from cases import CAUSAL
from holdfast.adversaries import DirectionalAblation, FewShotPrompt, FineTuning, Probe, build
from holdfast.adversaries.benign_data import BenignTraining
from holdfast.adversaries.directional_ablation import _mean_state, ablate, writers
from holdfast.api import audit, immunize
from holdfast.auditing import language_models
from holdfast.errors import HoldfastError
from holdfast.metrics.diagnostics import inspect
from holdfast.models import CausalModel, ModelSpec, SplitModel, check_fits, load_model, load_task_for
from holdfast.models.sampled_text import continuations
from holdfast.results import Thresholds
from holdfast.runtime.run import Run
from holdfast.tasks import load_task, load_tokenizer
from holdfast.tasks.next_token import IGNORED
from holdfast.tasks.splits import HALVES_SEED
from holdfast.training import Strategy, finetune, not_applicable, optimizer_of, prepare
from texts import BERT, GPT2, WORDS, save_causal, save_model, write_rows, write_text

CPU = torch.device("cpu")
LENGTHS = ("good", "good nice", "bad ugly film a")
QA = [{"prompt": f"the {w} was", "answer": a} for w in ("film", "book", "story", "plot") for a in LENGTHS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("causal")


@pytest.fixture(scope="module")
def name(place):
    return save_causal(place / "llama")


@pytest.fixture(scope="module")
def questions(place, name):
    """Rows of different lengths, so that there is padding."""
    return load_task_for(f"{write_rows(place / 'qa.jsonl', QA)}@kind=next-token,length=10,test_fraction=0.5", name)


@pytest.fixture(scope="module")
def texts(place, name):
    """A benign and a restricted text."""
    paths = [write_text(place / f"{part}.txt", 60, seed) for seed, part in enumerate(("benign", "restricted"))]
    return [load_task_for(f"{path}@kind=next-token,length=8,test_limit=20", name) for path in paths]


def loaded(name, task, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return load_model(ModelSpec(name=name, **options), task)


def plain(name):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name.removeprefix("hf:"))


def batch_of(task, split="train"):
    return next(task.sweep(split, 6, device=CPU))


def transformers_loss(network, batch, pad):
    """The loss as transformers computes it: it shifts the labels itself."""
    last = (batch.y != IGNORED).long().cumsum(1).argmax(1)
    ids = torch.cat([batch.x, torch.full((len(batch.x), 1), pad)], 1)
    labels = torch.cat([torch.full((len(batch.x), 1), IGNORED), batch.y], 1)
    ids[torch.arange(len(ids)), last + 1] = batch.y[torch.arange(len(ids)), last]
    mask = torch.arange(ids.shape[1])[None] <= last[:, None] + 1
    return network(input_ids=ids, attention_mask=mask.long(), labels=labels).loss


class TestAgainstTransformers:
    def test_the_loss_is_that_of_transformers(self, name, questions):
        batch = batch_of(questions)
        assert (batch.y == IGNORED)[:, -1].any()
        assert (batch.y[:, 0] == IGNORED).all()
        expected = transformers_loss(plain(name), batch, questions.vocabulary.pad)
        assert questions.loss(loaded(name, questions), batch).item() == pytest.approx(float(expected), abs=1e-5)

    def test_a_step_is_that_of_transformers(self, name, questions):
        model, network, batch = loaded(name, questions), plain(name).train(), batch_of(questions)
        strategy = Strategy("direct", "all", "adamw", 1e-2, 6)
        prepare(model, strategy, questions)
        own = optimizer_of(model, strategy)
        theirs = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
        for optimizer, loss in (
            (own, questions.loss(model.train(), batch)),
            (theirs, transformers_loss(network, batch, questions.vocabulary.pad)),
        ):
            loss.backward()
            optimizer.step()
        for (key, ours), (_, other) in zip(model.network.named_parameters(), network.named_parameters(), strict=True):
            # Adam divides by the gradient's size, so rounding shows where that is tiny.
            assert torch.allclose(ours, other, atol=1e-3), key
        assert float(questions.loss(model, batch)) == pytest.approx(
            float(transformers_loss(network, batch, questions.vocabulary.pad)), abs=1e-4
        )

    def test_lora_is_that_of_peft_and_leaves_the_embedding(self, name, questions):
        import peft

        model, batch = loaded(name, questions), batch_of(questions)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            prepare(model, Strategy("direct", "lora", "adamw", 1e-2, 6, rank=4), questions)
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = peft.get_peft_model(plain(name), config).train()
        assert not model.head.weight.requires_grad
        adapters = {n.replace(".default", ""): p for n, p in model.network.named_parameters() if "lora" in n}
        others = {
            n.removeprefix("base_model.model.").replace(".default", ""): p
            for n, p in theirs.named_parameters() if "lora" in n
        }  # fmt: skip
        assert adapters.keys() == others.keys()
        with torch.no_grad():
            for key, value in others.items():
                adapters[key].copy_(value)
        model.train()
        losses = questions.loss(model, batch), transformers_loss(theirs, batch, questions.vocabulary.pad)
        assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-5)
        for loss in losses:
            loss.backward()
        for key, value in others.items():
            assert torch.allclose(adapters[key].grad, value.grad, atol=1e-5), key

    def test_adapters_in_a_folder_are_merged(self, place, name, questions):
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            adapted = peft.get_peft_model(plain(name), config)
        merged = copy.deepcopy(adapted).merge_and_unload()
        folder = place / "merged"
        save_causal(folder)
        merged.save_pretrained(folder)
        batch = batch_of(questions)
        with torch.no_grad():
            expected = adapted.eval()(input_ids=batch.x).logits
        assert torch.allclose(loaded(f"hf:{folder}", questions).eval()(batch.x), expected, atol=1e-5)

    def test_padding_changes_nothing_that_counts(self, name, questions):
        model, batch = loaded(name, questions).eval(), batch_of(questions)
        other = batch.x.clone()
        for row, targets in zip(other, batch.y, strict=True):
            row[int((targets != IGNORED).nonzero()[-1]) + 1 :] = 7
        counts = batch.y != IGNORED
        assert torch.allclose(model(batch.x)[counts], model(other)[counts], atol=1e-6)


class TestLoading:
    def test_it_is_split_at_the_output_embedding(self, name, questions):
        model = loaded(name, questions)
        assert isinstance(model, CausalModel)
        assert model.head_name == "lm_head"
        assert not model.fresh_head
        assert [len(block) for block in model.blocks()][:1] == [1]
        assert [block[0][0] for block in model.blocks()] == [
            "model.embed_tokens", *(f"model.layers.{i}" for i in range(3))
        ]  # fmt: skip

    def test_features_of_the_last_depth_make_the_logits(self, name, questions):
        model, batch = loaded(name, questions).eval(), batch_of(questions)
        shallow, last = model.features_by_depth(batch.x, 2)
        assert shallow.shape == last.shape == (batch.x.numel(), 16)
        assert torch.allclose(last @ model.head.weight.T, model(batch.x).flatten(0, 1), atol=1e-5)
        assert not torch.allclose(shallow, last)

    def test_embeddings_of_positions_have_a_row_for_each_sample(self, place, questions):
        name = causal_gpt2(place / "positions")
        task = load_task_for(f"{place / 'qa.jsonl'}@kind=next-token,length=10,test_fraction=0.5", name)
        model, batch = loaded(name, task), batch_of(task)
        states = model.features_by_depth(batch.x, len(model.blocks()))
        assert {len(z) for z in states} == {batch.x.numel()}
        for defense in (CAUSAL["tar"], CAUSAL["repnoise"]):
            immunized, _ = defense.immunize(model, task, task, run=Run(0, CPU))
            assert all(p.isfinite().all() for p in immunized.parameters())

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_weights_stay_tied(self, place, questions, tied):
        name = save_causal(place / f"tied-{tied}", tie_word_embeddings=tied)
        model = loaded(name, questions)
        for own in (model, model.clone(), model.fresh()):
            assert (own.head.weight is own.network.get_input_embeddings().weight) == tied
        model.save(place / "saved.safetensors")
        again = load_model(str(place / "saved.safetensors"), questions)
        assert (again.head.weight is again.network.get_input_embeddings().weight) == tied
        batch = batch_of(questions)
        assert torch.equal(again.eval()(batch.x), model.eval()(batch.x))

    def test_a_folder_in_shards_and_in_half_precision(self, place, name, questions):
        folder = place / "shards"
        save_causal(folder)
        (folder / "model.safetensors").unlink()
        plain(name).to(torch.bfloat16).save_pretrained(folder, max_shard_size="8KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        model = loaded(f"hf:{folder}", questions)
        assert model.dtype == torch.float32

    def test_the_written_folder_is_read_by_transformers(self, place, name, questions):
        model = loaded(name, questions)
        folder = model.save_pretrained(place / "written")
        batch = batch_of(questions)
        with torch.no_grad():
            logits = plain(f"hf:{folder}")(input_ids=batch.x).logits
        assert torch.equal(logits, model.eval()(batch.x))
        assert {"generation_config.json", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
        again = SplitModel.from_pretrained(folder, questions)
        assert again.facts().sha256 == model.facts().sha256

    def test_a_head_of_its_own_is_written_although_the_original_was_tied(self, place, name, questions):
        model = loaded(name, questions)
        with torch.random.fork_rng():
            model.reset_head()
        folder = model.save_pretrained(place / "untied")
        batch = batch_of(questions)
        with torch.no_grad():
            logits = plain(f"hf:{folder}")(input_ids=batch.x).logits
        assert torch.allclose(logits, model.eval()(batch.x), atol=1e-6)
        assert model.network.config.tie_word_embeddings  # the model itself is unchanged

    @pytest.mark.parametrize(
        ("config", "options", "message"),
        [
            (BERT, {}, "is not a causal language model"),
            (
                {"vocab_size": 8},
                {},
                "has embeddings for 8 tokens, and row 0 of the train split of task 'qa' has the id",
            ),
            (
                {"max_position_embeddings": 9},
                {},
                "reads at most 9 tokens .* rows of task 'qa' have 10; set the task's length to at most 9",
            ),
            ({}, {"pooling": "mean"}, "pooling is mean, and the next-token task .* needs an answer at every position"),
            ({}, {"num_labels": 3}, "option of model .* 'num_labels'"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tmp_path, questions, config, options, message):
        if config is BERT:
            save_model(tmp_path, BERT)
        else:
            save_causal(tmp_path, **config)
        with pytest.raises(HoldfastError, match=message):
            loaded(f"hf:{tmp_path}", questions, options=options)

    @pytest.mark.parametrize("occurs", [False, True])
    def test_a_tokenizer_may_have_more_tokens_than_the_embedding_if_they_do_not_occur(self, tmp_path, occurs):
        """As if an end, a padding and a picture token were added to the tokenizer alone: 16 words, and three more."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        save_causal(tmp_path, vocab_size=18, bos_token_id=None, eos_token_id=None)
        tokens = Tokenizer(
            models.WordLevel({w: i for i, w in enumerate([*WORDS, "[UNK]", "[END]"])}, unk_token="[UNK]")
        )
        tokens.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]", eos_token="[END]")
        fast.add_tokens(["picture"])
        fast.add_special_tokens({"pad_token": "[PAD]"})
        fast.save_pretrained(tmp_path)
        rows = [*QA, {"prompt": "the picture", "answer": "good"}] if occurs else QA
        path = f"{write_rows(tmp_path / 'qa.jsonl', rows)}@kind=next-token,length=10,test_fraction=0.5"
        task = load_task_for(path, f"hf:{tmp_path}")
        assert (task.num_outputs, task.vocabulary.pad) == (20, 19)
        if occurs:
            with pytest.raises(
                HoldfastError, match=r"for 18 tokens, and row .* has the id 18, .*Leave out what is written"
            ):
                loaded(f"hf:{tmp_path}", task)
            return
        model, batch = loaded(f"hf:{tmp_path}", task), batch_of(task)
        assert (batch.x == 19).any()  # padding
        expected = transformers_loss(plain(f"hf:{tmp_path}"), batch._replace(x=batch.x.clamp(max=17)), 0)
        assert float(task.loss(model, batch)) == pytest.approx(float(expected), abs=1e-5)
        adversary = FineTuning(Strategy("direct", "all", "adamw", 1e-2, 4))
        assert adversary.not_applicable(model, task) is None
        curve = adversary.attack(model, task, budgets=(0, 5), run=Run(0, CPU))
        assert curve.losses[1] < float(expected)
        assert model.known_tokens == 18

    def test_another_kind_of_task_is_refused(self, name, questions):
        with pytest.raises(HoldfastError, match="is a language model: it returns one next token a position"):
            check_fits(loaded(name, questions), load_task("digits"), own_task=False)
        with pytest.raises(HoldfastError, match="A model for it is a causal language model, hf:FOLDER"):
            check_fits(load_model("mlp", load_task("digits")), questions, own_task=False)


class TestSmallLlama:
    def test_it_has_the_vocabulary_of_its_task_and_is_written_for_transformers(self, tmp_path):
        task = load_task("phrases@tokenizer=bytes,length=16,train_limit=40,test_limit=10")
        model = loaded("llama", task, options={"width": 16, "depth": 2, "tied": True})
        assert (model.num_outputs, len(model.blocks())) == (258, 3)
        assert model.head.weight is model.network.get_input_embeddings().weight
        folder = model.save_pretrained(tmp_path / "written")
        batch = batch_of(task)
        with torch.no_grad():
            assert torch.equal(plain(f"hf:{folder}")(input_ids=batch.x).logits, model.eval()(batch.x))
        model.save(tmp_path / "model.safetensors")
        assert load_model(str(tmp_path / "model.safetensors"), task).facts().sha256 == model.facts().sha256

    @pytest.mark.parametrize(
        ("options", "message"), [({"width": 18, "heads": 2}, "multiple of twice its 2 heads"), ({"deep": 1}, "'depth'")]
    )
    def test_impossible_sizes_are_refused(self, options, message):
        with pytest.raises(HoldfastError, match=message):
            loaded("llama", load_task("phrases@tokenizer=bytes,length=16"), options=options)

    def test_a_task_of_classes_needs_another_model(self):
        with pytest.raises(HoldfastError, match="llama predicts the next token"):
            load_model("llama", load_task("digits"))


STARTS = ["direct", "head", "last-block", "last-half", "shrink-perturb"]


class TestStarts:
    @pytest.mark.parametrize(
        ("start", "scope"),
        [(start, "all") for start in STARTS]
        + [(start, scope) for scope in ("norm", "lora", "lora-attention") for start in ("direct", "head")],
    )
    def test_every_start_is_trained(self, name, questions, start, scope):
        model = loaded(name, questions)
        strategy = Strategy(start, scope, "adam", 1e-2, 6, rank=2)
        assert not_applicable(strategy, model, questions) is None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            prepare(model, strategy, questions)
            losses = finetune(model, questions, strategy, generator=torch.Generator().manual_seed(0), device=CPU)
            values = [float(loss) for _, loss in zip(range(8), losses, strict=False)]
        assert values[-1] < values[0]

    def test_a_probe_on_one_vector_a_sample_does_not_apply(self, name, questions):
        reason = Probe("ridge", "raw").not_applicable(loaded(name, questions), questions)
        assert "answers at every position" in reason


class TestTied:
    @pytest.mark.parametrize("scope", ["head", "last-block", "all"])
    def test_the_body_stays_if_the_head_is_trained_alone(self, name, questions, scope):
        model = loaded(name, questions)
        embedding = model.network.get_input_embeddings().weight
        assert embedding is model.head.weight
        before = embedding.detach().clone()
        strategy = Strategy("direct", scope, "adamw", 1e-2, 6)
        prepare(model, strategy, questions)
        work = finetune(model, questions, strategy, generator=torch.Generator(), device=CPU)
        next(work), next(work)
        assert torch.equal(model.network.get_input_embeddings().weight, before) == (scope != "all")
        assert not torch.equal(model.head.weight, before)


class TestPaddingDoesNotCount:
    def test_the_anchor_is_the_mean_over_tokens_that_count(self, name, questions):
        """A slow twin: KL(released || attacked) at each position that counts, one by one."""
        released, model = loaded(name, questions).eval(), loaded(name, questions).eval()
        with torch.no_grad():
            model.head.weight.add_(0.1)
            model.network.get_input_embeddings().weight[3:6].mul_(-1)
        beside = BenignTraining(
            model, released, questions, Strategy(batch_size=4), replay=0.0, anchor=2.0,
            generator=torch.Generator().manual_seed(3), device=CPU,
        )  # fmt: skip
        drawn = questions.batches("train", 4, generator=torch.Generator().manual_seed(3), device=CPU)
        batch = next(drawn)
        with torch.no_grad():
            ours, theirs = (m(batch.x).log_softmax(-1) for m in (model, released))
        each = [
            float((theirs[i, j].exp() * (theirs[i, j] - ours[i, j])).sum())
            for i, j in (batch.y != IGNORED).nonzero().tolist()
        ]
        assert len(each) < batch.y.numel() / 2
        assert float(beside.penalty()) == pytest.approx(2 * sum(each) / len(each), rel=1e-4)

    def test_longer_padding_changes_no_distillation(self, place, name):
        """The same rows, padded to two lengths: one round of SOPHON with distillation gives the same weights."""
        weights = []
        for length in (10, 20):
            tasks = [
                load_task_for(
                    f"{write_rows(place / f'{part}.jsonl', rows)}@kind=next-token,length={length},test_fraction=0.5",
                    name,
                )
                for part, rows in (("padded", QA), ("other", [{**r, "prompt": f"so {r['prompt']}"} for r in QA]))
            ]
            defense = replace(CAUSAL["sophon-ice"], distillation=5.0, iterations=1, max_benign_drop=1.0)
            immunized, _ = defense.immunize(loaded(name, tasks[0]), *tasks, run=Run(0, CPU))
            weights.append(immunized.head.weight.detach())
        assert torch.allclose(*weights, atol=1e-5)


class TestMemory:
    def step(self, name, task, strategy, **options):
        model = loaded(name, task, options=options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            prepare(model, strategy, task)
            work = finetune(model, task, strategy, generator=torch.Generator().manual_seed(0), device=CPU)
            loss = float(next(work))
        return loss, [p.detach().clone() for p in model.parameters()]

    def test_parts_of_a_batch_give_the_step_of_the_whole(self, name, questions):
        """A row counts as much as it has tokens, so parts with few tokens count less."""
        whole = Strategy("direct", "all", "sgd", 1e-1, 6)
        parts = replace(whole, micro_batch=4)
        (one, first), (two, second) = (self.step(name, questions, s) for s in (whole, parts))
        assert one == pytest.approx(two, abs=1e-5)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))
        assert FineTuning(parts).name.endswith("in parts of 4")
        assert "micro_batch" not in FineTuning(whole).config()

    @pytest.fixture
    def seen(self, texts, monkeypatch):
        """Rows of each forward pass, on a task of whose logits three rows at once are few enough."""
        task, passed, forward = texts[1], [], CausalModel.forward
        monkeypatch.setattr("holdfast.tasks.next_token.SCORED_LOGITS", 3 * task.num_outputs * task.input_shape[0])

        def watched(self, ids):
            passed.append(len(ids))
            return forward(self, ids)

        monkeypatch.setattr(CausalModel, "forward", watched)
        assert task.size("train") > 3
        return passed

    def test_checks_pass_few_rows_of_a_large_vocabulary(self, name, texts, seen):
        assert not inspect(loaded(name, texts[1]), benign=texts[0], restricted=texts[1], run=Run(0, CPU)).failures
        assert max(seen) == 3

    @pytest.mark.parametrize("move", ["equalise", "revive", "reset-worst", "rescale"])
    def test_undo_moves_pass_few_rows_of_a_large_vocabulary(self, name, texts, move, seen):
        model, task = loaded(name, texts[1]), texts[1]
        attack = FineTuning(Strategy("direct", "all", "adamw", 1e-3, 2), undo=(move,))
        assert attack.not_applicable(model, task) is None
        attack.attack(model, task, budgets=(0, 1), run=Run(0, CPU))
        assert max(seen) == 3

    def test_checkpointing_changes_no_step(self, name, questions):
        strategy = Strategy("direct", "all", "sgd", 1e-1, 6)
        plain, saving = self.step(name, questions, strategy), self.step(name, questions, strategy, checkpointing=True)
        assert plain[0] == saving[0]
        assert all(torch.equal(a, b) for a, b in zip(plain[1], saving[1], strict=True))
        model = loaded(name, questions, options={"checkpointing": True})
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.fresh().network.modules())


class TestPrompting:
    def test_logits_are_those_after_the_prompt(self, name, questions):
        model, batch = loaded(name, questions).eval(), batch_of(questions)
        model.prefix = torch.tensor([5, 6, 7])
        whole = torch.cat([model.prefix.expand(len(batch.x), -1), batch.x], 1)
        prompted = model(batch.x)
        model.prefix = None
        assert torch.allclose(prompted, model(whole)[:, 3:], atol=1e-5)

    def test_examples_are_rows_with_their_answers(self, name, questions):
        model = loaded(name, questions)
        work = FewShotPrompt(3).run(model, questions, benign=None, generator=torch.Generator(), device=CPU)
        next(work)
        rows = [
            [*x[: int((y != IGNORED).nonzero()[-1]) + 1].tolist(), int(y[y != IGNORED][-1])]
            for x, y in zip(*questions_rows(questions), strict=True)
        ]
        rest = model.prefix.tolist()
        for _ in range(3):
            taken = next(row for row in rows if rest[: len(row)] == row)
            rest = rest[len(taken) :]
        assert not rest

    def test_it_fits_into_the_context(self, place, questions):
        small = save_causal(place / "small", max_position_embeddings=16)
        model = loaded(small, questions)
        next(FewShotPrompt(50).run(model, questions, benign=None, generator=torch.Generator(), device=CPU))
        assert model.prefix is None or len(model.prefix) <= 6
        assert "no room" in FewShotPrompt().not_applicable(
            loaded(save_causal(place / "tiny", max_position_embeddings=10), questions), questions
        )

    def test_what_it_writes_stays_within_the_context(self, place, questions):
        model = loaded(save_causal(place / "short", max_position_embeddings=12), questions)
        tokenizer = load_tokenizer(str(place / "short"))
        model.prefix = torch.tensor([5, 6, 7, 8, 9])
        network = model.network
        longest = []
        hook = network.register_forward_pre_hook(
            lambda _, __, named: longest.append(int(named["position_ids"].max()) if "position_ids" in named else 0),
            with_kwargs=True,
        )
        written = continuations(model, questions, tokenizer, rows=2, tokens=9, seed=0)
        hook.remove()
        assert len(written) == 2
        assert max(longest) < 12

    def test_an_example_must_fit(self, place, questions):
        model = loaded(save_causal(place / "narrow", max_position_embeddings=12), questions)
        assert "no room for an example" in FewShotPrompt(2).not_applicable(model, questions)


def questions_rows(task):
    return task._x["train"][:, 0], task._y["train"][:, 0]


class TestAblation:
    @pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False}, GPT2])
    def test_no_layer_writes_along_the_direction(self, place, questions, config):
        folder = place / f"ablated-{len(config)}"
        name = save_causal(folder, **config) if config is not GPT2 else causal_gpt2(folder)
        task = load_task_for(f"{place / 'qa.jsonl'}@kind=next-token,length=10,test_fraction=0.5", name)
        model = loaded(name, task)
        direction = torch.arange(16.0)
        ablate(model, direction)
        caught = []
        hooks = [
            layer.register_forward_hook(lambda _, __, output: caught.append(output @ direction))
            for layer in writers(model)
        ]
        model(batch_of(task).x)
        assert len(caught) == len(hooks) == 2 * (3 if config is not GPT2 else 2)
        assert max(c.detach().abs().max().item() for c in caught) < 1e-4

    def test_a_direction_of_zeros_changes_nothing(self, name, questions):
        model = loaded(name, questions)
        before = model.facts().sha256
        ablate(model, torch.zeros(16))
        assert model.facts().sha256 == before

    def test_what_only_one_direction_hides_comes_back(self, name, texts):
        """A model that adds a direction which spoils its outputs on restricted texts, and on those alone."""
        benign, restricted = texts
        model = loaded(name, benign)
        attack = DirectionalAblation(Strategy("direct", "all", "sgd", 1e-9, 8))
        work = attack.run(model, restricted, benign=benign, generator=torch.Generator().manual_seed(0), device=CPU)
        next(work)
        means = [_mean_state(model, t, 0.6, torch.Generator().manual_seed(0), CPU) for t in (restricted, benign)]
        fresh = loaded(name, benign)
        before = [_mean_state(fresh, t, 0.6, torch.Generator().manual_seed(0), CPU) for t in (restricted, benign)]
        assert (means[0] - means[1]).norm() < (before[0] - before[1]).norm()

    def test_it_needs_the_benign_task(self, name, questions):
        attack = DirectionalAblation(Strategy("direct", "all", "sgd", 1e-3, 8))
        with pytest.raises(HoldfastError, match="compares with benign data"):
            next(attack.run(loaded(name, questions), questions, benign=None, generator=torch.Generator(), device=CPU))


def causal_gpt2(folder):
    save_model(folder, GPT2, "AutoModelForCausalLM")
    return f"hf:{folder}"


@pytest.mark.parametrize(
    "adversary", [FewShotPrompt(2), DirectionalAblation(Strategy("direct", "lora", "adamw", 1e-3, 8), 0.5)]
)
class TestAdversaries:
    def test_it_is_built_from_its_config(self, adversary):
        again = build(json.loads(json.dumps(adversary.config())))
        assert (again.config(), again.name) == (adversary.config(), adversary.name)

    def test_it_changes_a_copy_and_depends_on_the_seed_alone(self, name, texts, adversary):
        benign, restricted = texts
        model = loaded(name, benign)
        before = model.facts().sha256
        curves = [
            adversary.attack(model, restricted, budgets=[0, 2], run=Run(0, CPU), seed=0, benign=benign)
            for _ in range(2)
        ]
        assert curves[0].scores == curves[1].scores
        assert curves[0].finite
        assert model.facts().sha256 == before
        assert model.prefix is None


class TestDefenses:
    @pytest.mark.parametrize("defense", CAUSAL)
    def test_only_the_seed_decides_and_a_stop_changes_nothing(self, name, texts, defense, tmp_path):
        benign, restricted = texts
        model = loaded(name, benign)
        before = model.facts().sha256
        one, record = CAUSAL[defense].immunize(model, benign, restricted, run=Run(0, CPU))
        again, _ = CAUSAL[defense].immunize(model, benign, restricted, run=Run(0, CPU, tmp_path))
        resumed, _ = CAUSAL[defense].immunize(model, benign, restricted, run=Run(0, CPU, tmp_path))
        assert model.facts().sha256 == before
        assert one.facts().sha256 == again.facts().sha256 == resumed.facts().sha256 != before
        assert one.head.weight is one.network.get_input_embeddings().weight
        series = [v for key, values in record.history.items() if key.endswith("loss") for v in values]
        assert series
        assert all(math.isfinite(v) for v in series)
        assert not one.training

    def test_defenses_of_vectors_are_refused(self, name, texts):
        with pytest.raises(HoldfastError, match="a probe needs one vector a sample"):
            immunize(loaded(name, texts[0]), benign=texts[0], restricted=texts[1], defense="signal-frontier")


AUDITED = [FineTuning(Strategy("direct", "all", "adamw", 1e-2, 8)), Probe("ridge", "raw")]


@pytest.fixture(scope="module")
def audited(place, name, texts):
    """Its own audit, and the same with a reference, which is returned as well."""
    benign, restricted = texts
    model, other = loaded(name, benign), loaded(save_causal(place / "other", num_hidden_layers=1), benign)
    settings = {"budgets": (0, 5), "seeds": 1, "threads": 1, "battery": AUDITED, "side_effects": False}
    own = {"original": model, "benign": benign, "restricted": restricted, "thresholds": Thresholds()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_models, "TOKENS", 8)
        return audit(model, **own, **settings), audit(model, **own, **settings, reference=other), other


def test_an_audit_tells_a_model_from_its_controls(texts, audited):
    result, restricted = audited[0], texts[1]
    scores = {curve.role: curve.scores for curve in result.curves}
    assert scores["immunized"] == scores["original"]
    assert scores["original"] != scores["scratch"]
    assert result.unit == "language skill"
    assert result.language.nll(0.0) == pytest.approx(restricted.chance)
    by_role = {role: [t for t in result.texts if t.role == role] for role in ("immunized", "original", "scratch")}
    assert [len(texts) for texts in by_role.values()] == [6, 6, 6]
    pairs = zip(by_role["immunized"], by_role["original"], strict=True)
    assert all((a.prompt, a.text) == (b.prompt, b.text) for a, b in pairs)  # the same model writes the same
    assert {t.adversary for t in result.texts} == {None, "direct+all adamw 0.01 b8"}


def test_a_reference_stands_for_training_from_scratch(texts, audited):
    (benign, restricted), (plain, against, other) = texts, audited
    scores = [{c.role: c.scores for c in found.curves} for found in (plain, against)]
    assert scores[0]["scratch"] != scores[1]["scratch"]
    assert scores[0]["immunized"] == scores[1]["immunized"]
    alone = AUDITED[0].attack(
        other, restricted.halves(HALVES_SEED)[1], budgets=[0, 5], run=Run(0, CPU), role="scratch", benign=benign
    )
    assert alone.scores == scores[1]["scratch"]
    assert f"the reference {other.name}" in against.verdict.threat_model
    assert "reference" not in plain.verdict.threat_model + " ".join(map(str, plain.verdict.reasons))
