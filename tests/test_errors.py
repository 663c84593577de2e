# ruff: noqa: E501
"""Every message names the argument, what was expected and what came."""

import math

import pytest
import torch

from gcl_kernels import ClipLoss, GCLLoss, aggregate_fields, gcl_loss, pairwise_logsumexp

N, M, D = 4, 6, 3
x, y = torch.zeros(N, D), torch.zeros(M, D)
ids_n, ids_m = torch.zeros(N, dtype=torch.int64), torch.zeros(M, dtype=torch.int64)
NO_LABELS = torch.zeros(N, 0, dtype=torch.int64)
meta = torch.zeros(M, D, device="meta")


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, r"lhs: expected a torch.Tensor, got list", ([[1.0]], y, 1.0), {}),
        (TypeError, r"lhs: expected dtype float64, .*, got int64", (x.long(), y, 1.0), {}),
        (ValueError, r"lhs: expected a 2-d tensor, got shape \(4,\)", (x[:, 0], y, 1.0), {}),
        (ValueError, r"rhs: expected a 2-d tensor, got shape \(1, 6, 3\)", (x, y[None], 1.0), {}),
        (ValueError, r"lhs: expected at least one row and one column, got shape \(0, 3\)", (x[:0], y, 1.0), {}),
        (ValueError, r"rhs: expected at least one row and one column, got shape \(0, 3\)", (x, y[:0], 1.0), {}),
        (ValueError, r"rhs: expected \(M, 3\) to match lhs \(4, 3\), got \(6, 2\)", (x, y[:, :2], 1.0), {}),
        (TypeError, r"rhs: expected the dtype of lhs, torch.float32, got torch.bfloat16", (x, y.bfloat16(), 1.0), {}),
        (ValueError, r"rhs: expected the device of lhs, cpu, got meta", (x, meta, 1.0), {}),
        (ValueError, r"logit_scale: expected one element, got shape \(2,\)", (x, y, torch.ones(2)), {}),
        (TypeError, r"logit_scale: expected a float or a floating-point tensor, got torch.int64", (x, y, torch.tensor(1)), {}),
        (TypeError, r"logit_scale: expected a float or a tensor of one element, got str", (x, y, "1"), {}),
        (ValueError, r"logit_scale: expected a finite number, got nan", (x, y, math.nan), {}),
        (ValueError, r"logit_scale: expected the device of lhs, cpu, got meta", (x, y, meta[0, 0]), {}),
        (ValueError, r"labels: expected labels for M < N .*, got None with N = 6, M = 4", (y, x, 1.0), {}),
        (TypeError, r"labels: expected a torch.Tensor, got list", (x, y, 1.0), {"labels": [0, 1, 2, 3]}),
        (TypeError, r"labels: expected dtype int64, .*, got float32", (x, y, 1.0), {"labels": torch.zeros(N)}),
        (ValueError, r"labels: expected \(4,\) or \(4, P\), got \(6,\)", (x, y, 1.0), {"labels": ids_m}),
        (ValueError, r"labels: expected \(4,\) or \(4, P\), got \(4, 0\)", (x, y, 1.0), {"labels": NO_LABELS}),
        (ValueError, r"labels: expected columns 0..5, or -1 for none, got values from 0 to 6", (x, y, 1.0), {"labels": torch.tensor([0, 6, 1, 2])}),
        (ValueError, r"labels: expected columns 0..5, or -1 for none, got values from -2 to 1", (x, y, 1.0), {"labels": torch.tensor([0, -2, 1, 1])}),
        (ValueError, r"rhs_ids: expected ids together with lhs_ids, got None", (x, y, 1.0), {"lhs_ids": ids_n}),
        (ValueError, r"lhs_ids: expected ids together with rhs_ids, got None", (x, y, 1.0), {"rhs_ids": ids_m}),
        (ValueError, r"lhs_ids: expected \(4,\) or \(4, K\), got \(6,\)", (x, y, 1.0), {"lhs_ids": ids_m, "rhs_ids": ids_m}),
        (TypeError, r"rhs_ids: expected dtype int64, got int32", (x, y, 1.0), {"lhs_ids": ids_n, "rhs_ids": ids_m.int()}),
        (ValueError, r"rhs_ids: expected 1 channels as in lhs_ids, got 2", (x, y, 1.0), {"lhs_ids": ids_n, "rhs_ids": ids_m.reshape(6, 1).expand(6, 2)}),
        (ValueError, r"backend: expected None or one of 'torch', 'triton', got 'cuda'", (x, y, 1.0), {"backend": "cuda"}),
    ],
)  # fmt: skip
def test_the_primitive_and_the_loss(error, message, arguments, options):
    for function in (pairwise_logsumexp, gcl_loss):
        if function is gcl_loss and isinstance(arguments[0], list):
            message = r"lhs: expected a torch.Tensor or a mapping of fields, got list"
        with pytest.raises(error, match=message):
            function(*arguments, **options)


F2 = {"title": torch.zeros(M, D), "image": torch.zeros(M, D)}
MASK = torch.ones(M, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "rhs", "options"),
    [
        (ValueError, r"weights: expected shape \(4,\), that of labels, got \(6,\)", y, {"weights": torch.ones(M)}),
        (TypeError, r"weights: expected a torch.Tensor, got float", y, {"weights": 1.0}),
        (ValueError, r"weights: expected finite numbers >= 0, got -1.0 \(1 such\)", y, {"weights": torch.tensor([1.0, -1.0, 0.0, 2.0])}),
        (ValueError, r"weights: expected finite numbers >= 0, got nan \(2 such\)", y, {"weights": torch.tensor([1.0, math.nan, 0.0, math.inf])}),
        (ValueError, r"weights: expected the device of lhs, cpu, got meta", y, {"weights": torch.ones(N, device="meta")}),
        (ValueError, r"directions: expected one of 'both', 'lhs_to_rhs', 'rhs_to_lhs', got 'left'", y, {"directions": "left"}),
        (ValueError, r"reduction: expected one of 'mean', .*, got 'avg'", y, {"reduction": "avg"}),
        (ValueError, r"field_mode: expected one of 'aggregate', 'pairwise', got 'all'", y, {"field_mode": "all"}),
        (ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5", y, {"label_smoothing": 1.5}),
        (TypeError, r"label_smoothing: expected a number, got str", y, {"label_smoothing": "0"}),
        (ValueError, r"z_loss: expected a number >= 0, got -1", y, {"z_loss": -1}),
        (ValueError, r"z_loss: expected a number >= 0, got nan", y, {"z_loss": math.nan}),
        (ValueError, r"rhs_field_weights: expected None beside a tensor rhs, got dict", y, {"rhs_field_weights": {"a": 1.0}}),
        (ValueError, r"rhs_field_mask: expected None beside a tensor rhs, got Tensor", y, {"rhs_field_mask": MASK}),
        (ValueError, r"rhs: expected at least one field, got none", {}, {}),
        (ValueError, r"rhs_field_weights: expected the fields \['image', 'title'\], got \['title'\]", F2, {"rhs_field_weights": {"title": 1.0}}),
        (ValueError, r"rhs_field_weights: expected 2 weights, one a field, got 3", F2, {"rhs_field_weights": [1.0, 2.0, 3.0]}),
        (ValueError, r"rhs_field_weights: expected finite weights >= 0, not all 0, got \[0.0, 0.0\]", F2, {"rhs_field_weights": [0.0, 0.0]}),
        (ValueError, r"rhs_field_weights: expected finite weights >= 0, not all 0, got \[-1.0, 2.0\]", F2, {"rhs_field_weights": [-1.0, 2.0]}),
        (TypeError, r"rhs_field_mask: expected dtype bool, got float32", F2, {"rhs_field_mask": torch.ones(M, 2)}),
        (ValueError, r"rhs_field_mask: expected shape \(6, 2\), rows x fields, got \(6, 3\)", F2, {"rhs_field_mask": torch.ones(M, 3, dtype=torch.bool)}),
        (ValueError, r"rhs\[image\]: expected shape \(6, 3\), got \(5, 3\)", {**F2, "image": torch.zeros(5, D)}, {}),
        (TypeError, r"rhs\[image\]: expected dtype torch.float32, got torch.float64", {**F2, "image": torch.zeros(M, D).double()}, {}),
        (ValueError, r"rhs\[image\]: expected the device of rhs\[title\], cpu, got meta", {**F2, "image": meta}, {}),
        (TypeError, r"rhs\[image\]: expected a torch.Tensor, got NoneType", {**F2, "image": None}, {}),
    ],
)  # fmt: skip
def test_the_loss(error, message, rhs, options):
    with pytest.raises(error, match=message):
        gcl_loss(x, rhs, 1.0, **options)


def test_modules_and_fields():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'temperature'"):
        GCLLoss(temperature=0.1)
    with pytest.raises(TypeError, match=r"scores: expected a torch.Tensor, got list"):
        GCLLoss()(x, y, [1.0], 1.0)
    with pytest.raises(ValueError, match=r"weights: expected shape \(4,\), that of labels, got \(6,\)"):
        GCLLoss()(x, y, torch.ones(M), 1.0)
    with pytest.raises(ValueError, match=r"use_horovod: expected False .*, got True"):
        ClipLoss(use_horovod=True)
    with pytest.raises(TypeError, match=r"fields: expected a mapping or sequence of \(N, D\) tensors, got str"):
        aggregate_fields("title")


def test_ids_may_be_anything_else_than_int64_only_by_conversion():
    ids = torch.arange(M, dtype=torch.int32)
    with pytest.raises(TypeError, match="lhs_ids: expected dtype int64, got int32"):
        gcl_loss(y, y, 1.0, lhs_ids=ids, rhs_ids=ids)


def test_weights_beside_no_label_may_hold_the_padding():
    labels, weights = torch.tensor([[0, -1]] * N), torch.tensor([[1.0, -1.0]] * N)
    assert gcl_loss(x, y, 1.0, labels=labels, weights=weights).isfinite()
