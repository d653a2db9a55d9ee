"""Write a trained model as other programs load it, without remote code.

    python tools/export.py --model_dir runs/mpo/model --out export/hf --hf

The official layout needs no export once a run has ended: `<out_dir>/model` is in it already, code
included.  Files and dtypes are those of the model, one file is in memory at a time (of a checkpoint
the whole model).  Configs say everything twice that transformers 4 and 5 read under different keys
(rope, tied heads).

Prompts made by transformers' processor differ from chat(): no default system message stands in
front of them (convert_internvl_weights_to_hf.py has none either).
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from runtime import InputError, field_values, flag, read_json, write_atomic, write_json


@runtime.command_line
class ExportConfig:
    """Write a trained model as other programs load it."""

    model_dir: Path = flag(Path("runs/mpo/model"), "the model; with --checkpoint, the run's start")
    out: Path = flag(Path("export"), "folder to write: new, empty, or an earlier export")
    checkpoint: Path | None = flag(None, "write this run, its best/ or a step as a model")
    hf: bool = flag(False, "layout of transformers 4.52 and later, TRL, ms-swift, vLLM")
    llm_only: bool = flag(False, "the language model alone: Qwen2, Qwen3 or Llama")
    llama: bool = flag(False, "the same of an InternLM2, which becomes a Llama")

    def __post_init__(self) -> None:
        if self.hf + self.llm_only + self.llama + (self.checkpoint is not None) != 1:
            raise InputError("choose one: --hf, --llm_only, --llama, or a --checkpoint")


import tokenizers

import weights
from config import InternVLConfig
from layouts import HF, split_stored, stored_pieces
from memory import merge_adapters
from model import InternVL
from tokenizer import CHAT_TEMPLATES, TOKENIZERS, Tokenizer, load_tokenizer
from tools.figures import TEMPLATES, render
from train import TrainConfig, prepare
from vision import IMAGENET_MEAN, IMAGENET_STD

LLM = "language_model."


def export_checkpoint(cfg: ExportConfig) -> None:
    """Write the model of a run's checkpoint as the run itself would at its end."""
    last = weights.newest_checkpoint
    checkpoint = last(cfg.checkpoint / "checkpoints") or last(cfg.checkpoint) or cfg.checkpoint
    flags = weights.checkpoint_state(checkpoint)["flags"]
    names = "lora_rank lora_alpha lora_parts lr_vision lr_projector lr_language state_dtype"
    trained = field_values(TrainConfig, {name: flags[name] for name in names.split()})
    run = TrainConfig(cfg.model_dir, recompute="off", **trained)
    # without adapters no weight of model_dir is left
    if run.lora_rank and flags["start weights"] != weights.fingerprint(cfg.model_dir):
        raise InputError(f"{checkpoint} belongs to another start than {cfg.model_dir}")
    model = prepare(weights.load_model(cfg.model_dir, dtype=weights.FLOATS[run.state_dtype]), run)
    tensors = {
        f"model/{name}": p
        for name, p in model.named_parameters()
        if not run.lora_rank or ".lora_" in name  # beside adapters nothing else is saved
    }
    weights.load_checkpoint(checkpoint, tensors, part="model/")
    merge_adapters(model)
    weights.save_model(model, cfg.out, like=cfg.model_dir)
    print(f"wrote {cfg.out} from {checkpoint}")


def export(cfg: ExportConfig) -> None:
    """Write cfg.out in the chosen layout; it appears whole or not at all."""
    out, model = weights.export_folder(cfg.out, cfg.model_dir), weights.empty_model(cfg.model_dir)
    raw, architecture = read_json(cfg.model_dir / "config.json"), model.config.llm.architecture
    if cfg.llama and architecture not in ("internlm2", "llama"):
        raise InputError(f"{cfg.model_dir}: its {architecture} is no Llama; pass --llm_only")
    with weights.new_export(out) as partial:
        settings = text_config(model.config, raw)
        settings |= write_tokenizer(cfg.model_dir, model.config, partial, images=cfg.hf)
        if cfg.hf:
            settings = hf_config(model, settings)
            for name in ("processor_config.json", "preprocessor_config.json"):
                known = {"config": model.config, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
                write_json(partial / name, filled(name, **known))
        write_json(partial / "config.json", settings)
        write_shards(model, cfg.model_dir, "" if cfg.hf else LLM, partial)
    print(f"wrote {cfg.out}")


def write_shards(model: InternVL, model_dir: Path, part: str, out: Path) -> None:
    """The model's files and their index, under the -hf names; only what begins with `part`."""
    parameters, renamed = dict(model.named_parameters()), stored_pieces(model, HF)
    stored, files = weights.pieces_of(model, model_dir), defaultdict(list)
    for name, pieces in stored.items():
        files[pieces[0].file.name].append(name)
    weight_map, total = {}, 0
    for file, names in files.items():
        shard = {}
        for name in names:
            rows = weights.read_rows(stored[name], parameters[name])
            if not weights.is_finite(rows):
                raise InputError(f"{model_dir}: {name} holds NaN or infinity; nothing is written")
            shard |= split_stored(rows, renamed[name])
        shard = {n.removeprefix(part): x for n, x in shard.items() if n.startswith(part)}
        if shard:
            weights.write_tensors(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    write_json(out / weights.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def filled(name: str, **values: Any) -> dict:
    """A file of templates/ with these values."""
    return json.loads(render(TEMPLATES / name, **values))


def text_config(config: InternVLConfig, raw: dict) -> dict:
    """The config under which transformers' decoder computes what ours does."""
    given = {"torch_dtype": raw.get("torch_dtype")} | (raw.get("llm_config") or raw["text_config"])
    return filled("text_config.json", llm=config.llm, given=given)


def hf_config(model: InternVL, text: dict) -> dict:
    """The config.json of InternVLForConditionalGeneration."""
    if model.image_context_id is None:
        raise InputError("the model's folder has no tokenizer, which names the image token's id")
    known = {"config": model.config, "vit": model.config.vision, "text": text}
    return filled("config.json", image_token_id=model.image_context_id, **known)


def write_tokenizer(model_dir: Path, config: InternVLConfig, out: Path, images: bool) -> dict:
    """tokenizer.json, chat template, and a generation_config.json that stops where chat() does.

    Returns what configs say of it.  A folder without a tokenizer gets none of these files.
    """
    if not any((model_dir / name).is_file() for name in TOKENIZERS):
        return {}
    tokenizer = load_tokenizer(model_dir)
    with_bos = config.llm.architecture in ("internlm2", "llama")
    template = chat_template(config.template, with_bos)
    known = {"with_bos": with_bos, "images": images, "chat_template": template}
    settings = filled("tokenizer_config.json", **known)
    write_json(out / "tokenizer_config.json", settings)
    write_atomic(out / "chat_template.jinja", template)
    bos = settings.get("bos_token")
    write_atomic(out / "tokenizer.json", tokenizer_json(tokenizer, bos, images))
    ids = {"eos_token_id": tokenizer.im_end_id}
    ids |= {"bos_token_id": tokenizer.token_id(bos)} if bos else {}
    # not in config.json: a row of the embedding that is padding there would get no gradient
    pad = tokenizer.token_id(settings["pad_token"])
    write_json(out / "generation_config.json", ids | {"pad_token_id": pad})
    return ids


def tokenizer_json(tokenizer: Tokenizer, bos: str | None, images: bool) -> str:
    """The tokenizer as a Hugging Face tokenizer.json, special tokens included, bos put in front.

    For programs without our decode rules; a run of bytes with an invalid one decodes differently.
    """
    data = json.loads(tokenizer.backend.to_str())
    for token in data["added_tokens"]:  # in ours marks are text, that is not special
        token["special"] |= token["content"] in tokenizer.marks
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    if images:
        backend.add_special_tokens([tokenizers.AddedToken("<video>", normalized=False)])
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_id(bos))]
        )
    return backend.to_str(pretty=True)


def chat_template(template: str, with_bos: bool) -> str:
    """The frame of a template in Jinja; messages bring their own system message.

    An image is <IMG_CONTEXT> with a line break behind it, as in the releases' -hf folders.
    """
    jinja = (TEMPLATES / "chat_template.jinja").read_text()
    after_end = CHAT_TEMPLATES[template].after_end.replace("\n", "\\n")
    return ("{{ bos_token }}" if with_bos else "") + jinja.replace("AFTER_END", after_end)


def main() -> None:
    cfg = runtime.parse_cli(ExportConfig)
    write = export_checkpoint if cfg.checkpoint else export
    write(cfg)


if __name__ == "__main__":
    runtime.run(main)
