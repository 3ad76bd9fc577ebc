"""Building of the compiled kernels: kept for later, whole or not at all, and done without where it fails."""

import os
import subprocess
import sys

import pytest
import torch
from problems import compiled_kernels

from blpo_rllib import BLPOConfig
from blpo_rllib.core import native

BUILD = "from blpo_rllib.core import native; assert native.load() is not None"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "blpo_rllib"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"], ids=["missing", "failing"])
def test_without_a_working_compiler_there_is_one_warning(compiler, cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", compiler)
    assert native.load.__wrapped__() is None
    assert caplog.text.count("BLPO's CPU kernels could not be built") == 1
    assert "native_kernels=False" in caplog.text
    assert not list(cache.glob("*.so"))


def test_processes_that_build_at_once_all_get_a_whole_library(cache):
    compiled_kernels()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache.parent)}
    builds = [subprocess.Popen([sys.executable, "-c", BUILD], env=environment) for _ in range(2)]
    assert [build.wait(timeout=300) for build in builds] == [0, 0]
    (library,) = cache.glob("*.so")
    built = library.stat().st_mtime_ns
    native.Kernels(lambda dtype: library)
    assert subprocess.run([sys.executable, "-c", BUILD], env=environment, check=False).returncode == 0
    assert library.stat().st_mtime_ns == built, "a library that exists is not built again"


def test_what_begins_in_the_background_is_built_once(cache, caplog):
    compiled_kernels()
    native.begin()
    kernels = native.load.__wrapped__()
    assert kernels is not None
    assert caplog.text.count("compiling BLPO's CPU kernels") <= 1
    assert len(list(cache.glob("*.so"))) == 1, "float64 is built where it is needed"
    assert kernels.address("adam", torch.float64)
    assert len(list(cache.glob("*.so"))) == 2


def test_a_broken_library_is_not_fatal(cache, caplog):
    compiled_kernels()
    library = native._built(torch.float32)
    library.write_bytes(b"not a library")
    assert native.load.__wrapped__() is None
    assert "could not be built" in caplog.text


@pytest.mark.parametrize("wanted", [True, False])
def test_the_config_decides(wanted):
    compiled_kernels()
    algo = BLPOConfig().environment("CartPole-v1").training(native_kernels=wanted).build_algo()
    update = algo.learner_group._learner._bilevel_updates["default_policy"]
    assert (update._adams[0]._kernels is not None) == wanted
    algo.stop()
    with pytest.raises(ValueError, match="native_kernels='yes' must be True or False"):
        BLPOConfig().environment("CartPole-v1").training(native_kernels="yes").validate()
