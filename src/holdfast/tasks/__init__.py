"""Tasks: data, an honest learner's loss, a score. One file per kind, and a catalog of names."""

from holdfast.tasks.base import Batch, Task
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.denoising import DenoisingTask, Schedule
from holdfast.tasks.loading import TaskSpec, is_text, load_task
from holdfast.tasks.regression import RegressionTask
from holdfast.tasks.text import TextTask
from holdfast.tasks.tokenizers import Tokenizer, Vocabulary, load_tokenizer, located

__all__ = [
    "ArrayTask",
    "Batch",
    "DenoisingTask",
    "RegressionTask",
    "Schedule",
    "Task",
    "TaskSpec",
    "TextTask",
    "Tokenizer",
    "Vocabulary",
    "is_text",
    "load_task",
    "load_tokenizer",
    "located",
]
