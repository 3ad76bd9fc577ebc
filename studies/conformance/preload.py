"""What the processes of scripts would all import: they are forked from one that has."""

import torch  # noqa: F401
