"""The benchmark's measurement of memory, in fresh processes."""

from bench import cases, measure, memory
from gcl_kernels.chips import this_cpu


def test_memory_that_cannot_be_read_is_no_crash(monkeypatch, capsys):
    def killed(*arguments):
        raise RuntimeError("bench --memory-of: exit -9")

    monkeypatch.setattr(measure, "in_fresh_process", killed)
    assert measure.cpu_extra_mib(cases.Case("cpu", "fp32", 16, 16, 8), "ours") is None
    assert "exit -9" in capsys.readouterr().err


def test_memory_in_a_fresh_process_sees_the_kept_exponentials():
    case = cases.Case("cpu", "fp32", 2048, 2048, 64, logit_scale=14.0)
    assert 16 < measure.cpu_extra_mib(case, "ours") < 40  # 16 MiB of exponentials and two tiles


def test_memory_of_a_step_is_within_the_plan(monkeypatch):
    """In a shape whose sides are four tiles each: a copy of one that is held too long shows.

    The plan is that of the passes, which hold one such copy more than the one step of a small batch does.
    """
    monkeypatch.delenv("GCL_KERNELS_WORKSPACE_MIB", raising=False)
    case = memory.Case("ours", 1024, 4096)
    assert 8 < memory.measured(case) < 1.15 * memory.predicted(case, this_cpu())
