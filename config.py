"""What a checkpoint's config.json says, for every generation of InternVL that is built here.

    load_config, parse_config   the official layout and transformers' own (-hf) -> InternVLConfig
    recipe                      what the official MPO script of that generation sets

Sources: configuration_internvl_chat.py, configuration_internlm2.py, transformers' Qwen2Config,
Qwen3Config and InternVLConfig (4.57 and 5), the releases' config.json.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

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

    KEYS: ClassVar = {"tile_size": "force_image_size", "max_tiles": "max_dynamic_patch"}
    vision: VisionConfig
    llm: LLMConfig
    template: str
    tile_size: int = count()  # pixels; the ViT's position table is resized to fit
    select_layer: int = -1
    max_tiles: int = flag(6, "tiles an image, without the thumbnail", 1, 128)
    system_message: str | None = None  # None: the template's own; "" is an empty one
    generation: Literal["2", "2.5", "3", "3.5"] = "2"
    image_token_id: int | None = None  # id of <IMG_CONTEXT>, which only the -hf layout gives

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile_size // self.vision.patch_size // 2) ** 2


# part of config.json -> its keys that have one value here: another one is refused by name
IMPLEMENTED = {
    "": {
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "min_dynamic_patch": 1,
        "use_thumbnail": True,
        **dict.fromkeys(("pad2square", "use_llm_lora", "use_backbone_lora"), False),
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
    },
    "vision_config": {
        "hidden_act": "gelu",
        **dict.fromkeys(("use_absolute_position_embeddings", "use_mean_pooling"), True),
    },
    "llm_config": {
        "hidden_act": "silu",
        **dict.fromkeys(("bias", "attention_bias", "mlp_bias", "use_sliding_window"), False),
    },
}
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
        tiles = {"min_patches": "min_dynamic_patch", "max_patches": "max_dynamic_patch"}
        raw = {tiles[k]: value for k, value in read_json(images).items() if k in tiles} | raw
    return parse_config(raw, str(path))


def parse_config(raw: dict, file: str = "config.json") -> InternVLConfig:
    """A config.json of any generation, official or -hf; unknown keys are tolerated.

    Raises InputError for a missing shape, a value of the wrong type, a language model that is not
    implemented, and for options this code lacks.
    """
    is_hf = "text_config" in raw
    llm_name = "text_config" if is_hf else "llm_config"
    for key in (llm_name, "vision_config"):
        if not isinstance(raw.get(key), dict):
            raise InputError(f"{file}: no {key!r}; expected the config.json of an InternVL model")
    raw = _official_keys(raw) if is_hf else raw
    raw = {"ps_version": "v1", "use_thumbnail": False, "max_dynamic_patch": 6} | raw
    if not raw.get("dynamic_image_size"):
        raw |= {"max_dynamic_patch": 1, "use_thumbnail": True}  # one tile has no thumbnail
    llm = _llm_config(raw, f"{file}: {llm_name}", is_hf)
    _check_implemented("vision_config", raw["vision_config"], f"{file}: vision_config")
    _check_implemented("", raw, file)
    vision = from_json(VisionConfig, raw["vision_config"], f"{file}: vision_config")
    values = raw | {
        "vision": vision,
        "llm": llm,
        "force_image_size": raw.get("force_image_size") or vision.image_size,
        "generation": raw.get("internvl_generation") or _generation(raw, llm.architecture, is_hf),
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


def _official_keys(raw: dict) -> dict:
    """A config of transformers' own layout (4.52 and later) under the official names.

    It has no template: internvl2_5, the one of all such releases, unless our export wrote another.
    """
    text, vision = raw["text_config"], {"norm_type": "layer_norm"} | raw["vision_config"]
    vision["qkv_bias"] = vision.get("attention_bias", False)
    vision["qk_normalization"] = vision.get("use_qk_norm", False)
    for key in ("image_size", "patch_size"):  # [height, width]
        if isinstance(vision.get(key), list) and vision[key][:1] * 2 == vision[key]:
            vision[key] = vision[key][0]
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


def _llm_config(raw: dict, name: str, is_hf: bool) -> LLMConfig:
    """llm_config, or the text_config of the -hf layout."""
    llm = raw["llm_config"]
    names = llm.get("architectures")
    given = str(names[0] if isinstance(names, list) and names else "?")
    architecture = given.removesuffix("ForCausalLM").replace("_", "").lower()
    if architecture not in CLASS_DEFAULTS or (architecture == "llama" and not is_hf):
        releases, instead = NOT_IMPLEMENTED.get(architecture, ("unknown", "InternVL3_5-8B"))
        raise InputError(
            f"{name}: the language model is {given} ({releases}); InternLM2, Qwen2 and Qwen3 are "
            f"implemented, as in {instead}"
        )
    llm = CLASS_DEFAULTS[architecture] | llm
    _check_implemented("llm_config", llm, name)
    if "sliding" in str(llm.get("layer_types")):
        raise InputError(f"{name}: layer_types has sliding windows; full attention is implemented")
    theta, factor = _rope(llm, name)
    sizes = [llm.get("hidden_size"), llm.get("num_attention_heads")]
    if not llm.get("head_dim") and all(isinstance(n, int) and n > 0 for n in sizes):
        llm["head_dim"] = sizes[0] // sizes[1]
    tied = True in (raw.get("tie_word_embeddings"), llm.get("tie_word_embeddings"))
    values = {"architecture": architecture, "rope_theta": theta, "rope_factor": factor}
    config = from_json(LLMConfig, llm | values | {"tied": tied}, name)
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise InputError(
            f"{name}: {config.num_attention_heads} heads of {config.head_dim} channels with "
            f"{config.num_key_value_heads} key/value heads; whole groups and even heads are needed"
        )
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        raise InputError(f"{name}: pad_token_id {config.pad_token_id} is not in the vocabulary")
    return config


def _rope(llm: dict, name: str) -> tuple[object, object]:
    """(base, factor of dynamic NTK or 0) as transformers 4 and 5 write them.

    4 reads rope_theta and rope_scaling, 5 reads rope_parameters: where both stand they must agree.
    """
    theta, readings = llm.get("rope_theta", 10000.0), []
    for key in ("rope_parameters", "rope_scaling"):
        scaling = llm.get(key)
        if not isinstance(scaling, dict | None):
            raise InputError(f"{name}: {key} is {scaling!r:.60}; expected an object or null")
        if scaling:
            unnamed = "?" if "factor" in scaling else "default"
            kind = scaling.get("rope_type", scaling.get("type", unnamed))
            if kind not in ("dynamic", "default") or scaling.get("partial_rotary_factor", 1) != 1:
                raise InputError(f"{name}: {key} is of type {kind!r}, {scaling}; take 'dynamic'")
            factor = scaling.get("factor") if kind == "dynamic" else 0.0
            readings.append((scaling.get("rope_theta", theta), factor))
    readings = readings or [(theta, 0.0)]
    if "rope_theta" in llm:
        readings.append((theta, readings[0][1]))
    if any(reading != readings[0] for reading in readings):
        raise InputError(
            f"{name}: rope_theta, rope_scaling and rope_parameters disagree: {readings}"
        )
    return readings[0]


def _generation(raw: dict, architecture: str, is_hf: bool) -> str:
    """Which InternVL it is; 2.5 and 3 share shapes and template where the LLM is Qwen2.

    What tells these apart: configs of 3 name another end of text and have a system_message (null).
    In doubt, as in the -hf layout, it is 3, whose recipe takes the smaller steps.
    """
    if raw.get("template") != "internvl2_5":
        return "2"
    if architecture == "qwen2":
        ends_turn = raw["llm_config"].get("eos_token_id") == 151645
        return "2.5" if ends_turn and "system_message" not in raw and not is_hf else "3"
    return "3.5" if architecture == "qwen3" else "2.5"


def _check_implemented(part: str, raw: dict, name: str) -> None:
    """Each key of the part is absent or has the one value that this code implements."""
    for key, value in IMPLEMENTED[part].items():
        if raw.get(key, value) != value:
            raise InputError(f"{name}: {key} is {raw[key]!r}; this code implements {value!r}")


# --------------------------------------------------------------------------- recipes


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
