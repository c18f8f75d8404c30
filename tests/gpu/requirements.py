"""Whether this Python has what the GPU suite needs. Nothing is installed: what is missing is named, with exit code 2.

Only Python's own library is imported until that is known.
"""

import importlib.metadata
import importlib.util
import os
import sys

NEEDED = {
    "torch": "torch>=2.11", "transformers": "transformers==5.22.2", "torchdata": "torchdata", "numpy": "numpy",
    "safetensors": "safetensors", "tokenizers": "tokenizers", "hydra": "hydra-core", "jinja2": "jinja2",
    "rich": "rich", "filelock": "filelock", "pytest": "pytest",
}  # fmt: skip
OPTIONAL = {"liger_kernel": "liger-kernel", "triton": "triton", "pytest_timeout": "pytest-timeout"}
LEAST_TORCH = (2, 11)


def version(module: str, package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # imported from a folder
        return getattr(importlib.import_module(module), "__version__", "of no version")


def main() -> int:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        wanted = " ".join(f"'{package}'" for package in missing)
        print(
            f"the GPU suite needs packages that {sys.executable} doesn't have, and installs nothing itself: {wanted}",
            file=sys.stderr,
        )
        return 2
    import torch

    found = {name: version(name, name) for name in ("torch", "transformers")}
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < LEAST_TORCH:
        print(f"the GPU suite needs torch 2.11 or newer; {sys.executable} has {torch.__version__}", file=sys.stderr)
        return 2
    if found["transformers"] != "5.22.2":
        print(f"transformers is {found['transformers']}; this project is written for 5.22.2", file=sys.stderr)
    device = os.environ.get("JOINT_TRAIN_GPU_SUITE_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        print(
            f"the GPU suite needs a GPU, and torch {torch.__version__} sees none. On CPU "
            "the same tests run at small sizes with JOINT_TRAIN_GPU_SUITE_DEVICE=cpu.",
            file=sys.stderr,
        )
        return 2
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    cuda = f", CUDA {torch.version.cuda}" if device == "cuda" else ""
    print(f"{card}; torch {found['torch']}{cuda}, transformers {found['transformers']}; {sys.executable}")
    absent = [package for module, package in OPTIONAL.items() if importlib.util.find_spec(module) is None]
    if absent:
        print(f"without {', '.join(absent)}: what needs them is skipped by name")
    return 0


if __name__ == "__main__":
    sys.exit(main())
