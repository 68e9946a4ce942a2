"""Stage `instruct`: conversations about pictures, written from captions and boxes by a text-only teacher."""

from components.instruct.component import Instruct
from components.instruct.llm.stage import try_endpoint
from components.instruct.settings import InstructSettings

__all__ = ["Instruct", "InstructSettings", "try_endpoint"]
