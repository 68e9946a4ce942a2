"""Less memory or more speed, the same gradients."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava.choices import Checkpointing
from llava.training import memory
from tests.support.mixed_batches import TrainingParts, pieces
from tests.support.training import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_world(tmp_path_factory.mktemp("memory"))


class Operators(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def gradients(
    world: tuple[Path, Path], change: Callable[[TrainingParts], None], stage: int = 2
) -> tuple[float, dict[str, torch.Tensor], Counter[str]]:
    """Loss, gradients and operators of one step after `change`."""
    made = pieces(*world, stage, tokens_per_row=1500)
    change(made)
    with Operators() as operators:
        loss = sum(made.module(row) for row in made.collator.step(0, 0, 1).rows)
        loss.backward()
    named = {name: value.grad for name, value in made.module.named_parameters() if value.grad is not None}
    return float(loss.detach()), named, operators.counted


def language_model(made: TrainingParts) -> Any:
    return made.stock.model.language_model


@pytest.mark.parametrize("stage", [1, 2])
def test_activations_computed_again_give_the_very_same_gradients(
    world: tuple[Path, Path], stage: int
) -> None:
    loss, expected, plain = gradients(world, lambda made: None, stage)
    products, elementwise = {}, {}

    def saving(how: Checkpointing) -> Callable[[TrainingParts], None]:
        return lambda made: memory.checkpoint_activations(language_model(made), how)

    for how in ("selective", "full"):
        again, found, counted = gradients(world, saving(how), stage)
        assert again == loss
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        products[how], elementwise[how] = counted["mm"], counted["silu"]
    # Of a layer's matrices, `selective` computes none again; of what lies between, all.
    assert products["selective"] == plain["mm"] < products["full"]
    assert elementwise["selective"] == elementwise["full"] == 2 * plain["silu"]


def test_a_fused_loss_gives_the_same_loss_and_gradients(world: tuple[Path, Path]) -> None:
    if not memory.can_fuse_loss():
        pytest.skip("this torch has no linear_cross_entropy")
    loss, expected, _ = gradients(world, lambda made: None)
    fused, found, _ = gradients(world, lambda made: memory.fuse_loss(made.module))
    assert fused == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name


def test_a_fused_loss_in_half_precision_is_summed_in_single() -> None:
    if not memory.can_fuse_loss():
        pytest.skip("this torch has no linear_cross_entropy")
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 512, bias=False, dtype=torch.bfloat16)
    hidden, targets = torch.randn(4000, 64, dtype=torch.bfloat16), torch.randint(0, 512, (4000,))
    plain = torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")
    module: Any = SimpleNamespace(stock=SimpleNamespace(lm_head=head))
    memory.fuse_loss(module)
    # A number in bf16 may be off by 1 in 256; the mean of thousands of them is not.
    assert module.loss(hidden, targets).item() == pytest.approx(plain.item(), rel=2e-4)


def test_compiled_layers_give_the_same_gradients(world: tuple[Path, Path]) -> None:
    loss, expected, _ = gradients(world, lambda made: None)
    made = pieces(*world, 2, tokens_per_row=1500)
    # What the compiler sees is traced and run as it is; generating code takes a minute on a CPU.
    memory.compile_layers(language_model(made), backend="eager")
    total = sum(made.module(row) for row in made.collator.step(0, 0, 1).rows)
    total.backward()
    assert float(total.detach()) == pytest.approx(loss, rel=1e-6)
    for name, parameter in made.module.named_parameters():
        if name in expected:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-5), name
