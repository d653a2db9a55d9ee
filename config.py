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
from tokenizer import CHAT_TEMPLATES
from vision import VisionConfig, count


@dataclass(frozen=True)
class LLMConfig:
    """Shapes of the language model.  Fields of `count` must be in the file.

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
    head_dim: int | None = None  # None in the file: hidden_size / heads
    max_position_embeddings: int = flag(32768, "tokens", 1)
    rope_theta: float = flag(10000.0, "base of the rotary angles", 1)
    rope_factor: float = flag(0.0, "of dynamic NTK; 0 = none", 0)
    rms_norm_eps: float = flag(1e-6, "added to the mean square", 0)
    tied: bool = False  # the embedding matrix is the head
    pad_token_id: int | None = None  # this row of the embedding matrix gets no gradient


@dataclass(frozen=True)
class InternVLConfig:
    """What the code needs of a checkpoint's config.json; defaults are the official class's."""

    KEYS: ClassVar = {"tile_size": "force_image_size", "max_tiles": "max_dynamic_patch"}
    vision: VisionConfig
    llm: LLMConfig
    template: Literal[tuple(CHAT_TEMPLATES)]
    tile_size: int = count()  # pixels; the ViT's position table is resized to fit
    select_layer: int = -1
    max_tiles: int = flag(6, "tiles an image, without the thumbnail", 1, 128)
    system_message: str | None = None  # None: the template's own; "" is an empty one
    generation: Literal["2", "2.5", "3", "3.5"] = "2"
    image_token_id: int | None = None  # id of <IMG_CONTEXT>, which only the -hf layout gives

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile_size // self.vision.patch_size // 2) ** 2


# key of config.json or its llm_config -> the one value that is implemented here
IMPLEMENTED = {
    "ps_version": "v2",
    "downsample_ratio": 0.5,
    "min_dynamic_patch": 1,
    "use_thumbnail": True,
    "pad2square": False,
    "use_sliding_window": False,
    "hidden_act": "silu",  # the ViT's is gelu
    "projector_hidden_act": "gelu",  # a key of the -hf layout, as the next
    "vision_feature_select_strategy": "default",  # without the class token
}
# language models of the family -> what the official class assumes where a key is absent
CLASS_DEFAULTS = {
    "internlm2": {"max_position_embeddings": 2048, "pad_token_id": 2},
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
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise InputError(f"no config.json in {model_dir}; pass the folder of an InternVL model")
    raw = read_json(path)
    for file in map(path.with_name, ("processor_config.json", "preprocessor_config.json")):
        if "text_config" in raw and file.is_file():  # transformers 5 writes the first alone
            images = read_json(file)
            images |= images.get("image_processor", {})
            limits = {"max_dynamic_patch": "max_patches", "min_dynamic_patch": "min_patches"}
            raw = {key: images[name] for key, name in limits.items() if name in images} | raw
    return parse_config(raw, str(path))


def parse_config(raw: dict, file: str = "config.json") -> InternVLConfig:
    """A config.json of any generation; unknown keys are tolerated, what this code lacks refused."""
    is_hf = "text_config" in raw
    llm_name = f"{file}: {'text' if is_hf else 'llm'}_config"
    for name in ("text_config" if is_hf else "llm_config", "vision_config"):
        if not isinstance(raw.get(name), dict):
            raise InputError(f"{file}: no {name!r}; expected the config.json of an InternVL model")
    raw = {"ps_version": "v1", "use_thumbnail": False} | (_official_keys(raw) if is_hf else raw)
    if not raw.get("dynamic_image_size"):
        raw |= {"max_dynamic_patch": 1, "use_thumbnail": True}  # one tile has no thumbnail
    for part, name in ((raw["llm_config"], llm_name), (raw, file)):
        for key, value in IMPLEMENTED.items():
            if part.get(key, value) != value:
                raise InputError(f"{name}: {key} is {part[key]!r}; this code implements {value!r}")
    llm = _llm_config(raw, llm_name, is_hf)
    vision = from_json(VisionConfig, raw["vision_config"], f"{file}: vision_config")
    values = raw | {
        "vision": vision,
        "llm": llm,
        "force_image_size": raw.get("force_image_size") or vision.image_size,
        "generation": raw.get("internvl_generation") or _generation(raw, llm.architecture, is_hf),
    }
    config = from_json(InternVLConfig, values, file)
    if config.tile_size % (2 * vision.patch_size) or vision.image_size < vision.patch_size:
        sizes = f"{config.tile_size} or image_size {vision.image_size}"
        raise InputError(f"{file}: {sizes} pixels are no even grid of patches")
    if vision.hidden_size % vision.num_attention_heads:
        raise InputError(f"{file}: vision_config: its heads do not divide hidden_size")
    if not -vision.num_hidden_layers - 1 <= config.select_layer <= vision.num_hidden_layers:
        raise InputError(f"{file}: the ViT has no layer select_layer {config.select_layer}")
    return config


def _official_keys(raw: dict) -> dict:
    """A config of transformers' own layout (4.52 and later) under the official names.

    It has no template: internvl2_5, the one of all such releases, unless our export wrote another.
    """
    text, vision = raw["text_config"], {"norm_type": "layer_norm"} | raw["vision_config"]
    vision["qkv_bias"] = vision.get("attention_bias", False)
    vision["qk_normalization"] = vision.get("use_qk_norm", False)
    for key in ("image_size", "patch_size"):  # [height, width]
        if isinstance(vision.get(key), list) and vision[key][:1] * 2 == vision[key] != []:
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
        known = f"InternLM2, Qwen2 and Qwen3 are implemented, as in {instead}"
        raise InputError(f"{name}: the language model is {given} ({releases}); {known}")
    if "sliding" in str(llm.get("layer_types")):
        raise InputError(f"{name}: layer_types has sliding windows; full attention is implemented")
    base, factor = _rope(llm, name)
    tied = True in (raw.get("tie_word_embeddings"), llm.get("tie_word_embeddings"))
    values = {"architecture": architecture, "tied": tied, "rope_theta": base, "rope_factor": factor}
    config = from_json(LLMConfig, CLASS_DEFAULTS[architecture] | llm | values, name)
    if (config.pad_token_id or 0) >= config.vocab_size:
        raise InputError(f"{name}: pad_token_id {config.pad_token_id} is not in the vocabulary")
    if config.head_dim is None:
        config = replace(config, head_dim=config.hidden_size // config.num_attention_heads)
    uneven = config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2
    if uneven or config.head_dim < 4:
        raise InputError(f"{name}: key heads must divide heads, head_dim be even and at least 4")
    return config


def _rope(llm: dict, name: str) -> tuple[object, object]:
    """(base, factor of dynamic NTK or 0) as transformers 4 and 5 write them.

    4 reads rope_theta and rope_scaling, 5 reads rope_parameters: where both stand they must agree.
    """
    theta, readings = llm.get("rope_theta", 10000.0), []
    for key in ("rope_parameters", "rope_scaling"):
        if not (rope := llm.get(key)):
            continue
        kind = isinstance(rope, dict) and rope.get("rope_type", rope.get("type"))
        if kind not in ("dynamic", "default") or rope.get("partial_rotary_factor", 1) != 1:
            raise InputError(f"{name}: {key} is {rope!r:.99}; 'dynamic' and 'default' can be read")
        factor = rope.get("factor") if kind == "dynamic" else 0.0
        readings.append((rope.get("rope_theta", theta), factor))
    base, factor = readings[0] if readings else (theta, 0.0)
    if llm.get("rope_theta", base) != base or any(r != (base, factor) for r in readings):
        raise InputError(f"{name}: rope_theta {theta}, rope_parameters and rope_scaling disagree")
    return base, factor


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


@dataclass(frozen=True)
class Recipe:
    """What the official MPO script of a generation sets; the rest is the same in all of them."""

    lr: float
    max_length: int  # tokens of prompt and response
    drop_path: float  # stochastic depth of the ViT
    source: str  # folder of the script in OpenGVLab/InternVL


RECIPES = {
    "2": Recipe(5e-6, 6144, 0.1, "internvl_chat/shell/internvl2.0_mpo"),
    "2.5": Recipe(1e-6, 8192, 0.1, "internvl_chat/shell/internvl2.5_mpo"),
    "3": Recipe(2e-7, 12288, 0.1, "internvl_chat/shell/internvl3.0/mpo"),
    "3.5": Recipe(2e-7, 16384, 0.1, "internvl_chat_gpt_oss/shell/internvl3_5_qwen3"),
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
