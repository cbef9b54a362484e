"""The selective scan on a CPU, forward and backward, as vector code that numba compiles once and keeps on disk.

The equations and the meaning of the arguments stand in helix.models.scan. What differs is the order of the work: a task is
one batch entry and VECTORS x LANES channels; the states of its channels run along the tokens and are kept at every chunk's
start only. The backward takes the chunks from the last to the first, recomputes the states of one and runs the adjoint
recurrence over it.

Tasks are fixed by the shapes, and sums over tasks are taken in their order: no number depends on how many threads there are.
The threads are torch.get_num_threads() plain ones that call compiled code without the GIL. Numba's own threading layers
would not do: 'omp' aborts a process that was forked after its first use, and 'workqueue' must not be entered twice.

Legend: B batch, L tokens, E channels, N state.
"""

import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.core import event
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model
from torch import Tensor
