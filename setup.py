"""The package megatron-jackpot. `pip install .` is safe on a CPU; the pinned environment is tools/env.sh.

SGLang's pins conflict with the trainer's, so on GPUs [server] belongs in an environment of its own.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_jackpot/__init__.py").read_text()).group(1)
README = ROOT / "README.md"

setup(
    name="megatron-jackpot",
    version=VERSION,
    description="Jackpot reinforcement learning (arXiv 2602.06107) on Megatron-core and SGLang",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    # Namespace packages too: servers/cpu_server is a folder for PYTHONPATH, launch/jobs one of shell scripts.
    packages=find_namespace_packages(
        include=["megatron_jackpot", "megatron_jackpot.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={
        "megatron_jackpot.launch.jobs": ["*.sbatch", "*.sh"],
        "megatron_jackpot.monitor.report.assets": ["*"],
        "megatron_jackpot.servers.cpu_server": ["*.dist-info/*"],
    },
    entry_points={"console_scripts": ["megatron-jackpot = megatron_jackpot.cli:main"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1",
        "numpy",
        "psutil",
        "pyyaml",
        "pydantic>=2.7",
        "aiohttp",
        "transformers>=5",
        "tokenizers",
        "safetensors",
        "reasoning-gym",
        "math-verify",
        "rich",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "server": ["sglang>=0.5.23"],
        "gpu": ["megatron-core==0.19.2", "transformer-engine[pytorch]==2.20.2"],
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "basedpyright"],
    },
)
