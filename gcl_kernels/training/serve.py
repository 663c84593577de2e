"""`python -m gcl_kernels.training.serve`: a page on which one searches a corpus with one trained model, or two side by side.

    python -m gcl_kernels.training.serve --model logs/CLIP/checkpoints/best.pt --model logs/GCL/checkpoints/best.pt \\
        --corpus corpus.json

The page and its JSON API are served on this machine alone, unless --host says otherwise. pip install "gcl_kernels[serve]"
"""

from __future__ import annotations

import argparse
import importlib.util
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gcl_kernels.training import command
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.ground_truth import read_grades
from gcl_kernels.training.options import Parser, parse_list
from gcl_kernels.training.search import add_corpus_options, add_field_options, opened

if TYPE_CHECKING:
    from gcl_kernels.training.serving.state import State

LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")

MOST_CONNECTIONS = 2000
"""Beyond, a request is answered 503."""


def parser() -> Parser:
    made = Parser("gcl_kernels.training.serve", description="A page to search a corpus on, with one model or two")
    made.add_argument("--model", "--pretrained", dest="models", action="append", required=True, metavar="[NAME=]CHECKPOINT",
                      help="a checkpoint file; given twice, the two are compared. NAME is what the page calls it")  # fmt: skip
    made.add_argument("--judged", type=Path, metavar="FILE",
                      help="JSON {query: {document: grade}}, as gcl-evaluate writes it; the page shows the grades")  # fmt: skip
    made.add_argument("--show", type=parse_list, default=[], metavar="COLUMNS",
                      help="columns that are shown beside the title and that one can filter by")  # fmt: skip
    made.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine alone)"
    )
    made.add_argument("--port", type=int, default=8000, help="default 8000; 0: any that is free")
    add_corpus_options(made)
    model = made.add_argument_group("models; what is left out is as the checkpoints were trained, if they say so")
    model.add_argument("--model-name", dest="model", help="open_clip's name of the architecture")
    add_field_options(model)
    return made


def name_of(checkpoint: str) -> str:
    """What a checkpoint is called: the name of its run, else that of the file."""
    path = Path(checkpoint).absolute()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem


def state_of(args: argparse.Namespace) -> State:
    """Open the corpus with each model.

    Raises:
        InputError: more than two models, and as the models and the corpus.
    """
    from gcl_kernels.training.serving.state import KEYS, Opened, State

    if len(args.models) > len(KEYS):
        raise InputError(f"--model: expected at most {len(KEYS)}, got {len(args.models)}")
    judged = read_grades(args.judged) if args.judged else {}
    models = []
    for key, text in zip(KEYS, args.models, strict=False):
        name, _, checkpoint = ("", "", text) if Path(text).exists() else text.rpartition("=")
        folder = args.folder / key if args.folder and len(args.models) > 1 else args.folder
        of_one = argparse.Namespace(**{**vars(args), "pretrained": checkpoint, "folder": folder, "top_k": 10})
        searcher, _ = opened(of_one, args.show, lambda line: print(line, flush=True))
        if pictures := [column for column in args.show if searcher.model.right[0].get(column) == "img"]:
            raise InputError(f"--show: expected columns of text, got pictures {pictures}")
        models.append(Opened(name.strip() or name_of(checkpoint), searcher))
    return State(Path(args.corpus).name, models, args.show, judged)


def serve(args: argparse.Namespace) -> None:
    """Open everything, and answer until interrupted."""
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"expected the package {package}, got none: pip install fastapi uvicorn")
    import uvicorn

    from gcl_kernels.training.serving.app import create_app

    # Before minutes of embedding: a port in use is said at once.
    with bound(args.host, args.port) as listening:
        state = state_of(args)
        local = args.host in LOOPBACK
        app = create_app(state, hosts=LOOPBACK if local else ("*",))
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{listening.getsockname()[1]}/ is the page, /docs its API; Ctrl-C ends it", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, limit_concurrency=MOST_CONNECTIONS,
            proxy_headers=False, timeout_graceful_shutdown=5,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: an address or a port that cannot be had.
    """
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port: expected 0 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: expected an address that can be listened at, got "
                         f"{error.strerror}") from None  # fmt: skip
    # Connections inherit it. Without it the body of an answer waits 40 ms for the receipt of its head.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def main(argv: Sequence[str] | None = None) -> int:
    """Serve as the command line says; input that cannot be used gives its message and status 2."""
    args = parser().parse_args(argv)
    return command.run(lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
