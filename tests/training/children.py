"""Processes that the tests start. They are forked from one that has imported open_clip, so each starts at once."""

import contextlib
import multiprocessing
import os
import signal

import torch

from gcl_kernels.training import train as training
from gcl_kernels.training.__main__ import main
from gcl_kernels.training.openclip import import_open_clip
from gcl_kernels.training.options import parse_args
from tests.conftest import expect_no_gloo_threads

import_open_clip()

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def rank(argv, log):
    """The training command as one of several processes, then a look at what outlives it; returns the status.

    What it prints is in `log`/rank0.txt and so on: standard output is that of whatever test was first to start a child.
    """
    torch.set_num_threads(1)
    with open(log / f"rank{os.environ['RANK']}.txt", "w") as out, contextlib.redirect_stdout(out):
        status = main(argv)
    expect_no_gloo_threads()
    return status


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
    training.create_model = with_dropout(training.create_model)
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
