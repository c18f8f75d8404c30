"""Data: sources, loss masks, packing, mixtures, and the loader that resumes to the sample."""

from joint_train.data.loader import BatchLoader, build_loader, loader_position
from joint_train.errors import DataError, OtherData

__all__ = ["BatchLoader", "DataError", "OtherData", "build_loader", "loader_position"]
