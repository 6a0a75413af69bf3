"""A checkpoint is whole and sound or it is not there; every kind of damage is found and passed over aloud."""

from __future__ import annotations

import os
import random
import shutil
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tunesmith.engine import checkpoint, durable
from tunesmith.engine.checkpoint import (
    check_free_space,
    check_writable,
    checkpoint_bytes,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    saved_steps,
    verify_checkpoint,
)
from tunesmith.errors import DiskError, NonFiniteError, RunError

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def some(step: int, size: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.w": torch.randn(size, size, generator=generator),
        "rng.cpu": torch.arange(50, dtype=torch.uint8),
    }


def two_good(root):
    for step in (1, 2):
        save_checkpoint(root, step, some(step), {"step": step, "note": "ä"})


def silent(text: str) -> None:
    raise AssertionError(f"nothing to warn of, but: {text}")


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path):
    tensors = {f"t{i}.{n}": (torch.rand(n, 3) * 9).to(d) for i, d in enumerate(DTYPES) for n in (0, 1, 7)}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "view": torch.arange(12.0).reshape(3, 4).T,
        'na"me|é': torch.zeros(1),
    }
    meta = {"a": [1, 0.1 + 0.2, None, True], "b": {"c": "ü\n"}}
    path = save_checkpoint(tmp_path / "new" / "checkpoints", 400, tensors, meta)
    assert path.name == "step_000400" and verify_checkpoint(path) == []
    found, found_meta = load_checkpoint(path)
    assert found.keys() == tensors.keys() and found_meta == meta
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_file_is_the_same_as_safetensors_own(tmp_path):
    tensors = {f"t{i}": torch.ones(i, 2).to(dtype) for i, dtype in enumerate(DTYPES)}
    path = save_checkpoint(tmp_path, 1, tensors, {})
    save_file(tensors, tmp_path / "theirs")
    ours, theirs = load_file(path / checkpoint.TENSORS), load_file(tmp_path / "theirs")
    assert all(torch.equal(ours[name], theirs[name]) for name in tensors)
    assert (path / checkpoint.TENSORS).stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_equal_contents_give_equal_bytes(tmp_path):
    paths = [save_checkpoint(tmp_path / name, 1, some(1), {"x": 1}) for name in "ab"]
    assert all((paths[0] / n).read_bytes() == (paths[1] / n).read_bytes() for n in os.listdir(paths[0]))


def corrupt(path, draw: random.Random) -> str:
    """Damage the checkpoint at `path` in one way, surely."""
    file = path / draw.choice(sorted(os.listdir(path)))
    data = bytearray(file.read_bytes())
    kind = draw.choice(["flip", "truncate", "append", "empty", "delete", "zero", "swap"])
    if kind == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        data = data[: draw.randrange(len(data))]
    elif kind == "append":
        data += bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))
    elif kind == "zero":
        start = draw.randrange(len(data))
        data[start : start + 4096] = bytes(min(4096, len(data) - start))
    elif kind == "swap":
        start = next(i for i in range(len(data) - 1) if data[i] != data[i + 1])
        data[start], data[start + 1] = data[start + 1], data[start]
    if kind == "delete":
        file.unlink()
    else:
        changed = b"" if kind == "empty" else bytes(data)
        if changed == file.read_bytes():
            return corrupt(path, draw)
        file.write_bytes(changed)
    return f"{kind} {file.name}"


def test_1000_of_1000_corruptions_are_found_and_the_one_before_is_used(tmp_path):
    two_good(tmp_path / "pristine")
    draw, found, missed_by_size, missed_by_loading = random.Random(5), 0, 0, 0
    for trial in range(1000):
        root = tmp_path / "run"
        shutil.copytree(tmp_path / "pristine", root)
        damage, warnings = corrupt(root / "step_000002", draw), []
        problems = verify_checkpoint(root / "step_000002")
        missed_by_size += not checkpoint._verify(root / "step_000002", contents=False)
        missed_by_loading += _loads(root / "step_000002")
        with pytest.raises(RunError):
            load_checkpoint(root / "step_000002")
        used = latest_checkpoint(root, warn=warnings.append)
        assert problems and used == root / "step_000001", (trial, damage)
        assert len(warnings) == 1 and "step_000002" in warnings[0] and problems[0] in warnings[0]
        assert (root / "step_000002.damaged-1").is_dir() and saved_steps(root) == [1]
        assert latest_checkpoint(root, warn=silent) == used
        found += 1
        shutil.rmtree(root)
    assert found == 1000
    # Controls: what weaker checks let through.
    assert missed_by_size > 100 and missed_by_loading > 100


def _loads(path) -> bool:
    try:
        load_file(path / checkpoint.TENSORS)
    except (SafetensorError, OSError):
        return False
    return True


@pytest.mark.parametrize(
    "what", ["link", "folder", "pipe", "socket", "renamed folder", "other manifest", "two swapped"]
)
def test_odd_things_in_a_checkpoint_are_damage_and_never_followed(tmp_path, what, monkeypatch):
    two_good(tmp_path)
    path = tmp_path / "step_000002"
    file = path / checkpoint.TENSORS
    if what == "link":
        shutil.move(file, tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif what == "folder":
        file.unlink()
        file.mkdir()
    elif what == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif what == "socket":
        file.unlink()
        monkeypatch.chdir(path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(file.name)
    elif what == "renamed folder":
        path = path.rename(tmp_path / "step_000009")
    elif what == "other manifest":
        shutil.copy(tmp_path / "step_000001" / checkpoint.MANIFEST, path)
    else:
        shutil.copytree(tmp_path / "step_000001", path, dirs_exist_ok=True)
    assert verify_checkpoint(path)
    assert latest_checkpoint(tmp_path, warn=lambda text: None) == tmp_path / "step_000001"


def test_when_none_is_sound_it_says_so_and_never_starts_afresh(tmp_path):
    assert latest_checkpoint(tmp_path / "absent", warn=silent) is None
    assert latest_checkpoint(tmp_path, warn=silent) is None
    two_good(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step_{step:06d}" / checkpoint.META).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(RunError) as caught:
            latest_checkpoint(tmp_path, warn=silent)
        assert "step_000001" in str(caught.value) and "step_000002" in str(caught.value)


def test_a_reader_changes_nothing(tmp_path):
    two_good(tmp_path)
    (tmp_path / "step_000002" / checkpoint.META).unlink()
    (tmp_path / ".tmp-step_000003-1").mkdir()
    before, warnings = sorted(os.listdir(tmp_path)), []
    assert latest_checkpoint(tmp_path, warn=warnings.append, repair=False) == tmp_path / "step_000001"
    assert sorted(os.listdir(tmp_path)) == before and len(warnings) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_a_number_is_never_saved(tmp_path, value):
    two_good(tmp_path)
    tensors = {**some(3), "optimizer.w|exp_avg": torch.tensor([1.0, value])}
    with pytest.raises(NonFiniteError, match=r"optimizer.w\|exp_avg \(1 of 2"):
        save_checkpoint(tmp_path, 3, tensors, {})
    assert saved_steps(tmp_path) == [1, 2] and len(os.listdir(tmp_path)) == 2
    mask = torch.tensor([0.0, float("-inf")])
    save_checkpoint(tmp_path, 3, {**some(3), "buffer.mask": mask}, {})  # a mask is infinite by design


def test_saving_a_step_again_replaces_it_and_moves_damage_aside(tmp_path):
    two_good(tmp_path)
    save_checkpoint(tmp_path, 2, some(7), {"again": True})
    assert load_checkpoint(tmp_path / "step_000002")[1] == {"again": True}
    (tmp_path / "step_000002" / checkpoint.META).unlink()
    save_checkpoint(tmp_path, 2, some(8), {"again": 2})
    assert load_checkpoint(tmp_path / "step_000002")[1] == {"again": 2}
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002", "step_000002.damaged-1"]


def test_what_a_crash_leaves_is_tidied_and_a_replaced_checkpoint_gets_its_name_back(tmp_path):
    two_good(tmp_path)
    shutil.copytree(tmp_path / "step_000001", tmp_path / ".old-step_000000")
    (tmp_path / ".tmp-step_000003-12345").mkdir()
    (tmp_path / "step_000002").rename(tmp_path / ".replaced-step_000002")
    assert latest_checkpoint(tmp_path, warn=silent) == tmp_path / "step_000002"
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002"]


def test_a_failing_disk_keeps_the_last_good_and_says_what_is_needed(tmp_path, monkeypatch):
    for number, code, text in ((28, 74, "disk full"), (5, 74, "I/O error"), (30, 2, "cannot be written")):
        two_good(root := tmp_path / str(number))
        real, calls = os.fsync, []

        def fail_at(at, number=number, real=real, calls=calls):
            def fsync(descriptor):
                calls.append(descriptor)
                if len(calls) == at:
                    raise OSError(number, os.strerror(number))
                return real(descriptor)

            return fsync

        for at in range(1, 5):
            calls.clear()
            monkeypatch.setattr(os, "fsync", fail_at(at))
            with pytest.raises(RunError) as caught:
                save_checkpoint(root, 3, some(3), {})
            monkeypatch.setattr(os, "fsync", real)
            assert text in str(caught.value) and "step_000003" in str(caught.value)
            assert caught.value.exit_code == code
            assert saved_steps(root) == [1, 2] and len(os.listdir(root)) == 2
        needed = checkpoint_bytes(some(3), {})
        assert code == 2 or f"{needed} bytes are needed" in str(caught.value)


def test_the_predicted_size_is_the_size(tmp_path):
    for step, size in enumerate((10, 100, 500)):
        meta = {"note": "x" * size}
        path = save_checkpoint(tmp_path, step, some(step, size), meta)
        real = sum((path / name).stat().st_size for name in os.listdir(path))
        assert abs(checkpoint_bytes(some(step, size), meta) - real) <= max(200, 0.05 * real)


def test_free_space_is_that_of_the_target_disk(tmp_path):
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(DiskError, match=r"bytes are needed.*bytes are free"):
        check_free_space(tmp_path / "not" / "yet", 1 << 60)


def test_unusable_folders_are_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/under", "n" * 300, "loop", "gone"):
        with pytest.raises(RunError, match="cannot be written"):
            check_writable(tmp_path / name)
        with pytest.raises(RunError, match="cannot be written"):
            save_checkpoint(tmp_path / name, 1, some(1), {})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for good in ("link", "m" * 255):
        check_writable(tmp_path / good)
        save_checkpoint(tmp_path / good, 1, some(1), {})
    assert latest_checkpoint(tmp_path / "real", warn=silent)


def test_pruning_keeps_the_newest_the_best_and_counts_only_whole_ones(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, some(step), {}, keep=2, protect={2})
    assert saved_steps(tmp_path) == [2, 4, 5]
    (tmp_path / "step_000005" / checkpoint.META).unlink()
    assert prune_checkpoints(tmp_path, keep=1) == [2] and saved_steps(tmp_path) == [4, 5]
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path, 6, some(6), {}, keep=0)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["save", "nan", "full", "damage", "prune", "crash"]), st.integers(1, 3)),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(1, 3))
def test_no_sequence_of_saves_failures_and_prunes_loses_the_last_good_one(tmp_path_factory, operations, keep):
    root, best = tmp_path_factory.mktemp("run"), 0
    sound: set[int] = set()
    for step, (operation, number) in enumerate(operations, start=1):
        if operation == "save":
            save_checkpoint(root, step, some(step, 3), {}, keep=keep, protect={best} - {0})
            sound.add(step)
            best = best if best in sound else step
        elif operation == "nan":
            with pytest.raises(NonFiniteError):
                save_checkpoint(root, step, {"w": torch.tensor(float("nan"))}, {}, keep=keep)
        elif operation == "full":
            with pytest.raises(RunError):
                save_checkpoint(root, step, _failing(number), {}, keep=keep)
        elif operation == "damage" and len(sound) > 1 and max(sound) != best:
            corrupt(root / f"step_{max(sound):06d}", random.Random(step))
            sound.discard(max(sound))
        elif operation == "prune":
            prune_checkpoints(root, keep=keep, protect={best} - {0})
        elif operation == "crash":
            (root / f".tmp-step_{step:06d}-77").mkdir()
        really = {s for s in saved_steps(root) if not verify_checkpoint(root / f"step_{s:06d}")}
        assert really <= sound and (not sound or (max(sound) in really and best in really))
        sound = really
    if sound:
        assert latest_checkpoint(root, warn=lambda text: None) == root / f"step_{max(sound):06d}"


class _Failing(dict):
    """Tensors whose second reading fails like a full disk."""

    def __init__(self, number: int) -> None:
        super().__init__(some(number, 3))
        self.readings = 0

    def items(self):
        self.readings += 1
        if self.readings > 2:
            raise OSError(28, os.strerror(28))
        return super().items()


def _failing(number: int) -> _Failing:
    return _Failing(number)


def test_write_file_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    durable.write_file(path, b"old")
    monkeypatch.setattr(os, "replace", _full)
    with pytest.raises(DiskError, match="3 bytes are needed"):
        durable.write_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["result.json"]
    monkeypatch.undo()
    durable.write_file(path, b"new")
    assert path.read_bytes() == b"new"


def _full(*_: object) -> None:
    raise OSError(28, os.strerror(28))
