"""The releases of InternVL by name: shapes for plans, benchmarks and tests, without weights.

    named_config("3.5-8b") -> InternVLConfig

Source of releases.json: the releases' config.json; of 2.5-38B, 3-38B and 3.5-38B those of their
language models.
"""

from pathlib import Path

from config import InternVLConfig, LLMConfig
from runtime import InputError, read_json
from vision import VisionConfig

TABLE = read_json(Path(__file__).with_name("releases.json"))
RELEASES = TABLE["releases"]  # name -> a value for each of TABLE["columns"]


def named_config(size: str) -> InternVLConfig:
    """A release by generation and size ("3.5-8b"), or a toy.

    A size alone ("8b") is that of the first generation that has it, from InternVL2 on.
    """
    name = next((n for n in RELEASES if size in (n, n.split("-")[-1])), None)
    if name is None:
        raise InputError(f"unknown size {size!r}; known: {', '.join(RELEASES)}")
    row = dict(zip(TABLE["columns"], RELEASES[name]))
    vit = VisionConfig(**TABLE["vision"][row.pop("vision")])
    own = {key: row.pop(key) for key in ("generation", "template")}
    return InternVLConfig(vit, LLMConfig(**row), tile_size=vit.image_size, max_tiles=12, **own)
