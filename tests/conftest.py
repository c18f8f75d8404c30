"""What several test files use."""

import pytest

from joint_train import starter


@pytest.fixture(scope="session")
def starter_dir(tmp_path_factory):
    """The starter pair and data, built once."""
    directory = tmp_path_factory.mktemp("starter") / "pair"
    starter.build(directory)
    return directory
