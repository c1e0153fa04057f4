"""Settings of a method found by search, for one concept on one model."""

from conceptx.tuning.objective import Quality, quality
from conceptx.tuning.search import tune
from conceptx.tuning.trials import Trial, Tuning

__all__ = ["Quality", "Trial", "Tuning", "quality", "tune"]
