"""open_clip: one line puts these losses where its factory and its trainer look them up.

    python examples/open_clip_apply.py                 # a CLIP of random weights on a CPU, a minute
    python examples/open_clip_apply.py --rows 16 --steps 4

It makes the loss as open_clip's trainer does, by `open_clip.create_loss`, and prints which class came out, the first batch's loss
beside that of open_clip's own class, then the loss every tenth of the run. The pictures are coloured squares, and the texts name
their colours and places. With open_clip's own command line nothing needs to be written at all:

    python -m gcl_kernels.integrations.open_clip --train-data ... --model ViT-B-32 ...    # instead of open_clip_train.main
"""

import argparse
from types import SimpleNamespace

import torch

import gcl_kernels.integrations.open_clip as integration

replaced = integration.apply()  # the one line; `integration.undo()` takes it back

import open_clip  # noqa: E402  (before or after makes no difference)
from open_clip.loss import CoCaLoss, SigLipLoss  # noqa: E402, F401  these are ours now, too

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
PLACES = [f"{vertical} {side}" for vertical in ("top", "middle", "bottom") for side in ("left", "centre", "right")]


def pairs():
    """Every picture with its text: a square of one colour in one of nine places, and another colour around it."""
    pictures, texts = [], []
    for name, colour in COLOURS.items():
        for around, other in COLOURS.items():
            for place, where in enumerate(PLACES):
                if name == around:
                    continue
                picture = torch.tensor(other, dtype=torch.float32).view(3, 1, 1).repeat(1, 32, 32)
                row, column = divmod(place, 3)
                picture[:, 11 * row : 11 * row + 10, 11 * column : 11 * column + 10] = torch.tensor(
                    colour, dtype=torch.float32
                ).view(3, 1, 1)
                pictures.append(picture - 0.5)
                texts.append(f"a {name} square on {around}, {where}")
    return torch.stack(pictures), open_clip.tokenize(texts, context_length=16)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="pairs in a batch, at most 180 (default 128)")
    parser.add_argument("--steps", type=int, default=60, help="batches (default 60)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    print(f"replaced: {', '.join(replaced)}")
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
        text_cfg={"context_length": 16, "width": 64, "heads": 2, "layers": 2},
    ).to(device)
    # These are the arguments that open_clip's trainer reads from its command line.
    names = ("distill", "siglip", "horovod", "local_loss", "gather_with_grad", "loss_dist_impl")
    criterion = open_clip.create_loss(SimpleNamespace(**dict.fromkeys(names), model="ViT", rank=0, world_size=1))
    print(f"open_clip.create_loss made a {type(criterion).__module__}.{type(criterion).__name__}")

    pictures, texts = (tensor.to(device) for tensor in pairs())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        rows = torch.randperm(len(pictures))[: options.rows].to(device)
        features = model(pictures[rows], texts[rows])
        loss = criterion(*features)
        if step == 0:
            integration.undo()
            with torch.no_grad():
                theirs = open_clip.ClipLoss()(*features)
            integration.apply()
            print(f"first batch: ours {loss.item():.6f}, open_clip's {theirs.item():.6f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, options.steps // 10) == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
