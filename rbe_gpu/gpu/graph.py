"""Work of a GPU captured once, as a CUDA graph, and launched again as a whole: one call in the place of many."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Graph:
    """The launches of `work()`, to be launched again on the same memory by calling this.

    `work` runs twice before it is captured: kernels are compiled, workspaces get their sizes and caches their
    panels. After that it must neither allocate memory of the GPU nor wait for it: the ops do neither when they are
    given `out=` and a workspace of which nothing else takes memory. A graph holds no array that it works on: whoever
    makes it keeps them, and the workspace.

    Parameters
    ----------
    work : takes nothing; what it returns is dropped
    device : number of the GPU on which all of its arrays are

    Raises
    ------
    CuPy's `CUDARuntimeError`, where `work` does what a graph cannot hold.
    """

    def __init__(self, work: Callable[[], Any], device: int = 0) -> None:
        import cupy

        self.device = device
        with cupy.cuda.Device(device):
            caller = cupy.cuda.get_current_stream()
            stream = cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
            stream.wait_event(caller.record())
            with stream:
                work()
                work()
                stream.begin_capture()
                try:
                    work()
                except BaseException:
                    with suppress(Exception):  # the capture is broken, which is no news
                        stream.end_capture()
                    raise
                self._graph = stream.end_capture()
            caller.wait_event(stream.record())

    def __call__(self) -> None:
        """Launch on the current stream."""
        import cupy

        with cupy.cuda.Device(self.device):
            self._graph.launch(cupy.cuda.get_current_stream())
