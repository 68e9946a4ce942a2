"""What changes memory or speed and no result: fused loss, compiled layers, checkpointing; and LoRA beside them."""

import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu.bench import PRECISIONS, Bench, Gradients
from benchmarks.gpu.compared import compare, same_bits
from benchmarks.gpu.findings import EPSILON, Findings, LeftOut, apart
from llava import lora
from llava.choices import Checkpointing
from llava.model import LlavaForTraining
from llava.training import memory
from llava.training.engine import AdamW, PlainEngine

NO_COUNTERS = "a CPU has no counters for it"


def fused_loss(bench: Bench, findings: Findings) -> None:
    """The vocabulary projection and its cross-entropy in chunks, against whole; a batch with nothing to learn, too."""
    if not memory.can_fuse_loss():
        raise LeftOut(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    for dtype, precision in PRECISIONS.items():
        plain, reference = _plain_and_reference(bench, dtype)
        module = bench.module(dtype)
        memory.fuse_loss(module)
        compare(findings, "fused", bench.gradients(module, bench.rows()), reference, dtype, plain)
        blank = module(bench.collator().blank_row().to(bench.device))
        findings.holds(f"{precision}: nothing to learn, no loss", blank.item() == 0, f"it is {blank.item()}")
    findings.say(findings.worst())


def compiled(bench: Bench, findings: Findings) -> None:
    """Compiled layers against the layers as they are: one program for rows of two lengths."""
    backend = "eager" if bench.short else "inductor"
    if backend == "inductor" and (missing := _missing(bench)):
        raise LeftOut(f"torch's compiler needs {missing}, which is not here")
    for dtype in [torch.float32] if bench.short else PRECISIONS:
        plain, reference = _plain_and_reference(bench, dtype)
        module = bench.module(dtype)
        memory.compile_layers(module.stock.model.language_model, backend)
        for tokens, what in ((None, "packed"), (1, "alone")):
            found = bench.gradients(module, bench.rows(tokens))
            compare(findings, f"compiled, {what}", found, reference, dtype, plain)
        torch._dynamo.reset()
    if backend == "eager":
        findings.without("generated code", "--short traces the layers and runs them as they are")
    findings.say(f"backend {backend}; {findings.worst()}")


def _missing(bench: Bench) -> str | None:
    """What the compiler calls and this machine lacks."""
    if bench.cuda and find_spec("triton") is None:
        return "triton"
    compilers = ("g++", "clang++", *(("gcc", "cc", "clang") if bench.cuda else ()))
    if not any(map(shutil.which, compilers)):
        return "a C compiler" if bench.cuda else "g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h (python3-dev)"
    return None


def checkpointing(bench: Bench, findings: Findings) -> None:
    """`selective` and `full` against `none`: the same gradients, and on a GPU less memory each."""
    for dtype, precision in PRECISIONS.items():
        plain, reference = _plain_and_reference(bench, dtype)
        kept = _checkpointed(bench, dtype, "none")
        peaks = {"none": kept.peak_bytes}
        for how in ("selective", "full"):
            found = _checkpointed(bench, dtype, how)
            peaks[how] = found.peak_bytes
            compare(findings, how, found, reference, dtype, plain)
            same = same_bits(findings, f"{how} and none, {precision}", found, kept)
            if not bench.cuda:
                # On a GPU attention's backward pass adds in whatever order its blocks end.
                findings.holds(f"{how}, {precision}: the bits of none", same, "they differ")
        if bench.cuda:
            findings.figures.setdefault("peak_bytes", {})[precision] = peaks
            none, selective, full = (peaks[how] or 0 for how in ("none", "selective", "full"))
            told = f"none {none:,}, selective {selective:,}, full {full:,} bytes"
            findings.holds(f"{precision}: each needs less memory", none > selective > full, told)
            findings.say(f"{precision}: {told}")
    if not bench.cuda:
        findings.without("peak memory", NO_COUNTERS)
    findings.say(findings.worst())


def with_lora(bench: Bench, findings: Findings) -> None:
    """Adapters that give nothing at first, learn packed as alone, and merge into a stock model."""
    if not lora.available():
        raise LeftOut("peft is not installed")
    for dtype, precision in PRECISIONS.items():
        plain, reference = _plain_and_reference(bench, dtype)
        module = bench.module(dtype)
        before = bench.gradients(module, bench.rows()).loss
        lora.inject(module.stock, lora.Lora(rank=4, alpha=8, dropout=0.0), bench.seed)
        module.stock.model.multi_modal_projector.requires_grad_(True)
        dtypes = {parameter.dtype for parameter in module.parameters()}
        findings.holds(f"{precision}: adapters are of the model's precision", dtypes == {dtype}, f"{dtypes}")
        first = bench.gradients(module, bench.rows())
        findings.within(
            f"{precision}: the loss before any step", abs(first.loss / before - 1), EPSILON[dtype]
        )
        projector = Gradients(first.loss, {}, _projector(first), None)
        start = Gradients(reference.loss, {}, _projector(reference), None)
        known = plain and Gradients(plain.loss, {}, _projector(plain), None)
        compare(findings, "projector beside adapters", projector, start, dtype, known)
        learned, merged = _learned_and_merged(bench, module)
        findings.holds(
            f"{precision}: adapters learn", learned.loss < first.loss, f"{first.loss} became {learned.loss}"
        )
        findings.within(
            f"{precision}: loss once merged",
            abs(merged.loss / learned.loss - 1),
            # Merged weights are rounded once more, each by half a unit in the last place.
            2e-5 if dtype == torch.float32 else 4 * EPSILON[dtype],
        )
        off = max(apart(merged.hidden[name], learned.hidden[name]) for name in learned.hidden)
        findings.figures.setdefault("states_once_merged", {})[precision] = off
    findings.say(findings.worst())


def _learned_and_merged(bench: Bench, module: LlavaForTraining) -> tuple[Gradients, Gradients]:
    engine = PlainEngine(module, AdamW(), 1.0)
    step = bench.rows()
    for _ in range(3):
        for number, row in enumerate(step.rows, start=1):
            loss = engine.loss(row.to(bench.device))
            engine.backward(loss, step.supervised, last=number == len(step.rows))
        engine.step(5e-3)
    learned = bench.gradients(module, step)
    lora.merge(module.stock)
    return learned, bench.gradients(module, step)


def _projector(found: Gradients) -> dict[str, torch.Tensor]:
    return {name: value for name, value in found.named.items() if "multi_modal_projector" in name}


def _checkpointed(bench: Bench, dtype: torch.dtype, how: Checkpointing) -> Gradients:
    module = bench.module(dtype)
    # Layers keep less only in training mode.
    module.stock.model.language_model.train()
    memory.checkpoint_activations(module.stock.model.language_model, how)
    found = bench.gradients(module, bench.rows())
    del module
    bench.release()
    return found


def _plain_and_reference(bench: Bench, dtype: torch.dtype) -> tuple[Gradients | None, Gradients]:
    """Stock LLaVA in this precision where it is a half one, and in fp32; made once."""
    made = bench.kept.setdefault("stock", {})
    for wanted in {torch.float32, dtype}:
        if wanted not in made:
            made[wanted] = bench.stock_gradients(bench.module(wanted))
    return (None if dtype == torch.float32 else made[dtype]), made[torch.float32]
