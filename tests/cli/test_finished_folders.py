"""The commands on finished folders: replay, card and leaderboard, from the command line."""

from __future__ import annotations

import json
import shutil

import pytest
from test_cli import files, inside, refused

import holdfast
from holdfast.adversaries import listed
from holdfast.cli.main import main
from holdfast.experiments.replay import replay

assert files  # the fixture
TASKS = ("--benign", "digits[0-4]", "--restricted", "digits[5-9]")


@pytest.fixture
def folder(brief_folder, tmp_path):
    """A copy of a finished run, to be tampered with."""
    return shutil.copytree(brief_folder, tmp_path / "run")


@pytest.fixture(scope="module")
def audited(files, tmp_path_factory):
    """The folder of an audit from the command line."""
    out = tmp_path_factory.mktemp("audits") / "audited"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        arguments = [
            "audit", "fresh.safetensors", "--original", "original.safetensors", *TASKS, "--out", out,
            "--budgets", "0,2,4", "--seeds", 2, "--shots", 5, "--threads", 1, "--reported", 0.31,
            "--set", "side_effects=false",
        ]  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
    assert ended.value.code in (0, 3, 4)
    return out


def change(folder, edit):
    content = json.loads((folder / "result.json").read_text())
    edit(content)
    (folder / "result.json").write_text(json.dumps(content))


class TestReplay:
    def test_every_role_and_another_adversary_of_a_run(self, brief_folder, brief_result):
        for role in ("immunized", "original", "scratch"):
            assert replay(brief_folder, role=role).same, role
        name = list(brief_result.audit.adversaries)[-1]
        done = replay(brief_folder, adversary=name, seed=brief_result.audit.seeds[-1])
        assert done.repeated == done.recorded, "losses and folds as well"
        assert done.recorded.adversary == name

    def test_from_the_command_line(self, brief_folder, capsys):
        done = inside(capsys, "replay", brief_folder)
        assert done.returncode == 0, done.stderr
        assert "The same scores, to the last digit, and the same training losses." in done.stdout

    def test_exit_1_where_a_score_is_another(self, folder, brief_result, capsys):
        best = brief_result.audit.by_budget[-1].best_adversary["immunized"]

        def edit(content):
            for curve in content["audit"]["curves"]:
                if (curve["role"], curve["seed"], curve["adversary"]) == ("immunized", 0, best):
                    curve["scores"][-1] += 0.01

        change(folder, edit)
        done = inside(capsys, "replay", folder)
        assert done.returncode == 1
        assert "NOT the same" in done.stdout
        assert "differs" in done.stdout

    def test_an_audit_says_where_its_models_came_from(self, audited, files, monkeypatch, capsys):
        source = json.loads((audited / "result.json").read_text())["recipe"]["source"]
        assert source["model"] == "fresh.safetensors"
        assert source["restricted"] == "digits[5-9]"
        monkeypatch.chdir(files)
        for role in ("immunized", "scratch"):
            done = inside(capsys, "replay", audited, "--role", role, "--seed", "1")
            assert done.returncode == 0, done.stderr + done.stdout

    def test_other_weights_and_other_data_are_refused_by_name(self, audited, files, tmp_path, monkeypatch, capsys):
        shutil.copy(files / "original.safetensors", tmp_path / "fresh.safetensors")
        shutil.copy(files / "original.safetensors", tmp_path / "original.safetensors")
        monkeypatch.chdir(tmp_path)
        refused(inside(capsys, "replay", audited), "Not what was audited: the immunized model (SHA-256")
        monkeypatch.chdir(files)
        other = shutil.copytree(audited, tmp_path / "other")
        change(other, lambda c: c["recipe"]["source"].update(restricted="digits[4-8]"))
        refused(inside(capsys, "replay", other), "Not what was audited: the restricted data")

    def test_an_audit_from_python_cannot_be_replayed(self, trained, benign, restricted, tmp_path, capsys):
        holdfast.audit(
            trained, original=trained, benign=benign, restricted=restricted, budgets=(0, 1), seeds=1, shots=2,
            battery=listed("quick-v1")[:1], side_effects=False, folder=tmp_path,
        )  # fmt: skip
        refused(inside(capsys, "replay", tmp_path), "does not say where its models and tasks came from", "from Python")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--adversary", "nobody"), ["Unknown adversary 'nobody'"]),
            (("--seed", "99"), ["no trial", "seed 99"]),
            (("--device", "quantum"), ["Device 'quantum'"]),
        ],
    )
    def test_bad_input(self, brief_folder, capsys, arguments, words):
        refused(inside(capsys, "replay", brief_folder, *arguments), *words)

    def test_an_adversary_of_another_version_is_refused(self, folder, brief_result, capsys):
        best = brief_result.audit.by_budget[-1].best_adversary["immunized"]
        change(folder, lambda c: c["audit"]["adversaries"][best].update(batch_size=49))
        refused(inside(capsys, "replay", folder), "that the audit does not name")

    def test_a_missing_model_is_named(self, folder, capsys):
        (folder / "model.safetensors").unlink()
        refused(inside(capsys, "replay", folder), "model.safetensors", "does not exist")


class TestCard:
    def test_is_bound_to_the_weights(self, folder, files, tmp_path, capsys):
        readme = tmp_path / "README.md"
        readme.write_text("# My model\n")
        assert inside(capsys, "card", folder, "--out", readme).returncode == 0
        assert readme.read_text().count("# My model") == 1
        done = inside(capsys, "card", readme, "--check", folder / "model.safetensors")
        assert done.returncode == 0
        assert "written again" not in done.stdout
        done = inside(capsys, "card", tmp_path, "--check", files / "fresh.safetensors")
        assert done.returncode == 1
        assert "NOT the card" in done.stdout

    def test_the_same_tensors_in_another_file_belong_to_it(self, folder, tmp_path, capsys):
        from safetensors.torch import load_file, save_file

        anew = tmp_path / "anew.safetensors"
        save_file(load_file(folder / "model.safetensors"), anew)
        (tmp_path / "README.md").write_text(inside(capsys, "card", folder).stdout)
        done = inside(capsys, "card", tmp_path, "--check", anew)
        assert done.returncode == 0
        assert "written again" in done.stdout

    def test_other_weights_get_no_card(self, folder, files, capsys):
        refused(
            inside(capsys, "card", folder, "--weights", files / "fresh.safetensors"), "other tensors than were audited"
        )

    def test_without_the_file_the_tensors_are_named(self, folder, capsys):
        (folder / "model.safetensors").unlink()
        done = inside(capsys, "card", folder)
        assert done.returncode == 0
        assert "SHA-256 of the tensors" in done.stdout
        assert "SHA-256 of the file" not in done.stdout
        assert "--weights FILE" in done.stderr

    def test_no_card_to_check(self, tmp_path, files, capsys):
        refused(inside(capsys, "card", tmp_path, "--check", files / "fresh.safetensors"), "does not exist")


class TestLeaderboard:
    def test_renders_what_is_there(self, audited, folder, tmp_path, capsys):
        shutil.copytree(audited, tmp_path / "audited")
        (tmp_path / "torn").mkdir()
        (tmp_path / "torn" / "result.json").write_text("{")
        done = inside(capsys, "leaderboard", tmp_path)
        assert done.returncode == 0, done.stderr
        assert "2 with an audit, 0 without, 1 not readable" in done.stdout
        page = (tmp_path / "leaderboard.html").read_text()
        assert ">31.0%<" in page, "what was reported"
        assert "battery quick-v1 only" in page

    def test_an_empty_folder(self, tmp_path, capsys):
        refused(inside(capsys, "leaderboard", tmp_path), "no result.json")
