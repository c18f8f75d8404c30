"""What is wrong with an example, and where it stands."""


class DataError(ValueError):
    """Data that can't be trained on. The message names the file and the line (or the row, for Parquet and datasets)."""


class OtherData(DataError):
    """A data position that belongs to other data than the configuration's."""
