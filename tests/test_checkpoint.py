"""Checkpoints are whole or passed over, and what was saved comes back bit for bit."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tlearn import checkpoint
from tlearn.checkpoint import (
    Progress,
    State,
    copied,
    load,
    load_best,
    mended_best,
    newest,
    publish_best,
    save,
    save_best,
)
from tlearn.errors import TlearnError

FILES = ("model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json")


def load_newest(root: Path) -> State | None:
    """What a resumed run gets."""
    folder = newest(root)
    return load(folder) if folder else None


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(3, 2, generator=generator), "bn.count": torch.tensor(step)}


def save_step(root: Path, step: int) -> Path:
    optimizer = {"w/exp_avg": torch.full((3, 2), float(step))}
    return write(root, State(tensors(step), optimizer, Progress(step=step, samples=7)))


def write(root: Path, state: State) -> Path:
    """As a run that went on from the newest one that is whole."""
    return save(root, state, kept=2, after=newest(root))


def newest_step(root: Path) -> int | None:
    restored = load_newest(root)
    if restored is None:
        return None
    assert torch.equal(restored.model["w"], tensors(restored.progress.step)["w"])
    return restored.progress.step


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    model = {
        "f32": torch.randn(3, 5),
        "f64": torch.randn(3, dtype=torch.float64),
        "bf16": torch.randn(7).bfloat16(),
        "int": torch.tensor(2**40 + 1),
        "empty": torch.zeros(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "transposed": shared.t(),
        "row": shared[1],
        "same": shared,
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    optimizer = {"a.b.weight/step": torch.tensor(3.0), "a.b.weight/exp_avg": torch.randn(2, 2)}
    progress = Progress(
        stage=1,
        stage_step=5,
        step=12,
        samples=384,
        seconds=0.1 + 0.2,
        rejected=2,
        epoch_sums={"loss": 1 / 3, "n": 32.0},
        best=[{"top1": 2 / 3, "stage": "head", "step": 4}],
        wandb_id="abc",
    )
    save_best(tmp_path / "checkpoints", {}, {"step": 4})
    write(tmp_path / "checkpoints", State(copied(model), copied(optimizer), progress))
    restored = load_newest(tmp_path / "checkpoints")

    assert restored is not None
    assert restored.progress == progress
    for given_tensors, found in ((model, restored.model), (optimizer, restored.optimizer)):
        assert given_tensors.keys() == found.keys()
        for name, tensor in given_tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            bits = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor) if t.numel()]
            assert not bits or torch.equal(*bits)


def test_without_checkpoints_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none") is None
    assert load_newest(tmp_path) is None


def test_the_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9_999, 10_000):
        save_step(tmp_path, step)
        assert newest_step(tmp_path) == step

    assert folders(tmp_path) == ["step-00009999", "step-00010000"]


def test_steps_with_more_digits_are_newer(tmp_path: Path) -> None:
    for step in (99_999_998, 99_999_999, 100_000_000):
        save_step(tmp_path, step)

    assert newest_step(tmp_path) == 100_000_000


def test_a_checkpoint_names_its_files_sizes_and_hashes(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())

    assert folders(folder) == sorted(FILES)
    assert manifest["version"] == 2
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in manifest["files"].items())


@pytest.mark.parametrize("name", FILES)
def test_without_one_of_its_files_the_previous_one_is_taken(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_step(tmp_path, 1)
    (save_step(tmp_path, 2) / name).unlink()

    assert newest_step(tmp_path) == 1
    told = capsys.readouterr().err.replace("\n", " ")
    assert "step-00000002" in told
    assert "trying the one before" in told
    assert name in told or "manifest" in told


@pytest.mark.parametrize("name", FILES)
def test_with_a_file_cut_anywhere_the_previous_one_is_taken(tmp_path: Path, name: str) -> None:
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 2) / name
    whole = path.read_bytes()
    for length in sorted({0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}):
        path.write_bytes(whole[:length])
        assert newest_step(tmp_path) == 1, length
    path.write_bytes(whole + b"\0")
    assert newest_step(tmp_path) == 1
    path.write_bytes(whole)
    assert newest_step(tmp_path) == 2


@pytest.mark.parametrize("name", FILES)
def test_with_any_byte_changed_the_previous_one_is_taken(tmp_path: Path, name: str) -> None:
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 2) / name
    whole = path.read_bytes()
    version = whole.find(b'"version": 2') + len(b'"version": ') if name == "manifest.json" else -1
    wrong = []
    for position in range(0, len(whole), 1 if len(whole) < 900 else 3):
        for bit in (0x01, 0x20, 0x80):
            damaged = bytearray(whole)
            damaged[position] ^= bit
            if position == version or (
                damaged[position : position + 1].isspace() and whole[position : position + 1].isspace()
            ):
                continue  # another version is another error
            path.write_bytes(damaged)
            try:
                found = newest_step(tmp_path)
            except Exception as error:
                wrong.append((position, bit, repr(error)))
            else:
                # a manifest in which only the layout changed says the same
                same = name == "manifest.json" and json.loads(damaged) == json.loads(whole) if found == 2 else False
                if found != 1 and not same:
                    wrong.append((position, bit, f"loaded {found}"))

    assert wrong == []


NO_MANIFESTS = """
null
3
[]
"x"
{}
{"version": 2}
{"version": 2, "files": null}
{"version": 2, "files": []}
{"version": 2, "files": {}}
{"version": 2, "files": {"model.safetensors": 3}}
{"version": 2, "files": {"model.safetensors": {}}}
"""


@pytest.mark.parametrize("manifest", [*NO_MANIFESTS.strip().splitlines(), "[" * 100_000])
def test_a_manifest_that_does_not_vouch_for_every_file_is_damaged(tmp_path: Path, manifest: str) -> None:
    save_step(tmp_path, 1)
    (save_step(tmp_path, 2) / "manifest.json").write_text(manifest)

    assert newest_step(tmp_path) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), content=st.binary(max_size=64))
def test_a_file_of_other_content_is_passed_over(tmp_path: Path, name: str, content: bytes) -> None:
    save_step(tmp_path, 1)
    (save_step(tmp_path, 2) / name).write_bytes(content)

    assert newest_step(tmp_path) == 1


def test_if_none_is_whole_there_is_nothing_to_load(tmp_path: Path) -> None:
    for folder in (save_step(tmp_path, 1), save_step(tmp_path, 2)):
        (folder / "model.safetensors").write_bytes(b"")

    with pytest.raises(TlearnError, match=r"(?s)no checkpoint is whole.*step-00000002: model.*step-00000001: model"):
        newest_step(tmp_path)


@pytest.mark.parametrize("version", [1, 17])
def test_another_format_version_is_an_error_that_names_it(tmp_path: Path, version: int) -> None:
    path = save_step(tmp_path, 2) / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', f'"version": {version}'))

    with pytest.raises(TlearnError, match=rf"step-00000002: checkpoint format version {version}.*reads version 2"):
        load_newest(tmp_path)


def test_the_same_step_saved_twice_is_the_second(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    write(tmp_path, State({"w": torch.ones(1)}, {}, Progress(step=2, stage=1)))
    restored = load_newest(tmp_path)

    assert restored is not None
    assert (restored.progress.step, restored.progress.stage) == (2, 1)
    assert restored.model["w"].tolist() == [1.0]
    assert folders(tmp_path) == ["step-00000002", "step-00000002.1"]


@pytest.mark.parametrize("damaged", [[5], [6]])
def test_what_is_saved_after_going_back_to_an_older_one_is_kept(tmp_path: Path, damaged: list[int]) -> None:
    for step in (5, 6):
        save_step(tmp_path, step)
    for step in damaged:
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    start = newest_step(tmp_path)
    assert start is not None
    for step in range(start + 1, start + 4):
        save_step(tmp_path, step)
        assert newest_step(tmp_path) == step


def test_damaged_checkpoints_do_not_count_among_the_two_that_are_kept(tmp_path: Path) -> None:
    for step in (2, 10):
        save_step(tmp_path, step)
    (tmp_path / "step-00000010" / "model.safetensors").write_bytes(b"")
    assert newest_step(tmp_path) == 2
    save_step(tmp_path, 4)
    save_step(tmp_path, 6)
    (tmp_path / "step-00000006" / "model.safetensors").write_bytes(b"")

    assert newest_step(tmp_path) == 4


@pytest.mark.parametrize("moment", ["model", "optimizer", "progress"])
def test_a_crash_while_writing_leaves_the_older_ones_and_nothing_that_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)

    def torn(state: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        if Path(path).name.startswith(moment):
            Path(path).write_bytes(b"torn")
            raise OSError("No space left on device")
        save_file(state, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", torn)
        if moment == "progress":
            patch.setattr(checkpoint, "asdict", lambda _: 1 / 0)
        with pytest.raises((OSError, ZeroDivisionError)):
            save_step(tmp_path, 3)

    assert [name for name in folders(tmp_path) if name.startswith("step-")] == ["step-00000001", "step-00000002"]
    assert newest_step(tmp_path) == 2
    save_step(tmp_path, 3)
    assert newest_step(tmp_path) == 3
    assert folders(tmp_path) == ["step-00000002", "step-00000003"]


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / f".step-00000002.{os.getpid() + 1}"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    save_step(tmp_path, 3)

    assert newest_step(tmp_path) == 3
    assert folders(tmp_path) == ["step-00000003"]


def test_a_pickle_in_the_place_of_tensors_is_not_read(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 2)
    torch.save(tensors(2), folder / "model.safetensors")
    with pytest.raises(TlearnError, match=r"model\.safetensors is damaged"):
        newest_step(tmp_path)

    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["files"]["model.safetensors"]
    entry["bytes"] = (folder / "model.safetensors").stat().st_size
    entry["sha256"] = checkpoint.sha256(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="header"):
        load_newest(tmp_path)


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())


def test_progress_is_readable_json(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 9)

    assert json.loads((folder / "progress.json").read_text()) == asdict(Progress(step=9, samples=7))


# best weights


def score(step: int, top1: float = 0.5) -> dict[str, Any]:
    return {"step": step, "top1": top1, "stage": "höchste"}


def keep_best(root: Path, *scores: dict[str, Any]) -> Path:
    """Weights of the last of these scores are written, all of them shown."""
    save_best(root / "checkpoints", tensors(scores[-1]["step"]), scores[-1])
    publish_best(root / "checkpoints", root / "best", sorted(scores, key=lambda s: -s["top1"]))
    return root / "best" / "model.safetensors"


def test_the_best_weights_carry_their_score(tmp_path: Path) -> None:
    path = keep_best(tmp_path, score(1, 2 / 3))
    state, best = load_best(path)

    assert torch.equal(state["w"], tensors(1)["w"])
    assert best == score(1, 2 / 3)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["best"])["score"]["top1"] == 2 / 3


@pytest.mark.parametrize("links", [True, False])
def test_as_many_best_weights_are_shown_as_there_are_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    keep_best(tmp_path, score(1, 0.1))
    keep_best(tmp_path, score(1, 0.1), score(2, 0.3))
    path = keep_best(tmp_path, score(1, 0.1), score(2, 0.3), score(3, 0.2))

    assert folders(tmp_path / "best") == ["model.safetensors", "top-2.safetensors", "top-3.safetensors"]
    assert [load_best(path.with_name(name))[1]["step"] for name in folders(tmp_path / "best")] == [2, 3, 1]
    assert all(
        torch.equal(load_best(path.with_name(name))[0]["w"], tensors(step)["w"])
        for name, step in zip(folders(tmp_path / "best"), (2, 3, 1), strict=True)
    )
    publish_best(tmp_path / "checkpoints", tmp_path / "best", [score(3)])  # a run that went back, and keeps one only
    assert folders(tmp_path / "best") == ["model.safetensors"]
    assert load_best(path)[1]["step"] == 3


def test_weights_stay_as_long_as_a_checkpoint_counts_them_among_the_best(tmp_path: Path) -> None:
    def save_with(step: int, *best: int) -> None:
        progress = Progress(step=step, best=[score(s) for s in best])
        write(tmp_path / "checkpoints", State(tensors(step), {}, progress))

    def kept() -> list[str]:
        return [name[5:13] for name in folders(tmp_path / "checkpoints") if name.startswith("best")]

    keep_best(tmp_path, score(1))
    save_with(2, 1)
    keep_best(tmp_path, score(2))
    save_with(3, 2)
    assert kept() == ["00000001", "00000002"]  # whoever goes on from step 2 needs those of step 1
    save_with(4, 2)
    assert kept() == ["00000002"]
    damaged = tmp_path / "checkpoints" / "step-00000004" / "progress.json"
    damaged.write_text(damaged.read_text().replace('"step"', '"wtep"'))
    save_with(5, 2)
    assert kept() == ["00000002"]


def test_a_damaged_checkpoint_is_none_of_the_two_that_are_kept(tmp_path: Path) -> None:
    save_step(tmp_path, 14)
    (save_step(tmp_path, 16) / "model.safetensors").write_bytes(b"")
    save_step(tmp_path, 16)  # a run that went on from 14 comes by here again

    assert folders(tmp_path) == ["step-00000014", "step-00000016.1"]


def test_best_weights_that_are_gone_are_told_and_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_best(tmp_path, score(1, 0.3))
    keep_best(tmp_path, score(1, 0.3), score(2, 0.2))
    kept, shown = tmp_path / "checkpoints", tmp_path / "best"
    best = [score(1, 0.3), score(2, 0.2)]
    (kept / "best-00000001.safetensors").unlink()
    assert mended_best(kept, shown, best) == best  # it is still shown
    assert load_best(kept / "best-00000001.safetensors")[1] == best[0]

    (kept / "best-00000001.safetensors").unlink()
    (shown / "model.safetensors").unlink()
    assert mended_best(kept, shown, best) == best[1:]
    assert load_best(shown / "model.safetensors")[1] == best[1]
    assert "best-00000001.safetensors is gone" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_best_weights_with_a_flipped_bit_are_an_error(tmp_path: Path, share: float) -> None:
    path = keep_best(tmp_path, score(1))
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 1
    path.write_bytes(content)

    with pytest.raises(TlearnError, match=r"model\.safetensors: damaged"):
        load_best(path)


def test_best_weights_are_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep_best(tmp_path, score(1, 0.1))

    def torn(state: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"torn")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", torn)
        with pytest.raises(OSError, match="No space"):
            keep_best(tmp_path, score(1, 0.1), score(2, 0.2))
    assert load_best(path)[1] == score(1, 0.1)

    keep_best(tmp_path, score(1, 0.1), score(2, 0.2))
    state, best = load_best(path)
    assert best == score(2, 0.2)
    assert torch.equal(state["w"], tensors(2)["w"])


def test_no_best_weights_yet_is_an_error_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(TlearnError, match="has this run finished an epoch"):
        load_best(tmp_path / "model.safetensors")


@pytest.mark.parametrize("length", [0, 5, 20, -1])
def test_damaged_best_weights_are_an_error_that_names_the_file(tmp_path: Path, length: int) -> None:
    path = keep_best(tmp_path, score(1))
    path.write_bytes(path.read_bytes()[:length])

    with pytest.raises(TlearnError, match=r"model\.safetensors"):
        load_best(path)


def test_tensors_without_a_score_are_no_best_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(1), path)

    with pytest.raises(TlearnError, match=r"model\.safetensors"):
        load_best(path)
