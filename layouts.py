"""Under which names the weights of a model are stored, one table a layout.

    OFFICIAL_INTERNLM2     InternVL2, 2.5 with InternLM2: our own names, but for the projector
    OFFICIAL_QWEN          InternVL2-1B, 2.5, 3, 3.5 with Qwen2 or Qwen3
    HF, HF_CONVERTED       transformers' own (-hf), in its two spellings; InternLM2 is a Llama there

In memory every decoder has InternLM2's structure, whose `wqkv` holds q, k and v of one key/value
head after another; every other layout stores q, k and v apart.  A table is read in both directions:
stored_pieces says which stored rows make up a parameter, split_stored undoes it.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import InternVL

# In-memory name -> stored name, replaced in this order; a * stands for q, k and v, into which a
# packed projection is split.  First what transformers calls the parts of InternLM2's decoder:
DECODER = {
    "language_model.model.tok_embeddings.": "language_model.model.embed_tokens.",
    "language_model.output.": "language_model.lm_head.",
    ".attention.wqkv.": ".self_attn.*_proj.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".attention.": ".self_attn.",  # q_norm, k_norm
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
}
OFFICIAL_INTERNLM2 = {"projector.": "mlp1."}
OFFICIAL_QWEN = DECODER | OFFICIAL_INTERNLM2
HF = DECODER | {  # InternVLForConditionalGeneration as save_pretrained writes it
    "vision_model.": "vision_tower.",
    ".encoder.layers.": ".encoder.layer.",
    ".attn.qkv.": ".attention.*_proj.",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
    ".class_embedding": ".cls_token",
    ".position_embedding": ".position_embeddings",
    ".patch_embedding.": ".patch_embeddings.projection.",
    "projector.0.": "multi_modal_projector.layer_norm.",
    "projector.1.": "multi_modal_projector.linear_1.",
    "projector.3.": "multi_modal_projector.linear_2.",
}
HF_CONVERTED = HF | {  # ... and as the official conversion script writes it
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
LAYOUTS = (OFFICIAL_INTERNLM2, OFFICIAL_QWEN, HF, HF_CONVERTED)


class Piece(NamedTuple):
    """Rows start..stop of a stored tensor."""

    name: str
    start: int
    stop: int
    file: Path | None = None


def stored_pieces(model: InternVL, names: dict[str, str]) -> dict[str, list[Piece]]:
    """In-memory name -> the stored rows that make up the parameter, in order; adapters have none.

    `names` is one of the tables above.  Where it has a *, the ViT's `qkv` is all rows of q, then k,
    then v; the decoder's `wqkv` for each key/value head its query heads, its key, its value.
    """
    llm, width = model.config.llm, model.config.vision.hidden_size
    query_rows = llm.num_attention_heads // llm.num_key_value_heads * llm.head_dim
    pieces: dict[str, list[Piece]] = {}
    for name, p in model.named_parameters():
        if ".lora_" in name:
            continue
        stored, groups, rows = name, 1, {"": p.shape[0]}
        for ours, theirs in names.items():
            stored = stored.replace(ours, theirs)
        if "*" in stored and name.startswith("language_model."):
            groups = llm.num_key_value_heads
            rows = {"q": query_rows, "k": llm.head_dim, "v": llm.head_dim}
        elif "*" in stored:
            rows = {"q": width, "k": width, "v": width}
        pieces[name] = [
            Piece(stored.replace("*", part), n * count, (n + 1) * count)
            for n in range(groups)
            for part, count in rows.items()
        ]
    return pieces


def split_stored(tensor: Tensor, pieces: list[Piece]) -> dict[str, Tensor]:
    """A whole parameter under its stored name, or split under its three."""
    parts: dict[str, list[Tensor]] = {}
    for piece, rows in zip(pieces, tensor.split([piece.stop - piece.start for piece in pieces])):
        parts.setdefault(piece.name, []).append(rows)
    return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in parts.items()}
