from __future__ import annotations

import dataclasses
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import reference
from cases import DEFENSES
from holdfast.defenses import (
    DeepCondition,
    DeepDefense,
    DeepIMMA,
    DeepOptKappa,
    DeepRIll,
    RidgeProbeSuppression,
    SlowProbeSuppression,
)
from holdfast.defenses.deep.base import _Immunization
from holdfast.defenses.deep.condition_number import log_kappa
from holdfast.defenses.deep.imma import probe_loss
from holdfast.defenses.state import snapshot
from holdfast.errors import HoldfastError
from holdfast.losses import descended_probe, ridge_probe
from holdfast.models import ModelSpec, SplitModel, features, load_model
from holdfast.runtime.run import Run
from holdfast.spectral.regularizers import r_ill_of_features, r_well_of_features
from holdfast.tasks import ArrayTask, load_task

CPU = torch.device("cpu")
DEEP = [name for name, defense in DEFENSES.items() if isinstance(defense, DeepDefense)]
BRIEF = {"iterations": 4, "batch_size": 20, "guard_every": 2, "max_benign_drop": 1.0}


@st.composite
def labelled(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    n, d, c = draw(st.integers(4, 12)), draw(st.integers(1, 12)), draw(st.integers(2, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    z = torch.randn(n, d, dtype=torch.float64, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return z, torch.arange(n) % c


class TestDescendedProbe:
    @given(labelled(), st.integers(1, 40))
    def test_equals_gradient_descent_step_by_step(self, case, steps):
        z, y = case
        found = descended_probe(z, y, steps)
        assert torch.allclose(found, reference.descended_share(z, y, steps), rtol=1e-8, atol=1e-10)

    @given(labelled(), st.integers(1, 6))
    @settings(max_examples=20)
    def test_its_gradient_is_that_of_the_descent(self, case, steps):
        z, y = case
        z = z / z.norm()
        z.requires_grad_()
        (found,) = torch.autograd.grad(descended_probe(z, y, steps), z)
        (wanted,) = torch.autograd.grad(reference.descended_share(z, y, steps), z)
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-8)

    @given(labelled())
    def test_grows_with_the_steps_to_the_closed_form(self, case):
        z, y = case
        shares = [descended_probe(z, y, t).item() for t in (1, 3, 10, 100)]
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(shares))
        assert shares[-1] <= 1 + 1e-9
        assert descended_probe(z, y, 10**9).item() == pytest.approx(ridge_probe(z, y, 1e-12).item(), abs=1e-3)

    def test_gradcheck_on_both_sides(self):
        torch.manual_seed(0)
        y = torch.tensor([0, 1, 2, 0, 1, 2])
        for width in (4, 9):
            z = torch.randn(6, width, dtype=torch.float64)
            top = torch.linalg.matrix_norm(z - z.mean(0), 2)
            # the step is the adversary's and is not differentiated: a large fixed direction keeps it where it is
            fixed = torch.zeros(6, 1, dtype=torch.float64)
            fixed[:3] = 10 * top

            def share(inner: torch.Tensor, fixed: torch.Tensor = fixed) -> torch.Tensor:
                return descended_probe(torch.cat([fixed, inner], 1), y, 5)

            assert torch.autograd.gradcheck(share, z.requires_grad_(), atol=1e-4, rtol=5e-2)

    def test_extremes(self):
        y = torch.tensor([0, 1, 0, 1])
        assert descended_probe(torch.ones(4, 3), y, 10).item() == 0
        assert descended_probe(torch.full((4, 3), torch.nan), y, 10).isnan()
        with pytest.raises(HoldfastError, match="is 0; expected at least 1"):
            descended_probe(torch.rand(4, 3), y, 0)
        with pytest.raises(HoldfastError, match="2 classes"):
            descended_probe(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), 1)


class TestProbeLoss:
    @given(labelled(), st.integers(0, 8))
    @settings(max_examples=30)
    def test_equals_autograd_through_the_training(self, case, steps):
        z, y = case
        z.requires_grad_()
        found, wanted = probe_loss(z, y, steps), reference.probe_loss(z, y, steps)
        assert torch.allclose(found, wanted, rtol=1e-9)
        if steps:
            ours, theirs = (torch.autograd.grad(loss, z)[0] for loss in (found, wanted))
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9 * float(theirs.abs().max()))

    @given(labelled())
    def test_every_step_lowers_it(self, case):
        z, y = case
        losses = [probe_loss(z, y, t).item() for t in range(6)]
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(losses))


class TestLogKappa:
    @given(labelled())
    def test_equals_the_eigenvalues_ratio(self, case):
        z, _ = case
        if torch.linalg.cond(z) < 1e6:
            assert log_kappa(z).exp().item() == pytest.approx(reference.kappa_of_features(z), rel=1e-6)

    def test_null_directions_do_not_count(self):
        z = torch.tensor([[2.0, 0.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        assert log_kappa(z).exp().item() == pytest.approx(8.0)

    def test_gradcheck(self):
        torch.manual_seed(0)
        assert torch.autograd.gradcheck(log_kappa, torch.randn(5, 3, dtype=torch.float64, requires_grad=True))

    def test_no_features_have_no_gradient(self):
        z = torch.zeros(3, 2, requires_grad=True)
        log_kappa(z).backward()
        assert z.grad.abs().max() == 0


@pytest.fixture(scope="module")
def images() -> tuple[ArrayTask, ArrayTask]:
    return load_task("digits[0-4]"), load_task("digits[5-9]")


def frozen_part(model: SplitModel, blocks: int) -> dict[str, torch.Tensor]:
    moved = {f"{n}." for b in model.blocks()[-blocks:] for n, _ in b} | {f"{model.head_name}."}
    state = model.network.state_dict()
    return {n: v for n, v in state.items() if not any(n.startswith(m) for m in moved)}


@pytest.mark.parametrize("name", DEEP)
class TestEveryDeepDefense:
    def test_moves_the_last_blocks_and_the_head_and_continues_to_the_same_model(self, name, model, images, tmp_path):
        class Killed(Exception):
            pass

        class Interrupted(Run):
            def seeded(self, *purpose):
                if purpose[1:2] == (2,):
                    raise Killed
                return super().seeded(*purpose)

        defense = dataclasses.replace(DEFENSES[name], epochs=None, iterations=4)
        before = frozen_part(model, 1)
        whole, record = defense.immunize(model, *images, run=Run(0, CPU))
        after = frozen_part(whole, 1)
        assert before
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert whole.facts().sha256 != model.facts().sha256
        assert all(p.requires_grad for p in whole.parameters())
        assert set(defense.terms) < set(record.history)
        with pytest.raises(Killed):
            defense.immunize(model, *images, run=Interrupted(0, CPU, tmp_path))
        resumed, again = defense.immunize(model, *images, run=Run(0, CPU, tmp_path))
        assert resumed.facts().sha256 == whole.facts().sha256
        assert again.history == record.history


def test_kept_answers_change_nothing_but_the_time(model, images):
    defense = DeepCondition(**BRIEF)
    kept, _ = defense.immunize(model, *images, run=Run(0, CPU))
    whole, _ = dataclasses.replace(defense, cache_gib=0).immunize(model, *images, run=Run(0, CPU))
    for one, other in zip(kept.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_too_large_answers_are_not_kept_and_that_is_said(model, images):
    _, record = DeepCondition(cache_gib=1e-6, **BRIEF).immunize(model, *images, run=Run(0, CPU))
    assert any("more than cache_gib" in event.message for event in record.events)


def test_memory_does_not_decide_what_is_mixed(model, images):
    """Mixtures are of what enters the first trained block, kept or not."""
    defense = RidgeProbeSuppression(
        iterations=3, batch_size=20, restricted_batch=60, guard_every=3, max_benign_drop=1.0
    )
    kept, _ = defense.immunize(model, *images, run=Run(0, CPU))
    anew, _ = dataclasses.replace(defense, cache_gib=0).immunize(model, *images, run=Run(0, CPU))
    for one, other in zip(kept.parameters(), anew.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_term_without_a_gradient_is_no_reason_to_train_without_it(model, images):
    silent = model.clone()
    with torch.no_grad():
        for p in silent.blocks()[-1][0][1].parameters():
            p.zero_()
    with pytest.raises(HoldfastError, match="cannot be balanced; give its lambda"):
        DeepCondition(**BRIEF).immunize(silent, *images, run=Run(0, CPU))


def test_a_low_score_on_the_way_leaves_the_weights_with_an_average_as_well(trained, images, monkeypatch):
    """The guard looks at the average, and puts it into the model; training goes on from the weights that were there."""
    config = DeepCondition(ema=0.9, **{**BRIEF, "guard_every": 1})
    plain, _ = DeepCondition(**{**BRIEF, "guard_every": 1}).immunize(trained, *images, run=Run(0, CPU))
    live = {}

    class Watched(_Immunization):
        def one_round(self, generator):
            values = super().one_round(generator)
            live.update(snapshot(self.model))
            return values

    watched = Watched(config, trained, *images, Run(0, CPU))
    watched.guard.acceptable = lambda _: watched.last
    watched.finish()
    state = plain.network.state_dict()
    assert all(torch.allclose(live[n], state[n], atol=1e-6) for n in live)


def test_how_many_steps_epochs_were_is_in_the_record(model, images):
    _, record = DeepCondition(epochs=0.2, **BRIEF).immunize(model, *images, run=Run(0, CPU))
    assert record.events[0].message == f"0.2 epochs of the shorter set are {len(record.history['iteration'])} steps"


def test_a_head_whose_outputs_are_not_the_logits_is_not_trained_alone(images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5),
                            nn.Softplus())  # fmt: skip
    model = SplitModel(network, "5")
    with pytest.raises(HoldfastError, match="cannot be trained alone"):
        DeepRIll(**BRIEF).immunize(model, *images, run=Run(0, CPU))


def test_what_the_owner_froze_stays_frozen(model, images):
    owned = model.clone()
    last = owned.blocks()[-1][0][1]
    last.weight.requires_grad_(False)
    immunized, _ = DeepCondition(optimizer="adam", **BRIEF).immunize(owned, *images, run=Run(0, CPU))
    now = immunized.blocks()[-1][0][1]
    assert torch.equal(now.weight, last.weight)
    assert not now.weight.requires_grad
    assert not torch.equal(now.bias, last.bias)


def test_balanced_terms_begin_with_the_norm_of_the_losss_gradient(trained, images):
    run = Run(0, CPU)
    config = DeepCondition(well_multiple=3.0, lambda_ill=0.25, **BRIEF)
    work = _Immunization(config, trained, *images, run)
    weights = work._balance()
    assert weights["r_ill"] == 0.25
    norms: dict[str, list[float]] = {"benign_loss": [], "r_well": []}
    generators = [run.generator("deep-condition", "balance", role) for role in ("benign", "restricted")]
    streams = [
        task.batches("train", 20, generator=g, device=CPU)
        for g, task in zip(generators, (work.benign, work.restricted), strict=True)
    ]
    model = work.model
    for _ in range(8):
        benign, _ = (next(s) for s in streams)
        logits, z = model.with_features(benign.x)
        smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, benign.y)
        for key, value in {"benign_loss": smoothed, "r_well": r_well_of_features(z.double())}.items():
            found = torch.autograd.grad(value, work.body(), retain_graph=True, allow_unused=True)
            norms[key].append(float(torch.cat([g.flatten() for g in found if g is not None]).norm()))
    wanted = 3 * sum(norms["benign_loss"]) / sum(norms["r_well"])
    assert weights["r_well"] == pytest.approx(wanted, rel=1e-4)


def test_a_step_is_eq_11(trained, images):
    """One step of plain descent equals one written out."""
    config = DeepCondition(
        lambda_well=1e-3, lambda_ill=2e-3, optimizer="sgd", schedule="constant", iterations=1, batch_size=20,
        guard_every=1, max_benign_drop=1.0, learning_rate=0.1, head_weight_decay=0.5,
    )  # fmt: skip
    run = Run(0, CPU)
    work = _Immunization(config, trained, *images, run)
    immunized, _ = config.immunize(trained, *images, run=run)
    plain = trained.clone().eval()
    benign, restricted = (
        next(task.batches("train", 20, generator=run.generator("deep-condition", "batches", role), device=CPU))
        for role, task in (("benign", work.benign), ("restricted", work.restricted))
    )
    logits, z = plain.with_features(benign.x)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, benign.y) + 1e-3 * r_well_of_features(z.double())
    loss = loss + 2e-3 * r_ill_of_features(plain.features(restricted.x).double())
    loss.backward()
    last = plain.blocks()[-1]
    with torch.no_grad():
        for _, module in last:
            for p in module.parameters():
                p.sub_(0.1 * p.grad)
        for p in plain.head.parameters():
            p.sub_(0.1 * (p.grad + 0.5 * p))
    for one, other in zip(immunized.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_an_epoch_is_of_the_shorter_set(images):
    benign, restricted = images
    assert benign.size("train") != restricted.size("train")
    shorter = min(round(0.9 * benign.size("train")), restricted.size("train"))
    assert DeepCondition(epochs=3, batch_size=20).with_steps(*images).iterations == 3 * (shorter // 20)
    assert DeepCondition(iterations=7).with_steps(*images).iterations == 7


def test_r_ill_alone_trains_the_body_by_nothing_else(trained, images):
    """With a weight of zero the body stays where it was, and the head learns."""
    immunized, _ = DeepRIll(lambda_ill=0.0, **BRIEF).immunize(trained, *images, run=Run(0, CPU))
    moved = {n for n, p in immunized.named_parameters() if not torch.equal(p, dict(trained.named_parameters())[n])}
    assert moved == {f"network.{trained.head_name}.{part}" for part in ("weight", "bias")}


@pytest.mark.parametrize("kind", [RidgeProbeSuppression, SlowProbeSuppression])
def test_suppression_takes_from_the_probe_what_it_is_told_to(trained, images, kind):
    benign, restricted = images
    more = {"steps": 10} if kind is SlowProbeSuppression else {}
    defense = kind(iterations=60, restricted_batch=300, max_benign_drop=0.2, **more)
    immunized, _ = defense.immunize(trained, benign, restricted, run=Run(0, CPU))

    def explained(model: SplitModel) -> float:
        x, _ = features(model, restricted, "test")
        y = torch.cat([b.y for b in restricted.sweep("test", 500, device=CPU)])
        return float(descended_probe(x, y, 10) if kind is SlowProbeSuppression else ridge_probe(x, y, 0.01))

    assert explained(immunized) < 0.75 * explained(trained)
    assert benign.score(immunized) > benign.score(trained) - 0.1


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (DeepCondition, {"blocks": 0}, "blocks is 0"),
        (DeepCondition, {"optimizer": "adamm"}, "adam"),
        (DeepCondition, {"schedule": "linear"}, "cosine"),
        (DeepCondition, {"precision": "fp8"}, "bf16"),
        (DeepCondition, {"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        (DeepCondition, {"lambda_ill": -1.0}, "lambda_ill is -1.0"),
        (DeepCondition, {"epochs": 0.0}, "epochs is 0.0"),
        (DeepCondition, {"cache_gib": -1.0}, "cache_gib is -1.0"),
        (DeepRIll, {"ill_multiple": float("nan")}, "ill_multiple is nan"),
        (DeepIMMA, {"inner_steps": 0}, "inner_steps is 0"),
        (DeepOptKappa, {"lambda_kappa": -2.0}, "lambda_kappa is -2.0"),
        (DeepCondition, {"precision": "bf16"}, "only rounding errors"),
        (RidgeProbeSuppression, {"weight": 0.0}, "weight is 0.0"),
        (RidgeProbeSuppression, {"restricted_batch": 1}, "restricted_batch is 1"),
        (SlowProbeSuppression, {"steps": 0}, "steps is 0"),
    ],
)
def test_bad_settings(kind, change, message):
    with pytest.raises(HoldfastError, match=message):
        kind(**change)


def test_more_blocks_than_there_are(model, images):
    with pytest.raises(HoldfastError, match=r"blocks is 9 and the body of .* has 3"):
        DeepCondition(blocks=9).immunize(model, *images, run=Run(0, CPU))


def test_a_low_benign_score_gives_the_last_good_state(trained, images):
    defense = DeepCondition(
        iterations=6, guard_every=1, learning_rate=50.0, optimizer="sgd", max_benign_drop=0.0, schedule="constant"
    )
    immunized, record = defense.immunize(trained, *images, run=Run(0, CPU))
    benign = images[0]
    assert not record.completed
    assert benign.score(immunized) == pytest.approx(benign.score(trained), abs=0.05)


@pytest.mark.parametrize("name", ["deep-condition", "deep-opt-kappa", "deep-imma", "ridge-probe", "slow-probe"])
def test_features_that_are_no_numbers_are_the_guards_affair(name, trained, images):
    """No decomposition of them is tried: the defense goes back, and says so."""
    far = {"iterations": 6, "learning_rate": 1e30, "optimizer": "sgd", "precision": "float32"}
    defense = dataclasses.replace(DEFENSES[name], **far)
    immunized, record = defense.immunize(trained, *images, run=Run(0, CPU))
    assert record.rollbacks > 0
    assert any("not finite" in event.message for event in record.events)
    assert all(bool(p.isfinite().all()) for p in immunized.parameters())


def test_models_of_other_libraries(images):
    torch.manual_seed(0)
    task = load_task("digits[0-4]@image_size=32,channels=3")
    other = load_task("digits[5-9]@image_size=32,channels=3")
    model = load_model("timm:mobilenetv2_035", task)
    immunized, record = RidgeProbeSuppression(restricted_batch=60, **BRIEF).immunize(
        model, task, other, run=Run(0, CPU)
    )
    assert record.history["explained"][0] > 0
    assert immunized.facts().sha256 != model.facts().sha256


@pytest.fixture(scope="module")
def read() -> tuple[SplitModel, ArrayTask, ArrayTask]:
    sizes = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "bert", "intermediate_size": 32, "max_position_embeddings": 16, **sizes}
    topic, mood = (load_task(f"phrases-{name}@tokenizer=words,length=10") for name in ("topic", "mood"))
    torch.manual_seed(0)
    return load_model(ModelSpec(name="hf:tiny", options={"config": config}), topic), topic, mood


class TestSentences:
    @pytest.mark.parametrize("kind", [DeepCondition, RidgeProbeSuppression])
    def test_encoders_are_immunized_like_images(self, read, kind):
        immunized, record = kind(**BRIEF).immunize(*read, run=Run(0, CPU))
        assert immunized.facts().sha256 != read[0].facts().sha256
        assert not any("run in every step" in event.message for event in record.events)

    def test_token_ids_have_no_mixtures(self, read):
        with pytest.raises(HoldfastError, match="token ids, which cannot be mixed"):
            RidgeProbeSuppression(mixing=1.0, **BRIEF).immunize(*read, run=Run(0, CPU))

    def test_what_none_stands_for(self, read, images):
        assert RidgeProbeSuppression().resolved(read[1]).mixing == 0.0
        assert RidgeProbeSuppression().resolved(images[0]).mixing == 1.0
