"""The package of Triton kernels: its imports, and the check that compiles without a GPU."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_compile_check_compiles_without_a_gpu():
    command = [sys.executable, "-m", "transfuse.triton_kernels.compile_check", "--jobs", "1"]
    child = subprocess.run(
        [*command, "--only", "forward bf16 D=64 sm_90"], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert "1 kernels, 0 failed" in child.stdout
    child = subprocess.run([*command, "--only", "sideways"], capture_output=True, text=True)
    assert child.returncode == 2


def test_compile_check_fails_on_spills_and_on_too_much_shared_memory():
    from transfuse.triton_kernels import compile_check

    assert compile_check.verdict(80, 163 * 1024, 0, hot=True) == ""
    assert compile_check.verdict(80, 1024, 8, hot=False) == ""
    assert "spills 8" in compile_check.verdict(80, 1024, 8, hot=True)
    assert "shared memory" in compile_check.verdict(80, 163 * 1024 + 1, 0, hot=False)
    assert compile_check.verdict(90, 163 * 1024 + 1, 0, hot=False) == ""
    # A launch that cannot be compiled is reported, not raised: 3 is no power of two.
    case = compile_check.cases()[0]
    launch = case.plan()[0]
    broken = launch._replace(arguments={**launch.arguments, "BLOCK_M": 3})
    error = compile_check.check_launch(case._replace(plan=lambda: [broken]), 0, 90).error
    assert error


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, transfuse.triton_kernels; "
        "sys.exit(any(name.split('.')[0] == 'triton' for name in sys.modules))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_missing_triton_names_the_extra():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "try:\n    from transfuse.triton_kernels import attention\n"
        "except ImportError as error:\n    sys.exit('transfuse[triton]' not in str(error))\n"
        "sys.exit(2)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
