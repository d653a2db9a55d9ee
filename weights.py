"""Weights in and out: official safetensors, and checkpoints of a training run.

    load_model                 a folder in the official layout -> the model, every key accounted for
    load_weights               the same, straight into a model that may be sharded over processes
    save_model                 back into the official layout: names, dtypes, shards, index
    CheckpointWriter, ...      model + AdamW + run state, complete or absent, for any process count
    export                     the layouts of other programs:
                               python weights.py export --model_dir M --like ORIG --out DIR

Everything on disk is safetensors or JSON: nothing here unpickles or runs what it reads.
torch.distributed.checkpoint is not used because its metadata file is a pickle.

A sharded parameter is a DTensor split over its first dimension as torch.chunk does; a process
reads only its own rows of each tensor, so nobody ever holds the model twice.
"""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from model import InternVL, LLMConfig, load_config
from runtime import InputError, flag, parse_command, run, sync_folder, write_atomic
from tokenizer import chat_template, load_tokenizer, tokenizer_json

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


# --------------------------------------------------------------------------- official names


def official_name(name: str) -> str:
    """Our parameter name -> the name in the released files.  The only rename there is."""
    return name.replace("projector.", "mlp1.", 1) if name.startswith("projector.") else name


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Official name -> parameter (a DTensor where the model is sharded); adapters have none."""
    named = model.named_parameters()
    return {official_name(name): p for name, p in named if ".lora_" not in name}


# --------------------------------------------------------------------------- reading


def weight_files(model_dir: Path) -> dict[str, Path]:
    """Official tensor name -> the safetensors file that holds it; one file or index + shards."""
    model_dir = Path(model_dir)
    index = model_dir / INDEX
    if index.is_file():
        try:
            named = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{index}: not an index of weights ({error!r})") from None
        files = {name: model_dir / file for name, file in named.items()}
        for path in sorted(set(files.values())):
            if path.parent != model_dir:
                raise InputError(f"{index}: shard {path} lies outside {model_dir}")
            if not path.is_file():
                raise InputError(f"missing shard {path}, named in {index.name}; fetch it again")
        for path in sorted(set(files.values())):
            with open_weights(path) as f:
                listed = {name for name, file in files.items() if file == path}
                _compare_keys(f"{path} and {index.name}", listed, set(f.keys()))
        return files
    found = sorted(model_dir.glob("*.safetensors"))
    if len(found) == 1:
        with open_weights(found[0]) as f:
            return dict.fromkeys(f.keys(), found[0])
    if found:
        raise InputError(f"{len(found)} *.safetensors in {model_dir} but no {INDEX}; fetch it")
    raise InputError(f"no *.safetensors in {model_dir}; pass the folder of an InternVL2 model")


def open_weights(path: Path) -> safe_open:
    """safe_open whose errors name the file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from None


def _compare_keys(what: str, expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        raise InputError(
            f"{what} disagree: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])})"
        )


def local_rows(p: Tensor) -> slice:
    """The rows of the whole tensor that this process holds of parameter `p`."""
    if not isinstance(p, DTensor):
        return slice(0, p.shape[0])
    rows = slice(0, p.shape[0])
    for dim, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, placement
            size, rank = p.device_mesh.size(dim), p.device_mesh.get_local_rank(dim)
            chunk = -(-p.shape[0] // size)
            rows = slice(min(rank * chunk, p.shape[0]), min((rank + 1) * chunk, p.shape[0]))
    return rows


def local(p: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return p.to_local() if isinstance(p, DTensor) else p


def stored_rows(model: nn.Module, model_dir: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(official name, parameter, this process's rows of it in the files), one tensor at a time.

    Raises InputError unless the files hold exactly the model's tensors in the model's shapes.
    """
    files, tensors = weight_files(model_dir), named_tensors(model)
    _compare_keys(f"weights in {model_dir} and config.json", set(tensors), set(files))
    by_file: dict[Path, list[str]] = {}
    for name, path in files.items():
        by_file.setdefault(path, []).append(name)
    for path, names in sorted(by_file.items()):
        with open_weights(path) as f:
            for name in names:
                stored, p = f.get_slice(name), tensors[name]
                if list(stored.get_shape()) != list(p.shape):
                    raise InputError(
                        f"{path}: {name} has shape {list(stored.get_shape())}, the model of "
                        f"config.json needs {list(p.shape)}"
                    )
                yield name, p, stored[local_rows(p)]


@torch.no_grad()
def load_weights(model: nn.Module, model_dir: Path) -> None:
    """Fill `model` from official files; a sharded model reads only its own rows."""
    for _, p, rows in stored_rows(model, model_dir):
        local(p).copy_(rows)


def image_context_id(model_dir: Path) -> int | None:
    """Id of <IMG_CONTEXT>; None where the folder has no tokenizer at all."""
    if not any((Path(model_dir) / name).is_file() for name in TOKENIZER_FILES[:2]):
        return None
    return load_tokenizer(model_dir).image_context_id


def empty_model(model_dir: Path, drop_path_rate: float | None = None) -> InternVL:
    """The model of a folder on the meta device: shapes without memory."""
    config = load_config(model_dir)
    if drop_path_rate is not None:
        config = config.with_drop_path(drop_path_rate)
    with torch.device("meta"):
        return InternVL(config, image_context_id(model_dir))


def load_model(
    model_dir: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> InternVL:
    """The model of a folder in the official layout, in eval mode, every key accounted for."""
    model = empty_model(model_dir).to(dtype).to_empty(device=device)
    load_weights(model, model_dir)
    return model.eval()


# --------------------------------------------------------------------------- writing


def is_writer() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def all_of(here: bool) -> bool:
    """Whether it holds in every process."""
    if not dist.is_initialized():
        return here
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor(float(here), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def whole(p: Tensor) -> Tensor:
    """The whole tensor; a collective where it is sharded."""
    return p.full_tensor() if isinstance(p, DTensor) else p


@torch.no_grad()
def save_model(model: nn.Module, out_dir: Path, like: Path) -> None:
    """Write `model` as folder `like` is laid out: names, dtypes, shards, index, config, tokenizer.

    Called by every process of a sharded run; rank 0 writes, one shard in memory at a time.  The
    folder appears whole or not at all, and is read back and compared before this returns.
    """
    like, out_dir = Path(like), Path(out_dir)
    files, tensors = weight_files(like), named_tensors(model)
    _compare_keys(f"the model and {like}", set(files), set(tensors))
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    if is_writer():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_small_files(like, partial)
    for path in sorted(set(files.values())):
        shard = {}
        with open_weights(path) as f:
            for name in (n for n, file in files.items() if file == path):
                dtype = f.get_slice(name).get_dtype()
                full = whole(tensors[name])  # every process takes part
                if is_writer():
                    shard[name] = full.to("cpu", SAFETENSORS_DTYPE[dtype]).contiguous()
            metadata = f.metadata() or {"format": "pt"}
        if is_writer():
            write_tensors(shard, partial / path.name, metadata=metadata)
    if is_writer():
        sync_folder(partial)
    barrier()
    for name, p, rows in stored_rows(model, partial):
        if not torch.equal(local(p).to("cpu", rows.dtype), rows):
            raise RuntimeError(f"{partial}: {name} read back differs from the model; disk at fault")
    barrier()
    if is_writer():
        replace_folder(partial, out_dir)
    barrier()


SAFETENSORS_DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def copy_small_files(like: Path, out_dir: Path) -> None:
    """Config, index and tokenizer; never code."""
    for name in ("config.json", INDEX, *TOKENIZER_FILES):
        if (like / name).is_file():
            shutil.copyfile(like / name, out_dir / name)
            sync_file(out_dir / name)


def write_tensors(tensors: dict[str, Tensor], path: Path, **how: object) -> None:
    """save_file, durable; an error (a full disk) names the file."""
    try:
        save_file(tensors, path, **how)
        sync_file(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}; what was saved before is intact") from error


def sync_file(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def replace_folder(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`; what stood there goes only once the new one is in place."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------- checkpoints


# checkpoints/step-00000120/ = state.json + shard-000-of-002.safetensors ...; a tensor's rows are
# spread over the shards as torch.chunk does, so any number of processes can read them back.


def shard_place(tensors: dict[str, Tensor]) -> tuple[int, int, bool]:
    """(number of this process's shard, how many shards there are, whether it is ours to write).

    With replicated groups (a mesh of two dimensions) only the first group writes.
    """
    meshes = [t.device_mesh for t in tensors.values() if isinstance(t, DTensor)]
    if not meshes:
        return 0, 1, is_writer()
    *replica, number = meshes[0].get_coordinate()
    return number, meshes[0].size(-1), not any(replica)


class CheckpointWriter:
    """Writes <folder>/step-<n>, complete or absent, and keeps the newest `keep` of them.

    In the background a thread writes a copy in host memory while training goes on: worth it where
    the copy is fast and the disk slow, as beside a GPU.  The checkpoint counts once every process
    has written its shard and process 0 has renamed the folder; only the main thread talks to other
    processes, in `save`, `settle` and `finish`.
    """

    def __init__(self, folder: Path, keep: int, background: bool = False) -> None:
        self.folder, self.keep = Path(folder), keep
        self.pool = ThreadPoolExecutor(1) if background else None
        self.pending: tuple[Path, dict, Future | None] | None = None

    @torch.no_grad()
    def save(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        """Every process calls it with its own shards; `state` is plain JSON, "world" and "shapes"
        are added.  OSError where the disk is full, in the background at the next call."""
        self.finish()
        partial = self.folder / f".step-{step:08d}.partial"
        number, count, ours = shard_place(tensors)
        if is_writer():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        path = partial / f"shard-{number:03d}-of-{count:03d}.safetensors"
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        state = {**state, "step": step, "world": count, "shapes": shapes}
        self.pending = (partial, state, None)
        if ours and self.pool:
            shard = {name: local(t).to("cpu", copy=True) for name, t in tensors.items()}
            self.pending = (partial, state, self.pool.submit(write_tensors, shard, path))
        elif ours:
            write_tensors({name: local(t).contiguous() for name, t in tensors.items()}, path)
        if not self.pool:
            self.finish()

    def settle(self) -> None:
        """Once a step: complete a checkpoint that all processes have written by now."""
        if self.pending:
            written = self.pending[2] is None or self.pending[2].done()
            if all_of(written):
                self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint under way and complete it."""
        if not self.pending:
            return
        partial, state, future = self.pending
        self.pending = None
        if future:
            future.result()
        barrier()
        if is_writer():
            write_atomic(partial / "state.json", json.dumps(state))
            replace_folder(partial, self.folder / f"step-{state['step']:08d}")
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                shutil.rmtree(old)
        barrier()


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step; half-written ones have another name."""
    found = sorted(p for p in Path(folder).glob("step-*") if (p / "state.json").is_file())
    return found[-1] if found else None


def checkpoint_state(checkpoint: Path) -> dict:
    """What was saved beside the tensors."""
    path = checkpoint / "state.json"
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete {checkpoint}") from None


@torch.no_grad()
def load_checkpoint(checkpoint: Path, tensors: dict[str, Tensor]) -> dict:
    """Fill this process's rows of `tensors`; returns the state.  Any process count may read."""
    state = checkpoint_state(checkpoint)
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    _compare_keys(f"{checkpoint} and this run", set(shapes), set(state["shapes"]))
    for name, shape in state["shapes"].items():
        if shape != shapes[name]:
            raise InputError(f"{checkpoint}: {name} has shape {shape}, this run {shapes[name]}")
    world = state["world"]
    for rank in range(world):
        with open_weights(checkpoint / f"shard-{rank:03d}-of-{world:03d}.safetensors") as f:
            for name, t in tensors.items():
                mine, stored = local_rows(t), f.get_slice(name)
                chunk = -(-t.shape[0] // world) if t.ndim else 1
                first = min(rank * chunk, t.shape[0])
                start = max(mine.start, first)
                stop = min(mine.stop, first + stored.get_shape()[0])
                if start < stop:
                    rows = stored[start - first : stop - first]
                    local(t)[start - mine.start : stop - mine.start].copy_(rows)
    return state


# --------------------------------------------------------------------------- export


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as other programs load it: evaluation harnesses, inference engines."""

    model_dir: Path = flag(Path("runs/mpo/model"), "the trained model, official layout")
    like: Path = flag(Path("weights/InternVL2-8B"), "the released folder: code and tokenizer files")
    out: Path = flag(Path("export"), "folder to write")
    llm_only: bool = flag(False, "InternLM2 alone, for text-only harnesses (remote code)")
    llama: bool = flag(False, "the LLM alone as a Llama checkpoint: loads without remote code")

    def __post_init__(self) -> None:
        if self.llm_only and self.llama:
            raise ValueError("choose one of --llm_only and --llama")


LLM = "language_model."
LLAMA_NAMES = {  # InternLM2 -> Llama, but for wqkv
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output.": "lm_head.",
}


def llama_tensors(name: str, tensor: Tensor, config: LLMConfig) -> dict[str, Tensor]:
    """One InternLM2 tensor under Llama's names; wqkv splits into q, k and v."""
    if "attention.wqkv" not in name:
        for ours, theirs in LLAMA_NAMES.items():
            name = name.replace(ours, theirs)
        return {name: tensor}
    packed = tensor.unflatten(0, (config.num_key_value_heads, -1, config.head_dim))  # g slot d ...
    parts = {"q": packed[:, :-2], "k": packed[:, -2:-1], "v": packed[:, -1:]}
    return {
        name.replace("attention.wqkv", f"self_attn.{letter}_proj"): part.flatten(0, 2).contiguous()
        for letter, part in parts.items()
    }


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


def write_llama_tokenizer(like: Path, template: str, out: Path) -> None:
    """A tokenizer that loads without remote code, with the model's chat format."""
    if not any((Path(like) / name).is_file() for name in TOKENIZER_FILES[:2]):
        return
    for name in TOKENIZER_FILES:
        if name != "generation_config.json":
            (out / name).unlink(missing_ok=True)
    write_atomic(out / "tokenizer.json", tokenizer_json(load_tokenizer(like)))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    settings |= {"eos_token": "<|im_end|>", "pad_token": "</s>", "unk_token": "<unk>"}
    settings |= {"clean_up_tokenization_spaces": False, "chat_template": chat_template(template)}
    write_atomic(out / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False, indent=1))


def write_shards(tensors: Iterator[tuple[str, Tensor]], out: Path, limit: int = 4 << 30) -> None:
    """Official-style shards of at most `limit` bytes with their index, one in memory at a time."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(shard, out / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > limit:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + nbytes, total + nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(out / f"part-{i}.safetensors", out / file)
        sync_file(out / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(out / INDEX, json.dumps(index, indent=1))


def export(cfg: ExportConfig) -> None:
    """See ExportConfig.  Names and shapes must be those of `like`, whose files decide the dtype."""
    ours, theirs = weight_files(cfg.model_dir), weight_files(cfg.like)
    _compare_keys(f"{cfg.model_dir} and {cfg.like}", set(theirs), set(ours))
    raw = json.loads((Path(cfg.like) / "config.json").read_text())
    config = load_config(cfg.like)
    partial = cfg.out.with_name(f".{cfg.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in theirs:
            if (cfg.llm_only or cfg.llama) and not name.startswith(LLM):
                continue
            with open_weights(ours[name]) as mine, open_weights(theirs[name]) as released:
                stored = released.get_slice(name)
                tensor = mine.get_tensor(name)
                if list(tensor.shape) != list(stored.get_shape()):
                    raise InputError(
                        f"{name} is {list(tensor.shape)} in {cfg.model_dir} but "
                        f"{list(stored.get_shape())} in {cfg.like}"
                    )
                tensor = tensor.to(SAFETENSORS_DTYPE[stored.get_dtype()])
            if cfg.llama:
                yield from llama_tensors(name.removeprefix(LLM), tensor, config.llm).items()
            else:
                yield (name.removeprefix(LLM) if cfg.llm_only else name), tensor

    for path in sorted(Path(cfg.like).iterdir()):  # config, tokenizer, and the release's own code
        code = path.suffix == ".py"
        if path.is_file() and not path.name.endswith((".safetensors", INDEX)):
            if not (cfg.llama and code):
                shutil.copyfile(path, partial / path.name)
    if cfg.llm_only:
        write_atomic(partial / "config.json", json.dumps(raw["llm_config"], indent=1))
    if cfg.llama:
        write_atomic(partial / "config.json", json.dumps(llama_config(raw["llm_config"]), indent=1))
        write_llama_tokenizer(cfg.like, config.template, partial)
    write_shards(tensors(), partial)
    replace_folder(partial, cfg.out)
    print(f"wrote {cfg.out}")


def main() -> None:
    export(parse_command({"export": ExportConfig})[1])


if __name__ == "__main__":
    run(main)
