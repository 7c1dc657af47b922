"""A defense registers where it stands, in this package or another one."""

from __future__ import annotations

import sys
from importlib import invalidate_caches

import pytest

import holdfast
from holdfast.defenses import DEFENSES, Sophon, build_defense, list_defenses, register_defense
from holdfast.errors import HoldfastError
from holdfast.runtime.registry import Registry
from plugins import NOISE, installed


def with_defense(folder, code):
    """Installs a package with one defense, for a `with` block."""
    return installed(folder, {"noisy": ("holdfast.defenses", code)}, [DEFENSES])


def test_the_names_are_sorted_and_each_class_stands_under_its_own():
    assert list_defenses() == sorted(list_defenses())
    assert {"sophon", "ntl", "condition", "leace"} <= set(list_defenses())
    assert all(kind.name == name for name, kind in DEFENSES.items())


@pytest.mark.trains
def test_a_defense_of_another_package_is_built_and_run_by_name(tmp_path, model, benign, restricted):
    with with_defense(tmp_path, NOISE):
        assert "noise" in list_defenses()
        assert build_defense({"name": "noise", "scale": "0.5"}).config() == {"scale": 0.5}
        shaken = holdfast.immunize(model, benign=benign, restricted=restricted, defense="noise", scale=0.5)
        assert shaken.facts().sha256 != model.facts().sha256
        assert (shaken.immunization.defense, shaken.immunization.config) == ("noise", {"scale": 0.5})
        with pytest.raises(HoldfastError, match="Unknown setting of defense 'noise': 'scales': did you mean 'scale'"):
            build_defense({"name": "noise", "scales": 1})
    assert "noise" not in list_defenses()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0", "ZeroDivisionError"),
        (NOISE.replace('"noise"', '"ntl"'), "Two members of holdfast.defenses are called 'ntl'"),
    ],
)
def test_a_broken_package_is_named_each_time_and_not_passed_over(tmp_path, code, why):
    with with_defense(tmp_path, code):
        for _ in range(2):
            with pytest.raises(HoldfastError, match=r"'others' offers a defense \(noisy = noisy\).*Repair") as error:
                build_defense({"name": "sophon"})
            assert why in str(error.value)


def test_a_second_defense_of_one_name_is_refused():
    class Other(Sophon):
        pass

    with pytest.raises(HoldfastError, match=r"are called 'sophon': .*Sophon and .*Other; rename one"):
        register_defense(Other)
    assert DEFENSES["sophon"] is Sophon


class TestRegistry:
    @pytest.fixture
    def shapes(self, tmp_path, monkeypatch):
        """A registry of a package whose members are two files, one of them in a subfolder."""
        folder = tmp_path / "shapes_of_a_test"
        (folder / "round").mkdir(parents=True)
        (folder / "__init__.py").write_text(
            "from holdfast.runtime.registry import Registry\nSHAPES = Registry('shape', 'shapes_of_a_test')\n"
        )
        (folder / "round/__init__.py").write_text("")
        for place, name in (("square", "square"), ("round/circle", "circle")):
            (folder / f"{place}.py").write_text(
                f"from shapes_of_a_test import SHAPES\n@SHAPES.register({name!r})\nclass Shape: ...\n"
            )
        monkeypatch.syspath_prepend(tmp_path)
        invalidate_caches()
        yield folder
        for name in [name for name in sys.modules if name.startswith("shapes_of_a_test")]:
            del sys.modules[name]

    @staticmethod
    def registry() -> Registry:
        from importlib import import_module

        return import_module("shapes_of_a_test").SHAPES

    def test_every_file_of_the_folder_is_a_member_without_an_import(self, shapes):
        registry = self.registry()
        assert list(registry) == ["circle", "square"]
        assert len(registry) == 2
        assert registry["circle"] is registry.lookup("circle") is not registry["square"]
        assert "cube" not in registry
        with pytest.raises(HoldfastError, match="Unknown shape 'squar': did you mean 'square'"):
            registry.lookup("squar")

    def test_a_broken_file_of_the_folder_does_not_leave_a_part_of_the_members(self, shapes):
        (shapes / "triangle.py").write_text("raise RuntimeError('broken')")
        registry = self.registry()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken"):
                list(registry)
