"""sentence-transformers: `GCLLoss` in the place of MultipleNegativesRankingLoss, with a score for each pair.

    python examples/sentence_transformers_gcl.py                 # random weights, no download, half a minute on a CPU
    python examples/sentence_transformers_gcl.py --rows 32 --steps 10

It prints the first batch's loss without scores beside MultipleNegativesRankingLoss's, then the trainer's loss with scores, and
the products that a query finds first after training. A pair with a score of 0.9 weighs three times as much as one of 0.3. For
a model of your own write `SentenceTransformer("its name")` in the place of `small_model()`.
"""

import argparse
import itertools
import tempfile

import torch

# Before sentence_transformers: beside a CPU-only torch its import may fail on torchvision, which this one mends.
from gcl_kernels.integrations.sentence_transformers import GCLLoss  # isort: skip
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PrinterCallback

# What people ask for, and what sellers write: the model has to learn that they mean the same.
COLOURS = {"red": "crimson", "blue": "navy", "green": "olive", "black": "ebony", "white": "ivory", "brown": "chestnut"}
THINGS = {"shoe": "sneaker", "hat": "fedora", "coat": "parka", "bag": "satchel", "scarf": "shawl", "belt": "sash"}
KINDS = {"new": 0.9, "used": 0.6, "broken": 0.3}  # how much a buyer likes it: the score


def offers():
    """(query, product, score) of every colour, thing and kind."""
    for (colour, tint), (thing, model) in itertools.product(COLOURS.items(), THINGS.items()):
        for kind, score in KINDS.items():
            yield f"{colour} {thing}", f"{kind} {tint} {model}", score


def small_model():
    """One vector a word, and their mean: the smallest model that learns something."""
    words = ["[UNK]", *COLOURS, *COLOURS.values(), *THINGS, *THINGS.values(), *KINDS]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=64)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=54, help="pairs in a batch, at most 108 (default 54)")
    parser.add_argument("--steps", type=int, default=100, help="batches (default 100)")
    options = parser.parse_args()
    torch.manual_seed(0)

    columns = dict(zip(("anchor", "positive", "score"), map(list, zip(*offers(), strict=True)), strict=True))
    model = small_model()

    queries, products = (columns[name][: options.rows] for name in ("anchor", "positive"))
    features = [model.preprocess(texts) for texts in (queries, products)]
    with torch.no_grad():
        ours, theirs = (kind(model)(features, None).item() for kind in (GCLLoss, MultipleNegativesRankingLoss))
    print(f"first batch: GCLLoss without scores {ours:.6f}, MultipleNegativesRankingLoss {theirs:.6f}")

    # Offers of the same query are no negatives of one another: `hide_duplicates`.
    loss = GCLLoss(model, score_to_weight="linear", score_range=(0, 1), normalize="mean", hide_duplicates=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.rows, learning_rate=0.05,
            logging_steps=max(1, options.steps // 10), logging_first_step=True, save_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_drop_last=True, dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss
        )
        trainer.remove_callback(PrinterCallback)  # it prints dictionaries
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step'] - 1}: loss {entry['loss']:.4f}")

    texts = columns["positive"]
    similarity = model.similarity(model.encode(["red shoe"]), model.encode(texts))[0]
    print(f"red shoe finds: {', '.join(texts[k] for k in similarity.topk(3).indices.tolist())}")


if __name__ == "__main__":
    main()
