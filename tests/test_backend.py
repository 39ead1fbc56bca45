"""Who runs an op: what is asked for, what is possible, and what is said when they differ."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastem import ops
from fastem.ops import Backend, backend, current_backend, native, use_backend

K = torch.ones(1, 1, 3, 3) / 9


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FASTEM_BACKEND", raising=False)


@pytest.fixture
def not_built(monkeypatch):
    """A machine without the extension."""
    monkeypatch.setattr(native, "_problem", "it is not built")
    backend._warn_once.cache_clear()


def test_the_innermost_block_decides(monkeypatch):
    assert current_backend() is Backend.AUTO
    monkeypatch.setenv("FASTEM_BACKEND", "reference")
    assert current_backend() is Backend.REFERENCE
    with use_backend("triton"), use_backend(Backend.NATIVE):
        assert current_backend() is Backend.NATIVE
    assert current_backend() is Backend.REFERENCE


def test_unknown_backend_is_refused(monkeypatch):
    said = "must be one of auto, reference, native, triton, got 'cuda'"
    with pytest.raises(ValueError, match=said), use_backend("cuda"):
        pass
    monkeypatch.setenv("FASTEM_BACKEND", "fast")
    with pytest.raises(ValueError, match="got 'fast'"):
        ops.recentre(K)


def test_auto_is_native_where_it_is_built(native_backend):
    with use_backend(Backend.AUTO):
        assert backend.select("recentre", [K]) is Backend.NATIVE
        assert backend.select("recentre", [K.double()]) is Backend.REFERENCE
        assert backend.select("recentre", [K.half()]) is Backend.REFERENCE


def test_double_precision_is_the_specification(backend):
    assert ops.recentre(K.double()).dtype == torch.float64
    k = K.double().requires_grad_()
    (grad,) = torch.autograd.grad(ops.project_kernel(k)[0, 0, 0, 0], k)
    assert grad.isfinite().all()


def test_auto_without_the_extension_says_so_once(not_built):
    with pytest.warns(RuntimeWarning, match="plain torch.*pip install") as said:
        assert torch.equal(ops.project_kernel(2 * K), K)
        ops.project_kernel(K)
    assert len(said) == 1


def test_forced_native_without_the_extension_raises(not_built):
    said = "cannot run on the native backend.*Build it with pip"
    with use_backend(Backend.NATIVE), pytest.raises(RuntimeError, match=said):
        ops.recentre(K)


def test_forced_native_refuses_half_precision(native_backend):
    with pytest.raises(RuntimeError, match="takes float32, got torch.float16"):
        ops.recentre(K.half())


def test_forced_triton_names_the_ops_it_has():
    pytest.importorskip("triton")
    with use_backend(Backend.TRITON), pytest.raises(RuntimeError, match="no Triton twin; those of .*wiener_guidance"):
        ops.recentre(K)


def test_forced_triton_without_triton_raises(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with use_backend(Backend.TRITON), pytest.raises(RuntimeError, match="pip install triton"):
        ops.predict_x0(K, K, 0.5)


def test_inputs_that_require_grad_are_refused(native_backend):
    k = K.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="project_kernel has no backward on the native backend.*no_grad"):
        ops.project_kernel(k)
    with torch.no_grad():
        assert ops.project_kernel(k).isfinite().all()
    with use_backend(Backend.REFERENCE):
        assert ops.project_kernel(k).requires_grad


def test_weights_that_require_grad_are_refused_too(native_backend):
    weight = torch.ones(1, 2, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="denoise_chain has no backward"):
        ops.denoise_chain(K, torch.ones(1), [weight], [None], 1.0)


def test_build_info_is_said_in_words():
    assert ("kernels" in native.build_info()) == native.available()


def test_instruction_sets_agree(native_backend, tmp_path):
    """The plain build of the kernels and the one this machine uses give the same result up to rounding."""
    k, g = torch.rand(1, 1, 9, 9), torch.rand(1, 1, 17, 17)
    arguments = (k, g, k, torch.ones(1), [torch.rand(8, 2, 3, 3), torch.rand(1, 8, 3, 3)], [None, None], 1.0, 3)
    torch.save(arguments, tmp_path / "arguments.pt")
    code = (
        "import sys, torch; from fastem import ops; from fastem.ops import native\n"
        "torch.save(ops.hqs_chain(*torch.load(sys.argv[1])), sys.argv[2]); print(native.build_info())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "arguments.pt", tmp_path / "result.pt"],
        env=os.environ | {"FASTEM_ISA": "generic", "FASTEM_BACKEND": "native"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("cpu kernels: generic")
    torch.testing.assert_close(torch.load(tmp_path / "result.pt"), ops.hqs_chain(*arguments), rtol=1e-5, atol=1e-8)
