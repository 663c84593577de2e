"""Gloo processes that stay: starting them costs seconds, a case in them milliseconds."""

import datetime
import multiprocessing
import pickle
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

WORLDS = (1, 2, 3, 4)
EXCHANGE_TIMEOUT, ANSWER_TIMEOUT = 30, 120  # seconds

# Ranks are forked from one process that has imported what they need: importing costs more than the tests do.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preloaded"])


class Pool:
    """`run(world, function, *arguments)`: [function(group, *arguments) of each rank of a group of that size]."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(WORLDS[-1]):
            mine, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(rank, str(Path(self.folder.name) / "rendezvous"), theirs), daemon=True
            )
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, world, function, *arguments):
        for pipe in self.pipes[:world]:
            pipe.send_bytes(pickle.dumps((world, function, arguments)))
        # all answers before the first failure is told, so that the next case finds the pool in step
        answers = [self.answer(rank) for rank in range(world)]
        for ok, answer in answers:
            if not ok:
                raise AssertionError(answer)
        return [answer for _, answer in answers]

    def answer(self, rank):
        if not self.pipes[rank].poll(ANSWER_TIMEOUT):
            for process in self.processes:
                process.kill()
            raise AssertionError(
                f"rank {rank} has not answered within {ANSWER_TIMEOUT} s; no case after this one can run"
            )
        return pickle.loads(self.pipes[rank].recv_bytes())

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send_bytes(pickle.dumps(None))
            process.join()
        assert all(process.exitcode == 0 for process in self.processes)
        self.folder.cleanup()


def _serve(rank, path, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=WORLDS[-1],
        timeout=datetime.timedelta(seconds=EXCHANGE_TIMEOUT),
    )
    groups = {world: dist.new_group(range(world)) for world in WORLDS}
    while (task := pickle.loads(pipe.recv_bytes())) is not None:
        world, function, arguments = task
        try:
            answer = True, function(groups[world], *arguments)
        except Exception:
            answer = False, f"rank {rank} of {world}:\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


def error_of(function):
    """What the call raises."""
    try:
        function()
    except Exception as error:
        return error
    return None
