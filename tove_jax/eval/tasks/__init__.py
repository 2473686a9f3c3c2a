"""Tasks that judge what a vision-language model answers: readers of published files, and scorers."""

from tove_jax.eval.tasks.base import Question, Scores, Task
from tove_jax.eval.tasks.registry import KINDS, Options, open_task, parse_wanted

__all__ = ["KINDS", "Options", "Question", "Scores", "Task", "open_task", "parse_wanted"]
