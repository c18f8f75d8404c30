"""Loading with HSDP: one replica reads, the others get it over the network between them instead of from the disk."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

REPLICATE = "dp_replicate"


class Replicas:
    """The replicas that hold these tensors, or the only one where nothing says that there are more.

    Args:
        tensors: of one model or its optimizer; the mesh is that of the sharded ones. Those that aren't sharded are the
            same on all ranks.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        meshes = (tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
        mesh = next((mesh for mesh in meshes if REPLICATE in (mesh.mesh_dim_names or ())), None)
        self.mesh: DeviceMesh | None = mesh if mesh is not None and mesh[REPLICATE].size() > 1 else None

    @property
    def reads(self) -> bool:
        """Whether this rank is of the replica that reads."""
        return self.mesh is None or self.mesh.get_local_rank(REPLICATE) == 0

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Send what the first replica has to the others, in place. Collective: all ranks with the same tensors."""
        if self.mesh is None:
            return
        group = self.mesh.get_group(REPLICATE)
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.numel() == 0:
                continue
            # AdamW's step counters may be on the CPU, where the mesh's groups of a GPU job needn't reach.
            sent = local.detach().to(self.mesh.device_type).contiguous()
            dist.broadcast(sent, group=group, group_src=0)
            if sent.data_ptr() != local.data_ptr():
                local.copy_(sent)
