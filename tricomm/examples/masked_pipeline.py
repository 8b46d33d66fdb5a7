"""Train padded sentences: dropout, a mask, two outputs, unequal microbatches, clipping, evaluation.

torchrun --nproc-per-node 2 -m tricomm.examples.masked_pipeline
"""

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tricomm import Mesh, Replicate, ShardingSpec
from tricomm.pipeline import EdgeTensor, Executor, Stage, clip_gradients, one_f_one_b

WORDS, WIDTH, LENGTH, STEPS, PADDING = 50, 32, 12, 30, 0
ROWS, WEIGHTS = [8, 8, 8, 2], [8 / 26, 8 / 26, 8 / 26, 2 / 26]  # the microbatches of 26 sentences


class Encoder(nn.Module):  # noqa: D101
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(WORDS, WIDTH), nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the words mean, and which of them are padding."""
        return self.dropout(self.embedding(tokens)), tokens == PADDING


class Decoder(nn.Module):  # noqa: D101
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, hidden: Tensor, padding: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, padding left out, and the logits."""
        logits = self.head(self.layer(hidden, src_key_padding_mask=padding))
        return nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PADDING), logits


def make_batch(step: int) -> dict[str, tuple[Tensor, ...]]:
    """Sentences of 3 to LENGTH words; each word is to become the next one."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, WORDS - 1, (sum(ROWS), LENGTH), generator=random)
    tokens[torch.arange(LENGTH) >= torch.randint(3, LENGTH + 1, (sum(ROWS), 1), generator=random)] = PADDING
    targets = torch.where(tokens == PADDING, PADDING, tokens + 1)
    return {"tokens": torch.split(tokens, ROWS), "targets": torch.split(targets, ROWS)}


def main() -> None:
    """Train, evaluate without dropout, and save what this rank holds."""
    dist.init_process_group("gloo")
    if dist.get_world_size() != 2:
        raise SystemExit(f"{dist.get_world_size()} processes, and this pipeline has 2 stages of one rank: start 2")
    rank, first, last = dist.get_rank(), Mesh([0], ("rank",)), Mesh([1], ("rank",))
    module = (Encoder, Decoder)[rank]()
    encoder = Stage(first, ("tokens",), ("hidden", "padding"), None if rank else module)
    inputs, all_of_it = ("hidden", "padding", "targets"), (Replicate(),)
    decoder = Stage(last, inputs, ("loss", "logits"), module if rank else None, all_of_it)
    real, mask = (ShardingSpec(first, all_of_it, dtype=dtype) for dtype in ("float32", "bool"))
    there = ShardingSpec(last, all_of_it)
    hidden = EdgeTensor(real, there, shape=("rows", LENGTH, WIDTH))
    crosses = {"hidden": hidden, "padding": EdgeTensor(mask, there, gradient=None, shape=("rows", LENGTH))}
    with Executor(one_f_one_b(2, len(ROWS)), [encoder, decoder], {(0, 1): crosses}) as executor:
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
        for step in range(STEPS):
            optimizer.zero_grad()
            executor.step(make_batch(step), sizes={"rows": ROWS}, loss_weights=WEIGHTS)
            clip_gradients(executor, 1.0)  # by the norm over both stages
            optimizer.step()
        module.eval()
        found = executor.evaluate(batch := make_batch(STEPS), sizes={"rows": ROWS}, loss_weights=WEIGHTS)
    if rank:
        right = torch.cat(found.outputs["logits"]).argmax(-1) == torch.cat(batch["targets"])
        print(f"loss {found.loss:.3f}, {right.float().mean():.0%} right")
    torch.save(module.state_dict(), f"stage{rank}.pt")  # of this stage alone; load_state_dict reads it back
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
