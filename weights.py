"""Weights in and out: official safetensors, and checkpoints of a training run.

    load_model                 a folder in the official layout -> the model, every key accounted for
    load_weights               the same, straight into a model that may be sharded over processes
    save_model                 back into the layout of a release: names, dtypes, shards, index
    CheckpointWriter, ...      model + AdamW + run state, complete or absent, for any process count

Everything on disk is safetensors or JSON: nothing here unpickles or runs what it reads.
torch.distributed.checkpoint is not used because its metadata file is a pickle.

A sharded parameter is a DTensor split over its first dimension as torch.chunk does; a process
reads only its own rows of each tensor, so nobody ever holds the model twice.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import runtime
from config import load_config
from layouts import LAYOUTS, Piece, split_stored, stored_pieces
from model import InternVL
from runtime import Failure, InputError, all_of, is_main, read_json, write_atomic, write_json
from tokenizer import TOKENIZERS, load_tokenizer

INDEX = "model.safetensors.index.json"
EXPORT_MARK = "export.json"  # lists what an export wrote; only such a folder is ever replaced
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}  # what flags call them

# --------------------------------------------------------------------------- reading


def weight_files(model_dir: Path) -> dict[str, Path]:
    """Stored tensor name -> the safetensors file that holds it: the index's shards, or else all."""
    index, files = Path(model_dir) / INDEX, {}
    present = {path.name: path for path in Path(model_dir).glob("*.safetensors")}
    listed = read_json(index).get("weight_map") if index.is_file() else {x: x for x in present}
    shards = set(map(str, listed.values())) if isinstance(listed, dict) else set()
    for shard in sorted(shards | present.keys()):
        if shard in shards ^ present.keys():  # one outside of the folder is missing, too
            kind = "missing" if shard in shards else "unlisted"
            raise InputError(f"{index}: {kind} shard {shard}; fetch what it lists, and no more")
        with open_weights(path := present[shard]) as f:
            for name in f.keys():  # noqa: SIM118  (it is no dict)
                if name in files:
                    raise InputError(f"{path} and {files[name].name} both hold {name}; keep one")
                files[name] = path
    if not files:
        raise InputError(f"no *.safetensors in {model_dir}; pass the folder of a model")
    return files


def open_weights(path: Path) -> safe_open:
    """safe_open whose errors name the file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: no whole safetensors file ({error}); fetch it again") from None


def _compare_keys(sides: str, expected: set[str], present: set[str]) -> None:
    missing, unexpected = sorted(expected - present), sorted(present - expected)
    if missing or unexpected:
        told = f"{sides} disagree: {len(missing)} missing ({', '.join(missing[:3])})"
        raise InputError(f"{told}, {len(unexpected)} unexpected ({', '.join(unexpected[:3])})")


def is_sharded(x: Tensor | nn.Module) -> bool:
    """Whether FSDP has split it; asked without DTensor's import, which takes a second."""
    return hasattr(x, "device_mesh") or hasattr(x, "reshard")


def shard_place(*tensors: Tensor) -> tuple[int, int, bool]:
    """(number of this process's shard, how many shards there are, whether it is ours to write).

    A mesh's last dimension splits, another one replicates: only the first of its groups writes.
    """
    meshes = [t.device_mesh for t in tensors if is_sharded(t)]
    if not meshes:
        return 0, 1, is_main()
    *replica, number = meshes[0].get_coordinate()
    return number, meshes[0].size(-1), not any(replica)


def local_rows(p: Tensor) -> slice:
    """The rows of the whole tensor that this process holds of `p`, as torch.chunk splits them."""
    number, count, _ = shard_place(p)
    size = -(-len(p) // count)
    return slice(number * size, (number + 1) * size)


def local(p: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return p.to_local() if is_sharded(p) else p


def pieces_of(model: InternVL, model_dir: Path) -> dict[str, list[Piece]]:
    """Our parameter name -> the rows of a folder's files that make up the parameter.

    Of the layouts that which fits best; InputError unless the files hold exactly its tensors.
    """
    files = weight_files(model_dir)
    layouts = [stored_pieces(model, names) for names in LAYOUTS]
    stored = [{piece.name for piece in chain(*layout.values())} for layout in layouts]
    pieces, names = max(zip(layouts, stored), key=lambda fit: len(fit[1] & files.keys()))
    _compare_keys(f"weights in {model_dir} and config.json", names, set(files))
    return {
        name: [piece._replace(file=files[piece.name]) for piece in parts]
        for name, parts in pieces.items()
    }


def stored_rows(model: InternVL, model_dir: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(our name, parameter, this process's rows of it in the files), one tensor at a time."""
    parameters = dict(model.named_parameters())
    for name, pieces in pieces_of(model, model_dir).items():
        yield name, parameters[name], read_rows(pieces, parameters[name])


def read_rows(pieces: list[Piece], p: Tensor) -> Tensor:
    """This process's rows of the tensor `p`, joined from the stored pieces of the whole."""
    own, offset, parts = local_rows(p), 0, []
    for name, start, stop, path in pieces:
        shape = [max(x.stop for x in pieces if (x.name, x.file) == (name, path)), *p.shape[1:]]
        with open_weights(path) as f:
            stored = f.get_slice(name)
            kind, given = stored.get_dtype(), stored.get_shape()
            if given != shape or kind not in DTYPES:
                told = f"{path}: {name} has shape {given} and type {kind}, the model of config.json"
                needed = f"{shape} and {', '.join(DTYPES)}"
                raise InputError(f"{told} needs {needed}; fetch the released files")
            first, last = max(own.start - offset, 0), min(own.stop - offset, stop - start)
            parts.append(stored[start + first : start + max(first, last)])
        offset += stop - start
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fingerprint(model_dir: Path) -> str:
    """32 hex digits of all its weights, read once and not again while they stay as they are."""
    return runtime.fingerprint(set(weight_files(model_dir).values()))


@torch.no_grad()
def load_weights(model: InternVL, model_dir: Path, device: str | torch.device) -> None:
    """Fill a model of the meta device from official files, a sharded one with its own rows."""
    if is_sharded(model):
        model.to_empty(device=device)
    else:  # to_empty would import sympy
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
    for name, p, rows in stored_rows(model, model_dir):
        local(p).copy_(rows)
        if not is_finite(local(p)):
            raise InputError(f"{model_dir}: {name} holds NaN or infinity; fetch the weights again")


def is_finite(tensor: Tensor) -> bool:
    """Without a second tensor of its size: extremes of a tensor with NaN are NaN."""
    return not tensor.numel() or all(map(torch.isfinite, tensor.aminmax()))


def empty_model(model_dir: Path, drop_path_rate: float | None = None) -> InternVL:
    """The model of a folder on the meta device: shapes without memory.

    The id of <IMG_CONTEXT> is None where neither a tokenizer nor config.json names it.  A model
    whose config.json ties the head to the embedding has a head of its own if the files have one.
    """
    config, image_token = load_config(model_dir), None
    if drop_path_rate is not None:
        config = replace(config, vision=replace(config.vision, drop_path_rate=drop_path_rate))
    heads = ("lm_head.weight", ".output.weight")
    if config.llm.tied and any(name.endswith(heads) for name in weight_files(model_dir)):
        config = replace(config, llm=replace(config.llm, tied=False))
    if any((Path(model_dir) / name).is_file() for name in TOKENIZERS):
        image_token = load_tokenizer(model_dir).image_context_id
    with torch.device("meta"):
        return InternVL(config, config.image_token_id if image_token is None else image_token)


def load_model(
    model_dir: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> InternVL:
    """The model of a folder in the official layout, in eval mode, every key accounted for."""
    model = empty_model(model_dir).to(dtype)
    load_weights(model, model_dir, device)
    return model.eval()


# --------------------------------------------------------------------------- writing


def whole(p: Tensor) -> Tensor:
    """The whole tensor; a collective where it is sharded."""
    return p.full_tensor() if is_sharded(p) else p


@torch.no_grad()
def save_model(model: InternVL, out_dir: Path, like: Path) -> None:
    """Write `model` as folder `like` is laid out: names, dtypes, shards, index and small files.

    Called by every process of a sharded run; rank 0 writes, one shard in memory at a time.  The
    folder appears whole or not at all, and is read back and compared before this returns.
    """
    with new_export(export_folder(out_dir, like)) as partial:
        if is_main():
            for path in sorted(Path(like).iterdir()):  # what a release needs beside its weights
                kept = path.suffix in (".json", ".jinja", ".model", ".py")
                if (kept or path.name == "merges.txt") and path.is_file():
                    text = path.read_bytes()
                    if path.name == "config.json" and not model.config.llm.tied:
                        # transformers 4 would put the embedding in the place of the trained head
                        text = re.sub(rb'("tie_word_embeddings"\s*:\s*)true', rb"\1false", text)
                    write_atomic(partial / path.name, text)
        write_weights(model, Path(like), partial)
        all_of(True)  # all wait here
        for name, p, rows in stored_rows(model, partial):
            if not torch.equal(local(p).to("cpu", rows.dtype), rows):
                raise Failure(f"{partial}: {name} read back differs from the model; disk at fault")


def write_weights(model: InternVL, like: Path, partial: Path) -> None:
    """The model's parameters in the shards of `like`."""
    pieces, parameters = pieces_of(model, like), dict(model.named_parameters())
    for path in sorted(set(weight_files(like).values())):
        shard = {}
        with open_weights(path) as f:
            stored = {name: DTYPES[f.get_slice(name).get_dtype()] for name in f.keys()}
            for name, parts in pieces.items():
                here = stored.keys() & {piece.name for piece in parts}  # q, k may lie elsewhere
                if not here:
                    continue
                full = whole(parameters[name])  # every process takes part
                if not all(is_finite(full.to(kind)) for kind in {stored[key] for key in here}):
                    raise Failure(f"{name} holds NaN or infinity, so the model is not written")
                split = split_stored(full, parts) if is_main() else {}
                shard |= {key: split[key].to("cpu", stored[key]) for key in here & split.keys()}
            metadata = f.metadata() or {"format": "pt"}
        if is_main():
            write_tensors(shard, partial / path.name, metadata=metadata)


def export_folder(out_dir: Path, like: Path) -> Path:
    """The folder behind `out_dir`, links followed, if an export may be written there.

    InputError where it overlaps with the input, or holds anything that no export of ours wrote.
    """
    out, like = Path(out_dir).resolve(), Path(like).resolve()
    str(out).encode()  # fails at a name that safetensors would write and not read again
    if out.is_relative_to(like) or like.is_relative_to(out):
        raise InputError(f"{out_dir} and the input {like} overlap; name another folder")
    if out.exists() and not out.is_dir():  # a device, too, would be renamed away
        raise InputError(f"{out_dir} is no folder; name another one")
    mark = out / EXPORT_MARK
    written = read_json(mark).get("files") if mark.is_file() else None
    written = {mark.name, *written} if isinstance(written, list) else set()
    if strange := sorted({path.name for path in out.glob("*")} - written):
        told = f"{out_dir} holds {strange[0]}, which no export of this program wrote there"
        raise InputError(f"{told}; move it away or name another folder")
    return out


@contextlib.contextmanager
def new_export(out_dir: Path) -> Iterator[Path]:
    """A `new_folder` that lists its files in the end, so that the next export may replace it."""
    alone = runtime.alone_in(out_dir.parent, 0, "name another folder", f".{out_dir.name}.lock")
    with alone, new_folder(out_dir.with_name(f".{out_dir.name}.partial"), out_dir) as partial:
        yield partial
        if is_main():
            write_json(partial / EXPORT_MARK, {"files": sorted(os.listdir(partial))})


@contextlib.contextmanager
def new_folder(partial: Path, final: Path) -> Iterator[Path]:
    """A folder `partial` to fill, which becomes `final` once every process has left it.

    What stood there goes only once the new one is in place.  After an error nothing is left of it.
    """
    old = final.with_name(f".{final.name}.old")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
    all_of(True)  # all wait here
    try:
        yield partial
        all_of(True)  # all wait here
        if is_main():
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                os.replace(final, old)
            os.replace(partial, final)
            shutil.rmtree(old, ignore_errors=True)
        all_of(True)  # all wait here
    finally:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)


def write_tensors(tensors: dict[str, Tensor], path: Path, **options: object) -> None:
    """save_file, durable; an error (a full disk) names the file."""
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, **options)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise Failure(f"cannot write {path}: {error}; what was saved before is intact") from error


# --------------------------------------------------------------------------- checkpoints

# checkpoints/step-00000120/ = state.json, shard-000-of-002.safetensors, ..., each with a .checksum


def sign(path: Path) -> None:
    write_atomic(path.with_suffix(".checksum"), runtime.fingerprint([path]))


def is_intact(path: Path) -> bool:
    """Whether a file of a checkpoint is what was written there."""
    known = path.with_suffix(".checksum")
    return path.is_file() and known.is_file() and known.read_text() == runtime.fingerprint([path])


class CheckpointWriter:
    """Writes <folder>/step-<n>, complete or absent, and keeps the newest `keep` of them.

    Later ones, of a run that was killed and went back, go first.  In the background a thread writes
    a copy in host memory while training goes on, as beside a GPU.  The checkpoint counts once every
    process has written its shard and process 0 has renamed the folder; only the main thread talks
    to other processes, in `save` and `finish`.
    """

    def __init__(self, folder: Path, keep: int, background: bool = False) -> None:
        self.folder, self.keep, self.background = Path(folder), keep, background
        self.thread = ThreadPoolExecutor(1)
        self.under_way: tuple[Path, contextlib.ExitStack, Future] | None = None

    @torch.no_grad()
    def save(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        """Each process gives its shards, `state` is JSON.  A full disk may be told a call later."""
        self.finish()
        number, count, ours = shard_place(*tensors.values())
        shards = [f"shard-{n:03d}-of-{count:03d}.safetensors" for n in range(count)]
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        state = {**state, "step": step, "shapes": shapes, "shards": shards}
        final, folder = self.folder / f"step-{step:08d}", contextlib.ExitStack()
        partial = folder.enter_context(new_folder(self.folder / ".partial", final))
        copies = {n: local(t).to("cpu", copy=self.background) for n, t in tensors.items() if ours}

        def write() -> None:
            if ours:
                write_tensors(copies, partial / shards[number])
                sign(partial / shards[number])
            if is_main():
                write_json(partial / "state.json", state)
                sign(partial / "state.json")

        self.under_way = final, folder, self.thread.submit(write)
        self.finish(wait=not self.background)

    def finish(self, wait: bool = True) -> None:
        """Complete the checkpoint under way, if all processes have written it or one may wait."""
        if not self.under_way or not (wait or all_of(self.under_way[-1].done())):
            return
        (final, folder, writing), self.under_way = self.under_way, None
        with folder:
            writing.result()
        if is_main():
            complete = sorted(complete_checkpoints(self.folder), key=lambda p: (p <= final, p))
            for old in complete[: -self.keep]:
                shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the oldest first; half-written ones and copies have other names."""
    return sorted(p.parent for p in Path(folder).glob(f"step-{'[0-9]' * 8}/state.json"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    return (complete_checkpoints(folder) or [None])[-1]


def checkpoint_state(checkpoint: Path) -> dict:
    """What was saved beside the tensors."""
    state = read_json(checkpoint / "state.json")
    if not is_intact(checkpoint / "state.json") or checkpoint.name != f"step-{state['step']:08d}":
        raise _damaged(checkpoint, "state.json")
    return state


def _damaged(checkpoint: Path, file: str) -> InputError:
    told = f"{checkpoint}: {file} is not what was saved as {checkpoint.name}"
    return InputError(f"{told}; delete the folder to continue from the checkpoint before")


@torch.no_grad()
def load_checkpoint(checkpoint: Path, tensors: dict[str, Tensor], part: str = "") -> dict:
    """Fill this process's rows of `tensors`; returns the state.  Any process count may read.

    They are all that the checkpoint holds under names that begin with `part`.
    """
    state = checkpoint_state(checkpoint)
    ours = {f"{name} {list(t.shape)}" for name, t in tensors.items()}
    saved = {f"{name} {x}" for name, x in state["shapes"].items() if name.startswith(part)}
    _compare_keys(f"{checkpoint} and this run", ours, saved)
    files = [checkpoint / name for name in state["shards"]]
    rank, world = runtime.rank_and_world()
    damaged = [path.name for path in files[rank::world] if not is_intact(path)]  # each read once
    if not all_of(not damaged):
        raise _damaged(checkpoint, ", ".join(damaged) or "a shard")
    for name, t in tensors.items():
        chunks = torch.arange(len(t)).chunk(len(files))  # rows of each shard that has any
        pieces = [Piece(name, 0, len(chunk), path) for chunk, path in zip(chunks, files)]
        local(t).copy_(read_rows(pieces, t))
    return state
