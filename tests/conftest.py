"""Fixtures: small tasks and models, and the real data where it is at hand."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock
from threadpoolctl import threadpool_limits

import training
from fewer import cut
from holdfast.experiments.recipe import load as load_recipe
from holdfast.experiments.runner import run_recipe
from holdfast.metrics import diagnostics
from holdfast.models import ModelSpec, SplitModel, load_model
from holdfast.results import RunResult, read_result
from holdfast.runtime.executors import Executor, executor
from holdfast.runtime.run import Run
from holdfast.tasks import ArrayTask, TextToImageTask, load_task
from holdfast.training import pretrain

# One thread, here and in the processes that tests start: as fast as two for networks this small, and indifferent to
# what else the machine does. `make test-portable` asks for two as well.
THREADS = int(os.environ.get("HOLDFAST_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)
threadpool_limits(THREADS)  # NumPy's, which is loaded: the variable would come too late
os.environ["OMP_NUM_THREADS"] = str(THREADS)
if os.environ.get("ATEN_CPU_CAPABILITY"):
    # In bfloat16 it asks the processor for AVX-512, and not what torch was told to use.
    torch.backends.cuda.enable_flash_sdp(False)
# Nor is it their business how a terminal is, what started them, or what a person has set.
for name in (
    "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
    "HOLDFAST_TRACEBACK", "HOLDFAST_DATA", "RANK", "LOCAL_RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
):  # fmt: skip
    os.environ.pop(name, None)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
# The same examples in every run, and as many seconds as a busy machine needs for one.
hypothesis.settings.register_profile("holdfast", derandomize=True, deadline=None)
hypothesis.settings.load_profile("holdfast")
Made = TypeVar("Made")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(training)


def pytest_collection_finish() -> None:
    """Leaves what was imported out of every later collection of garbage: hundreds of thousands of objects."""
    gc.collect()
    gc.freeze()


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[], Made]) -> Made:
    """What the first worker of this run makes, and the others read; `name` is unique among all that is shared."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make()
    file = factory.getbasetemp().parent / f"{name}.pickle"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_bytes(pickle.dumps(make()))
            unfinished.rename(file)
    return pickle.loads(file.read_bytes())


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOLDFAST_DATA", raising=False)


def real_data() -> Path:
    folder = Path(os.environ.get("HOLDFAST_TEST_DATA", SHARED))
    if not folder.is_dir():
        pytest.skip("real data is not at hand: set HOLDFAST_TEST_DATA to a folder with cifar10.npz, mnist.npz, ...")
    return folder


@pytest.fixture
def data_dir() -> Path:
    return real_data()


@pytest.fixture(scope="session")
def few_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few samples of every file of the real data; see `fewer.cut`."""
    folder = real_data()
    return once(tmp_path_factory, "few-data", lambda: cut(folder, tmp_path_factory.mktemp("data") / "few"))


@pytest.fixture
def brief_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red flags are looked for on few samples, where a test is about something else and the network is a real one."""
    monkeypatch.setattr(diagnostics, "SAMPLES", 16)
    monkeypatch.setattr(diagnostics, "FEW", 4)


@pytest.fixture
def run() -> Run:
    return Run(seed=0, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def session_run() -> Run:
    return Run(seed=0, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def benign() -> ArrayTask:
    return load_task("digits[0-4]")


@pytest.fixture(scope="session")
def restricted() -> ArrayTask:
    return load_task("digits[5-9]")


@pytest.fixture(scope="session")
def digit_images() -> tuple[ArrayTask, ArrayTask]:
    """The same two domains for a denoiser: benign and restricted."""
    return load_task("digits[0-4]@kind=denoising"), load_task("digits[5-9]@kind=denoising")


@pytest.fixture(scope="session")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> SplitModel:
    """A small one that knows its benign task a little; it is shared, so do not change it."""
    from zoo import SETTINGS, denoising

    made = once(tmp_path_factory, "denoiser", denoising.benign_denoiser)
    SETTINGS["unet, benign"].original = made
    return made


@pytest.fixture(scope="session")
def digit_captions() -> tuple[TextToImageTask, TextToImageTask]:
    """Digits with captions: benign and restricted."""
    task = load_task("digits@kind=text-to-image,caption=a photo of the digit {},train_limit=400,test_limit=50")
    assert isinstance(task, TextToImageTask)
    return task.subset(range(8)), task.subset([8, 9])


@pytest.fixture(scope="session")
def text_to_image(
    digit_captions: tuple[TextToImageTask, TextToImageTask], tmp_path_factory: pytest.TempPathFactory
) -> SplitModel:
    """A small one that knows its benign task a little; it is shared, so do not change it."""
    spec = ModelSpec(name="text-unet", options={"widths": [8]})
    return once(tmp_path_factory, "text-to-image", lambda: _pretrained(spec, digit_captions[0], steps=30))


@pytest.fixture(scope="session")
def two_workers() -> Iterator[Executor]:
    """`processes:2`, whose two processes serve one test after another: each takes seconds to start."""
    made = executor("processes:2")
    with made.kept():
        yield made


@pytest.fixture
def model(benign: ArrayTask) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_model("cnn", benign)


@pytest.fixture(scope="session")
def trained(benign: ArrayTask, tmp_path_factory: pytest.TempPathFactory) -> SplitModel:
    """A model that knows its benign task."""
    return once(tmp_path_factory, "trained", lambda: _pretrained("cnn", benign, steps=150))


def _pretrained(spec: str | ModelSpec, task: ArrayTask, *, steps: int) -> SplitModel:
    run = Run(seed=0, device=torch.device("cpu"))
    with run.seeded("initialise"):
        fresh = load_model(spec, task)
    return pretrain(fresh, task, steps=steps, run=run)


@pytest.fixture(scope="session")
def zoo_originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SplitModel]:
    """The two networks of digits that sham defenses are made of; the zoo makes its shams of them as well."""
    from zoo import SETTINGS  # all adversaries that answer shams, which takes seconds

    made = once(tmp_path_factory, "zoo", lambda: {norm: SETTINGS[norm].original for norm in ("batch", "none")})
    for norm, original in made.items():
        SETTINGS[norm].original = original
    return made


@pytest.fixture(scope="session")
def toy() -> ArrayTask:
    """Two well separated clusters a class, as feature vectors."""
    return toy_task(3)


def toy_task(classes: int, *, samples: int = 30, width: int = 6, seed: int = 0) -> ArrayTask:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width)) * 3

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(n) % classes
        return centres[y] + rng.normal(size=(n, width)), y

    return ArrayTask("toy", *draw(samples * classes), *draw(20 * classes))


@pytest.fixture(scope="session")
def brief_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole, brief run."""

    def made() -> Path:
        folder = tmp_path_factory.mktemp("runs") / "brief"
        run_recipe(load_recipe("quickstart", scale="smoke"), folder=folder, device="cpu", quiet=True)
        return folder

    # A copy for each worker: tests write reports into it.
    return shutil.copytree(once(tmp_path_factory, "brief", made), tmp_path_factory.mktemp("copy") / "brief")


@pytest.fixture(scope="session")
def brief_result(brief_folder: Path) -> RunResult:
    return read_result(brief_folder)
