"""The table of benchmarks: one module each, with prompts, parsing, scores and what they read."""

from components.scoring.base import MAX_FAILED, Files, MissingFile, Scored, Unit
from components.scoring.benchmarks import captions, llava_bench, mm_vet, mmbench, mme, pope, scienceqa, vqa
from components.scoring.benchmarks.benchmark import Benchmark
from llava.errors import RefusedInput

BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (vqa, pope, scienceqa, llava_bench, captions, mme, mmbench, mm_vet)
}


def find(name: str) -> Benchmark:
    """The benchmark of that name; an unknown one is refused with the known ones."""
    if name not in BENCHMARKS:
        raise RefusedInput(f"benchmark {name!r} is none of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


__all__ = ["BENCHMARKS", "MAX_FAILED", "Benchmark", "Files", "MissingFile", "Scored", "Unit", "find"]
