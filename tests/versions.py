"""What tests need of torch that not every supported release has."""

import pytest
from torch.distributed.fsdp import FSDPModule

trains_towers = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="freeze.towers=false needs torch 2.13"
)
