"""Lightning callbacks: checkpoints, prediction files, pictures, cost, interruption, progress, a repeated epoch."""

from .best import KeepBest, StopEarly, best_of
from .checkpoints import CheckpointFiles, SaveCheckpoints, validation_owed
from .pictures import LogPictures, WritePredictions, image_of
from .steps import RepeatEpoch, SeedSteps, StepProgress, TrainingCost
from .stopping import StopOnInterrupt

__all__ = [
    "CheckpointFiles",
    "KeepBest",
    "LogPictures",
    "RepeatEpoch",
    "SaveCheckpoints",
    "SeedSteps",
    "StepProgress",
    "StopEarly",
    "StopOnInterrupt",
    "TrainingCost",
    "WritePredictions",
    "best_of",
    "image_of",
    "validation_owed",
]
