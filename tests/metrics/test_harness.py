"""Tasks of lm-evaluation-harness as measures: answers equal the harness's own, before and after an attack."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest
import torch

from holdfast.adversaries import FewShotPrompt, FineTuning
from holdfast.auditing.audit import audit, tables
from holdfast.auditing.spec import AuditSpec
from holdfast.errors import HoldfastError
from holdfast.metrics import harness
from holdfast.models import load_model, load_task_for
from holdfast.runtime.run import Run
from holdfast.tasks import load_task, load_tokenizer
from holdfast.training import Strategy
from texts import WORDS, save_causal, write_rows

CPU = torch.device("cpu")
REASON = 'needs lm-evaluation-harness: pip install "holdfast[lm-eval]"'
OWN = """
task: own-questions
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    save_causal(folder / "llama")
    rows = [{"question": f"the {w} was", "choices": ["good", "bad nice"], "label": i % 2} for i, w in enumerate(WORDS)]
    write_rows(folder / "own.jsonl", rows)
    (folder / "own.yaml").write_text(OWN)
    return folder


@pytest.fixture(scope="module")
def name(place):
    return f"hf:{place / 'llama'}"


@pytest.fixture(scope="module")
def tasks(place, name):
    """A benign and a restricted task, in which the attack is easy."""
    made = []
    for part, prompt, answer in (("benign", "the", "good"), ("restricted", "so", "ugly")):
        rows = [{"prompt": f"{prompt} {w} {v}", "answer": answer} for w in WORDS for v in WORDS[:2]]
        made.append(load_task_for(f"{write_rows(place / f'{part}.jsonl', rows)}@length=8", name))
    return made


@pytest.fixture
def model(name, tasks):
    return load_model(name, tasks[0])


@pytest.fixture(scope="module")
def tokenizer(name):
    return load_tokenizer(name.removeprefix("hf:"))


@pytest.fixture
def measure(place):
    pytest.importorskip("lm_eval", reason=REASON)
    return f"lm-eval:{place / 'own.yaml'}"


PAIRS = [("the film was", " good"), ("the book", " was very nice"), ("", "good bad"), ("so not", " and is")]


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.mark.usefixtures("measure")
class TestAnswers:
    def test_they_are_those_of_the_harness_for_the_folder(self, name, model, tokenizer):
        from lm_eval.models.huggingface import HFLM

        own = harness.harness_model(model, tokenizer)
        theirs = HFLM(pretrained=name.removeprefix("hf:"), device="cpu", batch_size=4)
        for ours, other in zip(
            *(lm.loglikelihood(asked("loglikelihood", *PAIRS)) for lm in (own, theirs)), strict=True
        ):
            assert ours[0] == pytest.approx(other[0], abs=1e-4)
            assert ours[1] == other[1]
        texts = [(" ".join(WORDS[i:] * 9),) for i in range(3)]  # longer than the context
        rolled = [lm.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for lm in (own, theirs)]
        assert rolled[0] == pytest.approx(rolled[1], abs=1e-3)
        wanted = [(text, {"until": ["bad"], "max_gen_toks": 6}) for text, _ in PAIRS if text]
        written = [lm.generate_until(asked("generate_until", *wanted)) for lm in (own, theirs)]
        assert written[0] == written[1]

    def test_they_are_those_of_a_head_of_its_own(self, model, tokenizer):
        """The harness ties weights again; a head that an attack made must stay."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.reset_head()
        own = harness.harness_model(model, tokenizer)
        (found,) = own.loglikelihood(asked("loglikelihood", ("the film was", " good")))
        ids = torch.tensor([tokenizer.fast("the film was good")["input_ids"]])
        with torch.no_grad():
            expected = model.eval()(ids[:, :-1])[0, -1].log_softmax(-1)[ids[0, -1]]
        assert found[0] == pytest.approx(float(expected), abs=1e-5)

    def test_a_prompt_comes_before(self, model, tokenizer):
        """As if it were written in the request: likelihoods, and what is generated."""
        fast, prompt = tokenizer.fast, "so good so bad"
        plain = harness.harness_model(model.clone(), tokenizer)
        model.prefix = torch.tensor(fast(prompt)["input_ids"])
        own = harness.harness_model(model, tokenizer)
        pairs = [pair for pair in PAIRS if pair[0]]
        longer = [(f"{prompt} {text}", after) for text, after in pairs]
        found = own.loglikelihood(asked("loglikelihood", *pairs)), plain.loglikelihood(asked("loglikelihood", *longer))
        assert [f[0] for f in found[0]] == pytest.approx([f[0] for f in found[1]], abs=1e-4)
        until = {"until": ["bad"], "max_gen_toks": 5}
        written = [
            lm.generate_until(asked("generate_until", *((text, until) for text, _ in texts)))
            for lm, texts in ((own, pairs), (plain, longer))
        ]
        assert written[0] == written[1]
        assert own.max_length == model.context - len(model.prefix)


def test_a_task_of_a_file_is_scored(model, tokenizer, measure):
    random.seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    (found,) = harness.harness_scores(model, tokenizer, measure, run=Run(0, CPU))
    assert (found.task, found.metric) == ("own-questions", "acc")
    right = 0
    for i, word in enumerate(WORDS):
        likelihoods = []
        for choice in ("good", "bad nice"):
            before = len(tokenizer.fast(f"the {word} was")["input_ids"])
            ids = torch.tensor([tokenizer.fast(f"the {word} was {choice}")["input_ids"]])
            with torch.no_grad():
                logs = model.eval()(ids[:, :-1])[0].log_softmax(-1)
            likelihoods.append(sum(float(logs[k - 1, ids[0, k]]) for k in range(before, ids.shape[1])))
        right += likelihoods[i % 2] > likelihoods[1 - i % 2]
    assert found.value == pytest.approx(right / len(WORDS))
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(states[2], torch.get_rng_state())


def test_an_audit_measures_before_and_after_the_best_attack(model, tasks, measure):
    attacks = (FineTuning(Strategy("direct", "all", "adamw", 1e-2, 8)), FewShotPrompt(2))
    spec = AuditSpec(battery=attacks, budgets=(0, 5), seeds=1, side_effects=False, measures=(measure,))
    benign, restricted = tasks
    result = audit(model, model, benign=benign, restricted=restricted, spec=spec, run=Run(0, CPU))
    best = result.by_budget[-1].best_adversary["immunized"]
    assert [(m.role, m.adversary) for m in result.measured] == [
        ("immunized", None), ("immunized", best), ("original", None), ("original", best)
    ]  # fmt: skip
    scores = [m.score for m in result.measured]
    assert scores[0] == scores[2]
    table = tables(result)["measures"]
    assert [(row["model"], row["after"]) for row in table.rows] == [
        ("immunized", "no attack"), ("immunized", best), ("original", "no attack"), ("original", best)
    ]  # fmt: skip
    assert [row["own-questions: acc"].mean for row in table.rows] == scores
    plain = audit(
        model, model, benign=benign, restricted=restricted, spec=spec.model_copy(update={"measures": ()}),
        run=Run(0, CPU),
    )  # fmt: skip
    assert plain.model_dump(exclude={"measured"}) == result.model_dump(exclude={"measured"})


class TestRefused:
    def test_another_name(self):
        with pytest.raises(HoldfastError, match="'arc_easy' is unknown; expected lm-eval:TASK"):
            harness.check_measure("arc_easy")

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(HoldfastError, match=r'pip install "holdfast\[lm-eval\]"'):
            harness.check_measure("lm-eval:arc_easy")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "the file does not exist"),
            ("dataset_path: json", "it has no `task`"),
            ("task: own\ndoc_to_text: !function run.me", "is not valid YAML"),
        ],
    )
    @pytest.mark.usefixtures("measure")
    def test_a_file_that_cannot_be_used(self, tmp_path, text, message):
        if text is not None:
            (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(HoldfastError, match=message):
            harness.check_measure(f"lm-eval:{tmp_path / 'own.yaml'}")

    @pytest.mark.usefixtures("measure")
    def test_an_unknown_task_and_one_that_fails(self, model, tokenizer, tmp_path):
        with pytest.raises(HoldfastError, match="has no task 'arc_hardest'"):
            harness.check_measure("lm-eval:arc_hardest")
        (tmp_path / "own.yaml").write_text(OWN)
        with pytest.raises(HoldfastError, match=r"own\.yaml' failed: FileNotFoundError"):
            harness.harness_scores(model, tokenizer, f"lm-eval:{tmp_path / 'own.yaml'}", run=Run(0, CPU))

    def test_a_model_of_another_kind(self, measure):
        digits = load_task("digits")
        cnn = load_model("cnn", digits)
        with pytest.raises(HoldfastError, match="is not a causal language model"):
            audit(cnn, cnn, benign=digits, restricted=digits, spec=AuditSpec(measures=(measure,)), run=Run(0, CPU))


def test_measures_are_plain_values():
    """They stand in recipes and in results."""
    assert json.loads(AuditSpec(measures=("lm-eval:arc_easy",)).model_dump_json())["measures"] == ["lm-eval:arc_easy"]
