import os

# Two threads for everyone: torch, the environments' BLAS and Ray's workers share two cores on CI.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("WANDB_MODE", "offline")
# Never join a cluster that happens to run on this machine.
os.environ.setdefault("RAY_ADDRESS", "local")
# Ray's workers unpickle what these modules define.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))

import pytest
import ray
import torch


@pytest.fixture(scope="module", autouse=True)
def _no_ray_left_over():
    """Building an algorithm starts Ray; the next module decides anew how."""
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
