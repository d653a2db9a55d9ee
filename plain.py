"""The whole paper in one sitting: Mixed Preference Optimization of InternVL (arXiv:2411.10442).

    python plain.py --model_dir toy/model --meta toy/meta.json

One process, one pair at a time: an image becomes tiles, tiles and question become a prompt, the
model gives the log-prob of the chosen and of the rejected response, a frozen copy of the model
gives the same two numbers, and the loss of section 4 is four lines in `pair_loss`.  No packing, no
KV cache, no stored reference, no FSDP: train.py does the same with two fifths of the arithmetic,
and the tests of train.py and generate.py compare them with this file.
"""

import math
from pathlib import Path

from runtime import InputError, command_line, flag, parse_cli, run


@command_line
class PlainConfig:
    """Train on preference pairs in the plainest way, and ask the model one question."""

    model_dir: Path = flag(Path("toy/model"), "folder in the official layout")
    meta: Path = flag(Path("toy/meta.json"), "meta.json or .jsonl of pairs; see tools/convert.py")
    steps: int = flag(8, "optimizer steps", low=1)
    batch_size: int = flag(8, "pairs a step", low=1)
    lr: float = flag(2e-3, "peak learning rate (the paper's 8B run: 5e-6)")
    warmup: float = flag(0.05, "share of the steps with rising rate", low=0, high=1)
    weight_decay: float = flag(0.05, "AdamW's, for matrices", low=0)
    max_grad_norm: float = flag(1.0, "clip the gradient's norm; 0 = off", low=0)
    beta: float = flag(0.1, "KL coefficient of eq. 4 to 7", low=1e-9)
    seed: int = flag(42, "order of the pairs")


import torch
import torch.nn.functional as F
from torch import Tensor

from data import epoch_order
from images import load_image
from model import InternVL
from records import PairRecord, read_meta
from tokenizer import Tokenizer, encode_chat, encode_response, load_tokenizer, training_text
from vision import preprocess
from weights import load_model

# --------------------------------------------------------------------------- one pair


def read_prompt(
    record: PairRecord, model: InternVL, tokenizer: Tokenizer
) -> tuple[Tensor | None, list]:
    """The record's images as tiles (tile 3 h w), its question as ids with their image tokens."""
    config = model.config
    if record.augment:
        raise InputError(f"{record.name}: plain.py has no data_augment; use train.py")
    images = [
        preprocess(load_image(path), record.max_tiles, config.tile_size) for path in record.images
    ]  # each: tiles of tile_size, and last the whole image if it was cut
    prompt = encode_chat(
        tokenizer,
        config.template,
        [(training_text(config.template, record.question), None)],
        [config.tokens_per_tile * len(tiles) for tiles in images],
        record.system_prompt,
        config.system_message,
    )
    return torch.cat(images) if images else None, prompt


def response_logp(model: InternVL, tiles: Tensor | None, prompt: list, response: list) -> Tensor:
    """log pi(y | x), summed over the response's tokens, its closing <|im_end|> too."""
    ids = torch.tensor([prompt + response])
    logits = model(ids, tiles)[0, len(prompt) - 1 : -1]  # (token vocab): each predicts the next
    logps = logits.log_softmax(-1)
    return logps.gather(-1, torch.tensor(response)[:, None]).sum()


def pair_loss(
    policy: InternVL,
    reference: InternVL,
    tokenizer: Tokenizer,
    record: PairRecord,
    beta: float,
    shift: float,
) -> tuple[Tensor, list[float]]:
    """MPO's loss of one pair, and the two rewards that move the shift."""
    tiles, prompt = read_prompt(record, policy, tokenizer)
    template = policy.config.template
    chosen = encode_response(tokenizer, template, record.chosen)
    rejected = encode_response(tokenizer, template, record.rejected, not record.cut_off)

    chosen_logp = response_logp(policy, tiles, prompt, chosen)
    rejected_logp = response_logp(policy, tiles, prompt, rejected)
    with torch.no_grad():
        reference_chosen = response_logp(reference, tiles, prompt, chosen)
        reference_rejected = response_logp(reference, tiles, prompt, rejected)
    c = chosen_logp - reference_chosen  # log-ratios; times beta they are the rewards
    r = rejected_logp - reference_rejected

    preference = -F.logsigmoid(beta * (c - r))  # eq. 4 (DPO): which of the two is better
    # eq. 5 = eq. 6 + eq. 7 (BCO): is each one good at all
    quality = -F.logsigmoid(beta * c - shift) - F.logsigmoid(-(beta * r - shift))
    generation = -chosen_logp / len(chosen)  # eq. 8 (SFT): still able to write it
    loss = 0.8 * preference + 0.2 * quality + 1.0 * generation  # eq. 3 (MPO)
    return loss, [beta * c.item(), beta * r.item()]


# --------------------------------------------------------------------------- all pairs


def learning_rate(step: int, cfg: PlainConfig) -> float:
    """Linear warm-up, then a cosine to 0; step counts from 0, so the first one has rate 0."""
    warm = math.ceil(cfg.warmup * cfg.steps)
    if step < warm:
        return cfg.lr * step / warm
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cfg.steps - warm)))


def make_optimizer(policy: InternVL, cfg: PlainConfig) -> torch.optim.AdamW:
    """Matrices decay, vectors (biases, norms, layer scales) do not."""
    matrices = [p for p in policy.parameters() if p.ndim > 1]
    vectors = [p for p in policy.parameters() if p.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay)


def train(cfg: PlainConfig) -> tuple[InternVL, list[float]]:
    """The trained policy and the loss of each step."""
    policy, reference = load_model(cfg.model_dir), load_model(cfg.model_dir)
    reference.requires_grad_(False)  # pi_0 of eq. 4: the same weights, frozen
    tokenizer = load_tokenizer(cfg.model_dir)
    sets = read_meta(cfg.meta, policy.config.max_tiles)
    steps_per_epoch = -(-len(epoch_order(sets, cfg.seed, 0)) // cfg.batch_size)
    optimizer = make_optimizer(policy, cfg)
    all_rewards, losses = [], []
    for step in range(cfg.steps):
        # delta of eq. 6 and 7: the mean reward of all earlier steps
        shift = sum(all_rewards) / len(all_rewards) if all_rewards else 0.0
        epoch, batch = divmod(step, steps_per_epoch)
        order = epoch_order(sets, cfg.seed, epoch)  # (set, line) of each pair
        pairs = order[batch * cfg.batch_size : (batch + 1) * cfg.batch_size]
        for p in policy.parameters():
            p.grad = torch.zeros_like(p)  # without one AdamW would skip the ViT in a step of text
        loss = 0.0
        for set_number, line in pairs:
            record = sets[set_number][line]
            one_loss, rewards = pair_loss(policy, reference, tokenizer, record, cfg.beta, shift)
            (one_loss / len(pairs)).backward()
            loss += one_loss.item() / len(pairs)
            all_rewards += rewards
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        optimizer.step()
        losses.append(loss)
        print(f"step {step + 1}/{cfg.steps}  loss {loss:.4f}", flush=True)
    return policy, losses


# --------------------------------------------------------------------------- an answer


@torch.no_grad()
def greedy_ids(
    model: InternVL, tiles: Tensor | None, prompt: list, stop: int, max_new_tokens: int
) -> list[int]:
    """The likeliest next token again and again, each time from the whole text so far."""
    answer: list[int] = []
    while len(answer) < max_new_tokens and stop not in answer:
        logits = model(torch.tensor([prompt + answer]), tiles)[0, -1]
        if model.image_context_id is not None:  # an answer holds no image
            logits[model.image_context_id] = -math.inf
        answer.append(int(logits.argmax()))
    return answer


def main() -> None:
    cfg = parse_cli(PlainConfig)
    policy, _ = train(cfg)
    tokenizer = load_tokenizer(cfg.model_dir)
    record = read_meta(cfg.meta, policy.config.max_tiles)[0][0]
    tiles, prompt = read_prompt(record, policy, tokenizer)
    answer = greedy_ids(policy, tiles, prompt, tokenizer.im_end_id, max_new_tokens=40)
    print(f"question  {record.question}\nchosen    {record.chosen}")
    print(f"answer    {tokenizer.decode(answer)}")


if __name__ == "__main__":
    run(main)
