"""The threads of a loader, each with one torch thread where it decodes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

# Fetching waits for the network or the disk, so two at a time are enough and keep a node's ranks
# from fetching what they will not need for long.
_FETCHES = 2
_START_SECONDS = 60


class Pools:
    """The threads of a loader: for fetching shards and for decoding.

    Args:
        threads: how many decode; each uses one torch thread.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.fetch = ThreadPoolExecutor(_FETCHES, "sr4ir-fetch")
        # torch.set_num_threads acts on the calling thread and on threads that start later, so
        # after the decoders have set theirs, the caller sets its own number again.
        before = torch.get_num_threads()
        started = threading.Barrier(threads + 1)

        def single() -> None:
            # Reading the number first: a thread's first use of torch would overwrite ours.
            torch.get_num_threads()
            torch.set_num_threads(1)
            started.wait(_START_SECONDS)

        self.decode = ThreadPoolExecutor(threads, "sr4ir-decode", initializer=single)
        for _ in range(threads):
            self.decode.submit(int)
        started.wait(_START_SECONDS)
        torch.set_num_threads(before)

    def close(self) -> None:
        """Cancels what waits, and returns when what runs has ended."""
        for pool in (self.fetch, self.decode):
            pool.shutdown(cancel_futures=True)
