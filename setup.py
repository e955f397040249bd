"""Installs dr2dist. The versions that were tested together are in launch/constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = (here / "dr2dist" / "version.py").read_text(encoding="utf-8")
found = re.search(r'__version__ = "(.+)"', version)
assert found is not None

setup(
    name="dr2dist",
    version=found.group(1),
    description="Reversible finetuning of vision backbones: exact, and distributed on DeepSpeed",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["dr2dist", "dr2dist.*"]),
        "dr2dist.configs",
        "dr2dist.configs.deepspeed",
    ],
    package_dir={"dr2dist.configs": "configs", "dr2dist.configs.deepspeed": "ds_configs"},
    package_data={"dr2dist.configs": ["*.yaml"], "dr2dist.configs.deepspeed": ["*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "braceexpand",
        "deepspeed>=0.19.8,<0.20",
        "fsspec",
        "matplotlib",
        "numpy",
        "pillow",
        "psutil",
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "setuptools",
        "tensorboard",
        "timm>=1.0.31",
        "torch>=2.9",
        "torchmetrics>=1.4",
        "torchvision",
        "tqdm",
        "webdataset>=1.0",
    ],
    extras_require={
        "bench": ["momentumnet", "revlib"],
        "datasets": ["datasets"],
        "demo": ["onnx"],
        "detection": ["pycocotools>=2.0.7"],
        "docs": ["griffelib", "mkdocs", "mkdocstrings[python]", "rich", "ruff"],
        "loggers": ["mlflow-skinny", "wandb"],
        "lora": ["peft"],
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "remote": ["aiohttp", "gcsfs", "s3fs"],
        "test": [
            "aiohttp",
            "av>=18",
            "datasets",
            "grimp",
            "import-linter",
            "kubeflow-trainer-api",
            "kubeflow-training",
            "mlflow-skinny",
            "momentumnet",
            "moto[server]",
            "mypy",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "peft",
            "pycocotools>=2.0.7",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "revlib",
            "ruff",
            "s3fs",
            "types-PyYAML",
            "types-tqdm",
            "wandb",
        ],
        "video": ["av>=18"],
    },
    entry_points={"console_scripts": ["dr2dist = dr2dist.cli:command"]},
)
