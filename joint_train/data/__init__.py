"""Data: sources, loss masks, packing, mixtures, and the loader that resumes to the sample."""

from typing import TYPE_CHECKING

from joint_train.lazy import lazy_names

if TYPE_CHECKING:
    from joint_train.data.loader import BatchLoader, build_loader, loader_position
    from joint_train.errors import DataError, OtherData

__all__ = ["BatchLoader", "DataError", "OtherData", "build_loader", "loader_position"]

__getattr__ = lazy_names(
    __name__,
    {
        "BatchLoader": "joint_train.data.loader",
        "build_loader": "joint_train.data.loader",
        "loader_position": "joint_train.data.loader",
        "DataError": "joint_train.errors",
        "OtherData": "joint_train.errors",
    },
)
