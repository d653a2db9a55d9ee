"""Write a trained model as other programs load it: evaluation harnesses, inference engines.

    python tools/export.py --model_dir runs/mpo/model --out export/llama --llama

    --llama      an InternLM2 as a Llama: loads without remote code
    --llm_only   the language model alone under its official names, with the release's code

The official layout needs no export: `<out_dir>/model` of a training run is in it already.
One tensor is in memory at a time; dtypes are those of the model's files.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import load_config
from layouts import DECODER, split_stored, stored_pieces
from runtime import InputError, flag, parse_cli, read_json, run, write_atomic
from tokenizer import chat_template, load_tokenizer, tokenizer_json
from weights import (
    INDEX,
    copy_small_files,
    empty_folder,
    empty_model,
    export_folder,
    finish_export,
    stored_rows,
    sync_file,
)

SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as other programs load it; see the head of this file."""

    model_dir: Path = flag(Path("runs/mpo/model"), "the trained model, official layout")
    out: Path = flag(Path("export"), "folder to write: new, empty, or an earlier export")
    llama: bool = flag(False, "the language model alone as a Llama: loads without remote code")
    llm_only: bool = flag(False, "the language model alone, official names and code")

    def __post_init__(self) -> None:
        if self.llm_only + self.llama != 1:
            raise InputError("choose one layout: --llama or --llm_only")


LLM = "language_model."


def export(cfg: ExportConfig) -> None:
    """Write cfg.out in the chosen layout; it appears whole or not at all."""
    out = export_folder(cfg.out, cfg.model_dir)
    raw = read_json(cfg.model_dir / "config.json")
    names = DECODER if cfg.llama else {}
    partial = out.with_name(f".{out.name}.partial")
    empty_folder(partial)
    copy_small_files(cfg.model_dir, partial)
    tensors = renamed_tensors(cfg.model_dir, names)
    write_shards(((n.removeprefix(LLM), t) for n, t in tensors if n.startswith(LLM)), partial)
    if cfg.llama:
        for path in partial.glob("*.py"):  # a Llama needs no code of its own
            path.unlink()
        settings = llama_config(raw["llm_config"]) | write_tokenizer(cfg.model_dir, partial)
    else:
        settings = raw["llm_config"]
    write_json(partial / "config.json", settings)
    finish_export(partial, out)
    print(f"wrote {cfg.out}")


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, ensure_ascii=False, indent=1))


def renamed_tensors(model_dir: Path, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model's weights under another table of names, one parameter at a time."""
    model = empty_model(model_dir)
    pieces = stored_pieces(model, names)
    for name, _, tensor in stored_rows(model, model_dir):
        yield from split_stored(tensor, pieces[name]).items()


def write_shards(tensors: Iterator[tuple[str, Tensor]], out: Path) -> None:
    """Shards of at most SHARD_BYTES with their index, one in memory at a time."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(shard, out / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(out / f"part-{i}.safetensors", out / file)
        sync_file(out / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def llama_config(llm: dict) -> dict:
    """The config.json under which a stock Llama decoder computes what InternLM2 does."""
    kept = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads max_position_embeddings rms_norm_eps rope_theta hidden_act bos_token_id
        pad_token_id torch_dtype tie_word_embeddings""".split()
    config = {k: llm[k] for k in kept if k in llm}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {"attention_bias": llm.get("bias", True), "mlp_bias": False}
    if scaling := llm.get("rope_scaling"):
        config["rope_scaling"] = {"rope_type": scaling["type"], "factor": scaling["factor"]}
    return config


def write_tokenizer(model_dir: Path, out: Path) -> dict:
    """A tokenizer that loads without remote code, with the model's chat format, and a
    generation_config.json that stops where chat() does; returns what config.json says of it."""
    if not any((model_dir / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return {}
    tokenizer, template = load_tokenizer(model_dir), load_config(model_dir).template
    for name in ("tokenizer.model", "special_tokens_map.json", "added_tokens.json"):
        (out / name).unlink(missing_ok=True)
    write_atomic(out / "tokenizer.json", tokenizer_json(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    settings |= {"eos_token": "<|im_end|>", "pad_token": "</s>", "unk_token": "<unk>"}
    settings |= {"clean_up_tokenization_spaces": False, "chat_template": chat_template(template)}
    write_json(out / "tokenizer_config.json", settings)
    stop = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.im_end_id}
    stop["pad_token_id"] = tokenizer.pad_id
    write_json(out / "generation_config.json", stop)
    return stop


def main() -> None:
    export(parse_cli(ExportConfig))


if __name__ == "__main__":
    run(main)
