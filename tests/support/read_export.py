"""What some version of transformers makes of folders: one line of JSON for each, with nothing of this project imported.

`python read_export.py PICTURE FOLDER...`; the versions that are compared have an environment each.
"""

import json
import sys
from typing import Any

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


def read(folder: str, picture: Any) -> dict[str, Any]:
    """Weights that were made up or left over, the ids of one question both ways, and the logits behind it."""
    import torch
    import transformers
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=picture, return_tensors="pt")
    shown = [
        {**part, "image": picture} if part["type"] == "image" else part for part in QUESTION[0]["content"]
    ]
    at_once = processor.apply_chat_template(
        [{"role": "user", "content": shown}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0, -1]
    return {
        "version": transformers.__version__,
        "lost": sorted(
            str(name)
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            for name in report[key]
        ),
        "ids": inputs["input_ids"][0].tolist(),
        "ids_at_once": at_once["input_ids"][0].tolist(),
        "pixels": inputs["pixel_values"].double().sum().item(),
        "logits": logits.tolist(),
    }


def main() -> None:
    """Read each folder."""
    import transformers
    from PIL import Image

    transformers.utils.logging.set_verbosity_error()
    with Image.open(sys.argv[1]) as picture:
        shown = picture.convert("RGB")
    for folder in sys.argv[2:]:
        print(json.dumps({"folder": folder, **read(folder, shown)}), flush=True)


if __name__ == "__main__":
    main()
