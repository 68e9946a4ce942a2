"""Answers, token by token, against stock `generate`; where bf16 ties two tokens, either is right."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.gpu.bench import PRECISIONS, Bench
from benchmarks.gpu.findings import FACTOR, Findings
from llava import generate
from llava import model as models
from llava.miniature import randomise

TOKENS = 16
QUESTIONS = ("Which colour?", "Is there anything to see in this picture at all?", "Why?")


def check(bench: Bench, findings: Findings) -> None:
    """A batch of questions with left padding by our way; stock LLaVA, each question alone, judges every token.

    Ours is right where the stock model, given the same tokens before it, likes no other token better by more than
    twice what its own logits there are off from fp32. In fp32 the tokens must be those of stock `generate`.
    """
    folder = _saved(bench)
    random = np.random.default_rng(bench.seed)
    pictures = [
        Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)) if number != 1 else None
        for number in range(len(QUESTIONS))
    ]
    whole = _stock(folder, torch.float32, bench)
    for dtype, precision in PRECISIONS.items():
        written, prompts = _ours(folder, dtype, bench, pictures)
        stock = _stock(folder, dtype, bench)
        same, tokens = 0, 0
        for number, (prompt, ours) in enumerate(zip(prompts, written, strict=True)):
            asked = _asked(stock, folder, QUESTIONS[number], pictures[number], bench, dtype)
            findings.holds(
                f"{precision}, question {number}: the prompt is the stock processor's",
                asked["input_ids"][0].tolist() == prompt,
                "it has other tokens",
            )
            theirs = stock.generate(**asked, max_new_tokens=TOKENS, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            agreed = next(
                (n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None
            )
            same += len(ours) if agreed is None else agreed
            tokens += len(ours)
            if dtype == torch.float32:
                findings.holds(f"{precision}, question {number}: the tokens", ours == theirs, "they differ")
            else:
                _judged(findings, f"{precision}, question {number}", stock, whole, asked, ours)
        findings.figures.setdefault("tokens", {})[precision] = {"written": tokens, "as stock": same}
        findings.say(f"{precision}: {same} of {tokens} tokens as stock")
        del stock
        bench.release()
    findings.say(findings.worst())


@torch.inference_mode()
def _judged(
    findings: Findings, what: str, stock: Any, whole: Any, asked: dict[str, torch.Tensor], ours: list[int]
) -> None:
    """The stock model reads prompt and our answer at once; its logits say how much worse than its best each is."""
    told = torch.tensor([ours], device=asked["input_ids"].device)
    ids = torch.cat([asked["input_ids"], told], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = asked.get("pixel_values")
    half, exact = (
        model(**inputs, **({} if pixels is None else {"pixel_values": pixels.to(model.dtype)}))
        .logits[0, -len(ours) - 1 : -1]
        .float()
        for model in (stock, whole)
    )
    worse = half.max(dim=1).values - half.gather(1, told[0, :, None])[:, 0]
    off = (half - exact).abs().max(dim=1).values.clamp_min(1e-6)
    at = int((worse / off).argmax())
    findings.within(f"{what}: least liked token", float(worse[at]), FACTOR * float(off[at]))


def _ours(
    folder: Path, dtype: torch.dtype, bench: Bench, pictures: list[Image.Image | None]
) -> tuple[list[list[int]], list[list[int]]]:
    """What `llava.generate.answer` lets the model write, and the prompts, without padding."""
    model, processor = generate.load(folder, str(bench.device))
    for parameter in model.parameters():
        # On a CPU it comes in fp32. The module's own `to` would round the frequencies of its positions, too.
        parameter.data = parameter.data.to(dtype)
    kept: list[tuple[dict[str, Any], torch.Tensor]] = []
    inner = model.generate

    def recorded(**options: Any) -> torch.Tensor:
        kept.append((options, inner(**options)))
        return kept[-1][1]

    model.generate = recorded
    generate.answer(model, processor, list(QUESTIONS), pictures, TOKENS)
    ((options, out),) = kept
    begin = options["input_ids"].shape[1]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    written = []
    for row in out[:, begin:].tolist():
        last = next((number for number, token in enumerate(row) if token in ends), len(row) - 1)
        written.append(row[: last + 1])
    masked = zip(options["input_ids"], options["attention_mask"], strict=True)
    return written, [ids[mask.bool()].tolist() for ids, mask in masked]


def _asked(
    stock: Any, folder: Path, question: str, picture: Image.Image | None, bench: Bench, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The stock processor's inputs for one question."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if picture is not None:
        parts.insert(0, {"type": "image", "image": picture})
    made = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    found = {name: made[name].to(bench.device) for name in ("input_ids", "attention_mask")}
    if picture is not None:
        found["pixel_values"] = made["pixel_values"].to(bench.device, dtype)
    return found


def _stock(folder: Path, dtype: torch.dtype, bench: Bench) -> Any:
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return loaded.to(bench.device).eval()


def _saved(bench: Bench) -> Path:
    """A stock folder with random weights that answer each question in their own way, kept in bf16."""
    folder, module = bench.folder / "generation", bench.module(torch.float32)
    world = bench.world()
    processor = LlavaProcessor(
        image_processor=world.image_processor,
        tokenizer=world.encoder.tokenizer,
        patch_size=world.shape.sizes.vision.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    torch.manual_seed(bench.seed)
    randomise(module.stock)
    models.save(module.stock.to(torch.bfloat16).cpu(), processor, folder, "chatml")
    return folder
