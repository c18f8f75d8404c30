"""Data: sources, loss masks, packing, mixtures, and the loader that resumes to the sample."""

from joint_train.data.errors import DataError, OtherData
from joint_train.data.loader import BatchLoader, build_loader, loader_position

__all__ = ["BatchLoader", "DataError", "OtherData", "build_loader", "loader_position"]
