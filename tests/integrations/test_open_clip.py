"""open_clip's losses replaced: where they are looked up, and in its own trainer."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import gcl_kernels
import gcl_kernels.integrations.open_clip as integration
from gcl_kernels.integrations import importing
from gcl_kernels.integrations.open_clip import __main__ as command
from gcl_kernels.training.openclip import TINY_MODEL, import_open_clip
from tests.counting import LargestTensor

open_clip = import_open_clip()
OURS = {
    "ClipLoss": gcl_kernels.ClipLoss,
    "SigLipLoss": gcl_kernels.SigLipLoss,
    "CoCaLoss": integration.CoCaLoss,
    "DistillClipLoss": integration.DistillClipLoss,
}
THEIRS = {name: getattr(open_clip.loss, name) for name in OURS}


@pytest.fixture(autouse=True)
def afterwards_undone():
    yield
    integration.undo()


def loss_of_factory(**given):
    names = ("distill", "siglip", "horovod", "local_loss", "gather_with_grad")
    arguments = dict.fromkeys(names, False) | {"model": "ViT", "rank": 0, "world_size": 1, "loss_dist_impl": None}
    arguments |= {"coca_caption_loss_weight": 1.0, "coca_contrastive_loss_weight": 1.0}
    return open_clip.create_loss(type("Arguments", (), arguments | given))


FACTORY = {
    "ClipLoss": {}, "SigLipLoss": {"siglip": True}, "CoCaLoss": {"model": "coca_ViT"}, "DistillClipLoss": {"distill": True}
}  # fmt: skip


def test_the_factory_makes_what_was_asked_for_and_undo_brings_open_clips_back():
    for name, arguments in FACTORY.items():
        chosen = {short: name == long for short, long in zip(("clip", "siglip", "coca", "distill"), OURS, strict=True)}
        replaced = integration.apply(**chosen)
        assert f"open_clip.factory.{name}" in replaced
        assert all(place.endswith(f".{name}") for place in replaced)
        for other, of_other in FACTORY.items():
            assert type(loss_of_factory(**of_other)) is (OURS if other == name else THEIRS)[other], (name, other)
        assert sorted(integration.undo()) == sorted(replaced)
        assert type(loss_of_factory(**arguments)) is THEIRS[name]


def test_a_second_call_changes_nothing_more():
    assert integration.apply()
    assert integration.apply() == []
    integration.undo()
    assert integration.undo() == []
    assert {name: getattr(open_clip.loss, name) for name in OURS} == THEIRS


def test_the_environment_turns_it_off(monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_OPEN_CLIP", "0")
    assert integration.apply() == []
    assert open_clip.factory.ClipLoss is THEIRS["ClipLoss"]


def test_a_loss_with_arguments_that_nobody_knows_is_refused_and_nothing_is_replaced(monkeypatch):
    class CoCaLoss(THEIRS["CoCaLoss"]):
        def forward(self, image_features, text_features, logits, labels, logit_scale, output_dict=False, mask=None):
            raise NotImplementedError

    monkeypatch.setattr(open_clip.factory, "CoCaLoss", CoCaLoss)
    with pytest.raises(
        RuntimeError, match=r"open_clip [\d.]+: expected CoCaLoss.forward .*, got one with \['mask'\] more"
    ):
        integration.apply()
    assert open_clip.factory.ClipLoss is THEIRS["ClipLoss"]


def test_without_open_clip_the_error_says_what_to_install():
    program = (
        "import sys; sys.modules['open_clip'] = None\n"
        "import gcl_kernels.integrations.open_clip as integration\n"
        "try: integration.apply()\n"
        "except ImportError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert (
        said.strip() == "open_clip: expected the package open_clip_torch >= 3.0, got none: pip install open_clip_torch"
    )


@pytest.mark.parametrize("name", OURS)
def test_arguments_are_open_clips_in_their_order(name):
    for method in ("__init__", "forward"):
        theirs, ours = (list(inspect.signature(getattr(k, method)).parameters) for k in (THEIRS[name], OURS[name]))
        assert ours[: len(theirs)] == theirs


def problem(dtype, n=9):
    g = torch.Generator().manual_seed(1)
    features = [torch.randn(n, 6, generator=g, dtype=dtype, requires_grad=True) for _ in range(2)]
    return features, [torch.randn(n, 5, generator=g, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("output_dict", [False, True])
def test_distillation_is_open_clips(output_dict):
    results = []
    for kind in (THEIRS["DistillClipLoss"], OURS["DistillClipLoss"]):
        features, teacher = problem(torch.float64)
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        losses = kind()(*features, scale, *teacher, torch.tensor(1.7), output_dict=output_dict)
        a, b = losses.values() if output_dict else losses
        results.append([a, b, *torch.autograd.grad(a + 2 * b, (*features, scale))])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation_of_rounded_features_is_theirs_in_float64(dtype):
    """open_clip's own, in the same dtype, is off by more."""
    features, teacher = problem(dtype)
    loss = OURS["DistillClipLoss"]()(*features, 3.0, *teacher, 1.7)
    assert [x.dtype for x in loss] == [torch.float32] * 2
    exact = THEIRS["DistillClipLoss"]()(*(x.double() for x in features), 3.0, *(x.double() for x in teacher), 1.7)
    for ours, theirs in zip(loss, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_distillation_stores_no_matrix_of_all_pairs():
    features = [torch.randn(1500, 16, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(1500, 8) for _ in range(2)]
    with LargestTensor() as largest:
        sum(OURS["DistillClipLoss"]()(*features, 3.0, *teacher, 1.0)).backward()
    assert largest.numel < 1500 * 1500


def test_captions_are_open_clips():
    results = []
    for kind in (THEIRS["CoCaLoss"], OURS["CoCaLoss"]):
        for weight in (0.5, 0):
            features, _ = problem(torch.float64)
            g = torch.Generator().manual_seed(2)
            logits = torch.randn(9, 4, 7, generator=g, dtype=torch.float64, requires_grad=True)
            loss = kind(2.0, weight)(*features, logits, torch.randint(0, 7, (9, 4), generator=g), 3.0)
            results.append([*loss, *torch.autograd.grad(sum(loss), (logits,))])
    for theirs, ours in zip(results[:2], results[2:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, check_dtype=False)


def test_nothing_is_declared_beside_a_torchvision_that_loads(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setattr(importing, "_declared", [])
    importing.import_torchvision()
    assert importing._declared == []


def test_another_fault_of_torchvision_is_not_hidden(monkeypatch):
    def broken(name, *args, **kwargs):
        raise RuntimeError("another fault")

    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError):
        importing.import_torchvision()
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setattr("builtins.__import__", broken)
    with pytest.raises(RuntimeError, match="another fault"):
        importing.import_torchvision()


def picture_files(folder, n):
    """A CSV file as open_clip_train reads it, of pictures of noise and captions that differ."""
    from PIL import Image

    random = np.random.default_rng(0)
    lines = ["filepath\ttitle"]
    for i in range(n):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{folder / f'{i}.png'}\tnumber {i} of colour {i * 7 % 11}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


# Trains once a case with open_clip's losses and once with ours, and prints what open_clip_train logs of each.
PROGRAM = """
import json, logging, os, sys
import torch
from torch.nn import parallel
import gcl_kernels.integrations.open_clip as integration
from gcl_kernels.integrations.open_clip import __main__ as command
from gcl_kernels.training.openclip import import_open_clip

folder, cases = sys.argv[1], json.loads(sys.argv[2])
import_open_clip().add_model_config(folder + "/coca_tiny.json")
original = parallel.DistributedDataParallel
parallel.DistributedDataParallel = lambda model, device_ids=None, **kw: original(model, **kw)  # takes no ids on a CPU
start = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda *a, **kw: torch.distributed.is_initialized() or start(*a, **kw)
losses = []
factory = logging.getLogRecordFactory()

def remembered(*arguments, **kw):
    record = factory(*arguments, **kw)
    losses.append(record.getMessage())
    return record

logging.setLogRecordFactory(remembered)

for number, options in enumerate(cases):
    for ours in (True, False):
        os.environ["GCL_KERNELS_OPEN_CLIP"] = str(int(ours))
        losses.clear()
        command.main([
            "--dataset-type=csv", f"--train-data={folder}/pairs.csv", "--batch-size=8", "--epochs=1", "--workers=0",
            "--lr=1e-3", "--warmup=1", "--precision=fp32", "--device=cpu", "--log-every-n-steps=1", f"--logs={folder}",
            f"--name={number}-{ours}", *options,
        ])
        integration.undo()
        if os.environ.get("RANK", "0") == "0":
            print("RESULT", json.dumps([number, ours, losses]))
"""


def trained(folder, cases, world=1):
    """For each case [(name, value) of every loss that open_clip_train logs] with our losses and with its own."""
    for package in ("pandas", "webdataset", "braceexpand"):
        pytest.importorskip(package, reason=f"open_clip_train needs the package {package}")
    picture_files(folder, 48)
    (folder / "coca_tiny.json").write_text(json.dumps(COCA))
    torch.manual_seed(0)
    torch.save(open_clip.create_model(TINY_MODEL).state_dict(), folder / "teacher.pt")
    open_clip.add_model_config(folder / "coca_tiny.json")
    captioner = open_clip.create_model("coca_tiny")
    torch.nn.init.normal_(captioner.text_decoder.text_projection, std=0.1)  # open_clip leaves it uninitialised
    torch.save(captioner.state_dict(), folder / "coca.pt")
    (folder / "program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    run = subprocess.run(
        [sys.executable, *launcher, str(folder / "program.py"), str(folder), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line.split(" ", 1)[1]) for line in run.stdout.splitlines() if line.startswith("RESULT")]
    losses = [[found for line in said for found in re.findall(r"(\w+): ([\d.]+) \(", line)] for _, _, said in lines]
    assert "replaced open_clip.ClipLoss" in run.stderr
    assert len(losses) == 2 * len(cases)
    assert all(losses)
    return list(zip(losses[::2], losses[1::2], strict=True))


def assert_alike(ours, theirs, tolerance):
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        assert name in ("Data", "Batch") or float(a) == pytest.approx(float(b), rel=tolerance), name


TEXT = {"context_length": 15, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
COCA = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8,
        "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True,
    },
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
    "custom_text": True,
}  # fmt: skip
TINY = f"--model={TINY_MODEL}"
LOGGED = 1e-4  # five digits are


def test_open_clip_train_has_the_same_losses(tmp_path):
    distillation = [f"--distill-model={TINY_MODEL}", f"--distill-pretrained={tmp_path / 'teacher.pt'}"]
    captions = ["--model=coca_tiny", f"--pretrained={tmp_path / 'coca.pt'}"]
    cases = [[TINY], [TINY, "--accum-freq=2"], [TINY, "--siglip"], [TINY, *distillation], captions]
    *of_float32, (ours, theirs) = trained(tmp_path, [*cases, [TINY, "--precision=amp_bf16"]])
    names = [{name for name, _ in losses if name not in ("Data", "Batch")} for losses, _ in of_float32]
    both = [{"Contrastive_loss", "Distill_loss", "Loss"}, {"Contrastive_loss", "Caption_loss", "Loss"}]
    assert names == [{"Contrastive_loss", "Loss"}] * 3 + both
    for pair in of_float32:
        assert_alike(*pair, LOGGED)
    assert_alike(ours, theirs, 5e-3)  # open_clip's logits are bfloat16 there, ours are not


def test_open_clip_train_over_ranks_has_the_same_losses(tmp_path):
    flags = [["--local-loss"] * local + ["--gather-with-grad"] * gather for local in (0, 1) for gather in (0, 1)]
    for ours, theirs in trained(tmp_path, [[TINY, *flag] for flag in flags], world=2):
        assert_alike(ours, theirs, LOGGED)


def test_the_command_leaves_open_clip_as_it_was(monkeypatch):
    module = types.ModuleType("open_clip_train.main")
    seen = []
    module.main = lambda arguments: seen.append((arguments, open_clip.factory.ClipLoss))
    monkeypatch.setitem(sys.modules, "open_clip_train", types.ModuleType("open_clip_train"))
    monkeypatch.setitem(sys.modules, "open_clip_train.main", module)
    command.main(["--model=x"])
    assert seen == [(["--model=x"], gcl_kernels.ClipLoss)]
    assert {name: getattr(open_clip.factory, name) for name in OURS} == THEIRS
