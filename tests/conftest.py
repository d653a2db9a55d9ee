"""Folders that tests read.  GOLDEN and BENCH name folders kept outside the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = Path(__file__).parent / "golden"  # golden files kept in the repository


def folder_from_environment(name: str) -> Path:
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"environment variable {name} names no folder (it is not in the repository)")
    return Path(value)


@pytest.fixture(scope="session")
def golden_tiny() -> Path:
    """The large golden folder internvl2-tiny, with the real tokenizer."""
    return folder_from_environment("GOLDEN") / "internvl2-tiny"


@pytest.fixture(scope="session")
def bench() -> Path:
    """Published benchmark questions, outputs and scores."""
    return folder_from_environment("BENCH")
