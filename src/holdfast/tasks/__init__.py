"""Tasks: data, the loss of honest training, a score. Each kind has its file; `builtin/` holds the named tasks."""

from holdfast.tasks.base import Batch, Task
from holdfast.tasks.builtin import TASKS
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.denoising import DenoisingTask
from holdfast.tasks.in_memory import InMemoryTask
from holdfast.tasks.loading import is_text, list_tasks, load_task
from holdfast.tasks.next_token import NextTokenTask
from holdfast.tasks.regression import RegressionTask
from holdfast.tasks.schedule import Schedule
from holdfast.tasks.spec import TaskSpec, parse_spec
from holdfast.tasks.text import TextTask
from holdfast.tasks.text_to_image import TextToImageTask
from holdfast.tasks.tokenizers import Tokenizer, Vocabulary, load_tokenizer, located

__all__ = [
    "TASKS",
    "ArrayTask",
    "Batch",
    "DenoisingTask",
    "InMemoryTask",
    "NextTokenTask",
    "RegressionTask",
    "Schedule",
    "Task",
    "TaskSpec",
    "TextTask",
    "TextToImageTask",
    "Tokenizer",
    "Vocabulary",
    "is_text",
    "list_tasks",
    "load_task",
    "load_tokenizer",
    "located",
    "parse_spec",
]
