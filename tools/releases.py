"""The releases of InternVL by name: shapes for plans, benchmarks and tests, without weights.

    named_config("3.5-8b") -> InternVLConfig

Source: the releases' config.json; of 2.5-38B, 3-38B and 3.5-38B those of their language models.
"""

from config import InternVLConfig, LLMConfig
from runtime import InputError
from vision import VisionConfig

# releases -> their language model: architecture, vocabulary, hidden, MLP, layers, heads, key/value
# heads, channels a head
LANGUAGE_MODELS = {
    "2-1b": ("qwen2", 151655, 896, 4864, 24, 14, 2, 64),
    "2-2b 2.5-2b": ("internlm2", 92553, 2048, 8192, 24, 16, 8, 128),
    "2-8b 2.5-8b": ("internlm2", 92553, 4096, 14336, 32, 32, 8, 128),
    "2-26b 2.5-26b": ("internlm2", 92553, 6144, 16384, 48, 48, 8, 128),
    "2.5-1b 3-1b": ("qwen2", 151674, 896, 4864, 24, 14, 2, 64),
    "2.5-4b": ("qwen2", 151674, 2048, 11008, 36, 16, 2, 128),
    "2.5-38b 3-38b": ("qwen2", 151674, 5120, 27648, 64, 40, 8, 128),
    "3-2b": ("qwen2", 151674, 1536, 8960, 28, 12, 2, 128),
    "3-8b": ("qwen2", 151674, 3584, 18944, 28, 28, 4, 128),
    "3-14b": ("qwen2", 151674, 5120, 13824, 48, 40, 8, 128),
    "3.5-1b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128),
    "3.5-2b": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128),
    "3.5-4b": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128),
    "3.5-8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128),
    "3.5-14b": ("qwen3", 151936, 5120, 17408, 40, 40, 8, 128),
    "3.5-38b": ("qwen3", 151936, 5120, 25600, 64, 64, 8, 128),
    "toy": ("internlm2", 2049, 256, 768, 6, 8, 4, 32),
}
RELEASES = {name: llm for names, llm in LANGUAGE_MODELS.items() for name in names.split()}


def named_config(size: str) -> InternVLConfig:
    """A release by generation and size ("3.5-8b"), or a toy.

    A size alone ("8b") is that of the first generation that has it, from InternVL2 on.
    """
    name = next((n for n in RELEASES if size in (n, n.split("-")[-1])), None)
    if name is None:
        raise InputError(f"unknown size {size!r}; known: {', '.join(RELEASES)}")
    generation, is_2 = name.split("-")[0], name.startswith(("2-", "toy"))
    architecture, is_large = RELEASES[name][0], name.endswith(("26b", "38b"))
    scaled = architecture == "internlm2" or (architecture == "qwen2" and not is_2)
    llm = LLMConfig(
        *RELEASES[name],
        max_position_embeddings=40960 if architecture == "qwen3" else 32768,
        rope_theta=1e6,
        rope_factor=(3.0 if name.endswith("26b") else 2.0) if scaled else 0.0,
        rms_norm_eps=1e-5 if architecture == "internlm2" else 1e-6,
        pad_token_id=2 if architecture == "internlm2" else None,
    )
    vit = VisionConfig(1024, 4096, 24, 16, 448, 14, True, False, "layer_norm")
    if is_large:  # InternViT-6B
        vit = VisionConfig(3200, 12800, 45, 25, 448, 14, False, True, "rms_norm")
    if name == "toy":
        vit = VisionConfig(128, 256, 4, 4, 112, 14, True, False, "layer_norm")
    first = "internlm2-chat" if architecture == "internlm2" else "Hermes-2"
    return InternVLConfig(
        vit,
        llm,
        template=first if is_2 else "internvl2_5",
        tile_size=vit.image_size,
        max_tiles=12,
        generation="2" if name == "toy" else generation,
    )
