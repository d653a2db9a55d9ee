"""No tensor on the wrong device: the model's ways on fake CUDA tensors, which need no card.

Fake tensors have shapes, dtypes and devices and no numbers.  An operation on two devices fails
there as it would on a card.  CPU builds of torch cannot make them, so there these tests skip.
"""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

import cache
import generate
import losses
import model
import train
import weights
from data import STAND_IN, PairData, lay_out
from records import read_meta
from tokenizer import load_tokenizer
from toy import write_world

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="a CPU build of torch has no fake CUDA tensors"
)
CUDA = torch.device("cuda", 0)


class ImageSlots(TorchFunctionMode):
    """`nonzero` of fake numbers has no length: the number of image slots is given."""

    def __init__(self, slots):
        super().__init__()
        self.slots = slots

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.nonzero:
            return args[0].new_zeros((self.slots, 1), dtype=torch.long)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 8, 0)
    return folder


@pytest.fixture
def fake(world, monkeypatch):
    """(FakeTensorMode, the toy's model on a fake card, bfloat16)."""
    monkeypatch.setattr(model, "compiled", lambda function: function)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        policy = weights.empty_model(world / "model")
        for module in policy.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        moved = torch.empty(tensor.shape, device=CUDA, dtype=torch.bfloat16)
                        parameter = tensors is module._parameters
                        tensors[name] = torch.nn.Parameter(moved) if parameter else moved
        yield mode, policy


def packs_of(world, policy):
    meta = read_meta(world / "meta.json", 12)
    options = {"batch_size": 4, "pack_tokens": 2000, "max_length": 2000, "seed": 0}
    data = PairData(meta, load_tokenizer(world / "model"), policy.config, **options)
    return [data.build(trees) for trees in data.plan(data.rows(0))[0]]


def on_card(mode, pack):
    tensors = {k: v for k, v in vars(pack).items() if isinstance(v, torch.Tensor)}
    return replace(pack, **{k: mode.from_tensor(v).to(CUDA) for k, v in tensors.items()})


def test_scores_losses_and_the_optimizer_stay_on_the_card(world, fake):
    mode, policy = fake
    with unset_fake_temporarily():
        pack = packs_of(world, policy)[0]
        slots = int((pack.input_ids == policy.image_context_id).sum())
    assert slots and len(pack.rejected)
    config = {"model_dir": world / "model", "meta": world / "meta.json", "out_dir": world / "run"}
    cfg = train.TrainConfig(**config, pack_tokens=2000, compile="off", head_rows=128, lr=1e-5)
    pack = on_card(mode, pack)
    with ImageSlots(slots), torch.no_grad():  # autograd's engine asks for a real card
        sums, lengths = train.score(policy, pack, cfg)
    chosen, rejected = sums[pack.chosen], sums[pack.rejected]
    of_pair = lengths[pack.chosen], lengths[pack.rejected]
    logps = losses.PairLogps(chosen, rejected, chosen, rejected, *of_pair)
    terms = losses.parse_objective("0.8*dpo+0.2*bco+sft")
    loss = losses.objective(terms, logps, beta=0.1, bco_shift=torch.zeros((), device=CUDA))[0]
    assert loss.device == CUDA and loss.shape == pack.chosen.shape
    for module in policy.modules():  # a run keeps float32 weights
        for name, p in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(p.detach().float())
    optimizer = train.make_optimizer(cfg, policy)
    for p in policy.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step(cfg.lr)
    states = [x for state in optimizer.state.values() for x in state.values()]
    assert {x.device for x in states} == {CUDA}


def test_a_stand_in_brings_tiles_and_no_pair_to_the_card(world, fake, monkeypatch):
    mode, policy = fake
    with unset_fake_temporarily():
        pack = lay_out([STAND_IN])
    config = {"model_dir": world / "model", "meta": world / "meta.json", "out_dir": world / "run"}
    cfg, shown = train.TrainConfig(**config, pack_tokens=2000), []
    monkeypatch.setattr(weights, "is_sharded", lambda x: True)  # as beside other processes
    image_features = policy.image_features
    policy.image_features = lambda tiles: shown.append(tiles) or image_features(tiles)
    pack = on_card(mode, pack)
    with ImageSlots(0), torch.no_grad():
        sums, _ = train.score(policy, pack, cfg)
    assert shown[0].shape == (2, 3, policy.config.tile_size, policy.config.tile_size)
    assert shown[0].device == sums.device == CUDA and sums[pack.chosen].shape == (0,)


@pytest.mark.parametrize("temperature, top_k, top_p", [(0, 0, 1.0), (1.0, 20, 0.9)])
def test_prefill_decode_and_choice_stay_on_the_card(fake, temperature, top_k, top_p):
    mode, policy = fake
    kv = cache.KVCache(policy.config.llm, 64, CUDA, torch.bfloat16, rounded=True)
    prompt, answers, left = cache.Room(), [cache.Room(high=True) for _ in range(3)], cache.Room()
    kv.enlarge(left, 40 * cache.KEYS)
    ids = [policy.image_context_id] * policy.config.tokens_per_tile + [5] * 40
    kv.enlarge(prompt, len(ids))
    tiles = torch.empty(1, 3, policy.config.tile_size, policy.config.tile_size, device=CUDA)
    with ImageSlots(policy.config.tokens_per_tile):
        [logits] = generate.prefill(policy, [ids], tiles, kv.prefill([prompt], [len(ids)]))
    assert logits.device == CUDA and logits.shape == (policy.config.llm.vocab_size,)
    for answer in answers:
        kv.enlarge(answer, 1)
    kv.release(left)  # so that the prompt's blocks move
    plan = kv.plan([(prompt, answer) for answer in answers], [1, 2, 3])
    assert prompt.blocks.max() < 40
    head = losses.aligned(policy.language_model.head.detach())
    logits = generate.decode(policy, kv, plan, head)[:3]
    assert logits.device == CUDA and logits.shape == (3, policy.config.llm.vocab_size)
    uniforms = torch.empty(3, device=CUDA)
    tokens = generate.choose(logits, uniforms, temperature, top_k, top_p)
    assert tokens.device == CUDA and tokens.shape == (3,)


def test_a_tensor_left_on_the_cpu_is_noticed(world, fake):
    """The check checks: a weight on the CPU ends the pass."""
    _, policy = fake
    norm = policy.language_model.model.norm
    norm.weight = torch.nn.Parameter(torch.empty(norm.weight.shape, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="device"), ImageSlots(0):
        generate.prefill(policy, [[1, 2, 3]], None, model.causal_attention)
