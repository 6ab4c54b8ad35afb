"""Prompts: sets, files, the GenEval format, and the stream that feeds training."""

from tiltflow.data.prompts import PROMPT_SETS, load_prompts, read_prompt_file
from tiltflow.data.stream import PromptGroup, PromptStream

__all__ = ["PROMPT_SETS", "PromptGroup", "PromptStream", "load_prompts", "read_prompt_file"]
