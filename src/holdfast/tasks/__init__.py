"""Tasks: data, an honest learner's loss, a score. One file per kind, and a catalog of names."""

from holdfast.tasks.arrays import ArrayTask
from holdfast.tasks.base import Batch, Task
from holdfast.tasks.catalog import TaskSpec, load_task
from holdfast.tasks.denoising import DenoisingTask, Schedule
from holdfast.tasks.regression import RegressionTask

__all__ = ["ArrayTask", "Batch", "DenoisingTask", "RegressionTask", "Schedule", "Task", "TaskSpec", "load_task"]
