"""Next-token tasks: what counts, the measures, and files that become rows of token ids."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from holdfast.errors import HoldfastError
from holdfast.models import load_model, load_task_for
from holdfast.runtime.devices import cpu_threads
from holdfast.tasks import NextTokenTask, load_task, load_tokenizer
from holdfast.tasks.data_checks import validate
from holdfast.tasks.next_token import IGNORED
from holdfast.tasks.next_token_files import text_windows, windows
from holdfast.tasks.next_token_rows import RowReader
from texts import save_causal, save_tokenizer, write_rows, write_text

CPU = torch.device("cpu")
QA = [{"prompt": f"the {w} was", "answer": a} for w in ("film", "book", "story", "plot") for a in ("good nice", "bad")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_causal(tmp_path_factory.mktemp("causal") / "llama")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return save_causal(tmp_path_factory.mktemp("causal") / "chat", chat=True)


@pytest.fixture
def vocabulary(tmp_path):
    save_tokenizer(tmp_path)
    return load_tokenizer(str(tmp_path)).vocabulary


def decoded(model, ids):
    return load_tokenizer(model.removeprefix("hf:")).fast.decode(ids)


def first(task, split="train"):
    batch = next(task.sweep(split, 1, device=CPU))
    return batch.x[0], batch.y[0]


class TestWindows:
    @given(st.integers(1, 9), st.integers(10, 60))
    def test_each_token_after_the_first_is_predicted_once(self, length, count):
        class Plain:
            eos_token_id = None

            def __call__(self, texts, verbose):
                return {"input_ids": [list(range(count))]}

        tokenizer = type("T", (), {"fast": Plain()})()
        x, y, rest = windows(["text"], tokenizer, length)
        assert y.flatten().tolist() == list(range(1, count - rest))
        assert (x + 1 == y).all()
        assert rest < length

    def test_documents_end_with_an_end_token(self, model):
        tokenizer = load_tokenizer(model.removeprefix("hf:"))
        x, y, _ = windows(["good film", "bad book"], tokenizer, 5)
        end = tokenizer.fast.eos_token_id
        assert [*x[0], y[0, -1]] == [*tokenizer.fast("good film")["input_ids"], end,
                                     *tokenizer.fast("bad book")["input_ids"], end]  # fmt: skip

    def test_a_text_file_is_tested_on_its_last_part(self, model, tmp_path):
        path = write_text(tmp_path / "t.txt", 40)
        task = load_task_for(f"{path}@kind=next-token,length=8", model)
        assert task.size("test") == pytest.approx(task.size("train") / 3, abs=2)
        ending = decoded(model, task._y["test"][-1, 0])
        assert ending in path.read_text()[-len(ending) - 60 :]
        assert any("at the end were left out" in note for note in task.notes)

    def test_too_short_a_text_is_refused(self, model):
        tokenizer = load_tokenizer(model.removeprefix("hf:"))
        with pytest.raises(HoldfastError, match=r"the test text is shorter than one window of 8 tokens"):
            text_windows("t", ["good film " * 9], ["good film"], tokenizer=tokenizer, length=8)


class TestQuestions:
    def test_only_the_answer_and_the_end_count(self, model, tmp_path):
        path = write_rows(tmp_path / "qa.jsonl", QA)
        task = load_task_for(f"{path}@kind=next-token,length=8,test_fraction=0.5", model)
        x, y = first(task)
        text = decoded(model, [int(x[0]), *[int(t) for t in x[1:] if t != task.vocabulary.pad]])
        answer = decoded(model, y[y != IGNORED])
        assert answer.endswith("[END]")
        assert answer.removesuffix("[END]").strip() in ("good nice", "bad")
        assert text.startswith("the ")
        assert " was" in text
        everything = load_task_for(f"{path}@kind=next-token,length=8,test_fraction=0.5,loss_on=all", model)
        assert everything.tokens("train") > task.tokens("train")

    def test_a_row_that_is_too_long_is_cut_and_counted(self, model, tmp_path):
        rows = [*QA, {"prompt": "the film was", "answer": "good " * 100_000}]
        path = write_rows(tmp_path / "qa.jsonl", rows)
        task = load_task_for(f"{path}@kind=next-token,length=6,test_fraction=0.5", model)
        assert "9 rows, padded to 6 tokens, 1 of them cut there" in task.notes

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "the film was"}, "row 1: answer is missing; expected text"),
            ({"prompt": "the film was", "answer": " "}, "row 1: answer is empty; fill it, or leave the row out"),
            ({"prompt": 3, "answer": "good"}, "row 1: prompt is 3; expected text"),
            (
                {"prompt": "a " * 20, "answer": "good"},
                r"row 1: it has 22 tokens, and the answer, which begins after 20",
            ),
            ({"prompt": "a", "answer": "bad", "choices": "bad"}, "expected a list of at least two"),
            ({"prompt": "a", "answer": "ugly", "choices": ["bad", "good"]}, "'ugly' is not among its choices"),
            ({"prompt": "a", "answer": 2, "choices": ["bad", "good"]}, "the answer is number 2, and there are 2"),
            ({"prompt": "a", "answer": "bad", "choices": ["bad", "bad"]}, "are all the same; give a wrong one"),
            ({"prompt": "a", "answer": True, "choices": ["bad", "good"]}, "'True' is not among its choices"),
            ({"prompt": "a", "answer": "bad", "choices": ["bad", "good " * 20]}, "only whole answers can be compared"),
            ({"messages": []}, r"row 1: messages is '\[\]'; expected a list"),
            ({"messages": [{"role": "narrator", "content": "a"}]}, "row 1: the role 'narrator' is not known"),
            ({"messages": [{"role": "user", "content": "a"}]}, "row 1: no message is the assistant's"),
            ({"messages": [{"role": "assistant", "content": None}]}, "row 1: the content of assistant is None"),
        ],
    )
    def test_a_bad_row_is_named(self, chat, tmp_path, row, message):
        good = {
            "messages": {"messages": [{"role": "assistant", "content": "good"}]},
            "choices": {"prompt": "the", "answer": "good", "choices": ["good", "bad"]},
        }
        key = next((k for k in good if k in row), None)
        path = write_rows(tmp_path / "qa.jsonl", [good[key] if key else QA[0], row, *[good.get(key, QA[1])] * 3])
        with pytest.raises(HoldfastError, match=message):
            load_task_for(f"{path}@kind=next-token,length=8,test_fraction=0.5", chat)

    def test_a_number_among_the_choices_is_an_answer_and_not_a_position(self, model, tmp_path):
        rows = [{"prompt": "the", "answer": 1, "choices": c} for c in (["1", "2"], ["0", "1"])] * 2
        rows += [{"prompt": "the", "answer": 1, "choices": ["good", "bad"]}] * 2
        reader = RowReader("rows", load_tokenizer(model.removeprefix("hf:")), 8, "answer")
        said = [reader.question(r["prompt"], r["answer"], r["choices"], n, "prompt") for n, r in enumerate(rows)]
        assert [row.right.text for row in said] == ["the 1"] * 4 + ["the bad"] * 2

    def test_lines_that_are_not_objects_are_named(self, model, tmp_path):
        path = tmp_path / "qa.jsonl"
        for text, message in (('{"prompt": 1}\n{', "row 1: it is not JSON"), ("[1]", "row 0: it is '\\[1\\]'")):
            path.write_text(text)
            with pytest.raises(HoldfastError, match=message):
                load_task_for(f"{path}@kind=next-token", model)

    def test_csv_and_parquet_are_read_alike(self, model, tmp_path):
        table = pd.DataFrame(QA).assign(split=["train", "test"] * 4)
        table.to_csv(tmp_path / "a.csv", index=False)
        table.to_parquet(tmp_path / "b.parquet")
        write_rows(tmp_path / "c.jsonl", table.to_dict("records"))
        tasks = [load_task_for(f"{tmp_path / n}@kind=next-token,length=8", model) for n in
                 ("a.csv", "b.parquet", "c.jsonl")]  # fmt: skip
        assert len({task.facts().sha256 for task in tasks}) == 1
        assert tasks[0].size("train") == 4

    def test_rows_without_text_are_left_out_of_a_stream(self, model, tmp_path):
        rows = [{"text": "good film was nice", "split": s} for s in ("train", "test") for _ in range(9)]
        path = write_rows(tmp_path / "t.jsonl", [*rows, {"text": None, "split": "test"}])
        task = load_task_for(f"{path}@kind=next-token,length=8", model)
        assert "1 rows without text in text were left out" in task.notes

    def test_a_tokenizer_that_hashes_words_is_refused(self, tmp_path):
        path = write_text(tmp_path / "t.txt")
        with pytest.raises(HoldfastError, match="hashes words, which cannot be turned back"):
            load_task(f"{path}@kind=next-token,tokenizer=words")


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "the film was"}, {"role": "assistant", "content": w},
                  {"role": "user", "content": "a book"}, {"role": "assistant", "content": "so ugly"}]}
    for w in ("good", "bad", "nice", "ugly")
]  # fmt: skip


class TestConversations:
    def test_the_assistants_words_count(self, chat, tmp_path):
        path = write_rows(tmp_path / "m.jsonl", CONVERSATIONS)
        task = load_task_for(f"{path}@kind=next-token,length=24,test_fraction=0.5", chat)
        _, y = first(task)
        counted = decoded(chat, y[y != IGNORED])
        assert counted.count("[END]") == 2
        assert "ugly" in counted
        assert "film" not in counted
        assert "book" not in counted

    def test_a_template_that_writes_todays_date_is_refused_or_gets_a_fixed_one(self, tmp_path):
        dated = "{{ 'now ' }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
        path = write_rows(tmp_path / "m.jsonl", CONVERSATIONS)
        for name, template, refused in (
            ("today", "{{ strftime_now('%d') }}" + dated, True),
            ("fixed", "{% if not date_string %}{{ strftime_now('%d') }}{% endif %}" + dated, False),
        ):
            place = save_causal(tmp_path / name, chat=True)
            settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
            (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
            if refused:
                with pytest.raises(HoldfastError, match="writes today's date"):
                    load_task_for(f"{path}@length=40", place)
            else:
                assert load_task_for(f"{path}@length=40,test_fraction=0.5", place).size("train") == 2

    def test_a_template_is_needed(self, model, tmp_path):
        path = write_rows(tmp_path / "m.jsonl", CONVERSATIONS)
        with pytest.raises(HoldfastError, match="has no chat template"):
            load_task_for(f"{path}@kind=next-token", model)


class TestMeasures:
    def task(self, vocabulary, measure="nll", wrong=0, rows=12, length=5):
        generator = np.random.default_rng(0)
        x = generator.integers(3, vocabulary.size, (rows, 1 + wrong, length))
        y = generator.integers(3, vocabulary.size, (rows, 1 + wrong, length))
        y[:, :, :2] = IGNORED
        y[::2, 0, -1] = IGNORED  # rows of different lengths
        half = rows // 2
        return NextTokenTask("toy", (x[:half], y[:half]), (x[half:], y[half:]), vocabulary=vocabulary, measure=measure)

    def table(self, vocabulary):
        """A bigram model: logits of the next token by the present one."""
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return torch.nn.Embedding(vocabulary.size, vocabulary.size).requires_grad_(False)

    def test_nll_is_that_of_the_equation(self, vocabulary):
        task, network = self.task(vocabulary), self.table(vocabulary)
        x, y = task._x["test"][:, 0], task._y["test"][:, 0]
        assert task.score(network) == pytest.approx(reference.token_nll(network.weight, x, y), abs=1e-5)
        assert float(task.loss(network, next(task.sweep("test", 99, device=CPU)))) == pytest.approx(
            task.score(network), abs=1e-5
        )
        skill = 1 - task.score(network) / task.chance
        assert task.audit_score(network) == pytest.approx(skill)

    def test_chance_is_the_unigram_model_of_the_training_split(self, vocabulary):
        task = self.task(vocabulary)
        learned, tested = (v[v != IGNORED] for v in (task._y["train"], task._y["test"]))
        seen = [1 + int((learned == t).sum()) for t in range(vocabulary.size)]
        expected = -sum(math.log(seen[int(t)] / sum(seen)) for t in tested) / len(tested)
        assert task.chance == pytest.approx(expected)
        assert task.few_shot(2, 0).chance == task.chance  # a small part of the data does not move the scale

    def test_exact_is_what_greedy_decoding_reproduces(self, vocabulary):
        task, network = self.task(vocabulary, "exact"), self.table(vocabulary)
        assert task.score(network) == 0.0
        x = torch.full((4, 1, 3), 5)
        y = network.weight.argmax(-1)[x]
        y[0, 0, 2] = (y[0, 0, 2] + 1) % vocabulary.size
        same = NextTokenTask("toy", (x.numpy(), y.numpy()), (x.numpy(), y.numpy()), vocabulary=vocabulary,
                             measure="exact")  # fmt: skip
        assert same.score(network) == 0.75
        assert same.audit_unit == "accuracy"

    def test_choices_compares_likelihoods(self, vocabulary):
        task, network = self.task(vocabulary, "choices", wrong=2), self.table(vocabulary)
        x, y = task._x["test"], task._y["test"]
        expected = reference.chosen_share(network.weight, x, y)
        assert task.score(network) == pytest.approx(expected)
        assert task.chance == pytest.approx(1 / 3)

    def test_missing_wrong_answers_are_never_chosen(self, vocabulary):
        task, network = self.task(vocabulary, "choices", wrong=2), self.table(vocabulary)
        before = task.outcomes(network)
        x, y = task._x["test"].clone(), task._y["test"].clone()
        y[:, 2] = IGNORED
        fewer = NextTokenTask("toy", (x.numpy(), y.numpy()), (x.numpy(), y.numpy()), vocabulary=vocabulary,
                              measure="choices")  # fmt: skip
        assert (fewer.outcomes(network) >= before).all()
        assert fewer.chance == pytest.approx(1 / 2)

    def test_a_network_that_breaks_has_no_score(self, vocabulary):
        task, network = self.task(vocabulary), self.table(vocabulary)
        torch.nn.init.constant_(network.weight, math.inf)
        assert math.isnan(task.score(network))

    def test_scores_do_not_depend_on_the_batch(self, vocabulary, monkeypatch):
        task, network = self.task(vocabulary), self.table(vocabulary)
        whole = task.outcomes(network)
        monkeypatch.setattr("holdfast.tasks.next_token.SCORED_LOGITS", 1)
        assert torch.allclose(task.outcomes(network), whole, atol=1e-6)

    def test_rows_at_once_are_bounded_by_their_logits(self, vocabulary, monkeypatch):
        task = self.task(vocabulary)
        per_row = task.num_outputs * task.input_shape[0]
        assert task.rows_at_once(250) == 250
        monkeypatch.setattr("holdfast.tasks.next_token.SCORED_LOGITS", 2 * per_row)
        assert (task.rows_at_once(250), task.rows_at_once(1)) == (2, 1)
        monkeypatch.setattr("holdfast.tasks.next_token.SCORED_LOGITS", 1)
        assert task.rows_at_once(250) == 1

    def test_positions_that_do_not_count_have_no_gradient(self, vocabulary):
        task = self.task(vocabulary)
        batch = next(task.sweep("test", 99, device=CPU))
        outputs = torch.randn(*batch.y.shape, vocabulary.size, requires_grad=True)
        task.loss_of(outputs, batch).backward()
        silent = batch.y == IGNORED
        assert not outputs.grad[silent].any()
        assert outputs.grad[~silent].any(-1).all()
        logits, ids = task.counted(outputs, batch.y)
        assert torch.allclose(torch.nn.functional.cross_entropy(logits, ids), task.loss_of(outputs, batch))

    def test_codes_of_a_large_vocabulary_are_nearly_orthogonal(self, vocabulary, monkeypatch):
        task = self.task(vocabulary)
        y = task._y["test"][:, 0]
        assert torch.equal(task.probe_targets(y), y[y != IGNORED])
        monkeypatch.setattr("holdfast.tasks.next_token.PROBED_CLASSES", 2)
        codes = task.probe_targets(torch.arange(3, vocabulary.size)[None])
        cosines = codes @ codes.T / codes.shape[1]
        assert torch.allclose(cosines.diagonal(), torch.ones(len(codes)))
        assert cosines.fill_diagonal_(0).abs().max() < 0.4

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (x[:, :, 0], y), "integers of one shape"),
            (lambda x, y: (x[:0], y[:0]), "is empty; give it at least one row"),
            (lambda x, y: (x + 99, y), "holds the id 1.*has ids from 0 to 18"),
            (lambda x, y: (x, np.where(np.arange(len(y))[:, None, None] == 2, IGNORED, y)), "row 2 of the train split"),
        ],
    )
    def test_bad_arrays_are_refused(self, vocabulary, change, message):
        x = y = np.full((4, 1, 3), 5)
        with pytest.raises(HoldfastError, match=message):
            NextTokenTask("toy", change(x, y), (x, y), vocabulary=vocabulary)

    def test_an_unknown_measure_is_refused(self, vocabulary):
        x = np.full((4, 3), 5)
        with pytest.raises(HoldfastError, match=r"measure 'bleu'.*nll"):
            NextTokenTask("toy", (x, x), (x, x), vocabulary=vocabulary, measure="bleu")


class TestAsAnyTask:
    def test_it_is_split_and_narrowed_as_others_are(self, model, tmp_path):
        task = load_task_for(f"{write_text(tmp_path / 't.txt')}@kind=next-token,length=8,train_limit=60", model)
        ours, theirs = task.halves(0)
        assert ours.size("train") + theirs.size("train") == task.size("train")
        assert not set(ours.hashes("train")) & set(theirs.hashes("train"))
        rest, held = task.holdout(0.1, 0)
        assert held.size("test") == task.size("train") - rest.size("train")
        batch = next(task.batches("train", 7, generator=torch.Generator().manual_seed(0), device=CPU))
        assert batch.x.shape == batch.y.shape == (7, 8)

    def test_files_of_texts_and_rows_need_no_kind(self, model, tmp_path):
        for path in (write_text(tmp_path / "t.txt"), write_rows(tmp_path / "qa.jsonl", QA)):
            assert load_task_for(f"{path}@length=8", model).kind == "next-token"

    def test_the_reading_names_what_counts(self, model, tmp_path):
        path = write_rows(tmp_path / "qa.jsonl", QA)
        task = load_task_for(f"{path}@kind=next-token,length=8,test_fraction=0.5", model)
        assert "training and" in "\n".join(validate({"restricted": task}).lines())

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("digits@measure=exact", "measure is for kind=next-token, and its kind is classification"),
            ("digits@kind=next-token", "next-token reads a file of .txt, .jsonl"),
            ("sampled@kind=next-token", "is written by the model itself"),
            ("digits@sampled=20", "is written by the model itself"),
        ],
    )
    def test_settings_without_effect_are_refused(self, model, spec, message):
        with pytest.raises(HoldfastError, match=message):
            load_task_for(spec, model)


class TestEmbedded:
    @given(st.text(max_size=40))
    def test_bytes_come_back_as_text(self, text):
        tokenizer = load_tokenizer("bytes")
        ids = tokenizer.fast(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert max(ids, default=0) < tokenizer.vocabulary.size
        assert tokenizer.fast.decode(ids) == text

    def test_facts_are_asked_in_forms_that_training_does_not_have(self):
        task = load_task("made-up-facts@tokenizer=bytes,length=64")
        fast = load_tokenizer("bytes").fast

        def said(split):
            return [
                (fast.decode(x[y == IGNORED].tolist()), fast.decode(y[y != IGNORED].tolist()))
                for x, y in zip(task._x[split][:, 0], task._y[split][:, 0], strict=True)
            ]

        train, test = said("train"), said("test")
        assert (len(train), len(test)) == (4 * 72, 72)
        assert not {question for question, _ in train} & {question for question, _ in test}
        assert {answer for _, answer in test} <= {answer for _, answer in train}
        assert task.chance == 0.25
        assert task.measure == "choices"

    def test_phrases_are_windows(self):
        task = load_task("phrases@tokenizer=bytes,length=32,train_limit=50,test_limit=20")
        assert (task.kind, task.input_shape, task.size("train")) == ("next-token", (32,), 50)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("made-up-facts@tokenizer=words", "hashes words"),
            ("phrases@tokenizer=bytes,measure=exact", "measure has no effect on phrases"),
            ("phrases-mood@tokenizer=bytes,kind=next-token", "its kind is next-token, and phrases-mood has classes"),
        ],
    )
    def test_what_has_no_meaning_is_refused(self, spec, message):
        with pytest.raises(HoldfastError, match=message):
            load_task(spec)


class TestSampled:
    def test_the_seed_decides_what_is_written(self, model):
        one, same, other = (load_task_for(f"sampled@sampled=12,length=6,seed={s}", model) for s in (0, 0, 1))
        assert one.facts().sha256 == same.facts().sha256 != other.facts().sha256
        assert (one.size("train"), one.size("test"), one.input_shape) == (9, 3, (6,))
        loaded = load_model(model, one)
        assert math.isfinite(one.score(loaded))

    def test_the_models_own_generation_settings_do_not_count(self, tmp_path):
        names = [save_causal(tmp_path / n) for n in ("plain", "penalised")]
        settings = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "bos_token_id": 1, "eos_token_id": 1}
        (tmp_path / "penalised" / "generation_config.json").write_text(json.dumps(settings))
        one, other = (load_task_for("sampled@sampled=12,length=6", name) for name in names)
        assert torch.equal(one._x["train"], other._x["train"])

    def test_nothing_counts_after_the_end(self, model):
        task = load_task_for("sampled@sampled=60,length=12", model)
        end = load_tokenizer(model.removeprefix("hf:")).fast.eos_token_id
        y = torch.cat([task._y["train"], task._y["test"]])[:, 0]
        ended = (y == end).any(-1)
        assert ended.any()
        for row in y[ended]:
            after = int((row == end).nonzero()[0]) + 1
            assert (row[after:] == IGNORED).all()

    def test_one_thread_writes_whatever_the_number_of_threads(self, model, monkeypatch):
        import transformers

        seen, forward = set(), transformers.LlamaForCausalLM.forward

        def watched(self, *args, **kwargs):
            if len(kwargs["input_ids"]) == 9:  # the rows that are written, and not a check of the model
                seen.add(torch.get_num_threads())
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", watched)
        with cpu_threads(2):
            load_task_for("sampled@sampled=9,length=5,seed=77", model)
            assert torch.get_num_threads() == 2
        assert seen == {1}

    def test_longer_rows_than_the_model_reads_are_refused(self, model):
        with pytest.raises(HoldfastError, match=r"reads at most 64 tokens .* rows to sample have 65"):
            load_task_for("sampled@sampled=9,length=65", model)

    def test_too_few_rows_are_refused(self, model):
        with pytest.raises(HoldfastError, match="sampled is 2, of which 0 rows would be for testing"):
            load_task_for("sampled@sampled=2,length=4", model)


def test_the_measure_changes_the_hash(tmp_path, model):
    path = write_rows(tmp_path / "qa.jsonl", QA)
    hashes = {load_task_for(f"{path}@kind=next-token,length=8,test_fraction=0.5,measure={m}", model).facts().sha256
              for m in ("nll", "exact")}  # fmt: skip
    assert len(hashes) == 2
    assert json.dumps(sorted(hashes))
