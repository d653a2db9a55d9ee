"""What a checkpoint's config.json says, for every generation of InternVL that is built here.

    load_config, parse_config   the official layout and transformers' own (-hf) -> InternVLConfig
    named_config                the shapes of a release by name, "3.5-8b": for plans and benchmarks
    recipe                      what the official MPO script of that generation sets

Sources: configuration_internvl_chat.py, configuration_internlm2.py, transformers' Qwen2Config,
Qwen3Config and InternVLConfig (4.57 and 5), the releases' config.json.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from runtime import InputError, flag, from_json, read_json
from vision import VisionConfig, count


@dataclass(frozen=True)
class LLMConfig:
    """Shapes of the language model.  Fields without a value must be in the file.

    One decoder serves all: InternLM2 (Llama in transformers' own layout); Qwen2, with biases on q,
    k and v; Qwen3, which normalises each head's q and k before it rotates them.
    """

    architecture: str  # internlm2, llama, qwen2 or qwen3
    vocab_size: int = count()
    hidden_size: int = count()
    intermediate_size: int = count()
    num_hidden_layers: int = count(1000)
    num_attention_heads: int = count()
    num_key_value_heads: int = count()
    head_dim: int = count()  # heads * head_dim need not be hidden_size
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rope_factor: float = 0.0  # dynamic NTK; 0 = none
    rms_norm_eps: float = 1e-6
    tied: bool = False  # the embedding matrix is the head
    pad_token_id: int | None = None  # this row of the embedding matrix gets no gradient

    @property
    def qkv_bias(self) -> bool:
        return self.architecture == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.architecture == "qwen3"


@dataclass(frozen=True)
class InternVLConfig:
    """What the code needs of a checkpoint's config.json; defaults are the official class's."""

    vision: VisionConfig
    llm: LLMConfig
    template: str
    tile_size: int = count()  # pixels; the ViT's position table is resized to fit
    select_layer: int = -1
    max_tiles: int = flag(6, "tiles an image, without the thumbnail", 1, 1000)
    system_message: str | None = None  # None: the template's own; "" is an empty one
    generation: str = "2"  # 2, 2.5, 3 or 3.5
    image_token_id: int | None = None  # id of <IMG_CONTEXT>, which only the -hf layout gives

    def with_drop_path(self, rate: float) -> "InternVLConfig":
        """The same model with another stochastic depth in the ViT."""
        return replace(self, vision=replace(self.vision, drop_path_rate=rate))

    def with_tied_head(self, tied: bool) -> "InternVLConfig":
        """The same model with the embedding matrix as its head, or with a head of its own."""
        return replace(self, llm=replace(self.llm, tied=tied))

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile_size // self.vision.patch_size // 2) ** 2


# language models of the family -> what the official class assumes where a key is absent
CLASS_DEFAULTS = {
    "internlm2": {"max_position_embeddings": 2048, "pad_token_id": 2, "bias": True},
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}
# ... and those that are not implemented -> releases that have them, releases to take instead
NOT_IMPLEMENTED = {
    "internlm3": ("InternVL3-9B", "InternVL3-8B"),
    "llama": ("Yi: InternVL2-40B; Llama 3: InternVL2-76B", "InternVL2-26B or InternVL2_5-38B"),
    "phi3": ("InternVL2-4B", "InternVL2_5-4B"),
    "qwen3moe": ("mixture of experts: InternVL3_5-30B-A3B, -241B-A28B", "InternVL3_5-38B"),
    "gptoss": ("mixture of experts: InternVL3_5-GPT-OSS-20B", "InternVL3_5-14B"),
}


def load_config(model_dir: Path) -> InternVLConfig:
    """The config.json of a folder in the official layout or in transformers' own (-hf)."""
    path, images = Path(model_dir) / "config.json", Path(model_dir) / "preprocessor_config.json"
    if not path.is_file():
        raise InputError(f"no config.json in {model_dir}; pass the folder of an InternVL model")
    raw = read_json(path)
    if "text_config" in raw and images.is_file():
        raw = {"max_dynamic_patch": read_json(images).get("max_patches", 12)} | raw
    return parse_config(raw, str(path))


def parse_config(raw: dict, file: str = "config.json") -> InternVLConfig:
    """A config.json of any generation, official or -hf; unknown keys are tolerated.

    Raises InputError for a missing shape, a value of the wrong type, a language model that is not
    implemented, and for options this code lacks.
    """
    llm_key = "text_config" if "text_config" in raw else "llm_config"
    for key in (llm_key, "vision_config"):
        if not isinstance(raw.get(key), dict):
            raise InputError(f"{file}: no {key!r}; expected the config.json of an InternVL model")
    if llm_key == "text_config":
        raw = _official_keys(raw, file)
    llm = _llm_config(raw, f"{file}: {llm_key}")
    vision = from_json(VisionConfig, raw["vision_config"], f"{file}: vision_config")
    _only(raw["vision_config"], f"{file}: vision_config", hidden_act="gelu")
    raw = {"ps_version": "v1", "use_thumbnail": False, "max_dynamic_patch": 6} | raw
    if not raw.get("dynamic_image_size"):
        raw |= {"max_dynamic_patch": 1, "use_thumbnail": True}  # one tile has no thumbnail
    _only(raw, file, ps_version="v2", downsample_ratio=0.5, pad2square=False)
    _only(raw, file, use_llm_lora=0, use_backbone_lora=0, min_dynamic_patch=1, use_thumbnail=True)
    values = raw | {
        "vision": vision,
        "llm": llm,
        "tile_size": raw.get("force_image_size") or vision.image_size,
        "max_tiles": raw["max_dynamic_patch"],
        "generation": _generation(raw, llm.architecture),
    }
    config, layers = from_json(InternVLConfig, values, file), vision.num_hidden_layers
    if (
        not -layers - 1 <= config.select_layer <= layers
        or vision.hidden_size % vision.num_attention_heads
    ):
        raise InputError(
            f"{file}: select_layer {config.select_layer} of {layers} layers, width "
            f"{vision.hidden_size} of {vision.num_attention_heads} heads: no such layer or head"
        )
    if config.tile_size % (2 * vision.patch_size):
        raise InputError(
            f"{file}: a tile of {config.tile_size} pixels is no even grid of patches of "
            f"{vision.patch_size}"
        )
    return config


def _official_keys(raw: dict, file: str) -> dict:
    """A config of transformers' own layout (4.52 and later) under the official names.

    It has no template: internvl2_5, the one of all such releases, unless our export wrote another.
    """
    vision = {"norm_type": "layer_norm"} | raw["vision_config"]
    vision["qkv_bias"] = vision.get("attention_bias", False)
    vision["qk_normalization"] = vision.get("use_qk_norm", False)
    for key in ("image_size", "patch_size"):  # [height, width]
        if isinstance(vision.get(key), list) and vision[key][:1] * 2 == vision[key]:
            vision[key] = vision[key][0]
    absolute = {"use_absolute_position_embeddings": True, "use_mean_pooling": True}
    _only(vision, f"{file}: vision_config", **absolute)
    _only(raw, file, projector_hidden_act="gelu", vision_feature_select_strategy="default")
    text = raw["text_config"]
    return {
        "template": "internvl2_5",
        "max_dynamic_patch": 12,
        "image_token_id": raw.get("image_token_index"),
        **raw,
        "llm_config": text | {"architectures": [text.get("model_type")]},
        "vision_config": vision,
        "select_layer": raw.get("vision_feature_layer", -1),
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
    }


def _llm_config(raw: dict, name: str) -> LLMConfig:
    """llm_config, or the text_config of the -hf layout."""
    llm = raw["llm_config"]
    names = llm.get("architectures")
    given = str(names[0] if isinstance(names, list) and names else "?")
    architecture = given.removesuffix("ForCausalLM").replace("_", "").lower()
    if architecture not in CLASS_DEFAULTS or (architecture == "llama" and "text_config" not in raw):
        releases, instead = NOT_IMPLEMENTED.get(architecture, ("unknown", "InternVL3_5-8B"))
        raise InputError(
            f"{name}: the language model is {given} ({releases}); InternLM2, Qwen2 and Qwen3 are "
            f"implemented, as in {instead}"
        )
    llm = CLASS_DEFAULTS[architecture] | llm
    _only(llm, name, hidden_act="silu", bias=False, attention_bias=False, mlp_bias=False)
    if llm.get("use_sliding_window") or "sliding" in str(llm.get("layer_types")):
        raise InputError(f"{name}: sliding windows; this code implements full attention alone")
    scaling = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(llm.get(key), dict | None):
            raise InputError(f"{name}: {key} is {llm[key]!r}; expected an object or null")
        scaling |= llm.get(key) or {}
    rope = scaling.get("rope_type", scaling.get("type", "?" if "factor" in scaling else "default"))
    if rope not in ("dynamic", "default"):
        raise InputError(f"{name}: rope_scaling is of type {rope!r}; 'dynamic' is implemented")
    theta = scaling.get("rope_theta", llm.get("rope_theta", 10000.0))
    _only(llm, name, rope_theta=theta)  # as transformers 4 and 5 read different ones of the two
    sizes = [llm.get("hidden_size"), llm.get("num_attention_heads")]
    if not llm.get("head_dim") and all(isinstance(n, int) and n > 0 for n in sizes):
        llm["head_dim"] = sizes[0] // sizes[1]
    values = llm | {
        "architecture": architecture,
        "rope_theta": theta,
        "rope_factor": scaling.get("factor") if rope == "dynamic" else 0.0,
        "tied": True in (raw.get("tie_word_embeddings"), llm.get("tie_word_embeddings")),
    }
    config = from_json(LLMConfig, values, name)
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise InputError(
            f"{name}: {config.num_attention_heads} heads of {config.head_dim} channels with "
            f"{config.num_key_value_heads} key/value heads; whole groups and even heads are needed"
        )
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        raise InputError(f"{name}: pad_token_id {config.pad_token_id} is not in the vocabulary")
    return config


def _generation(raw: dict, architecture: str) -> str:
    """Which InternVL it is; 2.5 and 3 share shapes and template where the LLM is Qwen2.

    What tells these apart: configs of 3 name another end of text and have a system_message (null).
    In doubt, as in the -hf layout, it is 3, whose recipe takes the smaller steps.
    """
    if raw.get("template") != "internvl2_5":
        return "2"
    if architecture == "qwen2":
        ends_turn = raw["llm_config"].get("eos_token_id") == 151645
        return "2.5" if ends_turn and not {"system_message", "text_config"} & set(raw) else "3"
    return "3.5" if architecture == "qwen3" else "2.5"


def _only(raw: dict, name: str, **implemented: object) -> None:
    """Each key is absent or has the one value that this code implements."""
    for key, value in implemented.items():
        if raw.get(key, value) != value:
            raise InputError(f"{name}: {key} is {raw[key]!r}; this code implements {value!r}")


# --------------------------------------------------------------------------- releases

# release -> its language model: architecture, vocabulary, hidden, MLP, layers, heads, key/value
# heads, channels a head
RELEASES = {
    "2-1b": ("qwen2", 151655, 896, 4864, 24, 14, 2, 64),
    "2-2b": ("internlm2", 92553, 2048, 8192, 24, 16, 8, 128),
    "2-8b": ("internlm2", 92553, 4096, 14336, 32, 32, 8, 128),
    "2-26b": ("internlm2", 92553, 6144, 16384, 48, 48, 8, 128),
    "2.5-1b": ("qwen2", 151674, 896, 4864, 24, 14, 2, 64),
    "2.5-2b": ("internlm2", 92553, 2048, 8192, 24, 16, 8, 128),
    "2.5-4b": ("qwen2", 151674, 2048, 11008, 36, 16, 2, 128),
    "2.5-8b": ("internlm2", 92553, 4096, 14336, 32, 32, 8, 128),
    "2.5-26b": ("internlm2", 92553, 6144, 16384, 48, 48, 8, 128),
    "2.5-38b": ("qwen2", 151674, 5120, 27648, 64, 40, 8, 128),
    "3-1b": ("qwen2", 151674, 896, 4864, 24, 14, 2, 64),
    "3-2b": ("qwen2", 151674, 1536, 8960, 28, 12, 2, 128),
    "3-8b": ("qwen2", 151674, 3584, 18944, 28, 28, 4, 128),
    "3-14b": ("qwen2", 151674, 5120, 13824, 48, 40, 8, 128),
    "3-38b": ("qwen2", 151674, 5120, 27648, 64, 40, 8, 128),
    "3.5-1b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128),
    "3.5-2b": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128),
    "3.5-4b": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128),
    "3.5-8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128),
    "3.5-14b": ("qwen3", 151936, 5120, 17408, 40, 40, 8, 128),
    "3.5-38b": ("qwen3", 151936, 5120, 25600, 64, 64, 8, 128),
    "toy": ("internlm2", 2049, 256, 768, 6, 8, 4, 32),
}


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


@dataclass(frozen=True)
class Recipe:
    """What the official MPO script of a generation sets; the rest is the same in all of them."""

    lr: float
    max_length: int  # tokens of prompt and response
    drop_path: float  # stochastic depth of the ViT
    max_tiles: int
    source: str  # folder of the script in OpenGVLab/InternVL


RECIPES = {
    "2": Recipe(5e-6, 6144, 0.1, 12, "internvl_chat/shell/internvl2.0_mpo"),
    "2.5": Recipe(1e-6, 8192, 0.1, 12, "internvl_chat/shell/internvl2.5_mpo"),
    "3": Recipe(2e-7, 12288, 0.1, 12, "internvl_chat/shell/internvl3.0/mpo"),
    "3.5": Recipe(2e-7, 16384, 0.1, 12, "internvl_chat_gpt_oss/shell/internvl3_5_qwen3"),
}


def recipe(config: InternVLConfig) -> Recipe:
    """The recipe of a model's generation and size (see `_generation` for what tells them apart)."""
    generation, values = config.generation, RECIPES[config.generation]
    if config.vision.num_hidden_layers == 45:  # InternViT-6B: 26B and larger
        values = replace(values, drop_path=0.4)
        if generation == "3":
            values = replace(values, max_length=8192)
    elif generation == "3.5" and config.llm.hidden_size <= 2560:  # 1B, 2B and 4B
        values = replace(values, drop_path=0.0)
    return values
