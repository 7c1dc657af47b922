"""Golden figures: every number that the packaged recipes give at smoke scale, before and after a change of structure.

    python tests/golden.py record [RECIPE ...]      run the recipes, and write tests/golden.json
    python tests/golden.py compare [RECIPE ...]     run them, and say which numbers are others than in tests/golden.json

Numbers hold to the last digit on one machine with the same libraries, and no further; `golden.json` says which those
were. So `make test` does not run this: record before a change that should keep behaviour, compare after it. Real data
are looked up in `$HOLDFAST_DATA`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import holdfast
from holdfast.runtime.documents import recipe_names

FILE = Path(__file__).with_name("golden.json")
APART = {"provenance", "timing", "seconds", "recipe", "png", "words", "reasons", "decision", "tried"}
"""Keys whose values depend on the moment or the machine, or are sentences; the numbers behind those are elsewhere."""


def numbers(value: Any, place: str = "") -> dict[str, float | str | None]:
    """Every number of a result, and every short text that is decided rather than written, by its place."""
    found: dict[str, float | str | None] = {}
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in APART:
                found |= numbers(each, f"{place}/{key}")
    elif isinstance(value, list):
        for i, each in enumerate(value):
            found |= numbers(each, f"{place}/{i}")
    elif value is None or isinstance(value, bool | int | float):
        found[place] = value
    return found


def digest(found: dict[str, Any]) -> str:
    """Hash of all numbers and their places."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def measured(recipe: str, folder: Path) -> dict[str, Any]:
    """Runs a recipe with one thread, or reads what an earlier call left in the folder."""
    out = folder / recipe.replace("/", "_")
    if not (out / "result.json").exists():
        command = [sys.executable, "-m", "holdfast", "run", recipe, "--scale", "smoke", "--out", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(holdfast.__file__).parents[1])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{recipe}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return numbers(json.loads((out / "result.json").read_text()))


def here() -> dict[str, str]:
    """What the last digits depend on."""
    own = {name: version(name) for name in ("torch", "timm", "transformers", "peft", "scikit-learn", "numpy", "scipy")}
    return {**own, "python": platform.python_version(), "instructions": torch.backends.cpu.get_cpu_capability()}


def main(arguments: list[str]) -> int:
    """Records or compares; returns 1 if a number differs."""
    if not arguments or arguments[0] not in ("record", "compare"):
        print(__doc__)
        return 2
    kept = json.loads(FILE.read_text()) if FILE.exists() else {"machine": {}, "recipes": {}}
    recipes = arguments[1:] or recipe_names()
    differing = []
    if arguments[0] == "compare" and kept["machine"] != here():
        print(f"Recorded with {kept['machine']}, and here is {here()}: last digits may differ.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("HOLDFAST_GOLDEN_FOLDER", temporary))
        for recipe in recipes:
            found = measured(recipe, folder)
            own = {"sha256": digest(found), "numbers": len(found), "parts": parts(found)}
            if arguments[0] == "record":
                kept["recipes"][recipe] = own
                print(f"{recipe}: {len(found)} numbers, {own['sha256'][:12]}")
            elif kept["recipes"].get(recipe) != own:
                differing.append(recipe)
                other = [
                    k for k, v in own["parts"].items() if kept["recipes"].get(recipe, {}).get("parts", {}).get(k) != v
                ]
                print(f"{recipe}: differs in {', '.join(sorted(other))}")
            else:
                print(f"{recipe}: {len(found)} numbers, all the same")
    if arguments[0] == "record":
        FILE.write_text(json.dumps({"machine": here(), "recipes": kept["recipes"]}, indent=1, sort_keys=True) + "\n")
    return int(bool(differing))


def parts(found: dict[str, Any]) -> dict[str, str]:
    """Hashes of the parts of a result, so that a difference can be looked for."""
    groups: dict[str, dict[str, Any]] = {}
    for place, value in found.items():
        groups.setdefault("/".join(place.split("/")[1:3]), {})[place] = value
    return {name: digest(group)[:16] for name, group in groups.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
