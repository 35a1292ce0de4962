"""The one training loop: optimizer, schedule, EMA, checkpoints with exact resume, early stopping, deadline, progress."""

from shohin.training.config import EpochRecord, Objective, TrainConfig, TrainResult
from shohin.training.loop import train
from shohin.training.state import copy_state, load_state

__all__ = ["EpochRecord", "Objective", "TrainConfig", "TrainResult", "copy_state", "load_state", "train"]
