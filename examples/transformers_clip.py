"""transformers: a CLIPModel under Trainer by `ContrastiveModel`, with a score for each pair.

    python examples/transformers_clip.py                                # random weights, no download, half a minute on a CPU
    python examples/transformers_clip.py --rows 16 --steps 10
    torchrun --nproc-per-node 2 examples/transformers_clip.py           # --rows pairs on each of 2 processes

It prints the first batch's loss without scores beside CLIPModel's own, then Trainer's loss with scores, and how many new pictures
find a text of their own kind first. For a model of your own write `CLIPModel.from_pretrained(name)` in the place of
`small_model()`, and a data set with columns `input_ids`, `pixel_values`, `scores` and `ids` in the place of `pairs()`.
"""

import argparse
import tempfile

import torch
from transformers import CLIPConfig, CLIPModel, PrinterCallback, Trainer, TrainingArguments

from gcl_kernels.integrations.transformers import ContrastiveModel

KINDS = 40  # of pictures; a text names its kind by two tokens


def small_model():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 16, "max_position_embeddings": 8, "bos_token_id": 14, "eos_token_id": 15}
    vision = sizes | {"image_size": 16, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def pairs(count, seed):
    """Rows of a picture, its text, how good a match they are (1 to 100: a picture with more noise is a worse one), and an id."""
    drawn = torch.Generator().manual_seed(0)
    patterns = torch.randn(KINDS, 3, 16, 16, generator=drawn)
    drawn.manual_seed(seed)
    for _ in range(count):
        kind, score = (int(torch.randint(low, high, (), generator=drawn)) for low, high in ((0, KINDS), (1, 101)))
        noise = (1 - score / 100) * torch.randn(3, 16, 16, generator=drawn)
        tokens = torch.tensor([14, kind // 10, 4 + kind % 10, 15])
        # Pairs with the same id are no negatives of one another: here, pictures of the same kind.
        yield {"input_ids": tokens, "pixel_values": patterns[kind] + noise, "scores": float(score), "ids": kind}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="pairs a process in a batch (default 128)")
    parser.add_argument("--steps", type=int, default=100, help="batches (default 100)")
    options = parser.parse_args()
    torch.manual_seed(0)

    clip = small_model()
    train, test = list(pairs(8 * options.rows, seed=1)), list(pairs(128, seed=2))
    first = {name: torch.stack([row[name] for row in train[: options.rows]]) for name in ("input_ids", "pixel_values")}

    # Its forward is what autocast and DistributedDataParallel see. Over several processes it compares the rows of all.
    model = ContrastiveModel(clip, score_to_weight="linear", score_range=(1, 100), normalize="mean")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=options.rows, learning_rate=2e-3, warmup_steps=5,
            logging_steps=max(1, options.steps // 10), logging_first_step=True, save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_drop_last=True, dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.accelerator.is_available(),  # several processes on a CPU are joined only where it is said
            ddp_find_unused_parameters=False,  # all of them take part in every step
        )  # fmt: skip
        if arguments.process_index == 0:
            with torch.no_grad():
                ours = ContrastiveModel(clip, process_group=None)(
                    **{k: v.to(clip.device) for k, v in first.items()}
                ).loss
                theirs = clip(**{k: v.to(clip.device) for k, v in first.items()}, return_loss=True).loss
            print(f"first batch: ContrastiveModel without scores {ours.item():.6f}, CLIPModel {theirs.item():.6f}")
        trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=test)
        trainer.remove_callback(PrinterCallback)  # it prints dictionaries
        trainer.train()
        text, image = (torch.from_numpy(x) for x in trainer.predict(test).predictions)
        if trainer.is_world_process_zero():
            for entry in trainer.state.log_history:
                if "loss" in entry:
                    print(f"step {entry['step'] - 1}: loss {float(entry['loss']):.4f}")
            kinds = torch.tensor([row["ids"] for row in test])
            found = kinds[(image @ text.T).argmax(dim=1)] == kinds
            print(f"of {len(test)} new pictures, {int(found.sum())} find a text of their kind first")
            clip.save_pretrained(folder)  # the encoder, as it was handed in


if __name__ == "__main__":
    main()
