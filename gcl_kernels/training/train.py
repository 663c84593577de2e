"""Train an open_clip model on scored pairs: one script, top to bottom.

    python -m gcl_kernels.training --train-data pairs.csv --left-keys "['query']" --right-keys "['title','image']" \\
        --weight-key score
    torchrun --nproc-per-node 8 -m gcl_kernels.training ...

The options are those of `gcl_kernels.training.options`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import gcl_kernels
from gcl_kernels import grad_cache
from gcl_kernels.training import checkpoint as checkpoints
from gcl_kernels.training import processes
from gcl_kernels.training.data import Columns, PairFile, Pairs, read_documents, shown
from gcl_kernels.training.encode import FieldEncoder, Inputs, TwoTower
from gcl_kernels.training.errors import DataError, EmptyError, InputError
from gcl_kernels.training.files import write_json_atomically
from gcl_kernels.training.memory import peak_memory, reset_peak_memory
from gcl_kernels.training.openclip import create_model, hold_frozen
from gcl_kernels.training.options import weighting
from gcl_kernels.training.ranking import (
    Corpus,
    Evaluation,
    corpus_of,
    embed_corpus,
    evaluate,
    known_documents,
    minmax,
    random_ranking,
    say_contradictions,
)
from gcl_kernels.training.sampler import Sampler
from gcl_kernels.training.tracking import Tracker

TABLE_METRICS = ("NDCG@10", "ERR", "RBP.9")

PLACES = {
    "logs", "name", "resume", "config", "report_to", "log_every_n_steps", "keep_last", "save_frequency", "save_steps",
    "val_frequency", "val_steps", "workers",
}  # fmt: skip
"""Options that a resumed run may change without becoming another run."""


@dataclass
class Run:
    """What a training run leaves: one evaluation and one random ranking per `--val-data` file, and what it cost."""

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    random: dict[str, Evaluation] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Batch:
    """The inputs of one step, on the CPU; `epoch` and `number` say where the sampler was after drawing it."""

    rows: Tensor
    left: Inputs
    left_mask: Tensor
    right: Inputs
    right_mask: Tensor
    epoch: int
    number: int
    ends_epoch: bool


def train(args: argparse.Namespace) -> Run:
    """Read, train, save, evaluate. `args` are those of `parse_args`.

    Writes `LOGS/NAME/checkpoints/epoch_N.pt`, which `open_clip.create_model(MODEL, pretrained=FILE)` loads, and
    `LOGS/NAME/results.json`. Under torchrun every process calls it and all return the same losses; the first writes, and
    evaluates.

    Raises:
        InputError: files or options that cannot be used; a checkpoint that cannot be resumed; a loss that is not finite.
    """
    with processes.start() as group:
        return train_in(group, args)


def train_in(group: processes.Processes, args: argparse.Namespace) -> Run:
    """`train`, as one of several processes."""
    device, folder = group.device, Path(args.logs) / args.name
    started = time.perf_counter()
    reset_peak_memory(device)

    # ---- data
    columns = columns_of(args)
    left_kinds, right_kinds = columns.left, columns.right
    left_weights = dict(zip(args.left_keys, args.left_weights, strict=True))
    right_weights = dict(zip(args.right_keys, args.right_weights, strict=True))

    def read(path: str, *, ids_alone: bool = False) -> PairFile:
        pairs = pair_file(args, path, check_images=args.check_images, ids_alone=ids_alone)
        if group.first:
            queries, documents = (len(ids.unique()) for ids in (pairs.query_numbers, pairs.document_numbers))
            print(f"{path}: {len(pairs)} pairs, {queries} queries, {documents} documents")
            if pairs.bad_count:
                print(
                    f"{path}: {pairs.bad_count} bad rows skipped:", *shown(pairs.bad_rows, pairs.bad_count), sep="\n  "
                )
        return pairs

    pairs = read(args.train_data)
    tests: dict[str, Pairs] = {}
    corpora: dict[str, dict[str, dict[str, str]]] = {}
    metas = dict(zip(args.val_data, args.doc_meta, strict=False))
    for path in args.val_data if group.first else ():
        try:
            tests[path] = read(path, ids_alone=path in metas and args.doc_id_key is not None).take()
        except EmptyError as error:
            print(f"{error}; passed over")
            continue
        meta = metas.get(path, path)
        if meta not in corpora:
            corpora[meta] = (
                read_documents(meta, right_kinds, check_images=args.check_images)
                if path in metas
                else corpus_of(tests[path])
            )
        known_documents(path, tests[path], corpora[meta])
        say_contradictions(path, tests[path])

    scores, ids, sampler = training_rows(args, pairs, group.world)
    steps = args.epochs * sampler.batches_per_epoch if args.steps is None else args.steps
    warmup = min(args.warmup, steps // 10)
    micro_batch = args.mini_batch_size or (args.batch_size if args.accum_freq > 1 else None)

    # ---- model
    torch.manual_seed(args.seed)
    model, tokenizer, preprocess = create_model(
        args.model, pretrained=args.pretrained, context_length=args.context_length, device=device
    )
    encoder = FieldEncoder(model, tokenizer, preprocess, workers=args.workers)
    if args.logit_scale:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(args.logit_scale))
    locked = {kind for kind, lock in (("img", args.lock_image), ("txt", args.lock_text)) if lock}
    freeze_all_but(model, {*left_kinds.values(), *right_kinds.values()} - locked)
    hold_frozen(model)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.torchcompile:
        # The number of distinct values changes from batch to batch.
        model.encode_text, model.encode_image = (
            torch.compile(tower, dynamic=True) for tower in (model.encode_text, model.encode_image)
        )
    towers: Any = TwoTower(model)
    if group.group is not None:
        towers = DistributedDataParallel(towers, device_ids=[device] if device.type == "cuda" else None)
    encode = grad_cache.cached(towers, micro_batch) if micro_batch else towers

    # ---- loss
    loss_options: dict[str, Any] = {
        "score_to_weight": args.score_to_weight,
        **weighting(args),
        "process_group": group.group,
    }
    loss_of_sides = gcl_kernels.GCLLoss(**loss_options, lhs_field_weights=left_weights, rhs_field_weights=right_weights)
    # Equal field weights, the default, make it the mean over all (left, right) pairs of fields.
    loss_of_field_pairs = gcl_kernels.GCLLoss(**loss_options, field_mode="pairwise")

    # ---- optimiser
    # As in open_clip, gains and biases do not decay.
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0},
            {"params": [weight for weight in trained if weight.ndim >= 2], "weight_decay": args.wd},
        ],
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        eps=args.eps,
    )
    precision = args.precision or ("amp_bf16" if device.type == "cuda" else "fp32")
    dtype = torch.float16 if precision == "amp" else torch.bfloat16
    autocast = torch.autocast(device.type, dtype, enabled=precision != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "amp")  # pyright: ignore[reportPrivateImportUsage]

    # ---- from a checkpoint
    run, first_step, best, history = Run(), 0, -math.inf, []
    found = checkpoints.resume(args.resume, folder / "checkpoints") if args.resume else None
    if found:
        path, content = found
        ours = content[checkpoints.OURS]
        warn_of_changes(path, ours, args, len(pairs), group)
        try:
            model.load_state_dict(content["state_dict"])
            optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: expected a checkpoint of {args.model}, got other weights: {reason}") from None
        if scaler.is_enabled() and "scaler" in content:
            scaler.load_state_dict(content["scaler"])
        sampler.seek(ours["epoch"], ours["batch"])
        first_step, best, history = ours["step"], ours["best"], ours["history"]
        run.losses = ours["losses"].tolist()
        set_random_state(ours["random"][group.rank % len(ours["random"])], device)
        if group.first:
            print(f"resumed from {path} at step {first_step} of {steps}")
    elif args.resume and group.first:
        print(f"--resume {args.resume}: no checkpoint in {folder / 'checkpoints'} yet, a new run")

    # ---- batches, made in a thread of their own, one ahead of the step
    def batch_of(rows: Tensor) -> Batch:
        place = sampler.epoch, sampler.batch, sampler.epoch_ended
        while True:
            cells = pairs.take(rows.tolist())
            left, left_mask = encoder.prepare(cells.left, left_kinds, distinct=not micro_batch)
            right, right_mask = encoder.prepare(cells.right, right_kinds, distinct=not micro_batch)
            whole = left_mask.any(dim=1) & right_mask.any(dim=1)
            if whole.all():
                return Batch(rows, left, left_mask, right, right_mask, *place)
            if not whole.any():
                raise DataError(f"{args.train_data}: expected a readable value in some row of a batch, got none")
            # An image was lost, and a row has nothing left. Another row takes its place; ids hide the copies from each other.
            rows = torch.where(whole, rows, rows[whole][0])

    def batches() -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as thread:
            draw = lambda: batch_of(next(sampler)[group.rank :: group.world])  # noqa: E731
            coming = thread.submit(draw)
            for step in range(first_step, steps):
                batch = coming.result()
                if step + 1 < steps:
                    coming = thread.submit(draw)
                yield batch

    # ---- one step
    def loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
        left, right = encoder.to_device(batch.left), encoder.to_device(batch.right)
        with autocast:
            lhs, rhs, scale = encode(left, right)
            batch_ids = None if args.false_negatives == "keep" else ids[batch.rows].to(device)
            inputs = lhs, rhs, scores[batch.rows].to(device), scale
            visible = {
                "lhs_ids": batch_ids,
                "rhs_ids": batch_ids,
                "lhs_field_mask": batch.left_mask.to(device),
                "rhs_field_mask": batch.right_mask.to(device),
            }
            loss = loss_of_sides(*inputs, **visible)
            if args.cross_field_loss:
                loss = loss + loss_of_field_pairs(*inputs, **visible)
        return loss, scale

    def update(step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate(step, steps, warmup, args.lr, args.lr_scheduler)
        loss, scale = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if args.grad_clip_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, args.grad_clip_norm)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(args.logit_scale_max))
        return loss.detach(), scale.detach()

    def evaluate_now(step: int) -> None:
        embedded: dict[str, Corpus] = {}
        for path in tqdm(
            tests, desc=f"{args.name}: evaluation", unit="file", disable=None if tests else True, leave=False
        ):
            # Test sets often share a corpus; it is embedded once.
            meta = metas.get(path, path)
            if meta not in embedded:
                embedded[meta] = embed_corpus(
                    encoder, corpora[meta], (right_kinds, right_weights), batch_size=EMBED_ROWS
                )
            run.evaluations[path] = evaluate(
                encoder,
                tests[path],
                embedded[meta],
                (left_kinds, left_weights),
                top_k=args.top_k,
                batch_size=EMBED_ROWS,
            )
            # A run that ends between its last checkpoint and its results evaluates that checkpoint again.
            history[:] = [line for line in history if (line["step"], line["test"]) != (step, path)]
            history.append({"step": step, "test": path, **run.evaluations[path].means})
            tracker.log(
                step, {f"{Path(path).stem}/{name}": value for name, value in run.evaluations[path].means.items()}
            )

    def save(step: int, batch: Batch, path: Path) -> None:
        states = group.gather(random_state(device))
        if not group.first:
            return
        content = {"epoch": batch.epoch + batch.ends_epoch, "name": args.name, "state_dict": model.state_dict(),
                   "optimizer": optimizer.state_dict()}  # fmt: skip
        if scaler.is_enabled():
            content["scaler"] = scaler.state_dict()
        content[checkpoints.OURS] = {
            "step": step, "epoch": batch.epoch, "batch": batch.number, "random": states, "best": best, "history": history,
            "losses": torch.tensor(run.losses, dtype=torch.float64), "options": vars(args), "rows": len(pairs),
        }  # fmt: skip
        checkpoints.save(path, content)
        checkpoints.keep_last(path.parent, args.keep_last)

    if args.dry_run:
        return dry_run(args, group, batches(), update, model, steps, sampler, started)

    # ---- training
    tracker = Tracker(args.report_to if group.first else "", folder, vars(args), first_step)
    model.train()
    pending: list[Tensor] = []
    progress = tqdm(
        batches(), desc=f"{args.name}: {args.score_to_weight}", unit="step", mininterval=1.0, initial=first_step,
        total=steps, disable=None if group.first else True,
    )  # fmt: skip
    for step, batch in enumerate(progress, first_step + 1):
        loss, scale = update(step - 1, batch)
        pending.append(loss)

        last, epochs_done = step == steps, batch.epoch + batch.ends_epoch
        save_now = last or due(step, args.save_steps) or (batch.ends_epoch and due(epochs_done, args.save_frequency))
        test_now = last or due(step, args.val_steps) or (batch.ends_epoch and due(epochs_done, args.val_frequency))
        if save_now or test_now or step % args.log_every_n_steps == 0:
            # Reading the losses waits for the device, so it is done for many steps at a time.
            new = torch.stack(pending).double()
            pending = []
            if group.group is not None:
                torch.distributed.all_reduce(new)
                new /= group.world
            if not new.isfinite().all():
                bad = len(run.losses) + int((~new.isfinite()).nonzero()[0]) + 1
                raise InputError(f"step {bad}: expected a finite loss, got {new[bad - len(run.losses) - 1].item()}; a smaller "
                                 f"--lr or --grad-clip-norm may help, and --resume goes on from the last checkpoint")  # fmt: skip
            run.losses += new.tolist()
            progress.set_postfix(loss=f"{run.losses[-1]:.3f}", scale=f"{scale.item():.1f}", refresh=False)
            lr = optimizer.param_groups[0]["lr"]
            tracker.log(step, {"loss": run.losses[-1], "logit_scale": scale.item(), "lr": lr})
        is_best = False
        if test_now and group.first:
            evaluate_now(step)
            if args.best_metric and run.evaluations:
                value = sum(evaluation.means[args.best_metric] for evaluation in run.evaluations.values()) / len(tests)
                is_best, best = value > best, max(best, value)
        # An evaluation that found the best model so far saves it; all ranks have to agree, as they save together.
        is_best = any(group.gather(is_best)) if args.best_metric and test_now else False
        if save_now or is_best:
            named = f"epoch_{max(epochs_done, 1)}.pt" if batch.ends_epoch or last else f"step_{step}.pt"
            path = run.checkpoint = folder / "checkpoints" / named
            save(step, batch, path)
            if is_best and group.first:
                checkpoints.also(path, checkpoints.BEST)
    if first_step >= steps:
        run.checkpoint = found[0] if found else None
        if group.first:
            evaluate_now(first_step)

    # ---- results
    tracker.close()
    run.seconds, run.peak_bytes = time.perf_counter() - started, peak_memory(device)
    if not group.first:
        return run
    if encoder.lost:
        print(f"{len(encoder.lost)} images could not be read and were missing values")
    for path, evaluation in run.evaluations.items():
        run.random[path] = random_ranking(tests[path], evaluation.document_ids, top_k=args.top_k)
    results = {
        "options": {key: value for key, value in vars(args).items() if value != -math.inf},
        "loss": run.losses,
        "logit_scale": model.logit_scale.exp().item(),
        "seconds": run.seconds,
        "peak_bytes": run.peak_bytes,
        "lost_images": encoder.lost,
        "history": history,
        "metrics": {path: evaluation.means for path, evaluation in run.evaluations.items()},
        "random": {path: evaluation.means for path, evaluation in run.random.items()},
        "per_query": {path: evaluation.rows() for path, evaluation in run.evaluations.items()},
    }
    write_json_atomically(folder / "results.json", results, indent=1)
    return run


def columns_of(args: argparse.Namespace) -> Columns:
    """What the columns of the run's files mean."""
    left, right = (
        dict(zip(keys, kinds, strict=True))
        for keys, kinds in zip((args.left_keys, args.right_keys), args.img_or_txt, strict=True)
    )
    return Columns(left, right, args.weight_key, args.query_id_key, args.doc_id_key)


def pair_file(args: argparse.Namespace, path: str, *, check_images: str, ids_alone: bool = False) -> PairFile:
    """One of the run's files; of its documents the ids alone where a corpus has their fields, as in `evaluate`."""
    columns = columns_of(args)
    if ids_alone:
        columns = replace(columns, right={args.doc_id_key: "txt"})
    return PairFile(
        path, columns, separator=args.csv_separator, dataset_type=args.dataset_type, check_images=check_images,
        skip_bad_rows=args.skip_bad_rows,
    )  # fmt: skip


def training_rows(args: argparse.Namespace, pairs: PairFile, world: int = 1) -> tuple[Tensor, Tensor, Sampler]:
    """The scores (N,), float32, and the ids (N, 2) of all rows, and the sampler of those that are trained on.

    Raises:
        DataError: scores out of range, none at `--min-score` or above, fewer rows than processes.
    """
    low, high = pairs.scores.min().item(), pairs.scores.max().item()
    if args.score_scaling == "none" and not 1 <= low <= high <= args.s_max:
        raise DataError(
            f"{args.train_data}: expected scores in [1, {args.s_max:g}] with --score-scaling none, got {low:g} to {high:g}"
        )
    scores = (minmax(pairs.scores) if args.score_scaling == "minmax" else pairs.scores).float()
    used = (pairs.scores >= args.min_score).nonzero().flatten()
    if len(used) == 0:
        raise DataError(f"{args.train_data}: expected a score >= --min-score {args.min_score:g}, got {high:g} at most")
    # A row's query and document are positives of each other in its own row alone; where they come again, with the same
    # query or the same document, other rows are no negatives.
    ids = torch.stack([pairs.query_numbers, pairs.document_numbers], dim=1)
    batch_size = min(args.batch_size * args.accum_freq * world, len(used))
    if batch_size < world:
        raise DataError(f"{args.train_data}: expected a row for each of {world} processes, got {batch_size} in all")
    distinct = ids[used] if args.false_negatives == "avoid" else None
    return scores, ids, Sampler(used, batch_size, seed=args.seed, least=world, ids=distinct)


EMBED_ROWS = 512
"""Rows embedded at a time in evaluation."""


def due(count: int, every: int) -> bool:
    """Whether it is time for what happens every so often, 0 being never."""
    return every > 0 and count % every == 0


def freeze_all_but(model: Any, kinds: set[str]) -> None:
    """Freeze the towers of other kinds, whole: open_clip's own lock leaves the projection of a Hugging Face tower.

    A tower without a field, or the bias of another loss, gets no gradient; processes would wait for it.
    """
    for name, weight in model.named_parameters():
        tower = "img" if name.startswith("visual.") else "txt"
        if name == "logit_bias" or (name != "logit_scale" and tower not in kinds):
            weight.requires_grad_(False)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """What dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def warn_of_changes(
    path: Path, ours: dict[str, Any], args: argparse.Namespace, rows: int, group: processes.Processes
) -> None:
    """Say what makes the rest of a resumed run another one than was begun."""
    now = vars(args)
    changed = [
        f"--{key.replace('_', '-')} {value} -> {now[key]}"
        for key, value in ours["options"].items()
        if key not in PLACES and key in now and now[key] != value
    ]
    if ours["rows"] != rows:
        changed.append(f"rows of --train-data {ours['rows']} -> {rows}")
    if len(ours["random"]) != group.world:
        changed.append(f"processes {len(ours['random'])} -> {group.world}")
    if changed and group.first:
        print(f"{path}: the run goes on, but differs from the one that was begun: {', '.join(changed)}")


def dry_run(
    args: argparse.Namespace, group: processes.Processes, batches: Iterator[Batch], update: Any, model: Any, steps: int,
    sampler: Sampler, started: float,
) -> Run:  # fmt: skip
    """Two steps, the second timed, and the plan."""
    run = Run()
    reading, seconds = time.perf_counter() - started, 0.0
    model.train()
    for step, batch in enumerate(batches):
        before = time.perf_counter()
        run.losses.append(update(step, batch)[0].item())
        seconds = time.perf_counter() - before
        if step == 1:
            break
    run.seconds, run.peak_bytes = time.perf_counter() - started, peak_memory(group.device)
    if group.first:
        weights = sum(weight.numel() for weight in model.parameters())
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        print(
            f"plan: {steps} steps of {sampler.batch_size} rows on {group.world} process(es), {len(sampler.rows)} rows an epoch\n"
            f"model: {args.model}, {weights / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained; a checkpoint is about "
            f"{(weights + 2 * trained) * 4 / 2**20:.0f} MiB\n"
            f"memory: {run.peak_bytes / 2**20:.0f} MiB at the peak of a step on {group.device}\n"
            f"time: {reading:.0f} s of reading and building, {seconds:.2f} s a step, about {steps * seconds / 60:.0f} min of "
            f"training; evaluation comes on top\n"
            f"loss of the first step: {run.losses[0]:.3f}"
        )
    return run


def learning_rate(step: int, steps: int, warmup: int, peak: float, scheduler: str = "cosine") -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0, or `peak` throughout (`"const"`); open_clip's schedules."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if scheduler == "const":
        return peak
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def metrics_table(rows: Sequence[tuple[str, str, Evaluation]]) -> str:
    """A table of (test set, run, evaluation) with `TABLE_METRICS`, means over the queries."""
    sets, runs = max(len(test) for test, _, _ in rows), max(len(run) for _, run, _ in rows)
    head = f"{'test set':<{sets}}  {'run':<{runs}}  {'queries':>7}  " + "  ".join(
        f"{name:>7}" for name in TABLE_METRICS
    )
    lines = [head, "-" * len(head)]
    for test, run, evaluation in rows:
        values = "  ".join(f"{evaluation.means[name]:7.3f}" for name in TABLE_METRICS)
        lines.append(f"{test:<{sets}}  {run:<{runs}}  {len(evaluation.query_ids):>7}  {values}")
    return "\n".join(lines)
