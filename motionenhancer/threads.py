"""Threads that work in the order of submission, and for which no process waits at its end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Threads:
    """A few daemon threads.

    Before Python exits, it waits for all threads of a `ThreadPoolExecutor`, even for a thread that never
    ends. It does not wait for these threads.

    Args:
        count: number of threads.
        name: beginning of their names.
    """

    def __init__(self, count: int, name: str) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=f"{name}_{i}", daemon=True) for i in range(count)]
        self._started = False

    def submit(self, do: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call `do` in a thread. If the future has a result before the call ends, it keeps this result."""
        answer: Future[Any] = Future()
        self._calls.put((answer, do, args))
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        return answer

    def close(self, *, wait: bool) -> None:
        """Cancel calls that have not begun, end the threads, and wait for them if `wait`."""
        with suppress(Empty):
            while True:
                call = self._calls.get_nowait()
                if call is not None:
                    call[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        if wait:
            self.join()

    def join(self) -> None:
        """Wait for the end of the threads."""
        if self._started:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            answer, do, args = call
            with suppress(InvalidStateError):
                if not answer.done() and answer.set_running_or_notify_cancel():
                    try:
                        answer.set_result(do(*args))
                    except InvalidStateError:
                        pass
                    except BaseException as error:
                        answer.set_exception(error)
            # What the call held is freed before the next one arrives.
            del call, answer, do, args
