"""The configuration table: every chip and every D finds one, a chip it does not know is told so once."""

import warnings

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gcl_kernels.backends.triton import config

PAD = 256  # operands.PAD: vectors are padded to it


@pytest.mark.parametrize("family", config.FAMILIES.values(), ids=config.FAMILIES)
@pytest.mark.parametrize("d", [1, 64, 256, 257, 768, 100_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3", "bf16x3"])
def test_every_case_has_a_configuration(family, d, dtype, precision):
    chosen = family.config(dtype, d, precision)
    for tile in (chosen.forward, chosen.backward, chosen.masked_forward, chosen.masked_backward):
        for side in (tile.rows, tile.cols):
            assert PAD % side == 0
        assert tile.warps in (4, 8)


@pytest.mark.parametrize(
    ("architecture", "family"),
    [((8, 0), "sm_80"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ("gfx942", "gfx942")],
)
def test_known_chips_find_their_family(architecture, family):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.family_of(architecture) == family


@pytest.mark.parametrize(
    ("architecture", "family"), [((7, 5), "sm_86"), ((11, 0), "sm_100"), ((12, 0), "sm_86"), ("gfx90a", "gfx942")]
)
def test_an_unknown_chip_takes_the_nearest_and_warns_once(architecture, family):
    config.family_of.cache_clear()
    with pytest.warns(UserWarning, match=f"no launch configuration for .* takes that of {family}"):
        assert config.family_of(architecture) == family
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.family_of(architecture) == family


def test_without_the_interpreter_cpu_tensors_are_refused():
    from gcl_kernels import pairwise_logsumexp

    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="got 'triton': it takes CUDA and HIP tensors, not one on cpu"):
        pairwise_logsumexp(x, x, 1.0, backend="triton")
