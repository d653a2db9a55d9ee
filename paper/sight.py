"""A projector that reads the toy's pictures, in the place of a pre-trained InternViT."""

from itertools import product

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as JsonTokenizer
from torch import Tensor, nn

from data import seeded
from model import InternVL
from toy import CELL, COLOURS, SHAPES, SIDE, draw, random_things
from vision import preprocess


@torch.no_grad()
def fit_projector(model: InternVL, tokenizer: JsonTokenizer, seed: int) -> None:
    """By least squares: no training.

    The ViT is random, but keeps all pixels of a cell.  The projector's first layer reads colour,
    shape and place off them; its second sends each cell to the sum of these words' embeddings.
    """
    rng, kinds = seeded(seed, "vision"), list(product(COLOURS, SHAPES))
    scenes = [random_things(rng) for _ in range(1200)]
    tiles = torch.cat([preprocess(draw(scene, rng), 1, CELL * SIDE) for scene in scenes])
    truth = torch.zeros(len(scenes), SIDE, SIDE, dtype=torch.long)  # 0: an empty cell
    for n, scene in enumerate(scenes):
        for thing in scene:
            truth[n, thing.row, thing.col] = 1 + kinds.index((thing.colour, thing.shape))
    truth, cell = truth.flatten(), torch.arange(SIDE * SIDE).repeat(len(scenes))
    model.vision_model.embeddings.position_embedding.normal_(std=0.3)
    projector = model.projector
    model.projector, first, gelu, second = projector  # what the ViT hands on, through its norm
    features = model.image_features(tiles).flatten(0, 1)
    model.projector = projector
    codes = torch.cat([F.one_hot(truth, 1 + len(kinds)), F.one_hot(cell)], dim=1) * 4.0 - 1.0
    set_linear(first, features, codes)

    def words(*names: str) -> Tensor:
        ids = [tokenizer.token_to_id(" " + name) for name in names]
        return model.language_model.model.tok_embeddings.weight[ids].sum(0)

    content = torch.stack([words(), *(words(*kind) for kind in kinds)])
    place = torch.stack([words(f"{c}{r}") for r in "123" for c in "abc"])
    set_linear(second, gelu(first(features)), content[truth] + place[cell])


def set_linear(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """The first rows of `layer` become the ridge regression of y (n out) on x (n in)."""
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    solution = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ y.double()).T.float()
    layer.weight[: len(solution)], layer.bias[: len(solution)] = solution[:, :-1], solution[:, -1]
