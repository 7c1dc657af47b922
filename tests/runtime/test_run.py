from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from holdfast.errors import HoldfastError
from holdfast.runtime.devices import cpu_threads, resolve_device
from holdfast.runtime.journal import Journal
from holdfast.runtime.run import Run, derive_seed
from holdfast.runtime.storage import load_tensors, optimizer_tensors, restore_optimizer, save_tensors, write_atomic


@given(st.integers(0, 2**31), st.text(), st.text())
def test_seeds_are_by_purpose(seed, first, second):
    assert 0 <= derive_seed(seed, first) < 2**63
    assert (derive_seed(seed, first) == derive_seed(seed, second)) == (first == second)
    assert derive_seed(seed, first, second) != derive_seed(seed, first + second)


def test_seeded_restores_the_global_generator():
    run = Run(3, torch.device("cpu"))
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with run.seeded("a"):
        inside = torch.rand(4)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    with run.seeded("a"):
        assert torch.equal(torch.rand(4), inside)
    with run.seeded("b"):
        assert not torch.equal(torch.rand(4), inside)


def test_seeded_restores_after_an_error():
    run = Run(3, torch.device("cpu"))
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), run.seeded("a"):
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_are_restored():
    before = torch.get_num_threads()
    with cpu_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_device_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(HoldfastError, match="Try 'auto' or 'cpu'"):
        resolve_device("cuda:99")


class TestFiles:
    def test_round_trip_with_meta(self, tmp_path):
        tensors = {"a": torch.randn(3, 2), "b": torch.arange(4)}
        save_tensors(tmp_path / "x.safetensors", tensors, {"round": 3, "history": [None, 0.5]})
        loaded, meta = load_tensors(tmp_path / "x.safetensors")
        assert meta == {"round": 3, "history": [None, 0.5]}
        assert all(torch.equal(loaded[k], v) for k, v in tensors.items())
        assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) & 0o400

    def test_channels_last_is_kept_by_value(self, tmp_path):
        tensor = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        save_tensors(tmp_path / "x.safetensors", {"a": tensor}, {})
        assert torch.equal(load_tensors(tmp_path / "x.safetensors")[0]["a"], tensor)

    def test_tensors_of_one_memory_are_written_each_for_itself(self, tmp_path):
        whole = torch.arange(12.0)
        tensors = {"whole": whole, "part": whole[3:6], "turned": whole.view(3, 4).T, "none": whole[:0]}
        save_tensors(tmp_path / "x.safetensors", tensors, {})
        loaded = load_tensors(tmp_path / "x.safetensors")[0]
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[k], v) for k, v in tensors.items())

    def test_a_failed_write_leaves_the_old_file_and_no_rubbish(self, tmp_path):
        path = tmp_path / "x.json"
        write_atomic(path, "old")
        with pytest.raises(UnicodeEncodeError):
            write_atomic(path, "\ud800")
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["x.json"]

    @pytest.mark.parametrize("write", [write_atomic, lambda path, _: save_tensors(path, {"a": torch.zeros(2)}, {})])
    def test_what_cannot_be_written_is_named(self, tmp_path, write, monkeypatch):
        (tmp_path / "folder").mkdir()
        with pytest.raises(HoldfastError, match=r"Cannot write '.*folder': it exists and is not a regular file"):
            write(tmp_path / "folder", "text")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(HoldfastError, match=r"Cannot write '.*pipe': it exists and is not a regular file"):
            write(tmp_path / "pipe", "text")
        with pytest.raises(HoldfastError, match="File name too long"):
            write(tmp_path / ("n" * 300), "text")
        (tmp_path / "file").write_text("")
        with pytest.raises(HoldfastError, match=r"Cannot write '.*/file/x': .*(exists|directory)"):
            write(tmp_path / "file" / "x", "text")

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("pathlib.Path.replace", full)
        with pytest.raises(HoldfastError, match=r"Cannot write '.*new': No space left on device.*Finished results"):
            write(tmp_path / "new", "text")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "pipe"]


class TestJournal:
    def test_survives_and_is_refused_for_other_work(self, tmp_path):
        path = tmp_path / "checkpoints" / "j.jsonl"
        Journal(path, {"seed": 1, "battery": "a"}).add("k", [1, 2])
        assert Journal(path, {"seed": 1, "battery": "a"}).entries == {"k": [1, 2]}
        with pytest.raises(HoldfastError, match="another battery, seed: results are never mixed"):
            Journal(path, {"seed": 2, "battery": "b"})

    @given(st.integers(1, 60))
    def test_a_torn_line_is_dropped(self, tmp_path_factory, cut):
        path = tmp_path_factory.mktemp("j") / "j.jsonl"
        journal = Journal(path, {"seed": 1})
        for i in range(3):
            journal.add(f"key {i}", i)
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        resumed = Journal(path, {"seed": 1})
        assert resumed.entries == {k: v for k, v in journal.entries.items() if k in resumed.entries}
        for i in range(3):
            if f"key {i}" not in resumed.entries:
                resumed.add(f"key {i}", i)
        assert path.read_bytes() == whole
        assert all(json.loads(line) for line in path.read_text().splitlines())

    @pytest.mark.parametrize("line", ["{broken", "[1]", '{"value": 1}', "3", '{"key": "b"}', '["key", "value"]'])
    def test_damage_is_said(self, tmp_path, line):
        path = tmp_path / "checkpoints" / "j.jsonl"
        Journal(path, {"seed": 1}).add("a", 1)
        with path.open("a") as handle:
            handle.write(line + "\n")
        with pytest.raises(HoldfastError, match="is damaged"):
            Journal(path, {"seed": 1})

    def test_the_same_piece_twice_with_other_values_is_damage(self, tmp_path):
        path = tmp_path / "checkpoints" / "j.jsonl"
        journal = Journal(path, {"seed": 1}, "study")
        journal.add("a", 1)
        journal.add("a", 1)
        assert Journal(path, {"seed": 1}, "study").entries == {"a": 1}
        journal.add("a", 2)
        with pytest.raises(HoldfastError, match=r"line 4: a occurs twice.*finished job of the study"):
            Journal(path, {"seed": 1}, "study")

    def test_a_refusal_names_the_work_and_its_command(self, tmp_path, monkeypatch):
        path = tmp_path / "checkpoints" / "j.jsonl"
        monkeypatch.setattr("sys.argv", ["/bin/holdfast", "run", "my study.yaml"])
        Journal(path, {"seed": 1}, "study")
        with pytest.raises(
            HoldfastError, match=r"unfinished study with another seed.*\(holdfast run 'my study.yaml'\)"
        ):
            Journal(path, {"seed": 2}, "audit")

    def test_a_journal_of_an_earlier_version_continues(self, tmp_path):
        path = tmp_path / "j.jsonl"
        path.write_text('{"belongs_to": {"seed": 1}}\n{"key": "a", "value": 1}\n')
        assert Journal(path, {"seed": 1}, "audit").entries == {"a": 1}
        with pytest.raises(
            HoldfastError, match=r"an unfinished audit with another seed.*the command that began it, or"
        ):
            Journal(path, {"seed": 2}, "audit")

    def test_reading_finds_damage_before_what_is_missing_is_done(self, tmp_path):
        journal = Journal(tmp_path / "j.jsonl", {}, "audit")
        journal.add("a", "1")
        journal.add("b", "one")
        assert journal.missing({"a": int, "c": int}) == ["c"]
        assert journal.read("a", int) == 1
        with pytest.raises(HoldfastError, match=r"j\.jsonl' is damaged \(b: invalid literal"):
            journal.missing({"b": int, "c": int})

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
    def test_a_full_disk_is_named_and_nothing_is_lost(self, tmp_path):
        journal = Journal(tmp_path / "j.jsonl", {})
        journal.add("a", 1)
        journal.path = Path("/dev/full")
        with pytest.raises(HoldfastError, match=r"Cannot write '/dev/full': No space left on device.*are kept"):
            journal.add("b", 2)
        assert journal.entries == {"a": 1}

    def test_a_folder_that_is_gone_is_named(self, tmp_path):
        journal = Journal(tmp_path / "checkpoints" / "j.jsonl", {})
        shutil.rmtree(tmp_path / "checkpoints")
        with pytest.raises(HoldfastError, match=r"Cannot write '.*j\.jsonl': No such file"):
            journal.add("a", 1)
        assert not (tmp_path / "checkpoints").exists()

    def test_in_memory(self):
        journal = Journal(None, {})
        journal.add("a", 1)
        assert journal.entries == {"a": 1}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.trains
def test_a_restored_optimizer_takes_the_same_step(fused, tmp_path):
    """Channels-last parameters and a file in between, which stores tensors contiguously."""

    def setting():
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1, fused=fused)

    def step(layer, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        layer(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()

    layer, optimizer = setting()
    step(layer, optimizer, 1)
    save_tensors(tmp_path / "s.safetensors", optimizer_tensors(optimizer), {})
    again, restored = setting()
    again.load_state_dict(layer.state_dict())
    restore_optimizer(restored, load_tensors(tmp_path / "s.safetensors")[0])
    step(layer, optimizer, 2)
    step(again, restored, 2)
    assert torch.equal(layer.weight, again.weight)


@pytest.mark.trains
def test_means_over_rows_and_columns_are_restored(tmp_path):
    """Adafactor keeps these instead of moments of the parameter's shape."""

    def setting():
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3)
        return layer, torch.optim.Adafactor(layer.parameters(), lr=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.linspace(-1, 1, 384).view(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()

    layer, optimizer = setting()
    step(layer, optimizer)
    again, restored = setting()
    again.load_state_dict(layer.state_dict())
    kept = optimizer_tensors(optimizer)
    save_tensors(tmp_path / "s.safetensors", kept, {})
    restore_optimizer(restored, load_tensors(tmp_path / "s.safetensors")[0])
    step(layer, optimizer)
    step(again, restored)
    assert torch.equal(layer.weight, again.weight)
    other = torch.optim.Adafactor([torch.nn.Parameter(torch.zeros(5, 3, 3, 3)), torch.nn.Parameter(torch.zeros(5))])
    with pytest.raises(HoldfastError, match="does not match any of its parameters"):
        restore_optimizer(other, kept)
