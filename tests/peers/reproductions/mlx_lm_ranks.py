"""mlx-lm 0.32.2 takes the mean of the ranks' means, whatever their numbers of targets.

One update by SGD on two ranks of this machine, with 2 and 20 targets. The model is a table of logits. Prints:

expected: 0% from the mean over all 22 targets
got: 34% from the mean over all 22 targets
"""

import json
import os
import socket
import subprocess
import sys
from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import SGD
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, train

if "MLX_RANK" not in os.environ:  # start both ranks, as `mlx.launch -n 2 --backend ring` does
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    hosts = mkdtemp() + "/hosts.json"
    with open(hosts, "w") as file:
        json.dump([[f"127.0.0.1:{one.getsockname()[1]}"] for one in free], file)
    for one in free:
        one.close()
    ranks = [{**os.environ, "MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)} for rank in range(2)]
    sys.exit(max([p.wait() for p in [subprocess.Popen([sys.executable, __file__], env=e) for e in ranks]]))

rank = mx.distributed.init(strict=True).rank()
batches = [(mx.array([[1] * n + [2]]), mx.array([[0, n + 1]])) for n in (2, 20)]
model = nn.Embedding(4, 4)
model.weight = start = mx.zeros((4, 4))
gradients = [nn.value_and_grad(model, default_loss)(model, *batch)[1]["weight"] for batch in batches]
wanted = (2 * gradients[0] + 20 * gradients[1]) / 22
settings = TrainingArgs(iters=1, adapter_file=mkdtemp() + "/a.safetensors")
train(model, SGD(1.0), [], args=settings, iterate_batches=lambda **_: [batches[rank]])
error = mx.linalg.norm(start - model.weight - wanted) / mx.linalg.norm(wanted)
if rank == 0:
    print("expected: 0% from the mean over all 22 targets")
    print(f"got: {error.item():.0%} from the mean over all 22 targets")
