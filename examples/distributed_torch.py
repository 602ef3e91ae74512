"""Watch curvature while two processes train one model with DistributedDataParallel.

What you learn: how each process hands over its own part of the probe data, and that all
get the figures of the whole. Needs no accelerator: the processes talk through Gloo.

Usage (Keras must run on PyTorch):

    KERAS_BACKEND=torch python examples/distributed_torch.py
"""

import argparse
import os
import tempfile

import keras
import numpy as np
import torch
from sklearn.datasets import load_digits

import keras_curvature as kc

PROCESSES = 2
PROBE = 128


def load_data():
    """Digits from 0 to 1, in random order."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return (x[order] / 16).astype("float32"), y[order]


def make_model():
    """A small classifier, with the same weights in each process."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def loss_fn(model, x, y):
    """What is minimised: the mean over the samples of a batch."""
    return torch.nn.functional.cross_entropy(model(x), y.long())


def train(rank, meeting_point, steps):
    """Trains in one of the processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=PROCESSES,
    )
    x, y = load_data()
    model = make_model()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    # Every second row, so that both have the same number of them.
    mine = slice(rank, PROBE, PROCESSES)
    monitor = kc.CurvatureMonitor(
        (x[mine], y[mine]), loss_fn=loss_fn, across_processes=True
    )
    monitor.set_model(model)
    for step in range(steps + 1):
        if step % 20 == 0:
            record = monitor.probe(step)
            if rank == 0:
                print(
                    f"step {step:3}: loss {record['loss']:.4f}, "
                    f"trace {record['hessian_trace']:.3f}",
                    flush=True,
                )
        rows = np.random.default_rng([step, rank]).integers(PROBE, len(x), 32)
        optimizer.zero_grad()
        outputs = parallel(torch.as_tensor(x[rows]))
        torch.nn.functional.cross_entropy(outputs, torch.as_tensor(y[rows])).backward()
        if step < steps:
            optimizer.step()
    traces = [None] * PROCESSES
    torch.distributed.all_gather_object(traces, record["hessian_trace"])
    if rank == 0:
        whole = kc.HessianOperator(model, x[:PROBE], y[:PROBE], loss_fn=loss_fn)
        trace = kc.hessian_trace(whole, method="exact", verbose=False).value
        each = " and ".join(f"{trace:.4f}" for trace in traces)
        print(f"At the end the processes say {each}; one process alone {trace:.4f}.")
    # Nobody leaves while another is still at work.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main():
    """Starts the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    if keras.backend.backend() != "torch":
        raise SystemExit("Set KERAS_BACKEND=torch: this example is about PyTorch.")
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(
            train,
            (os.path.join(directory, "meeting_point"), arguments.steps),
            PROCESSES,
        )


if __name__ == "__main__":
    main()
