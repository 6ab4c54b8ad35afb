import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tiltflow.errors import CheckpointError, ConfigError
from tiltflow.runtime.checkpoint import (
    CheckpointStore,
    flatten_state,
    load_state,
    load_tensors,
    save_state,
    save_tensors,
    unflatten_state,
    verify_checkpoint,
    write_atomically,
)


def writer(text: str, *, size: int = 100) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights.bin").write_bytes((text * size).encode())
        (folder / "state.json").write_text(text)

    return write


def no_space(folder: Path) -> None:
    writer("three")(folder)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def latest(store: CheckpointStore) -> tuple[Path | None, list[str]]:
    messages: list[str] = []
    return store.latest(on_skip=messages.append), messages


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A store with the checkpoints 1 and 2."""
    store = CheckpointStore(tmp_path / "run", keep=2)
    store.save(1, writer("one"))
    store.save(2, writer("two"))
    return store


class TestSave:
    def test_content_manifest_and_link(self, store: CheckpointStore) -> None:
        assert names(store.directory) == ["epoch_000001", "epoch_000002", "latest"]
        assert os.readlink(store.directory / "latest") == "epoch_000002"
        manifest = json.loads((store.directory / "latest" / "manifest.json").read_text())
        assert manifest["version"] == 1
        assert manifest["epoch"] == 2
        expected = [("policy/weights.bin", b"two" * 100), ("state.json", b"two")]
        assert manifest["files"] == [
            {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in expected
        ]
        verify_checkpoint(store.directory / "latest")
        assert latest(store) == (store.directory / "epoch_000002", [])

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_retention(self, tmp_path: Path, keep: int) -> None:
        store = CheckpointStore(tmp_path, keep=keep)
        for epoch in range(6):
            store.save(epoch, writer(f"{epoch}"))
        assert names(tmp_path) == [f"epoch_{epoch:06d}" for epoch in range(6 - keep, 6)] + ["latest"]

    def test_replacing_an_epoch(self, store: CheckpointStore) -> None:
        path = store.save(2, writer("new two"))
        assert (path / "state.json").read_text() == "new two"
        assert names(store.directory) == ["epoch_000001", "epoch_000002", "latest"]
        assert latest(store) == (path, [])

    def test_going_back_removes_the_abandoned_future(self, store: CheckpointStore) -> None:
        store.save(3, writer("three"))
        path = store.save(2, writer("again"))
        assert names(store.directory) == ["epoch_000002", "latest"]
        assert latest(store) == (path, [])

    def test_a_failed_replacement_keeps_the_old_one(self, store: CheckpointStore, monkeypatch: Any) -> None:
        rename = os.rename

        def failing(source: Path, target: Path) -> None:
            if str(source).endswith(".tmp"):
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(CheckpointError, match="Input/output error"):
            store.save(2, writer("new two"))
        assert names(store.directory) == ["epoch_000001", "epoch_000002", "latest"]
        assert (store.directory / "latest" / "state.json").read_text() == "two"

    def test_files_get_the_permissions_of_the_umask(self, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path / "run")
        path = store.save(1, lambda folder: save_file({"x": torch.ones(2)}, folder / "x.safetensors"))
        plain = tmp_path / "plain"
        plain.touch()
        for name in ("x.safetensors", "manifest.json"):
            assert stat.S_IMODE((path / name).stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

    def test_bad_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"keep=0: .*1 or more"):
            CheckpointStore(tmp_path, keep=0)
        with pytest.raises(ConfigError, match="epoch=-1"):
            CheckpointStore(tmp_path).save(-1, writer("x"))

    def test_the_manifest_name_is_taken(self, store: CheckpointStore) -> None:
        with pytest.raises(CheckpointError, match=r"manifest\.json; that name is taken"):
            store.save(3, lambda folder: write_atomically(folder / "manifest.json", "{}"))
        assert names(store.directory) == ["epoch_000001", "epoch_000002", "latest"]


class TestFailedWrites:
    def check_untouched(self, store: CheckpointStore) -> None:
        assert names(store.directory) == ["epoch_000001", "epoch_000002", "latest"]
        assert os.readlink(store.directory / "latest") == "epoch_000002"
        for epoch, text in [(1, "one"), (2, "two")]:
            verify_checkpoint(store.directory / f"epoch_{epoch:06d}")
            assert (store.directory / f"epoch_{epoch:06d}" / "state.json").read_text() == text

    def test_no_space(self, store: CheckpointStore) -> None:
        with pytest.raises(CheckpointError) as caught:
            store.save(3, no_space)
        message = str(caught.value)
        assert f"cannot write checkpoint epoch_000003 in {store.directory}: No space left on device" in message
        assert "MiB free" in message
        assert "lower the number of checkpoints kept (now 2)" in message
        assert "the run resumes from the checkpoint before" in message
        self.check_untouched(store)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
    def test_no_space_from_the_kernel(self, store: CheckpointStore) -> None:
        def write(folder: Path) -> None:
            (folder / "policy").write_text("a")
            Path("/dev/full").write_bytes(b"x")

        with pytest.raises(CheckpointError, match="No space left on device"):
            store.save(3, write)
        self.check_untouched(store)

    def test_a_real_size_limit(self, store: CheckpointStore) -> None:
        code = f"""
import resource, torch
from pathlib import Path
from tiltflow.errors import CheckpointError
from tiltflow.runtime.checkpoint import CheckpointStore, save_tensors
from safetensors.torch import save_file
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
big = {{"x": torch.zeros(100_000)}}
writers = [
    lambda folder: save_tensors(folder / "big.safetensors", big),
    lambda folder: save_file(big, folder / "big.safetensors"),
    lambda folder: (folder / "big.bin").write_bytes(bytes(100_000)),
]
for write in writers:
    try:
        CheckpointStore(Path({str(store.directory)!r})).save(3, write)
    except CheckpointError as error:
        print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        assert len(lines) == 3
        for line in lines:
            assert line.startswith(f"cannot write checkpoint epoch_000003 in {store.directory}: File too large")
        self.check_untouched(store)

    def test_another_exception_passes_through(self, store: CheckpointStore) -> None:
        def write(folder: Path) -> None:
            writer("three")(folder)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.save(3, write)
        self.check_untouched(store)

    def test_the_directory_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "run").touch()
        with pytest.raises(CheckpointError, match=r"cannot write checkpoint epoch_000001 in .*run: File exists"):
            CheckpointStore(tmp_path / "run").save(1, writer("x"))

    def test_kill_while_writing(self, store: CheckpointStore) -> None:
        code = f"""
import os, signal
from pathlib import Path
from tiltflow.runtime.checkpoint import CheckpointStore
def write(folder):
    (folder / "weights.bin").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
CheckpointStore(Path({str(store.directory)!r})).save(3, write)
"""
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == -signal.SIGKILL
        stale = [name for name in names(store.directory) if name.endswith(".tmp")]
        assert len(stale) == 1
        assert stale[0].startswith(".epoch_000003.")
        assert latest(store) == (store.directory / "epoch_000002", [])
        store.save(3, writer("three"))
        assert names(store.directory) == ["epoch_000002", "epoch_000003", "latest"]

    def test_kill_at_every_rename(self, store: CheckpointStore, tmp_path: Path) -> None:
        # Replacing epoch 2 renames, relinks and removes; whatever comes last before the kill, a checkpoint 2 remains.
        code = f"""
import os, shutil, signal
from pathlib import Path
from tiltflow.runtime.checkpoint import CheckpointStore

def write(folder):
    (folder / "state.json").write_text("new two")

def deadly(function):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper

for left in range(1, 100):
    directory = Path({str(tmp_path)!r}) / f"killed_{{left}}"
    shutil.copytree({str(store.directory)!r}, directory, symlinks=True)
    child = os.fork()
    if child == 0:
        for name in ("rename", "replace", "symlink", "rmdir", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        CheckpointStore(directory, keep=1).save(2, write)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(left)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        kills = int(done.stdout) - 1
        assert kills >= 8
        found = []
        for call in range(1, kills + 1):
            killed = CheckpointStore(tmp_path / f"killed_{call}")
            path, messages = latest(killed)
            assert path is not None
            found.append((path / "state.json").read_text())
            assert messages == [] or "latest points to epoch_000002, which does not exist" in messages[0]
            with pytest.raises(CheckpointError, match="No space left"):
                killed.save(3, no_space)
            again, messages = latest(killed)
            assert again == killed.directory / "epoch_000002"
            assert (again / "state.json").read_text() == found[-1]
            final = killed.save(2, writer("last two"))
            assert latest(killed) == (final, [])
            assert [name for name in names(killed.directory) if name.startswith(".epoch")] == []
        assert found[0] == "two"
        assert found[-1] == "new two"
        assert found == sorted(found, reverse=True)


class TestLatest:
    def test_nothing_yet(self, tmp_path: Path) -> None:
        assert latest(CheckpointStore(tmp_path / "absent")) == (None, [])
        assert latest(CheckpointStore(tmp_path)) == (None, [])

    def test_kill_between_rename_and_link(self, store: CheckpointStore) -> None:
        link = store.directory / "latest"
        link.unlink()
        link.symlink_to("epoch_000001")
        assert latest(store) == (store.directory / "epoch_000002", [])
        link.unlink()
        assert latest(store) == (store.directory / "epoch_000002", [])

    def test_truncated(self, store: CheckpointStore) -> None:
        with (store.directory / "epoch_000002" / "policy" / "weights.bin").open("r+b") as file:
            file.truncate(123)
        path, messages = latest(store)
        assert path == store.directory / "epoch_000001"
        assert messages == [
            f"{store.directory}/epoch_000002 is damaged: policy/weights.bin is truncated from 300 to 123 bytes; "
            "using epoch_000001 instead"
        ]

    def test_flipped_byte(self, store: CheckpointStore) -> None:
        file = store.directory / "epoch_000002" / "policy" / "weights.bin"
        data = bytearray(file.read_bytes())
        data[150] ^= 1
        file.write_bytes(data)
        path, [message] = latest(store)
        assert path == store.directory / "epoch_000001"
        assert "epoch_000002 is damaged: the checksum of policy/weights.bin differs from the manifest" in message

    def test_missing_file(self, store: CheckpointStore) -> None:
        (store.directory / "epoch_000002" / "state.json").unlink()
        path, [message] = latest(store)
        assert path == store.directory / "epoch_000001"
        assert "epoch_000002 is incomplete: the file state.json is missing; using epoch_000001" in message

    def test_deleted_manifest(self, store: CheckpointStore) -> None:
        (store.directory / "epoch_000002" / "manifest.json").unlink()
        path, [message] = latest(store)
        assert path == store.directory / "epoch_000001"
        assert "epoch_000002 has no manifest.json; using epoch_000001" in message

    @pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\x00" * 40, b'{"version": 1, "epoch": 2}'])
    def test_damaged_manifest(self, store: CheckpointStore, damage: bytes) -> None:
        (store.directory / "epoch_000002" / "manifest.json").write_bytes(damage)
        path, [message] = latest(store)
        assert path == store.directory / "epoch_000001"
        assert "epoch_000002 has a damaged manifest.json" in message

    def test_two_damaged(self, store: CheckpointStore) -> None:
        store = CheckpointStore(store.directory, keep=3)
        store.save(3, writer("three"))
        for epoch in (2, 3):
            (store.directory / f"epoch_{epoch:06d}" / "state.json").unlink()
        path, messages = latest(store)
        assert path == store.directory / "epoch_000001"
        assert ["epoch_000003" in messages[0], "epoch_000002" in messages[1]] == [True, True]
        assert all(message.endswith("using epoch_000001 instead") for message in messages)

    def test_all_damaged(self, store: CheckpointStore) -> None:
        for epoch in (1, 2):
            (store.directory / f"epoch_{epoch:06d}" / "state.json").unlink()
        with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is intact") as caught:
            latest(store)
        assert str(caught.value).count("state.json is missing") == 2

    def test_broken_link(self, store: CheckpointStore) -> None:
        shutil.rmtree(store.directory / "epoch_000002")
        path, messages = latest(store)
        assert path == store.directory / "epoch_000001"
        assert messages == [
            f"{store.directory}/latest points to epoch_000002, which does not exist; using epoch_000001 instead"
        ]
        shutil.rmtree(store.directory / "epoch_000001")
        path, [message] = latest(store)
        assert path is None
        assert message.endswith(f"which does not exist; {store.directory} holds no checkpoint")


class TestVerify:
    def test_not_a_checkpoint(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "absent"):
            with pytest.raises(CheckpointError) as caught:
                verify_checkpoint(path)
            assert str(caught.value) == (
                f"{path} is not a tiltflow checkpoint: no manifest.json; expected a folder such as outputs/<run>/latest"
            )

    def test_damaged(self, store: CheckpointStore) -> None:
        path = store.directory / "latest"
        with (path / "state.json").open("a") as file:
            file.write("more")
        with pytest.raises(CheckpointError, match=r"state\.json has grown from 3 to 7 bytes"):
            verify_checkpoint(path)

    def test_newer_format(self, store: CheckpointStore) -> None:
        path = store.directory / "epoch_000002"
        (path / "manifest.json").write_text('{"version": 2, "epoch": 2, "parts": []}')
        with pytest.raises(CheckpointError, match="has format version 2, this tiltflow reads version 1"):
            verify_checkpoint(path)

    def test_renamed_over_another_epoch(self, store: CheckpointStore) -> None:
        (store.directory / "epoch_000002").rename(store.directory / "epoch_000007")
        with pytest.raises(CheckpointError, match=r"manifest\.json of epoch 2"):
            verify_checkpoint(store.directory / "epoch_000007")

    def test_a_copy_under_another_name(self, store: CheckpointStore, tmp_path: Path) -> None:
        verify_checkpoint(shutil.copytree(store.directory / "latest", tmp_path / "best"))


class TestWriteAtomically:
    def test_bytes_and_text(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "a", b"\x00\r\n")
        assert (tmp_path / "a").read_bytes() == b"\x00\r\n"
        write_atomically(tmp_path / "a", "é\n")
        assert (tmp_path / "a").read_bytes() == "é\n".encode()
        assert names(tmp_path) == ["a"]

    def test_failure_keeps_the_old_file(self, tmp_path: Path, monkeypatch: Any) -> None:
        write_atomically(tmp_path / "a", "old")

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"cannot write a in .*: No space left on device \(.* MiB free"):
            write_atomically(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "old"
        assert names(tmp_path) == ["a"]

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="No such file or directory"):
            write_atomically(tmp_path / "absent" / "a", "x")


def assert_same(left: Any, right: Any) -> None:
    """Compare two nests: types, order of keys, and tensors bit by bit."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.contiguous().reshape(-1).view(torch.uint8).equal(right.contiguous().reshape(-1).view(torch.uint8))
    elif isinstance(left, dict):
        assert [(type(key), key) for key in left] == [(type(key), key) for key in right]
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right or (left != left and right != right)


class TestState:
    def trained(self, *, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 1)).to(torch.bfloat16)
        model[0].to(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        for _ in range(steps):
            self.step(model, optimizer)
        return model, optimizer

    def step(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model[2](model[1](model[0](torch.randn(5, 3))).to(torch.bfloat16)).square().sum().backward()
        optimizer.step()

    def test_adamw_and_generators(self, tmp_path: Path) -> None:
        _, optimizer = self.trained(steps=5)
        state = {
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "generator": torch.Generator().manual_seed(3).get_state(),
        }
        assert state["optimizer"]["state"][0]["step"].shape == ()
        save_state(tmp_path, "trainer", state)
        assert names(tmp_path) == ["trainer.json", "trainer.safetensors"]
        assert_same(load_state(tmp_path, "trainer"), state)

    def test_a_resumed_optimizer_takes_the_same_steps(self, tmp_path: Path) -> None:
        model, optimizer = self.trained(steps=3)
        save_state(tmp_path, "s", {"m": model.state_dict(), "o": optimizer.state_dict(), "r": torch.get_rng_state()})
        self.step(model, optimizer)
        other, other_optimizer = self.trained(steps=0)
        state: Any = load_state(tmp_path, "s")
        other.load_state_dict(state["m"])
        other_optimizer.load_state_dict(state["o"])
        torch.set_rng_state(state["r"])
        self.step(other, other_optimizer)
        assert_same(dict(other.state_dict()), dict(model.state_dict()))
        assert_same(other_optimizer.state_dict(), optimizer.state_dict())

    def test_every_kind(self, tmp_path: Path) -> None:
        state = {
            3: "int key",
            "3": ["text key", {}, [], ()],
            None: (1, (2.5, "x"), [None, True, False]),
            True: {"nested": {(1, "a"): -0.0}},
            "floats": [0.1, 1e-320, 1.7976931348623157e308, float("nan"), float("inf"), -float("inf")],
            "ints": [0, -1, 2**63, 10**40],
            "text": 'quote " backslash \\ é \n \x00 😀',
            "looks like a tag": {"tensor": "0", "tuple": [1], "dict": [[1, 2]], "float": "nan"},
            "tensors": [
                torch.tensor(3.5, dtype=torch.float64),
                torch.tensor([float("nan"), -0.0], dtype=torch.float16),
                torch.tensor([True, False]),
                torch.arange(4, dtype=torch.uint8),
                torch.zeros(0, 3, dtype=torch.int64),
                torch.randn(2, 3).to(torch.bfloat16),
                torch.arange(6.0).reshape(2, 3).T,
            ],
        }
        save_state(tmp_path, "all", state)
        assert_same(load_state(tmp_path, "all"), state)
        json.loads((tmp_path / "all.json").read_text(), parse_constant=pytest.fail)

    @pytest.mark.parametrize("state", [None, 3, (), [], {}, "text"])
    def test_without_tensors(self, tmp_path: Path, state: object) -> None:
        save_state(tmp_path, "s", state)
        assert_same(load_state(tmp_path, "s"), state)

    def test_other_kinds_are_refused(self) -> None:
        with pytest.raises(CheckpointError, match=r"state\['a'\]\[1\] is a set; a state may hold dict"):
            flatten_state({"a": [1, {2}]})

    def test_foreign_json_is_refused(self) -> None:
        for structure in ({"tensor": "7"}, {"pickle": "x"}, {"dict": [[1]]}, {"dict": [{"tuple": [1, 2]}]}):
            with pytest.raises(CheckpointError, match="which flatten_state never writes"):
                unflatten_state({}, structure)

    def test_missing_or_damaged(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"cannot read the state of .*s\.json"):
            load_state(tmp_path, "s")
        save_state(tmp_path, "s", {"x": torch.ones(3)})
        (tmp_path / "s.safetensors").write_bytes(b"nonsense")
        with pytest.raises(CheckpointError, match=r"cannot read the tensors of .*s\.safetensors"):
            load_state(tmp_path, "s")


class TestTensors:
    def test_round_trip(self, tmp_path: Path) -> None:
        base = torch.arange(12.0).reshape(3, 4)
        tensors = {"view": base[:, 1:3], "tied": base, "again": base, "grad": torch.nn.Parameter(torch.ones(2))}
        save_tensors(tmp_path / "t.safetensors", tensors)
        loaded = load_tensors(tmp_path / "t.safetensors")
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor)
        assert names(tmp_path) == ["t.safetensors"]

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"cannot read the tensors of .*absent\.safetensors"):
            load_tensors(tmp_path / "absent.safetensors")


def test_a_run_that_counts_steps_names_its_checkpoints_so(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, unit="step")
    (tmp_path / ".step_000005.1.tmp").mkdir()
    for step in (100, 200, 300, 300):
        store.save(step, writer(str(step)))
    assert names(tmp_path) == ["latest", "step_000200", "step_000300"]
    assert store.has(300) and not store.has(100)
    assert latest(store) == (tmp_path / "step_000300", [])
    verify_checkpoint(tmp_path / "latest")
    (tmp_path / "step_000300" / "state.json").write_text("other")
    chosen, (message,) = latest(store)
    assert chosen == tmp_path / "step_000200" and "step_000300 is damaged" in message
