"""Processes that the tests start. They are forked from one that has imported open_clip, so each starts at once."""

import contextlib
import multiprocessing
import os
import signal
import time
from datetime import timedelta

import torch

from gcl_kernels.training import checkpoint, inputs, preparing, processes, validation
from gcl_kernels.training import run as training
from gcl_kernels.training.__main__ import main
from gcl_kernels.training.folder import RunFolder
from gcl_kernels.training.openclip import import_open_clip
from gcl_kernels.training.options import parse_args
from tests.conftest import expect_no_gloo_threads

import_open_clip()

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def rank(argv, log):
    """The training command as one of several processes, then a look at what outlives it; returns the status.

    What it prints is in `log`/rank0.txt and so on, and its errors in rank0.err: standard output is that of whatever test was
    first to start a child.
    """
    torch.set_num_threads(1)
    name = f"rank{os.environ['RANK']}"
    with (
        open(log / f"{name}.txt", "w") as out,
        open(log / f"{name}.err", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = main(argv)
    expect_no_gloo_threads()
    return status


def rank_with_slow_work(argv, log, timeout, seconds):
    """`rank`, in a group whose collectives end after `timeout` seconds, in which reading, evaluating and saving take the first
    process `seconds`."""
    processes.TIMEOUT = timedelta(seconds=timeout)

    def slow(function):
        def call(*args, **options):
            if os.environ["RANK"] == "0":
                time.sleep(seconds)
            return function(*args, **options)

        return call

    inputs.read_documents, validation.evaluate = slow(inputs.read_documents), slow(validation.evaluate)
    checkpoint.also, preparing.create_model = slow(checkpoint.also), slow(preparing.create_model)
    return rank(argv, log)


def rank_that_is_stopped(argv, log):
    """`rank`, of which one process alone gets a signal, within its second step."""
    if os.environ["RANK"] == "1":
        torch.optim.AdamW.step = signalling(torch.optim.AdamW.step, 2)
    return rank(argv, log)


def signalling(function, count):
    """`function`, in whose `count`-th call the process is asked to end."""
    calls = 0

    def call(*args, **options):
        nonlocal calls
        calls += 1
        if calls == count:
            signal.raise_signal(signal.SIGTERM)
        return function(*args, **options)

    return call


def hold(folder):
    """Hold the folder of the run `folder`/logs/run until killed."""
    run = RunFolder(str(folder / "logs"), "run")
    run.hold(resumed=False)
    (folder / "held").touch()
    time.sleep(600)


def with_dropout(create_model):
    """Models that draw random numbers as they train."""

    def create(*args, **options):
        model, *rest = create_model(*args, **options)
        encode = model.encode_text
        model.encode_text = lambda tokens: torch.nn.functional.dropout(encode(tokens), 0.2, model.training)
        return model, *rest

    return create


def run_killed(where, count, argv):
    """Trains with dropout in a child that kills itself at the `count`-th step or write; returns the child's exit status."""
    child = CONTEXT.Process(target=train_until_killed, args=(where, count, argv))
    child.start()
    child.join()
    return child.exitcode


def train_until_killed(where, count, argv):
    save = torch.save

    def half(content, path):
        save(content, path)
        os.truncate(path, os.path.getsize(path) // 2)

    if where == "step":
        torch.optim.AdamW.step = killing(torch.optim.AdamW.step, count, lambda *args: None)
    if where == "write":
        torch.save = killing(save, count, half)
    torch.set_num_threads(1)
    preparing.create_model = with_dropout(preparing.create_model)
    training.train(parse_args(argv))


def killing(function, count, before):
    """`function`, in whose `count`-th call the process does `before` and is killed."""
    calls = 0

    def call(*args, **options):
        nonlocal calls
        calls += 1
        if calls == count:
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return call
