"""One decode step recorded as CUDA graphs, so that a step is one launch instead of hundreds.

Launched from Python, a step of a 28-layer model is some 600 small kernels, and the GPU waits for every launch.
A graph launches all of them at once, but it replays the very same kernels on the very same addresses. So everything
that changes from step to step is a tensor (the step number too), everything that changes from call to call is copied
into such tensors, and there is one graph for each of a few batch sizes. A batch that has shrunk in between is filled up
with rows that are finished: they write past their end, where nothing is read.

New weights need no new graph, as long as they are copied in place (llms.sync_actor).
"""

import functools
from collections.abc import Callable

import torch


class StepGraphs:
    """The recorded step, for batches of up to max_rows rows."""

    def __init__(self, step: Callable[[torch.Tensor, torch.Tensor], None], max_rows: int, device: torch.device):
        """step(rows, t): feeds rows (n,) long at step t, a (1,) long tensor. It may only read and write tensors that
        stay where they are, and must not wait for the GPU. Recording runs it on rows 0, 1, ... at t = 1, so what it
        writes has to be reset afterwards."""
        self.max_rows = max_rows
        # One dimension, not none: indexing with a 0-dim tensor asks the GPU for its value, which a capture forbids.
        self.t = torch.ones(1, dtype=torch.long, device=device)
        self.rows: dict[int, torch.Tensor] = {}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        for size in [max_rows, *reversed(batch_sizes(max_rows))]:  # the largest first: the others fit into its memory
            self.rows[size] = torch.arange(size, device=device)
            self.graphs[size] = self._record(step, size)

    def _record(self, step, size: int) -> torch.cuda.CUDAGraph:
        def run():
            step(self.rows[size], self.t)
            self.t += 1

        # torch asks for runs on a side stream before: what a first call allocates or chooses must not be recorded.
        stream = side_stream(self.t.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.t.fill_(1)
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self.t.fill_(1)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph

    def replay(self, rows: torch.Tensor, t: int, rows_changed: bool) -> None:
        """Runs the step on rows (n,) at step t. rows_changed: whether they are others than at the last call."""
        if t == 1:
            self.t.fill_(1)  # from here on, every replay adds 1
        size = min(size for size in self.graphs if size >= len(rows))
        if rows_changed:
            others = torch.ones(self.max_rows, dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)
            fillers = others.nonzero().squeeze(-1)[: size - len(rows)]
            self.rows[size].copy_(torch.cat([rows, fillers]))
        self.graphs[size].replay()


@functools.cache
def side_stream(device: torch.device):
    """One for all recordings of the process: cuBLAS keeps a workspace for every stream it has ever worked on."""
    return torch.cuda.Stream(device)


def batch_sizes(max_rows: int) -> list[int]:
    """8, 12, 16, 24, 32, 48, ... below max_rows: at most a third of a batch is filled up."""
    powers = [2**i for i in range(3, 20)]
    return [size for power in powers for size in (power, power * 3 // 2) if size < max_rows]
