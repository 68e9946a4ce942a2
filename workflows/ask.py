"""One question about one picture, to a model wherever it lies."""

from pathlib import Path

from llava.errors import RefusedInput


def answer(question: str, model: str, image: Path, root: str, max_new_tokens: int, device: str) -> str:
    """The model's greedy answer. The picture is looked at before the model is loaded."""
    from llava.data.images import BadImage, decode

    try:
        picture = decode(image.read_bytes())
    except OSError as error:
        raise RefusedInput(f"{image}: {error.strerror or error}; give the path of a picture") from None
    except BadImage as bad:
        raise RefusedInput(f"{image}: {bad}") from None
    from components.register import model_folder
    from llava import generate

    folder = model_folder(model, root)
    loaded, processor = generate.load(folder, device)
    return generate.answer(loaded, processor, [question], [picture], max_new_tokens)[0]
