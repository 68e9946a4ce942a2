"""The rules teacher's words: requests, phrasings, colours, numbers and the names of COCO's categories."""

DETAIL_REQUESTS: tuple[str, ...] = (
    "Describe this picture in detail.",
    "Tell me everything that you can see here.",
    "Give a thorough description of the picture.",
    "What does the picture show? Go into detail.",
    "Explain the picture part by part.",
    "Write a full description of what is shown.",
)

PHRASINGS: dict[str, tuple[str, ...]] = {
    "count": (
        "How many {nouns} are there?",
        "How many {nouns} do you see?",
        "What is the number of {nouns} in the picture?",
    ),
    "where": (
        "Where is the {name}?",
        "In which part of the picture is the {name}?",
        "Which quarter of the picture holds the {name}?",
    ),
    "exists": (
        "Is there {a_name} in the picture?",
        "Can you see {a_name}?",
        "Does the picture show {a_name}?",
    ),
    "colour": (
        "What colour is the {name}?",
        "Which colour does the {name} have?",
        "Name the colour of the {name}.",
    ),
    "shape": (
        "What shape is the {colour} object?",
        "Which shape does the {colour} thing have?",
        "Name the shape of the {colour} object.",
    ),
    "what": (
        "What is in the {place}?",
        "Which object is at the {place}?",
        "Name the thing in the {place} part.",
    ),
    "size": (
        "Which is {word}, the {first} or the {second}?",
        "Which one is {word}: the {first} or the {second}?",
    ),
    "relation": (
        "Is the {first} {ways} the {second}?",
        "Seen from the {second}, is the {first} {ways} it?",
    ),
}

COLOURS: tuple[str, ...] = (
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "black",
    "white",
    "brown",
    "grey",
    "pink",
    "orange",
)

NUMBERS: tuple[str, ...] = (
    "none",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)

COCO_NAMES: tuple[str, ...] = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *(
        "elephant",
        "bear",
        "zebra",
        "giraffe",
        "backpack",
        "umbrella",
        "handbag",
        "tie",
        "suitcase",
        "frisbee",
    ),
    *(
        "skis",
        "snowboard",
        "sports ball",
        "kite",
        "baseball bat",
        "baseball glove",
        "skateboard",
        "surfboard",
    ),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard"),
    *("cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"),
    *("scissors", "teddy bear", "hair drier", "toothbrush"),
)

_IRREGULAR = {"person": "people", "knife": "knives", "mouse": "mice"}
_UNCHANGED = {"sheep", "skis", "scissors", "broccoli"}
_PLURAL_ONLY = {"skis", "scissors", "broccoli"}


def plural(noun: str) -> str:
    """`traffic light` -> `traffic lights`; of several words the last one bends."""
    head, space, last = noun.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")) and last not in _UNCHANGED:
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        last = last[:-1] + "ies"
    elif last not in _UNCHANGED:
        last += "s"
    return head + space + last


def with_article(noun: str) -> str:
    """`an apple`, `a bus`; words without a singular take none."""
    if noun in _PLURAL_ONLY:
        return noun
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"
