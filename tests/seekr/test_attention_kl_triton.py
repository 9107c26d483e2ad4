"""The Triton kernels: interpreted on CPU, compiled for CUDA without a device, and what is refused."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seekr import attention_kl_triton
from seekr.attention_kl import Geometry, TeacherPair, attention_kl
from seekr.attention_kl_triton import can_use_triton
from seekr.attention_kl_windows import launch_parameters
from seekr.errors import ConfigError
from tests.seekr.attention_kl_interpreted import case, draw, result, teachers

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
INTERPRETED = Path(__file__).with_name("attention_kl_interpreted.py")
SHARED_MEMORY = 99 * 1024  # of the smallest device since compute capability 8.0


@needs_triton
def test_interpreted_kernels_equal_the_reference() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def compiled(name: str, pair: bool, dim: int, dtype: torch.dtype, capability: int) -> Any:
    """Compile a kernel as a launch would, for contiguous tensors of usual alignment."""
    import triton.language as tl
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from seekr import attention_kl_kernels

    kernel, launch = getattr(attention_kl_kernels, name), launch_parameters(dim, dtype)
    constants: dict[str, Any] = {
        "PAIR": pair,
        "D": dim,
        "BLOCK_D": dim,
        "DOT": getattr(tl, str(dtype).removeprefix("torch.")),
        "ACC": tl.float32,
        "BLOCK_Q": launch.block_q,
        "BLOCK_K": launch.block_k,
    }
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    tables, sums = ("rows", "slots", "groups", "reach"), ("dense", "stats", "out")
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for index, argument in enumerate(kernel.arg_names):
        if argument.endswith("_d"):
            constants[argument] = 1
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("scaling", "their_scaling"):
            signature[argument] = "fp32"
        else:
            kind = element if argument.removeprefix("their_") in ("query", "key") else "i32"
            kind = "*i32" if argument in tables else "*fp32" if argument in sums else kind
            signature[argument] = kind
            if kind != "i32" or argument.endswith(("_b", "_h", "_t", "_tokens")):
                aligned[(index,)] = [["tt.divisibility", 16]]
    return triton_compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


@needs_triton
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("dtype", "dim", "capability"),
    [
        (torch.bfloat16, 128, 80),
        (torch.bfloat16, 64, 90),
        (torch.bfloat16, 128, 90),
        (torch.float32, 64, 80),
        (torch.float32, 128, 90),
    ],
)
def test_kernels_compile_for_ampere_and_hopper_with_the_shared_memory_of_any_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype, dim: int, capability: int
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("forward", "query_gradient", "key_gradient"):
        for pair in (False, True):
            kernel = compiled(name, pair, dim, dtype, capability)
            assert kernel.metadata.shared <= SHARED_MEMORY, (name, pair, kernel.metadata.shared)
            assert len(kernel.asm["cubin"]) > 0


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["pair", "exact", "tails"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)]
)
def test_on_a_device_value_and_gradients_are_near_the_reference_in_float64(
    dtype: torch.dtype, tolerance: float, name: str
) -> None:
    rows = list(range(0, 700, 3))
    positions = [rows, [*rows[:150], *[-1] * (len(rows) - 150)]]
    query, key, geometry, pair = case(tokens=700, dim=128, positions=positions, dtype=dtype)
    stored_pair = TeacherPair(
        query_BSQD=pair.query_BSQD.double(),
        key_BSTD=pair.key_BSTD.double(),
        scaling=pair.scaling,
        valid_BSQ=pair.valid_BSQ,
    )
    expected_teacher = teachers(stored_pair, geometry)[name]
    expected = result("reference", query.double(), key.double(), expected_teacher, geometry)
    on_device = TeacherPair(
        query_BSQD=pair.query_BSQD.cuda(),
        key_BSTD=pair.key_BSTD.cuda(),
        scaling=pair.scaling,
        valid_BSQ=pair.valid_BSQ.cuda(),
    )
    teacher = on_device if name == "pair" else expected_teacher.to("cuda")  # type: ignore[union-attr]
    found = result("triton", query.cuda(), key.cuda(), teacher, geometry)
    again = result("triton", query.cuda(), key.cuda(), teacher, geometry)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    torch.testing.assert_close(found[0].cpu().double(), expected[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(found[1:], expected[1:], strict=True):
        bound = tolerance * float(other.abs().max())
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=bound)


def test_what_cannot_be_given_is_refused_with_what_was_found_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, geometry, pair = case()
    monkeypatch.setattr(attention_kl_triton, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not can_use_triton(query, geometry)
    with pytest.raises(ConfigError, match=r"found device cpu, allowed is CUDA.*use 'auto'"):
        attention_kl(query, key, pair, geometry, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert can_use_triton(query, geometry)
    wide = draw((2, 4, 70, 257), 0)
    assert not can_use_triton(wide, geometry)
    with pytest.raises(ConfigError, match="head dim 257, allowed is up to 256"):
        attention_kl(wide, wide, pair, geometry, "triton")
    with pytest.raises(ConfigError, match="teacher head dim 24, allowed is the student's 30"):
        attention_kl(wide[..., :30], wide[..., :30], pair, geometry, "triton")
    with pytest.raises(ConfigError, match=r"dtype torch\.int32, allowed are torch\.float16"):
        attention_kl(query.int(), key.int(), pair, geometry, "triton")
    bounded = Geometry(
        heads=geometry.heads,
        positions_BQ=geometry.positions_BQ,
        spans=geometry.spans,
        scaling=1.0,
        epsilon=1e-8,
    )
    with pytest.raises(ConfigError, match="epsilon 1e-08, allowed is 0"):
        attention_kl(query, key, pair, bounded, "triton")
    monkeypatch.setattr(attention_kl_triton, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no package triton, allowed is 3\.5 or newer: install"):
        attention_kl(query, key, pair, geometry, "triton")


def test_the_module_is_imported_where_triton_is_absent() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from seekr import attention_kl_triton as module;"
        "import torch; sys.exit(module.can_use_triton(torch.zeros(1, 1, 1, 16), None))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
