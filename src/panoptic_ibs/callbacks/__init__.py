"""Lightning callbacks: checkpoints, prediction files, pictures, cost, interruption, progress, a repeated epoch."""

from .checkpoints import CheckpointFiles, SaveCheckpoints, validation_owed
from .pictures import LogPictures, WritePredictions, image_of
from .steps import RepeatEpoch, SeedSteps, StepProgress, TrainingCost
from .stopping import StopOnInterrupt

__all__ = [
    "CheckpointFiles",
    "LogPictures",
    "RepeatEpoch",
    "SaveCheckpoints",
    "SeedSteps",
    "StepProgress",
    "StopOnInterrupt",
    "TrainingCost",
    "WritePredictions",
    "image_of",
    "validation_owed",
]
