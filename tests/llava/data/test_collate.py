"""Packed rows on their way to the device: what travels, from which memory, and who makes it ready."""

import threading
from dataclasses import replace

import pytest
import torch

from llava.data.collate import PackedRow
from tests.support.mixed_batches import TrainingParts, pieces
from tests.support.training import make_world

CPU, META, CUDA = (torch.device(name) for name in ("cpu", "meta", "cuda"))
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TrainingParts:
    return pieces(*make_world(tmp_path_factory.mktemp("collate")), stage=2, tokens_per_row=1000)


@pytest.fixture(scope="module")
def row(made: TrainingParts) -> PackedRow:
    return made.collator.step(0, 0, 1).rows[0]


def tensors(row: PackedRow) -> dict[str, torch.Tensor]:
    found = {name: value for name, value in vars(row).items() if isinstance(value, torch.Tensor)}
    assert len(found) == 6
    return found


def test_on_the_cpu_a_row_is_the_very_same_memory(row: PackedRow) -> None:
    for name, value in tensors(row.to(CPU)).items():
        assert value.data_ptr() == tensors(row)[name].data_ptr()


def test_every_tensor_travels_but_the_bounds_which_wait_until_a_kernel_asks(row: PackedRow) -> None:
    moved = row.to(META)
    assert {value.device for value in tensors(moved).values()} == {META}
    assert moved.segments.lengths == row.segments.lengths
    assert moved.segments.bounds.device == CPU
    asked = moved.segments.on(META)
    assert asked.device == META and asked.shape == row.segments.bounds.shape
    # One copy serves all layers, and the layers that are computed again.
    assert moved.segments.on(META) is asked
    assert moved.segments.on(CPU) is moved.segments.bounds


def test_rows_for_a_gpu_are_pinned_in_the_thread_that_collates(
    made: TrainingParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, PackedRow]] = []

    def pinned(row: PackedRow) -> PackedRow:
        # Page-locked memory needs a GPU: here a copy stands in for it.
        done.append((threading.current_thread().name, replace(row, input_ids=row.input_ids.clone())))
        return done[-1][1]

    monkeypatch.setattr(PackedRow, "pinned", pinned)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    given = [row for step in made.collator.steps(0, 3, 0, 1, device=CUDA) for row in step.rows]
    assert [id(row) for row in given] == [id(row) for _, row in done]
    assert all(thread.startswith("collate") for thread, _ in done) and len(done) >= 3
    done.clear()
    assert [row for step in made.collator.steps(0, 3, 0, 1, device=CPU) for row in step.rows]
    assert not done


def test_pinning_covers_every_tensor(row: PackedRow, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    pinned = row.pinned()
    assert {id(value) for value in [*tensors(pinned).values(), pinned.segments.bounds]} == set(
        map(id, copies)
    )
    for name, value in tensors(row).items():
        assert torch.equal(getattr(pinned, name), value)
    assert pinned.segments.lengths == row.segments.lengths


@on_cuda
def test_a_pinned_row_arrives_whole_though_its_memory_is_let_go_at_once(row: PackedRow) -> None:
    for _ in range(20):
        # Nothing else holds the page-locked copy: the allocator keeps it until the copy is done.
        moved = row.pinned().to(CUDA)
        for name, value in tensors(row).items():
            assert torch.equal(getattr(moved, name).cpu(), value), name
    assert all(value.is_pinned() for value in tensors(row.pinned()).values())
