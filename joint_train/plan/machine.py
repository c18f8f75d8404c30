"""The hardware that a plan is for, and the speeds that its kernels reach."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# TFLOP/s of attention kernels on an H100 or H200 (SXM, 989 dense), bfloat16, of the products that they do: two forward,
# five backward. Kernels come in two forms, for a head_dim up to 256 and up to 512.
#   memory-efficient: measured on an H200 at head_dim 512 (ffpa-attn 0.2, bench/README.md: 131 and 42 where causal, 135
#     and 46 where not). One kernel serves all of head_dim above 128, so the same is taken at 256.
#   flash: FlashAttention 2, which torch has up to head_dim 256 and without a mask (arXiv 2407.08608, figures 5 and 6).
#   flex: assumed. No GPU has run them; that they fit in shared memory is what a compiler says.
ATTENTION = {
    "memory-efficient 256 forward": 131.0, "memory-efficient 256 backward": 42.0,
    "memory-efficient 512 forward": 131.0, "memory-efficient 512 backward": 42.0,
    "flash 256 forward": 330.0, "flash 256 backward": 250.0,
    "flex 256 forward": 220.0, "flex 256 backward": 110.0,
    "flex 512 forward": 120.0, "flex 512 backward": 60.0,
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """The hardware that a plan is for; the defaults are those of an H100 node.

    Speeds are those that kernels reach, not those of a data sheet.
    """

    gpus: int = 8
    gpu_memory_gb: float = 80.0  # as vendors count: units of 2**30 bytes
    # Share of it for CUDA's context and NCCL's buffers (2 to 3 GiB), and for what the allocator keeps: it has a pool
    # for each stream (compute, gather, reduce), and what one has freed no other can use.
    reserve: float = 0.06
    tflops: float = 989.0  # of a GPU, dense bfloat16
    # Share of them that matrix products reach in a long run, at the card's power limit: what torchtitan's published
    # 6,667 tokens a second of Llama 3 8B leave for them.
    utilisation: float = 0.55
    attention_tflops: Mapping[str, float] = field(default_factory=lambda: ATTENTION)  # of an H100: scaled by `tflops`
    flex_head_dim: int = 512  # the largest that FlexAttention's kernels have shared memory for
    hbm_gb_per_second: float = 2900.0  # memory bandwidth of a GPU
    launch_us: float = 10.0  # of the host for each kernel: Python, autograd and the driver
    overlap_cost: float = 0.15  # of the time of hidden communication, whose kernels take SMs from those beside them
    gpus_per_node: int = 8
    nvlink_gb_per_second: float = 350.0  # of a GPU to those of its node, as collectives reach it
    network_gb_per_second: float = 45.0  # of a GPU to other nodes: 400 Gbit/s
    pcie_gb_per_second: float = 50.0  # of a GPU to its host's memory, each way: PCIe 5.0 x16
    disk_gb_per_second: float = 5.0  # all ranks together

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that a run can use."""
        return self.gpu_memory_gb * 2**30 * (1 - self.reserve)

    def kernel_tflops(self, kernel: str) -> float:
        """TFLOP/s of a kernel as :class:`joint_train.plan.meter.Work` names it."""
        if kernel in self.attention_tflops:
            return self.attention_tflops[kernel] * self.tflops / 989.0
        return self.tflops * self.utilisation


# Cards that pairs are served on, by the names on the command line: dense bfloat16 and bandwidth of their data sheets.
# Kernels reach 2,900 of an H100's 3,350 GB/s; the same share is taken of the others'.
_SHEETS = {
    "h100": (80, 989, 3350), "h200": (141, 989, 4800), "b200": (180, 2250, 8000), "a100": (80, 312, 2039),
    "l40s": (48, 362, 864), "l4": (24, 121, 300), "rtx4090": (24, 165, 1008), "rtx5090": (32, 209, 1792),
    "mi300x": (192, 1307, 5300),
}  # fmt: skip
CARDS = {
    name: Machine(gpus=1, gpu_memory_gb=memory, tflops=tflops, hbm_gb_per_second=bandwidth * 2900 / 3350)
    for name, (memory, tflops, bandwidth) in _SHEETS.items()
}
